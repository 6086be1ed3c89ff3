"""The opcodes of the PTX machine that reach memory, work on whole warps, or direct the threads."""

import numpy as np
import ptx
import pytest
import torch
from one_kernel import DTYPES, check, launch
from ptx import PTXError
from ptx_machine import Machine
from ptx_memory import alike
from test_ptx_ops import F32, RANDOM, S32, U32, bf16

# Memory


def test_vector_loads_and_stores_with_hints():
    data = torch.arange(128, dtype=torch.int32).numpy().view(np.uint32)  # at an address that is a multiple of 64
    out = np.zeros(128, np.uint32)
    body = """
    mad.wide.u32 %d10, %r1, 16, %d1; mad.wide.u32 %d11, %r1, 16, %d2;
    ld.global.L1::evict_last.v4.b32 {%r10, %r11, %r12, %r13}, [%d10]; st.global.wt.v2.b32 [%d11], {%r11, %r10};
    st.global.b32 [%d11+8], %r13; st.b32 [%d11+12], %r12;
    """
    stats = launch(body, {"data": data, "out": out})
    assert np.array_equal(out.reshape(32, 4), data.reshape(32, 4)[:, [1, 0, 3, 2]])
    assert stats.loaded == {"data": 512}
    assert (stats.distinct_loaded["data"], stats.distinct_stored["out"], stats.distinct_stored["data"]) == (512, 512, 0)
    assert stats.stored == {"out": 512}
    assert stats.sectors["data"] == 16


@pytest.mark.parametrize(("kind", "dtype"), [("u8", np.uint8), ("s8", np.int8), ("b16", np.uint16), ("s16", np.int16)])
def test_narrow_loads_are_extended(kind, dtype):
    size = np.dtype(dtype).itemsize
    data, out = RANDOM.integers(0, 256**size, 32).astype(f"u{size}").view(dtype), np.zeros(32, np.int32)
    body = f"""
    mad.wide.u32 %d10, %r1, {size}, %d1; mad.wide.u32 %d11, %r1, 4, %d2;
    ld.global.nc.{kind} %r10, [%d10]; st.global.b32 [%d11], %r10;
    """
    launch(body, {"data": data, "out": out})
    assert np.array_equal(out, data.astype(np.int32))


def test_guarded_accesses_touch_what_is_guarded():
    data, out = np.arange(20, dtype=np.uint32), np.zeros(32, np.uint32)
    body = """
    mad.wide.u32 %d10, %r1, 4, %d1; mad.wide.u32 %d11, %r1, 4, %d2; setp.lt.u32 %p1, %r1, 20;
    mov.b32 %r10, 77; @%p1 ld.global.b32 %r10, [%d10]; st.global.b32 [%d11], %r10;
    """
    stats = launch(body, {"data": data, "out": out})
    assert np.array_equal(out, [*range(20), *[77] * 12])
    assert stats.loaded["data"] == 80


def test_local_memory_and_addresses_of_every_space():
    out = np.zeros(32, np.uint32)
    body = """
    .local .align 8 .b8 depot[16];
    mov.b64 %d10, depot; cvta.local.u64 %d11, %d10; st.local.b32 [%d10+4], %r1; ld.b32 %r10, [%d11+4];
    mov.b32 %r11, smem; mad.lo.s32 %r11, %r1, 4, %r11; st.shared.b32 [%r11], %r10;
    cvt.u64.u32 %d12, %r11; cvta.shared.u64 %d12, %d12; ld.b32 %r12, [%d12]; cvta.to.shared.u64 %d13, %d12;
    cvt.u32.u64 %r13, %d13; sub.s32 %r13, %r13, %r11; add.s32 %r12, %r12, %r13;
    cvta.to.global.u64 %d14, %d1; mad.wide.u32 %d14, %r1, 4, %d14; st.global.b32 [%d14], %r12;
    """
    launch(body, {"out": out}, shared=128)
    assert np.array_equal(out, np.arange(32))


def test_constants_and_programs():
    """A table in the text, and the numbers of programs and threads."""
    out = np.zeros(6 * 64, np.uint32)
    text = """
.version 8.7
.target sm_80
.global .align 4 .b32 table[3] = {5, 4294967295, 7};
.visible .entry k(.param .u64 out, .param .u32 n) {
.reg .b32 %r<9>; .reg .b64 %d<9>;
ld.param.u64 %d1, [out]; ld.param.u32 %r1, [n];
mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ctaid.y; mov.u32 %r4, %nctaid.x; mad.lo.s32 %r2, %r3, %r4, %r2;
mov.u32 %r5, %ntid.x; mov.u32 %r6, %tid.x; mad.lo.s32 %r2, %r2, %r5, %r6;
mul.wide.u32 %d2, %r2, 4; add.s64 %d1, %d1, %d2; ld.global.b32 %r7, [table+8]; add.s32 %r7, %r7, %r1; add.s32 %r7, %r7, %r2;
st.global.b32 [%d1], %r7;
ret;
}"""
    Machine(ptx.parse(text), (3, 2, 1), 64, 0, {"out": torch.from_numpy(out), "n": 100}).run()
    assert np.array_equal(out, np.arange(384) + 107)


@pytest.mark.parametrize(
    ("operation", "kind", "function"),
    [
        ("add", "u32", np.add), ("add", "f32", np.add), ("min", "s32", np.minimum), ("max", "u64", np.maximum),
        ("or", "b32", np.bitwise_or), ("and", "b32", np.bitwise_and), ("xor", "b32", np.bitwise_xor), ("add", "f64", np.add),
    ],
)  # fmt: skip
def test_atomics(operation, kind, function):
    """Eight threads to an element: what they do together, and that each saw what came before."""
    dtype = DTYPES[kind]
    data = RANDOM.integers(1, 100, 32).astype(dtype)
    out, before = np.full(4, 50, dtype), np.zeros(32, dtype)
    size, name = data.itemsize, "%r" if data.itemsize == 4 else "%d"
    body = f"""
    mad.wide.u32 %d30, %r1, {size}, %d1; ld.global.b{8 * size} {name}50, [%d30]; and.b32 %r11, %r1, 3;
    mad.wide.u32 %d31, %r11, {size}, %d2; mad.wide.u32 %d32, %r1, {size}, %d3;
    atom.global.gpu.acq_rel.{operation}.{kind} {name}51, [%d31], {name}50; st.global.b{8 * size} [%d32], {name}51;
    """
    launch(body, {"data": data, "out": out, "before": before})
    want = np.full(4, 50, dtype)
    for i, value in enumerate(data):
        assert before[i] == want[i % 4]
        want[i % 4] = function(want[i % 4], value)
    assert np.array_equal(out, want)


def test_exchanges():
    out, before = np.array([7, 7, 2, 2, 0], np.uint32), np.zeros(64, np.uint32)
    body = """
    mad.wide.u32 %d31, %r1, 4, %d2; setp.lt.u32 %p1, %r1, 2;
    @%p1 atom.global.acq_rel.gpu.cas.b32 %r10, [%d1], 7, 9; @%p1 atom.global.exch.b32 %r11, [%d1+4], 3;
    @%p1 red.global.add.u32 [%d1+8], 1; @%p1 atom.global.inc.u32 %r12, [%d1+12], 2; @%p1 red.global.dec.u32 [%d1+16], 5;
    @%p1 st.global.b32 [%d31], %r10; @%p1 st.global.b32 [%d31+128], %r11;
    """
    launch(body, {"out": out, "before": before})
    assert out.tolist() == [9, 3, 4, 1, 4]
    assert before[[0, 1, 32, 33]].tolist() == [7, 9, 7, 3]


def test_asynchronous_copies_arrive_with_their_group():
    data, out = np.arange(128, dtype=np.uint32) + 1, np.zeros(64, np.uint32)
    body = """
    mad.wide.u32 %d10, %r1, 16, %d1; mad.wide.u32 %d11, %r1, 4, %d2; shl.b32 %r10, %r1, 4; setp.lt.u32 %p1, %r1, 16;
    selp.b32 %r11, 16, 0, %p1;
    cp.async.cg.shared.global [ %r10 + 0 ], [ %d10 + 0 ], 0x10, %r11; cp.async.commit_group;
    cp.async.ca.shared.global [ %r10 + 512 ], [ %d10 + 4 ], 0x4, 4; cp.async.commit_group;
    cp.async.wait_group 1; ld.shared.b32 %r12, [%r10+12]; st.global.b32 [%d11], %r12;
    cp.async.wait_group 0; ld.shared.b32 %r12, [%r10+512]; st.global.b32 [%d11+128], %r12;
    """
    launch(body, {"data": data, "out": out}, shared=1024)
    assert np.array_equal(out[:32], np.where(np.arange(32) < 16, data[3::4], 0))
    assert np.array_equal(out[32:], data[1::4])
    for early in (body.replace("cp.async.wait_group 1;", ""), body.replace("cp.async.wait_group 0;", "")):
        with pytest.raises(PTXError, match="uninitialised"):
            launch(early, {"data": data, "out": out}, shared=1024)


# Warps


def shuffled(mode, by, clamp):
    lane = np.arange(32)
    segment, end = clamp >> 8 & 31, clamp & 31
    last = (lane & segment) | (end & ~segment)
    other = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": (lane & segment) | (by & ~segment)}[mode]
    inside = other >= last if mode == "up" else other <= last
    return np.where(inside, other, lane), inside


@pytest.mark.parametrize(
    ("mode", "by", "clamp"),
    [
        ("bfly", 16, 31),
        ("bfly", 3, 31),
        ("up", 3, 0),
        ("down", 5, 31),
        ("idx", 9, 31),
        ("idx", 2, 0x181F),
        ("down", 2, 0x181F),
    ],
)
def test_shuffles(mode, by, clamp):
    where, inside = shuffled(mode, by, clamp)
    text = f"shfl.sync.{mode}.b32 {{d}}|%p1, {{0}}, {by}, {clamp}, -1; @!%p1 add.s32 {{d}}, {{d}}, 1"
    check(text, [U32], ["b32"], "b32", U32[where] + ~inside)


def test_votes_and_reductions():
    odd = U32 % 2 == 1
    ballot = int(sum(1 << i for i in range(32) if odd[i]))
    test = "and.b32 %r30, {0}, 1; setp.eq.s32 %p1, %r30, 1; "
    check(test + "vote.sync.ballot.b32 {d}, %p1, -1", [U32], ["b32"], "b32", np.full(32, ballot, np.uint32))
    for mode, want in (("any", 1), ("all", 0), ("uni", 0)):
        check(
            f"{test} vote.sync.{mode}.pred %p2, %p1, -1; selp.b32 {{d}}, 1, 0, %p2", [U32], ["b32"], "b32", [want] * 32
        )
    check(test + "mov.b32 {d}, 0; @%p1 activemask.b32 {d}", [U32], ["b32"], "b32", np.where(odd, np.uint32(ballot), 0))
    check("elect.sync {d}|%p1, -1; selp.b32 {d}, 5, {d}, %p1", [U32], ["b32"], "b32", [5] + [0] * 31)
    for name, kind, value in (("add", "s32", S32.sum(dtype=np.int32)), ("min", "s32", S32.min()), ("max", "u32", U32.max()),
                              ("xor", "b32", np.bitwise_xor.reduce(U32)), ("min", "f32", np.float32(-np.inf))):  # fmt: skip
        source = F32 if kind == "f32" else U32.view(DTYPES[kind])
        check(f"redux.sync.{name}.{kind} {{d}}, {{0}}, -1", [source], [kind], kind, np.full(32, value, DTYPES[kind]))
    check("bar.warp.sync -1; mov.b32 {d}, {0}", [U32], ["b32"], "b32", U32)


def test_what_counts_as_one_number():
    """Sums in another order are alike, beside the largest of them; indices and what is stored by mistake are not."""

    def found(a, b, beside=()):
        a, b, beside = (np.array(x, np.float32).view(np.uint32) for x in (a, b, [*a, *b, *beside]))
        return alike(a, b, beside).tolist()

    assert found([1.0, 1e-3, 0.0], [1 + 1e-6, 1e-3 + 1e-7, 1e-7]) == [True, True, True]
    assert found([1.0, 1e-3], [1.001, -1e-3]) == [False, False]
    assert found([1e-3], [1e-3 + 1e-7]) == [False]
    assert found([1e-3], [1e-3 + 1e-7], beside=[1.0]) == [True]
    small = np.array([3, 70000], np.uint32)
    assert alike(small, small + np.uint32(1), np.array([1e9], np.float32).view(np.uint32)).tolist() == [False, False]
    assert alike(bf16([1.0, 1.0]), bf16([1 + 2**-7, 1 + 2**-6]), None).tolist() == [True, False]
    assert alike(np.float64([1.0, 1.0]).view(np.uint64), np.float64([1 + 1e-14, 1 + 1e-9]).view(np.uint64),
                 np.float64([1.0]).view(np.uint64)).tolist() == [True, False]  # fmt: skip


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrix_loads_and_stores(count, trans):
    """ldmatrix against its definition, and stmatrix as its inverse."""
    data, out = RANDOM.integers(0, 2**16, 8 * count * 8, dtype=np.uint16), np.zeros(8 * count * 8, np.uint16)
    held = np.zeros(32 * count, np.uint32)
    names = ", ".join(f"%r{20 + i}" for i in range(count))
    body = f"""
    setp.lt.u32 %p1, %r1, {8 * count}; mad.wide.u32 %d10, %r1, 16, %d1; mad.wide.u32 %d11, %r1, 16, %d2; shl.b32 %r2, %r1, 4;
    @%p1 ld.global.v2.b64 {{%d20, %d21}}, [%d10]; @%p1 st.shared.v2.b64 [%r2], {{%d20, %d21}}; bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%r2]; mad.wide.u32 %d12, %r1, {4 * count}, %d3;
    {"".join(f"st.global.b32 [%d12+{4 * i}], %r{20 + i};" for i in range(count))}
    stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r2+512], {{{names}}}; bar.sync 0;
    @%p1 ld.shared.v2.b64 {{%d20, %d21}}, [%r2+512]; @%p1 st.global.v2.b64 [%d11], {{%d20, %d21}};
    """
    launch(body, {"data": data, "out": out, "held": held}, shared=1024)
    matrices = data.reshape(count, 8, 8)
    matrices = matrices.transpose(0, 2, 1) if trans else matrices
    for i in range(count):
        for lane in range(32):
            pair = matrices[i, lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
            assert held[lane * count + i] == int(pair[0]) | int(pair[1]) << 16
    assert np.array_equal(out, data)


#: Where the PTX manual says that thread `lane` holds register i of a and b: (row, column), written out once more.
def place_a(kind, i, lane):
    group, thread = lane // 4, lane % 4
    if kind in ("f16", "bf16"):
        return group + 8 * (i // 2 % 2), thread * 2 + (i & 1) + 8 * (i // 4)
    return group + 8 * (i % 2), thread + 4 * (i // 2)


def place_b(kind, i, lane):
    group, thread = lane // 4, lane % 4
    return (thread * 2 + (i & 1) + 8 * (i // 2) if kind in ("f16", "bf16") else thread + 4 * i), group


@pytest.mark.parametrize(
    ("shape", "kind"),
    [("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "bf16"), ("m16n8k8", "tf32"), ("m16n8k4", "tf32"),
     ("m8n8k4", "f64"), ("m16n8k4", "f64"), ("m16n8k8", "f64"), ("m16n8k16", "f64")],
)  # fmt: skip
def test_matrix_products(shape, kind):
    m, k = int(shape[1:].split("n")[0]), int(shape.split("k")[1])
    out_type = np.float64 if kind == "f64" else np.float32
    a, b, c = (RANDOM.standard_normal(size).astype(out_type) for size in ((m, k), (k, 8), (m, 8)))

    def stored(x):
        if kind == "tf32":
            return x  # the low bits are there, and the hardware ignores them
        return bf16(x) if kind == "bf16" else x.astype(DTYPES[kind])

    def exact(x):
        if kind == "tf32":
            return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
        x = stored(x)
        return ((x.astype(np.uint32) << np.uint32(16)).view(np.float32) if kind == "bf16" else x).astype(np.float64)

    held_a, held_b = np.empty((32, m * k // 32), stored(a).dtype), np.empty((32, k * 8 // 32), stored(b).dtype)
    held_c, rows = np.empty((32, m // 4), out_type), m // 8
    for lane in range(32):
        for i in range(held_a.shape[1]):
            row, column = place_a(kind, i, lane) if rows == 2 else (lane // 4, lane % 4 + 4 * i)
            held_a[lane, i] = stored(a)[row, column]
        for i in range(held_b.shape[1]):
            held_b[lane, i] = stored(b)[place_b(kind, i, lane)]
        for i in range(held_c.shape[1]):
            held_c[lane, i] = c[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2]
    out = np.zeros_like(held_c)
    word, name = (8, "%d") if kind == "f64" else (4, "%r")
    body, lists = "", []
    for which, (array, start) in enumerate(((held_a, 20), (held_b, 40), (held_c, 50))):
        count = array.nbytes // 32 // word
        body += f"mad.wide.u32 %d10, %r1, {count * word}, %d{1 + which};"
        body += "".join(f"ld.global.b{8 * word} {name}{start + i}, [%d10+{i * word}];" for i in range(count))
        lists.append("{" + ", ".join(f"{name}{start + i}" for i in range(count)) + "}")
    end = "f64.f64.f64.f64" if kind == "f64" else f"f32.{kind}.{kind}.f32"
    body += f"mma.sync.aligned.{shape}.row.col.{end} {lists[2]}, {lists[0]}, {lists[1]}, {lists[2]};"
    body += f"mad.wide.u32 %d10, %r1, {held_c.shape[1] * word}, %d4;"
    body += "".join(f"st.global.b{8 * word} [%d10+{i * word}], {name}{50 + i};" for i in range(held_c.shape[1]))
    launch(body, {"a": held_a.ravel(), "b": held_b.ravel(), "c": held_c.ravel(), "out": out.ravel()})
    want = (exact(a) @ exact(b) + c).astype(out_type)
    for lane in range(32):
        for i in range(out.shape[1]):
            assert np.isclose(
                out[lane, i], want[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2], rtol=1e-6, atol=1e-6
            )


# Control


def test_threads_part_and_meet():
    """Each thread goes round its own number of times; then all are together again, for a shuffle."""
    body = """
    mov.b32 {d}, 0; mov.b32 %r30, 0;
    LOOP: setp.ge.u32 %p1, %r30, %r1; @%p1 bra DONE; add.s32 {d}, {d}, %r30; add.s32 %r30, %r30, 1; bra.uni LOOP;
    DONE: shfl.sync.idx.b32 %r31, {d}, 31, 31, -1; add.s32 {d}, {d}, %r31; setp.eq.s32 %p1, %r1, 5; @%p1 exit; mov.b32 {d}, {d}
    """
    want = [i * (i - 1) // 2 + 31 * 15 for i in range(32)]
    want[5] = 0  # it left before the store
    check(body, [U32], ["b32"], "b32", want)


def test_counts_of_instructions_and_barriers():
    out = np.zeros(256, np.uint32)
    body = "bar.sync 0; mad.wide.u32 %d10, %r1, 4, %d1; barrier.sync 0; add.s32 %r2, %r1, 1; add.s32 %r2, %r2, 1;"
    body += "fma.rn.f32 %r3, %r1, %r1, %r1; mul.f32 %r3, %r3, %r3; fence.acq_rel.gpu; nop;"
    stats = launch(body, {"out": out}, threads=128, grid=3)
    assert stats.barriers == 6
    assert stats.warp_instructions["add"] == 2 * 4 * 3
    assert stats.flops == {"f32": 3 * 128 * 3}


@pytest.mark.parametrize(
    ("stride", "size", "conflicts"), [(4, 4, 0), (8, 4, 1), (128, 4, 31), (132, 4, 0), (0, 4, 0), (16, 16, 0)]
)
def test_bank_conflicts(stride, size, conflicts):
    out = np.zeros(32, np.uint32)
    register, kind = ("{%r10, %r11, %r12, %r13}", "v4.b32") if size == 16 else ("%r10", "b32")
    body = f"mul.lo.s32 %r2, %r1, {stride}; mov.b32 %r10, 1; mov.b32 %r11, 1; st.shared.{kind} [%r2], {register};"
    assert launch(body, {"out": out}, shared=8192).bank_conflicts == conflicts
