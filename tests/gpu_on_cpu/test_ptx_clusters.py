"""Clusters in the PTX machine: shared memory of other blocks, the barrier that orders it, parameters by address; entries of a text.

Then the sample kernels as nvcc compiles them, right and with a fault each.
"""

import emulated_cuda
import numpy as np
import ptx
import pytest
import samples
import torch
from one_kernel import HEAD, launch
from ptx import PTXError
from ptx_machine import Machine
from test_cuda_on_cpu import HERE, exchanged, product_of, sums_of

BARRIER = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
#: The number of the block in %r2, of it in the cluster in %r3; the next block's smem in %d10, this one's in %d11.
NEXT = """
mov.u32 %r2, %ctaid.x; mov.u32 %r3, %cluster_ctarank; mov.u32 %r4, %cluster_nctarank;
add.u32 %r5, %r3, 1; rem.u32 %r5, %r5, %r4;
mov.u64 %d9, smem; cvta.shared.u64 %d11, %d9; mapa.u64 %d10, %d11, %r5;
setp.eq.u32 %p1, %r1, 0; mad.wide.u32 %d12, %r2, 4, %d1;
"""


def run(body, blocks=4, cluster=2, threads=64, shared=64):
    out = np.zeros(blocks, np.uint32)
    stats = launch(NEXT + body, {"out": out}, threads=threads, shared=shared, grid=blocks, cluster=cluster)
    return out.tolist(), stats


@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_shared_memory_of_the_next_block(cluster):
    """By a generic address, and by one of the cluster's."""
    for reach in ("ld.b32 %r7, [%d10];", "mapa.shared::cluster.u32 %r8, %r9, %r5; ld.shared::cluster.b32 %r7, [%r8];"):
        body = f"mov.u32 %r9, smem; @%p1 st.shared.b32 [%r9], %r2; {BARRIER} {reach} @%p1 st.global.b32 [%d12], %r7; {BARRIER}"
        out, stats = run(body, cluster=cluster)
        assert out == [i // cluster * cluster + (i + 1) % cluster for i in range(4)]
        assert stats.cluster_barriers == 2 * 4 // cluster


@pytest.mark.parametrize("at_once", [1, 4096])
def test_stores_into_the_next_block(at_once, monkeypatch):
    """However many clusters run at once."""
    monkeypatch.setattr("ptx_machine.THREADS_AT_ONCE", at_once)
    body = f"{BARRIER} @%p1 st.b32 [%d10+8], %r2; {BARRIER} ld.shared.b32 %r7, [%d9+8]; @%p1 st.global.b32 [%d12], %r7;"
    assert run(body, blocks=8, cluster=4)[0] == [3, 0, 1, 2, 7, 4, 5, 6]


def test_halves_of_the_barrier():
    """What is private may be done between them; threads may come to the second half one after the other."""
    body = """
    @%p1 st.shared.b32 [%d9], %r2;
    barrier.cluster.arrive.release;
    setp.gt.u32 %p2, %r1, 31; @%p2 bra LATE;
    barrier.cluster.wait.acquire; bra TOGETHER;
    LATE: add.u32 %r20, %r1, 1; barrier.cluster.wait.acquire;
    TOGETHER: ld.b32 %r7, [%d10]; @%p1 st.global.b32 [%d12], %r7;
    """
    out, stats = run(body)
    assert out == [1, 0, 3, 2]
    assert stats.cluster_barriers == 2


@pytest.mark.parametrize(("body", "message"), [
    ("@%p1 st.b32 [%d10], %r2;", "of another block: before the first barrier"),
    (f"{BARRIER} ld.b32 %r7, [%d10];", "uninitialised: load of shared byte 0"),
    (f"{BARRIER} @%p1 st.b32 [%d10], %r2; ld.shared.b32 %r7, [%d9];", "race: shared load of byte 0, stored by another"),
    (f"@%p1 st.shared.b32 [%d9], %r2; {BARRIER} ld.b32 %r7, [%d10]; @%p1 st.shared.b32 [%d9], %r2;",
     "race: shared store of byte 0, loaded by another"),
    # a barrier of the block alone orders nothing between blocks
    (f"{BARRIER} @%p1 st.b32 [%d10], %r2; bar.sync 0; ld.shared.b32 %r7, [%d9];", "race: shared load of byte 0, stored"),
    # nor does a barrier that others have not waited for, or not arrived at, when it is done
    (f"{BARRIER} barrier.cluster.arrive; @%p1 st.b32 [%d10], %r2; barrier.cluster.wait; ld.shared.b32 %r7, [%d9];",
     "race: shared load of byte 0, stored"),
    (f"@%p1 st.shared.b32 [%d9], %r2; {BARRIER} barrier.cluster.arrive; ld.b32 %r7, [%d10]; barrier.cluster.wait;"
     " @%p1 st.shared.b32 [%d9], %r2;", "race: shared store of byte 0, loaded"),
    # in the block itself: between the halves is after neither
    (f"{BARRIER} barrier.cluster.arrive; @%p1 st.shared.b32 [%d9], %r2; barrier.cluster.wait; ld.shared.b32 %r7, [%d9];",
     "race: shared load of byte 0, stored"),
    (f"{BARRIER} add.u64 %d10, %d10, 64; ld.b32 %r7, [%d10];", "out of bounds: shared load at byte 64 of 64"),
    ("mapa.u64 %d10, %d11, 2;", "no block of this rank in a cluster of 2"),
    ("barrier.cluster.arrive; barrier.cluster.arrive;", "divergent barrier: arrives twice"),
    ("barrier.cluster.wait;", "divergent barrier: waits for the cluster and has not arrived"),
    (f"setp.eq.u32 %p2, %r3, 0; @%p2 bra END; {BARRIER} END:", "divergent barrier: .*have ended"),
    (f"{BARRIER} setp.eq.u32 %p2, %r3, 0; @%p2 st.shared.b32 [%d9], %r3; @%p2 bra END; bar.sync 0; ld.b32 %r7, [%d10]; END:",
     "of another block: one that has ended"),
    ("setp.lt.u32 %p2, %r1, 32; @%p2 bra SOME; bar.sync 0; bra END; SOME: barrier.cluster.arrive; barrier.cluster.wait; END:",
     "divergent barrier: threads of one program wait at different ones"),
    ("barrier.cluster.arrive.relaxed;", "unknown modifiers"),
])  # fmt: skip
def test_what_a_gpu_would_not_forgive(body, message):
    with pytest.raises(PTXError, match=message):
        run(body)


def test_a_grid_is_whole_clusters():
    with pytest.raises(PTXError, match="got a grid of 3 programs, want whole clusters of 2"):
        run("", blocks=3)


# Parameters and entries


def struct_of(parameter_loads, value, **options):
    out = np.zeros(64, np.uint32)
    begin = "ld.param.b64 %d1, [out]; mov.u32 %r1, %tid.x; mad.wide.u32 %d2, %r1, 4, %d1;"
    parameters = ".param .u64 out, .param .align 8 .b8 one_param_1[24]"
    body = f"{begin}\n{parameter_loads}\nst.global.b32 [%d2], %r5;"
    text = HEAD.format(parameters=parameters, threads=64, body=body)
    arguments = {"out": torch.from_numpy(out), "struct": value}
    Machine(ptx.parse(text), (1, 1, 1), 64, 0, arguments, **options).run()
    return out


def test_parameters_by_address():
    value = np.arange(6, dtype=np.uint32).tobytes()
    assert (struct_of("ld.param.b32 %r5, [one_param_1+12];", value) == 3).all()
    own = "mov.b64 %d5, one_param_1; rem.u32 %r7, %r1, 6; mul.wide.u32 %d6, %r7, 4; add.u64 %d5, %d5, %d6;"
    for load in ("ld.param.b32 %r5, [%d5];", "cvta.param.u64 %d7, %d5; ld.b32 %r5, [%d7];"):
        assert np.array_equal(struct_of(own + load, value), np.arange(64) % 6)


@pytest.mark.parametrize(("body", "size", "message"), [
    ("ld.param.b32 %r5, [one_param_1+24];", 24, "out of bounds: no such parameter"),
    ("mov.b64 %d5, one_param_1; ld.param.b32 %r5, [%d5+48];", 24, "out of bounds: the parameters have"),
    ("mov.b64 %d5, one_param_1; ld.param.b32 %r5, [%d5+2];", 24, "misaligned: load of 4 bytes of a parameter"),
    ("mov.b64 %d5, one_param_1; cvta.param.u64 %d7, %d5; st.b32 [%d7], %r1;", 24, "a store to a parameter"),
    ("", 20, "got 20 bytes for one_param_1, want 24"),
])  # fmt: skip
def test_parameters_that_are_not_there(body, size, message):
    with pytest.raises(PTXError, match=message):
        struct_of(body, bytes(size))


def test_an_entry_is_named():
    one = HEAD.format(parameters=".param .u64 x", threads=32, body="")
    text = one + one.split("smem[];")[1].replace("one(", "other(")
    assert [entry[1] for entry in ptx.entries(text)] == ["one", "other"]
    assert ptx.parse(text, "other").name == "other"
    for name in (None, "third"):
        with pytest.raises(PTXError, match="entries, want one entry alone"):
            ptx.parse(text, name)


# The sample kernels


def compiled(name, target, seed=0, out=None, **changes):
    """What a sample kernel writes, as samples.run gives it, and what it did."""
    (path,) = emulated_cuda.compiled(
        target, sources=[HERE / "sample_kernels.cu"], folder=emulated_cuda.BUILD / "samples"
    )
    text, case = path.read_text(), samples.case_of(name)._replace(**changes)
    entry = next(entry[1] for entry in ptx.entries(text) if samples.is_entry(entry[1], name))
    kernel, x = ptx.parse(text, entry), torch.from_numpy(samples.given(name, seed))
    out = torch.full((case.made,), torch.nan) if out is None else torch.from_numpy(out)
    static, threads = -(-kernel.shared_bytes // 16) * 16, int(np.prod(case.block))
    arguments = {"in": x, "out": out, "n": case.n}
    stats = Machine(kernel, case.grid, threads, static + case.shared, arguments, cluster=case.cluster).run()
    return out.numpy(), stats


nvcc = [
    pytest.mark.compiles,
    pytest.mark.skipif(emulated_cuda.missing() is not None, reason=str(emulated_cuda.missing())),
]


@pytest.mark.parametrize("target", [pytest.param(target, marks=nvcc) for target in emulated_cuda.TARGETS])
def test_right_samples(target):
    np.testing.assert_allclose(compiled("sums", target)[0], sums_of(samples.given("sums")), rtol=1e-5)
    assert np.array_equal(compiled("copy", target)[0], samples.given("copy"))
    got, _ = compiled("product", target, out=np.zeros(128, np.float32))
    np.testing.assert_allclose(got.reshape(16, 8), product_of(samples.given("product")), rtol=3e-7)


@pytest.mark.parametrize("cluster", [pytest.param(cluster, marks=nvcc) for cluster in (1, 2, 4, 8)])
def test_right_samples_of_clusters(cluster):
    x = samples.given("exchange")
    got, stats = compiled("exchange", "sm_90a", cluster=cluster)
    np.testing.assert_allclose(got, exchanged(x, 5, cluster), rtol=1e-5)
    assert stats.cluster_barriers == (1 + 5) * 8 // cluster
    halves, _ = compiled("exchange in halves", "sm_90a", cluster=cluster)
    np.testing.assert_allclose(halves, 5 + np.roll(x.reshape(-1, cluster), -1, 1).ravel(), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param(*each, marks=nvcc, id=each[0])
        for each in (
            ("sums, missing barrier", "race: shared load"),
            ("sums, divergent barrier", "divergent barrier"),
            ("sums, one past shared", "out of bounds: shared store at byte 8 of 8"),
            ("sums, one past global", "out of bounds: global load of 4 bytes"),
            ("sums, across blocks", "race: global (load|store) at out"),
            ("sums, misaligned", "misaligned: global load of 16 bytes"),
            ("exchange, missing cluster barrier", "race: shared"),
            ("exchange, single buffer", "race: shared store of byte .*, loaded by another"),
            ("exchange, no last barrier", "race: shared store|of another block: one that has ended"),
            ("exchange, one past of other", "out of bounds: shared store at byte 64 of 64|race: shared"),
            ("copy, no wait", "uninitialised: load of shared byte"),
        )
    ],
)
def test_faults_in_samples(name, message):
    """Each is named, with the line."""
    with pytest.raises(PTXError, match=rf"({message}).*\(\w+\.(cu|h):\d+\)"):
        compiled(name, "sm_90a")
