"""Every opcode of the PTX machine, alone in a kernel of one or two warps, against numpy; and every check, on what it must refuse."""

import numpy as np
import ptx
import pytest
import torch
from ptx import PTXError
from ptx_machine import Machine
from ptx_ops import OPERATIONS

SEEN = set()  # opcodes that a test here ran
REGISTERS = {1: "h", 2: "h", 4: "r", 8: "d"}
DTYPES = {
    "s8": np.int8, "u8": np.uint8, "s16": np.int16, "u16": np.uint16, "b16": np.uint16, "f16": np.float16, "bf16": np.uint16,
    "s32": np.int32, "u32": np.uint32, "b32": np.uint32, "f32": np.float32, "tf32": np.uint32, "bf16x2": np.uint32,
    "f16x2": np.uint32, "s64": np.int64, "u64": np.uint64, "b64": np.uint64, "f64": np.float64,
}  # fmt: skip
HEAD = """
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 smem[];
.visible .entry one({parameters}) .reqntid {threads} {{
.reg .pred %p<9>; .reg .b16 %h<33>; .reg .b32 %r<99>; .reg .b64 %d<65>;
{body}
ret;
}}
"""


def launch(body, arrays, threads=32, shared=0, grid=1, worst=False):
    """Runs `body` with a pointer to each of `arrays` in %d1, %d2, ... and the thread's number in %r1."""
    parameters = ", ".join(f".param .u64 {name}" for name in arrays)
    loads = "".join(f"ld.param.b64 %d{i}, [{name}];\n" for i, name in enumerate(arrays, 1))
    text = HEAD.format(parameters=parameters, threads=threads, body=f"{loads} mov.u32 %r1, %tid.x;\n{body}")
    kernel = ptx.parse(text)
    SEEN.update(instruction.opcode for instruction in kernel.instructions)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Machine(kernel, (grid, 1, 1), threads, shared, tensors, worst=worst).run()


def run_one(instruction, sources, types, to, **options):
    """`instruction` with {0}, {1}, ... for its sources (arrays of `types`) and {d} for what comes out, of type `to`."""
    sources = [np.asarray(source, DTYPES[kind]) for source, kind in zip(sources, types, strict=True)]
    threads = -(-max(len(source) for source in sources) // 32) * 32
    arrays = {f"in{i}": np.resize(source, threads) for i, source in enumerate(sources)}
    out_size = np.dtype(DTYPES[to]).itemsize
    arrays["out"] = np.zeros(threads, DTYPES[to])
    body, names = "", {}
    for i, source in enumerate(sources):
        size, name = source.itemsize, f"%{REGISTERS[source.itemsize]}{10 + i}"
        body += f"mad.wide.u32 %d{20 + i}, %r1, {size}, %d{1 + i}; ld.global.b{8 * size} {name}, [%d{20 + i}];\n"
        names[str(i)] = name
    target = f"%{REGISTERS[out_size]}20"
    body += instruction.replace("{d}", target)
    for key, name in names.items():
        body = body.replace("{" + key + "}", name)
    body += f";\nmad.wide.u32 %d30, %r1, {out_size}, %d{len(sources) + 1}; st.global.b{8 * out_size} [%d30], {target};\n"
    launch(body, arrays, threads, **options)
    return arrays["out"][: len(sources[0])]


def check(instruction, sources, types, to, want, **options):
    got = run_one(instruction, sources, types, to, **options)
    want = np.asarray(want).astype(DTYPES[to])
    bits = f"u{want.itemsize}"
    assert np.array_equal(got.view(bits), want.view(bits)), f"{instruction}: got {got}, want {want}"


RANDOM = np.random.default_rng(0)
U32 = np.concatenate([RANDOM.integers(0, 2**32, 26, dtype=np.uint32), np.array([0, 1, 2**31, 2**32 - 1, 7, 31], np.uint32)])
V32 = np.roll(U32, 5)
U64 = np.concatenate([RANDOM.integers(0, 2**64, 28, dtype=np.uint64), np.array([0, 1, 2**63, 2**64 - 1], np.uint64)])
V64 = np.roll(U64, 3)
U16 = U32.astype(np.uint16)
V16 = np.roll(U16, 3)
SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, 1e-40, 3e38, 0.5, 1.5]
F32 = np.concatenate([RANDOM.standard_normal(22), SPECIAL]).astype(np.float32)
G32 = np.roll(F32, 7)
F64 = np.concatenate([RANDOM.standard_normal(22), SPECIAL])
G64 = np.roll(F64, 7)
S32, T32, S64, T64, S16, T16 = (x.view(x.dtype.str.replace("u", "i")) for x in (U32, V32, U64, V64, U16, V16))
SMALL = np.arange(32, dtype=np.uint32) * 3  # shifts, up to beyond the register


def big(function, *arrays, bits):
    """By Python's integers, of any size."""
    return np.array([function(*map(int, row)) % 2**bits for row in zip(*arrays, strict=True)], f"u{bits // 8}")


def nan(values, kind=np.float32):
    """With the NaN that the hardware gives."""
    values = np.array(values, kind)
    if kind == np.float32:
        values[np.isnan(values)] = np.array(0x7FFFFFFF, np.uint32).view(np.float32)
    return values


def truncated(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


D32, E32 = S32, np.where(T32 == 0, 3, T32)
with np.errstate(all="ignore"):
    INTEGERS = [
        ("add.s32 {d}, {0}, {1}", [S32, T32], "s32", "s32", S32 + T32),
        ("add.s64 {d}, {0}, {1}", [S64, T64], "s64", "s64", S64 + T64),
        ("add.s16 {d}, {0}, {1}", [S16, T16], "s16", "s16", S16 + T16),
        ("add.u32 {d}, {0}, 4294967295", [U32], "u32", "u32", U32 - np.uint32(1)),
        ("add.s32 {d}, {0}, -5", [S32], "s32", "s32", S32 - np.int32(5)),
        ("sub.s32 {d}, {0}, {1}", [S32, T32], "s32", "s32", S32 - T32),
        ("sub.u64 {d}, {0}, {1}", [U64, V64], "u64", "u64", U64 - V64),
        ("neg.s32 {d}, {0}", [S32], "s32", "s32", big(lambda a: -a, S32, bits=32)),
        ("abs.s64 {d}, {0}", [S64], "s64", "s64", big(abs, S64, bits=64).view(np.int64)),
        ("min.s32 {d}, {0}, {1}", [S32, T32], "s32", "s32", np.minimum(S32, T32)),
        ("min.relu.s32 {d}, {0}, {1}", [S32, T32], "s32", "s32", np.maximum(np.minimum(S32, T32), 0)),
        ("max.u32 {d}, {0}, {1}", [U32, V32], "u32", "u32", np.maximum(U32, V32)),
        ("min.s64 {d}, {0}, {1}", [S64, T64], "s64", "s64", np.minimum(S64, T64)),
        ("mul.lo.s32 {d}, {0}, {1}", [S32, T32], "s32", "s32", big(lambda a, b: a * b, S32, T32, bits=32).view(np.int32)),
        ("mul.hi.u32 {d}, {0}, {1}", [U32, V32], "u32", "u32", big(lambda a, b: a * b >> 32, U32, V32, bits=32)),
        ("mul.hi.s32 {d}, {0}, {1}", [S32, T32], "s32", "s32", big(lambda a, b: a * b >> 32, S32, T32, bits=32).view(np.int32)),
        ("mul.hi.u64 {d}, {0}, {1}", [U64, V64], "u64", "u64", big(lambda a, b: a * b >> 64, U64, V64, bits=64)),
        ("mul.hi.s64 {d}, {0}, {1}", [S64, T64], "s64", "s64", big(lambda a, b: a * b >> 64, S64, T64, bits=64).view(np.int64)),
        ("mul.wide.s32 {d}, {0}, {1}", [S32, T32], "s32", "s64", S32.astype(np.int64) * T32),
        ("mul.wide.u16 {d}, {0}, {1}", [U16, V16], "u16", "u32", U16.astype(np.uint32) * V16),
        ("mad.lo.s32 {d}, {0}, {1}, 9", [S32, T32], "s32", "s32", S32 * T32 + np.int32(9)),
        ("mad.wide.u32 {d}, {0}, {1}, 18446744073709551615", [U32, V32], "u32", "u64",
         U32.astype(np.uint64) * V32 - np.uint64(1)),
        ("mad.lo.s64 {d}, {0}, {1}, {1}", [S64, T64], "s64", "s64", S64 * T64 + T64),
        ("mad.hi.u32 {d}, {0}, {1}, {1}", [U32, V32], "u32", "u32", big(lambda a, b: (a * b >> 32) + b, U32, V32, bits=32)),
        ("div.s32 {d}, {0}, {1}", [D32, E32], "s32", "s32", big(truncated, D32, E32, bits=32).view(np.int32)),
        ("div.u64 {d}, {0}, {1}", [U64, V64 | np.uint64(1)], "u64", "u64", U64 // (V64 | np.uint64(1))),
        ("div.u32 {d}, {0}, 0", [U32], "u32", "u32", np.full(32, 2**32 - 1)),
        ("rem.s32 {d}, {0}, {1}", [D32, E32], "s32", "s32",
         big(lambda a, b: a - b * truncated(a, b), D32, E32, bits=32).view(np.int32)),
        ("rem.u32 {d}, {0}, 7", [U32], "u32", "u32", U32 % np.uint32(7)),
        ("and.b32 {d}, {0}, {1}", [U32, V32], "b32", "b32", U32 & V32),
        ("or.b64 {d}, {0}, {1}", [U64, V64], "b64", "b64", U64 | V64),
        ("xor.b16 {d}, {0}, {1}", [U16, V16], "b16", "b16", U16 ^ V16),
        ("not.b32 {d}, {0}", [U32], "b32", "b32", ~U32),
        ("cnot.b32 {d}, {0}", [U32], "b32", "b32", U32 == 0),
        ("shl.b32 {d}, {0}, {1}", [U32, SMALL], "b32", "b32", big(lambda a, n: a << n, U32, SMALL, bits=32)),
        ("shl.b16 {d}, {0}, 4", [U16], "b16", "b16", U16 << np.uint16(4)),
        ("shr.u32 {d}, {0}, {1}", [U32, SMALL], "u32", "u32", big(lambda a, n: a >> n, U32, SMALL, bits=32)),
        ("shr.s32 {d}, {0}, {1}", [S32, SMALL.view(np.int32)], "s32", "s32",
         big(lambda a, n: a >> n, S32, SMALL, bits=32).view(np.int32)),
        ("bfe.u32 {d}, {0}, {1}, 5", [U32, SMALL], "u32", "u32", big(lambda a, n: (a >> n) & 31, U32, SMALL, bits=32)),
        ("bfe.u32 {d}, {0}, 4, 32", [U32], "u32", "u32", U32 >> np.uint32(4)),
        ("bfe.s32 {d}, {0}, 4, 8", [S32], "s32", "s32", ((S32 >> 4) & 255).astype(np.int8).astype(np.int32)),
        ("bfe.s32 {d}, {0}, 28, 8", [S32], "s32", "s32", S32 >> 28),
        ("bfe.s32 {d}, {0}, 40, 8", [S32], "s32", "s32", S32 >> 31),
        ("bfe.u64 {d}, {0}, 33, 9", [U64], "u64", "u64", (U64 >> np.uint64(33)) & np.uint64(511)),
        ("bfi.b32 {d}, {0}, {1}, 5, 7", [U32, V32], "b32", "b32",
         big(lambda a, b: (b & ~(127 << 5)) | ((a & 127) << 5), U32, V32, bits=32)),
        ("lop3.b32 {d}, {0}, {1}, 240, 0xE2", [U32, V32], "b32", "b32",
         np.where(True, (V32 & U32) | (~V32 & np.uint32(240)), 0)),
        ("popc.b64 {d}, {0}", [U64], "b64", "u32", [bin(int(a)).count("1") for a in U64]),
        ("clz.b32 {d}, {0}", [U32], "b32", "u32", [32 - int(a).bit_length() for a in U32]),
        ("brev.b32 {d}, {0}", [U32], "b32", "b32", [int(f"{int(a):032b}"[::-1], 2) for a in U32]),
        ("prmt.b32 {d}, {0}, {1}, 0x7A40", [U32, V32], "b32", "b32",
         [(a & 255) | ((b & 255) << 8) | ((255 if a >> 23 & 1 else 0) << 16) | (b >> 24 << 24)
          for a, b in zip(U32.tolist(), V32.tolist(), strict=True)]),
        ("shf.l.wrap.b32 {d}, {0}, {1}, 5", [U32, V32], "b32", "b32", (V32 << np.uint32(5)) | (U32 >> np.uint32(27))),
        ("shf.r.clamp.b32 {d}, {0}, {1}, 40", [U32, V32], "b32", "b32", V32),
        ("shf.r.wrap.b32 {d}, {0}, {1}, 40", [U32, V32], "b32", "b32", (U32 >> np.uint32(8)) | (V32 << np.uint32(24))),
        ("mov.b32 {d}, {0}", [U32], "b32", "b32", U32),
        ("mov.b64 {d}, {{0}, {1}}", [U32, V32], "b32", "b64", U32.astype(np.uint64) | (V32.astype(np.uint64) << np.uint64(32))),
        ("mov.b64 {_, {d}}, {0}", [U64], "b64", "b32", U64 >> np.uint64(32)),
        ("{ .reg .b32 t; mov.b64 {{d}, t}, {0}; mov.b32 t, 0; }", [U64], "b64", "b32", U64 & np.uint64(2**32 - 1)),
        ("mov.b32 {d}, 0f3F800000; xor.b32 {d}, {d}, {0}", [U32], "b32", "b32", U32 ^ np.uint32(0x3F800000)),
        ("cvt.s64.s32 {d}, {0}", [S32], "s32", "s64", S32),
        ("cvt.u64.u32 {d}, {0}", [U32], "u32", "u64", U32),
        ("cvt.u32.u64 {d}, {0}", [U64], "u64", "u32", U64 & np.uint64(2**32 - 1)),
        ("cvt.u16.u32 {d}, {0}", [U32], "u32", "u16", U32 & np.uint32(65535)),
        ("cvt.s8.s32 {d}, {0}", [S32], "s32", "s32", S32.astype(np.int8)),
        ("cvt.u8.u32 {d}, {0}", [U32], "u32", "u32", U32.astype(np.uint8)),
        ("cvt.sat.s8.s32 {d}, {0}", [S32], "s32", "s32", np.clip(S32, -128, 127)),
        ("cvt.sat.u8.s32 {d}, {0}", [S32], "s32", "s32", np.clip(S32, 0, 255)),
        ("setp.lt.s32 %p1, {0}, {1}; selp.b32 {d}, 1, 0, %p1", [S32, T32], "s32", "s32", S32 < T32),
        ("setp.lt.u32 %p1, {0}, {1}; selp.b32 {d}, 1, 0, %p1", [U32, V32], "u32", "u32", U32 < V32),
        ("setp.hs.u32 %p1, {0}, {1}; selp.b32 {d}, 1, 0, %p1", [U32, V32], "u32", "u32", U32 >= V32),
        ("setp.ne.b64 %p1, {0}, {1}; selp.b32 {d}, 1, 0, %p1", [U64, V64], "b64", "u32", U64 != V64),
        ("setp.gt.s64 %p1|%p2, {0}, {1}; selp.b32 {d}, 1, 0, %p2", [S64, T64], "s64", "u32", S64 <= T64),
        ("setp.eq.s32 %p1, {0}, {0}; setp.gt.and.s32 %p2, {0}, {1}, !%p1; selp.b32 {d}, 1, 0, %p2", [S32, T32], "s32", "s32",
         np.zeros(32)),
        ("setp.eq.s32 %p1, {0}, {0}; setp.gt.xor.s32 %p2, {0}, {1}, %p1; selp.b32 {d}, 1, 0, %p2", [S32, T32], "s32", "s32",
         S32 <= T32),
        ("setp.lt.s32 %p1, {0}, {1}; not.pred %p2, %p1; and.pred %p3, %p1, %p2; or.pred %p4, %p3, %p2; selp.b32 {d}, 1, 0, %p4",
         [S32, T32], "s32", "s32", S32 >= T32),
        ("mov.pred %p1, 0; xor.pred %p1, %p1, 1; selp.b32 {d}, {0}, 3, %p1", [S32], "s32", "s32", S32),
        ("setp.lt.s32 %p1, {0}, {1}; mov.b32 {d}, 1; @!%p1 mov.b32 {d}, 2", [S32, T32], "s32", "s32", np.where(S32 < T32, 1, 2)),
    ]  # fmt: skip


@pytest.mark.parametrize("case", INTEGERS, ids=lambda case: case[0])
def test_integers_and_bits(case):
    instruction, sources, kind, to, want = case
    check(instruction, sources, [kind] * len(sources), to, want)


def bf16(values):
    """float32 to bf16 by torch."""
    return torch.tensor(np.asarray(values, np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


B16, C16 = bf16(F32), bf16(G32)
with np.errstate(all="ignore"):
    FB, GB = ((each.astype(np.uint32) << np.uint32(16)).view(np.float32) for each in (B16, C16))
    H16, I16 = F32.astype(np.float16), G32.astype(np.float16)
    NANS = np.array([np.nan, 1.0, np.nan, -0.0, 0.0, 2.0], np.float32)
    OTHER = np.array([1.0, np.nan, np.nan, 0.0, -0.0, 3.0], np.float32)
    HALVES = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 2.7, -2.7, 3e9, -3e9, np.nan, np.inf, -np.inf, 300.0, -1e-40], np.float32)
    TINY = np.array([1e-40, -1e-40, 1.0, 2.0**-126, 3e38], np.float32)
    FLOATS = [
        ("add.f32 {d}, {0}, {1}", [F32, G32], "f32", "f32", nan(F32 + G32)),
        ("add.rn.f64 {d}, {0}, {1}", [F64, G64], "f64", "f64", F64 + G64),
        ("add.ftz.f32 {d}, {0}, 0f00000000", [TINY], "f32", "f32", [0.0, 0.0, 1.0, 2.0**-126, 3e38]),
        ("add.sat.f32 {d}, {0}, 0f3F000000", [NANS], "f32", "f32", [0.0, 1.0, 0.0, 0.5, 0.5, 1.0]),
        ("sub.f32 {d}, {0}, {1}", [F32, G32], "f32", "f32", nan(F32 - G32)),
        ("sub.f64 {d}, {0}, {1}", [F64, G64], "f64", "f64", F64 - G64),
        ("mul.f32 {d}, {0}, {1}", [F32, G32], "f32", "f32", nan(F32 * G32)),
        ("mul.f64 {d}, {0}, 0d4000000000000000", [F64], "f64", "f64", F64 * 2),
        ("mul.ftz.f32 {d}, {0}, 0f3F000000", [TINY], "f32", "f32", [0.0, -0.0, 0.5, 0.0, 1.5e38]),
        ("div.rn.f32 {d}, {0}, {1}", [F32, G32], "f32", "f32", nan(F32 / G32)),
        ("div.full.f32 {d}, {0}, {1}", [F32, G32], "f32", "f32", nan((F32.astype(np.float64) / G32).astype(np.float32))),
        ("div.rn.f64 {d}, {0}, {1}", [F64, G64], "f64", "f64", F64 / G64),
        ("sqrt.rn.f32 {d}, {0}", [F32], "f32", "f32", nan(np.sqrt(F32))),
        ("sqrt.approx.ftz.f32 {d}, {0}", [abs(F32[:22])], "f32", "f32", np.sqrt(abs(F32[:22]))),
        ("sqrt.rn.f64 {d}, {0}", [abs(F64)], "f64", "f64", np.sqrt(abs(F64))),
        ("rcp.rn.f32 {d}, {0}", [F32], "f32", "f32", nan(1 / F32)),
        ("rcp.approx.ftz.f64 {d}, {0}", [F64[:22]], "f64", "f64",
         ((1 / (F64[:22].view(np.uint64) >> np.uint64(32) << np.uint64(32)).view(np.float64)).view(np.uint64)
          >> np.uint64(32) << np.uint64(32)).view(np.float64)),
        ("rsqrt.approx.f32 {d}, {0}", [abs(F32[:22])], "f32", "f32",
         (1 / np.sqrt(abs(F32[:22]).astype(np.float64))).astype(np.float32)),
        ("ex2.approx.f32 {d}, {0}", [F32[:22]], "f32", "f32", np.exp2(F32[:22].astype(np.float64)).astype(np.float32)),
        ("ex2.approx.ftz.f32 {d}, {0}", [np.float32([-127.0, 3.0])], "f32", "f32", [0.0, 8.0]),
        ("lg2.approx.f32 {d}, {0}", [abs(F32[:22])], "f32", "f32", np.log2(abs(F32[:22]).astype(np.float64)).astype(np.float32)),
        ("sin.approx.f32 {d}, {0}", [F32[:22]], "f32", "f32", np.sin(F32[:22].astype(np.float64)).astype(np.float32)),
        ("cos.approx.f32 {d}, {0}", [F32[:22]], "f32", "f32", np.cos(F32[:22].astype(np.float64)).astype(np.float32)),
        ("tanh.approx.f32 {d}, {0}", [F32[:22]], "f32", "f32", np.tanh(F32[:22].astype(np.float64)).astype(np.float32)),
        ("min.f32 {d}, {0}, {1}", [NANS, OTHER], "f32", "f32", nan([1.0, 1.0, np.nan, -0.0, -0.0, 2.0])),
        ("max.f32 {d}, {0}, {1}", [NANS, OTHER], "f32", "f32", nan([1.0, 1.0, np.nan, 0.0, 0.0, 3.0])),
        ("max.NaN.f32 {d}, {0}, {1}", [NANS, OTHER], "f32", "f32", nan([np.nan, np.nan, np.nan, 0.0, 0.0, 3.0])),
        ("min.f64 {d}, {0}, {1}", [F64, G64], "f64", "f64",
         np.where(F64 == G64, np.copysign(F64, np.minimum(np.copysign(1, F64), np.copysign(1, G64))), np.fmin(F64, G64))),
        ("max.bf16 {d}, {0}, {1}", [B16, C16], "bf16", "bf16", bf16(np.fmax(FB, GB))),
        ("neg.f32 {d}, {0}", [NANS], "f32", "f32", -NANS),
        ("abs.f64 {d}, {0}", [F64], "f64", "f64", abs(F64)),
        ("abs.ftz.f32 {d}, {0}", [TINY], "f32", "f32", [0.0, 0.0, 1.0, 2.0**-126, 3e38]),
        ("copysign.f32 {d}, {0}, {1}", [F32, G32], "f32", "f32", np.copysign(G32, F32)),
        ("fma.rn.bf16 {d}, {0}, {1}, {1}", [B16[:22], C16[:22]], "bf16", "bf16",
         bf16((FB[:22].astype(np.float64) * GB[:22] + GB[:22]).astype(np.float32))),
        ("add.f16 {d}, {0}, {1}", [H16[:22], I16[:22]], "f16", "f16", H16[:22] + I16[:22]),
        ("mul.bf16 {d}, {0}, {1}", [B16[:22], C16[:22]], "bf16", "bf16", bf16(FB[:22] * GB[:22])),
        ("cvt.f32.bf16 {d}, {0}", [B16], "bf16", "f32", FB),
        ("cvt.rn.bf16.f32 {d}, {0}", [F32], "f32", "bf16", B16),
        ("cvt.rz.bf16.f32 {d}, {0}", [F32], "f32", "bf16", F32.view(np.uint32) >> np.uint32(16)),
        ("cvt.f32.f16 {d}, {0}", [H16], "f16", "f32", H16),
        ("cvt.rn.f16.f32 {d}, {0}", [F32], "f32", "f16", H16),
        ("cvt.f64.f32 {d}, {0}", [F32], "f32", "f64", F32),
        ("cvt.rn.f32.f64 {d}, {0}", [F64 * 1.1], "f64", "f32", (F64 * 1.1).astype(np.float32)),
        ("cvt.rn.bf16x2.f32 {d}, {0}, {1}", [F32, G32], "f32", "b32", (B16.astype(np.uint32) << np.uint32(16)) | C16),
        ("cvt.rna.tf32.f32 {d}, {0}", [F32], "f32", "b32",
         np.where(np.isfinite(F32), (F32.view(np.uint32) + np.uint32(4096)) & np.uint32(0xFFFFE000), F32.view(np.uint32))),
        ("cvt.rn.f32.s32 {d}, {0}", [S32], "s32", "f32", S32.astype(np.float32)),
        ("cvt.rn.f32.u64 {d}, {0}", [U64], "u64", "f32", [np.float32(int(a)) for a in U64]),
        ("cvt.rn.f64.s64 {d}, {0}", [S64], "s64", "f64", S64.astype(np.float64)),
        ("cvt.rn.f16.s32 {d}, {0}", [np.int32([1, 2049, -7, 70000])], "s32", "f16", np.float16([1, 2048, -7, np.inf])),
        ("cvt.rni.s32.f32 {d}, {0}", [HALVES], "f32", "s32",
         [0, 2, 2, 0, -2, 3, -3, 2**31 - 1, -(2**31), 0, 2**31 - 1, -(2**31), 300, 0]),
        ("cvt.rzi.u16.f32 {d}, {0}", [HALVES], "f32", "u16", [0, 1, 2, 0, 0, 2, 0, 65535, 0, 0, 65535, 0, 300, 0]),
        ("cvt.rmi.s64.f32 {d}, {0}", [HALVES], "f32", "s64",
         [0, 1, 2, -1, -2, 2, -3, 3 * 10**9, -3 * 10**9, -(2**63), 2**63 - 1, -(2**63), 300, -1]),
        ("cvt.rpi.f32.f32 {d}, {0}", [HALVES[:7]], "f32", "f32", [1.0, 2.0, 3.0, -0.0, -1.0, 3.0, -2.0]),
        ("cvt.rmi.ftz.f32.f32 {d}, {0}", [HALVES[-1:]], "f32", "f32", [-0.0]),
        ("cvt.sat.f32.f32 {d}, {0}", [NANS], "f32", "f32", [0.0, 1.0, 0.0, 0.0, 0.0, 1.0]),
    ]  # fmt: skip
    COMPARISONS = {
        "eq": F32 == G32, "ne": (F32 < G32) | (F32 > G32), "lt": F32 < G32, "le": F32 <= G32, "gt": F32 > G32, "ge": F32 >= G32,
    }  # fmt: skip


@pytest.mark.parametrize("case", FLOATS, ids=lambda case: case[0])
def test_floats(case):
    instruction, sources, kind, to, want = case
    check(instruction, sources, [kind] * len(sources), to, want)


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"])
def test_float_comparisons(name, kind):
    a, b = np.float32([1, 2, 2, np.nan, 1, np.nan, -0.0]), np.float32([2, 1, 2, 1, np.nan, np.nan, 0.0])
    some = np.isnan(a) | np.isnan(b)
    with np.errstate(invalid="ignore"):
        ordered = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b, "num": ~some, "nan": some}
        want = ordered[name[:2]] | some if name[2:] == "u" and name != "num" else ordered[name]
    want = want if name == "nan" or name.endswith("u") else want & ~some
    sources = [bf16(x) if kind == "bf16" else x.astype(DTYPES[kind]) for x in (a, b)]
    check(f"setp.{name}.{kind} %p1, {{0}}, {{1}}; selp.b32 {{d}}, 1, 0, %p1", sources, [kind] * 2, "u32", want)


def exact_fma(a, b, c, kind):
    """By fractions, rounded to nearest even."""
    from fractions import Fraction

    out = []
    for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True):
        total = Fraction(x) * Fraction(y) + Fraction(z)
        value = kind(total.numerator / total.denominator)  # Python divides exactly; float32 may be off by the second rounding
        near = sorted((np.nextafter(value, kind(side)) for side in (-np.inf, np.inf)), key=float)
        best = min((*near, value), key=lambda v: (abs(Fraction(float(v)) - total), int(v.view(f"u{v.itemsize}")) & 1))
        out.append(best)
    return np.array(out, kind)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_fma_rounds_once(kind):
    name, bits = ("f32", 24) if kind == np.float32 else ("f64", 53)
    a = RANDOM.standard_normal(512).astype(kind)
    b = RANDOM.standard_normal(512).astype(kind)
    c = (RANDOM.standard_normal(512) * 10.0 ** RANDOM.integers(-8, 3, 512)).astype(kind)
    # a tie but for the last bit of the sum, which a first rounding to 53 bits would lose
    a[:4], b[:4] = 1 + 2.0 ** (1 - bits), 1 + 2.0 ** -(bits // 2)
    c[:4] = [2.0**-60, -(2.0**-60), 2.0**-70, 2.0**40]
    a[4:8] = 2.0 ** (bits - 1) + 1
    b[4:8], c[4:8] = 0.5, [2.0**-80, -(2.0**-80), 2.0**-30, 0.0]
    check(f"fma.rn.{name} {{d}}, {{0}}, {{1}}, {{2}}", [a, b, c], [name] * 3, name, exact_fma(a, b, c, kind))


def test_fma_of_special_numbers():
    a = np.float32([np.inf, np.inf, 0.0, np.nan, 3e38, -0.0, 1e-40])
    b = np.float32([1.0, 0.0, np.inf, 1.0, 10.0, 1.0, 1.0])
    c = np.float32([-np.inf, 1.0, 1.0, 1.0, -np.inf, 0.0, 1e-45])
    with np.errstate(all="ignore"):
        want = nan([np.nan, np.nan, np.nan, np.nan, -np.inf, 0.0, a[6] + c[6]])
    check("fma.rn.f32 {d}, {0}, {1}, {2}", [a, b, c], ["f32"] * 3, "f32", want)
    check("fma.rn.f64 {d}, {0}, {1}, {2}", [np.float64(x) for x in (a[[0, 4]], b[[0, 4]], c[[3, 3]])], ["f64"] * 3, "f64",
          np.float64([np.inf, float(a[4]) * 10 + 1]))  # fmt: skip


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("opcode", ["add", "mul", "fma"])
def test_roundings(opcode, mode):
    from fractions import Fraction

    a, b, c = (RANDOM.standard_normal(128).astype(np.float32) for _ in range(3))
    b[:40] *= np.float32(1e-9)
    terms = ["{0}", "{1}"] + (["{2}"] if opcode == "fma" else [])
    got = run_one(f"{opcode}.{mode}.f32 {{d}}, {', '.join(terms)}", [a, b, c], ["f32"] * 3, "f32")
    for x, y, z, value in zip(a.tolist(), b.tolist(), c.tolist(), got, strict=True):
        x, y, z = Fraction(x), Fraction(y), Fraction(z)
        exact = {"add": x + y, "mul": x * y, "fma": x * y + z}[opcode]
        below, above = (Fraction(float(np.nextafter(value, np.float32(side)))) for side in (-np.inf, np.inf))
        value = Fraction(float(value))
        right = {
            "rn": abs(value - exact) <= min(abs(below - exact), abs(above - exact)),
            "rm": value <= exact < above,
            "rp": below < exact <= value,
            "rz": (value <= exact < above) if exact > 0 else (below < exact <= value),
        }[mode]
        assert right


def test_worst_case_of_approximations():
    """With `worst`, an approximate function is off by about what the manual allows, and by no more."""
    for opcode, (function, relative, absolute) in __import__("ptx_numbers").APPROXIMATE.items():
        values = abs(F32[:22]) + np.float32(0.1)
        ending = "" if opcode == "tanh" else ".approx"
        got = run_one(f"{opcode}{ending or '.approx'}.f32 {{d}}, {{0}}", [values], ["f32"], "f32", worst=True).astype(np.float64)
        exact = function(values.astype(np.float64))
        allowed = np.maximum(relative * abs(exact), absolute) + 2.0**-24 * abs(exact)
        off = abs(got - exact)
        assert (off <= allowed).all() and (off > 0.3 * allowed).any(), opcode
    one = np.float32([1.0] * 32)
    assert (run_one("div.full.f32 {d}, {0}, {0}", [one], ["f32"], "f32", worst=True) != 1).any()


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_packed_numbers(kind):
    a, b = (np.stack([x[:22], y[:22]], 1).astype(np.float32) for x, y in ((F32, G32), (G32, F32)))
    to = (lambda x: bf16(x)) if kind == "bf16x2" else (lambda x: x.astype(np.float16).view(np.uint16))
    back = (lambda x: (x.astype(np.uint32) << np.uint32(16)).view(np.float32)) if kind == "bf16x2" else (
        lambda x: x.view(np.float16).astype(np.float32))  # fmt: skip
    x, y = to(a), to(b)
    sources = [np.ascontiguousarray(each).view(np.uint32).ravel() for each in (x, y)]
    for opcode, function in (("add", np.add), ("mul", np.multiply)):
        want = to(function(back(x), back(y)))
        check(f"{opcode}.{kind} {{d}}, {{0}}, {{1}}", sources, ["b32"] * 2, "b32", np.ascontiguousarray(want).view(np.uint32).ravel())


# Memory


def test_vector_loads_and_stores_with_hints():
    data, out = RANDOM.integers(0, 2**32, 128, dtype=np.uint32), np.zeros(128, np.uint32)
    body = """
    mad.wide.u32 %d10, %r1, 16, %d1; mad.wide.u32 %d11, %r1, 16, %d2;
    ld.global.L1::evict_last.v4.b32 {%r10, %r11, %r12, %r13}, [%d10]; st.global.wt.v2.b32 [%d11], {%r11, %r10};
    st.global.b32 [%d11+8], %r13; st.b32 [%d11+12], %r12;
    """
    stats = launch(body, {"data": data, "out": out})
    assert np.array_equal(out.reshape(32, 4), data.reshape(32, 4)[:, [1, 0, 3, 2]])
    assert stats.loaded == {"data": 512}
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
    early = body.replace("cp.async.wait_group 1;", "")
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
    [("bfly", 16, 31), ("bfly", 3, 31), ("up", 3, 0), ("down", 5, 31), ("idx", 9, 31), ("idx", 2, 0x181F), ("down", 2, 0x181F)],
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
        check(f"{test} vote.sync.{mode}.pred %p2, %p1, -1; selp.b32 {{d}}, 1, 0, %p2", [U32], ["b32"], "b32", [want] * 32)
    check(test + "mov.b32 {d}, 0; @%p1 activemask.b32 {d}", [U32], ["b32"], "b32", np.where(odd, np.uint32(ballot), 0))
    check("elect.sync {d}|%p1, -1; selp.b32 {d}, 5, {d}, %p1", [U32], ["b32"], "b32", [5] + [0] * 31)
    for name, kind, value in (("add", "s32", S32.sum(dtype=np.int32)), ("min", "s32", S32.min()), ("max", "u32", U32.max()),
                              ("xor", "b32", np.bitwise_xor.reduce(U32)), ("min", "f32", np.float32(-np.inf))):  # fmt: skip
        source = F32 if kind == "f32" else U32.view(DTYPES[kind])
        check(f"redux.sync.{name}.{kind} {{d}}, {{0}}, -1", [source], [kind], kind, np.full(32, value, DTYPES[kind]))
    check("bar.warp.sync -1; mov.b32 {d}, {0}", [U32], ["b32"], "b32", U32)


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
            assert np.isclose(out[lane, i], want[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2], rtol=1e-6, atol=1e-6)


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
    stats = launch(body + "fence.acq_rel.gpu; nop;", {"out": out}, threads=128, grid=3)
    assert stats.barriers == 6
    assert stats.warp_instructions["add"] == 2 * 4 * 3


@pytest.mark.parametrize(("stride", "size", "conflicts"), [(4, 4, 0), (8, 4, 1), (128, 4, 31), (132, 4, 0), (0, 4, 0), (16, 16, 0)])
def test_bank_conflicts(stride, size, conflicts):
    out = np.zeros(32, np.uint32)
    register, kind = ("{%r10, %r11, %r12, %r13}", "v4.b32") if size == 16 else ("%r10", "b32")
    body = f"mul.lo.s32 %r2, %r1, {stride}; mov.b32 %r10, 1; mov.b32 %r11, 1; st.shared.{kind} [%r2], {register};"
    assert launch(body, {"out": out}, shared=8192).bank_conflicts == conflicts


# What must be refused

HERE = "mad.wide.u32 %d10, %r1, 4, %d1; mad.wide.u32 %d11, %r1, 4, %d2; shl.b32 %r2, %r1, 2;"
REFUSED = {
    "unknown opcode": ("frobnicate.s32 %r2, %r1", "unknown opcode 'frobnicate'"),
    "unknown modifier": ("add.warp.s32 %r2, %r1, %r1", "unknown modifier .warp"),
    "unknown type": ("add.b32 %r2, %r1, %r1", "unknown modifier .b32"),
    "too few operands": ("add.s32 %r2, %r1", "got 2 operands, want 3"),
    "too many operands": ("fma.rn.f32 %r2, %r1, %r1, %r1, %r1", "got 5 operands, want 4"),
    "unknown register": ("add.s32 %r2, %nothing, 1", "%nothing read as s32"),
    "narrow register": ("add.s64 %r2, %d1, %d2", "%r2 written as s64"),
    "unknown cache hint": ("ld.global.L3::keep.b32 %r2, [%d10]", "unknown modifier .L3::keep"),
    "out of bounds": ("ld.global.b32 %r2, [%d10+4]", r"out of bounds.*\+256 bytes from the start of x, which has 256"),
    "before the start": ("st.global.b32 [%d10+-4], %r1", "out of bounds.*-4 bytes from the start of x"),
    "misaligned": ("ld.global.b64 %d20, [%d10+2]", "misaligned"),
    "vector misaligned": ("ld.global.v2.b32 {%r20, %r21}, [%d1+4]", "misaligned"),
    "shared out of bounds": ("st.shared.b32 [%r2+4], %r1", "out of bounds: shared store at byte 256 of 256"),
    "shared misaligned": ("st.shared.b32 [%r2+1], %r1", "misaligned"),
    "shared uninitialised": ("ld.shared.b32 %r3, [%r2]", "uninitialised"),
    "local out of bounds": ("st.local.b32 [%d1], %r1", "out of bounds: local"),
    "two values in one place": ("st.global.b32 [%d1], %r1", r"race: global store at x\[0\]|store different values"),
    "two values in shared memory": ("st.shared.b32 [0], %r1", "store different values"),
    "store and load of two warps": ("st.global.b32 [%d10], %r1; xor.b32 %r3, %r1, 32; mad.wide.u32 %d12, %r3, 4, %d1;"
                                    "ld.global.b32 %r4, [%d12]", r"race: global load at x\[.*stored"),
    "load and store of two warps": ("xor.b32 %r3, %r1, 32; mad.wide.u32 %d12, %r3, 4, %d1; ld.global.b32 %r4, [%d12];"
                                    "st.global.b32 [%d10], %r1", r"race: global store at x\[.*loaded"),
    "all load and one stores": ("ld.global.b32 %r4, [%d1]; setp.eq.s32 %p1, %r1, 0; @%p1 st.global.b32 [%d1], %r1",
                                "race: global store at x.*loaded"),
    "update and load": ("atom.global.add.u32 %r3, [%d1], 1; ld.global.b32 %r4, [%d1]", "race: global load at x.*updated"),
    "shared without a barrier": ("st.shared.b32 [%r2], %r1; xor.b32 %r3, %r2, 128; ld.shared.b32 %r4, [%r3]",
                                 "race: shared load of byte .*stored"),
    "shared overwritten too early": ("st.shared.b32 [%r2], %r1; bar.sync 0; xor.b32 %r3, %r2, 128; ld.shared.b32 %r4, [%r3];"
                                     "st.shared.b32 [%r2], %r4", "race: shared store of byte .*loaded"),
    "divergent barrier": ("setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync 0; bra.uni B; A: bar.sync 0; B: nop",
                          "divergent barrier"),
    "barrier after an exit": ("setp.lt.u32 %p1, %r1, 32; @%p1 exit; bar.sync 0", "divergent barrier"),
    "barrier of some": ("bar.sync 1, 32", "a barrier of other than all threads"),
    "shuffle with missing lanes": ("setp.lt.u32 %p1, %r1, 7; @%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1", "missing lanes"),
    "shuffle from a missing lane": ("setp.lt.u32 %p1, %r1, 7; @%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, 127", "missing lanes"),
    "vote with missing lanes": ("setp.lt.u32 %p1, %r1, 7; @%p1 vote.sync.any.pred %p2, %p1, -1", "missing lanes"),
    "reduction with missing lanes": ("setp.lt.u32 %p1, %r1, 7; @%p1 redux.sync.add.s32 %r3, %r1, -1", "missing lanes"),
    "product with missing lanes": ("setp.lt.u32 %p1, %r1, 7; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r2]",
                                   "missing lanes"),
    "warp group": ("wgmma.fence.sync.aligned", "warp group products"),
    "no end": ("L: bra.uni L", "does not end"),
    "branch to nowhere": ("bra NOWHERE", "no label"),
    "function call": ("call.uni printf", "unknown opcode 'call'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name, monkeypatch):
    monkeypatch.setattr("ptx_machine.ENDLESS", 100)
    instruction, message = REFUSED[name]
    x, y = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    with pytest.raises(PTXError, match=message):
        launch(f".loc 1 12 3\n{HERE}\n{instruction};", {"x": x, "y": y}, threads=64, shared=256)


@pytest.mark.parametrize("body", [
    "st.global.b32 [%d10], %r1; bar.sync 0; xor.b32 %r3, %r1, 32; mad.wide.u32 %d12, %r3, 4, %d1; ld.global.b32 %r4, [%d12]",
    "ld.global.b32 %r4, [%d1]; bar.sync 0; setp.eq.s32 %p1, %r1, 0; @%p1 st.global.b32 [%d1], %r1",
    "st.shared.b32 [%r2], %r1; bar.sync 0; xor.b32 %r3, %r2, 128; ld.shared.b32 %r4, [%r3]",
    "st.shared.b32 [%r2], %r1; xor.b32 %r3, %r2, 64; ld.shared.b32 %r4, [%r3]",  # within a warp
    "st.shared.b32 [0], 7; bar.sync 0; ld.shared.b32 %r4, [0]",  # all store the same
    "atom.global.add.u32 %r3, [%d1], 1; atom.global.add.u32 %r3, [%d1], 1",
])  # fmt: skip
def test_what_is_sound_passes(body):
    x, y = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    launch(f"{HERE}\n{body};", {"x": x, "y": y}, threads=64, shared=256)


@pytest.mark.parametrize(("body", "message"), [
    ("st.global.b32 [%d10], %r1", "race: global store at x.*stored"),
    ("ld.global.b32 %r3, [%d10]; bar.sync 0; setp.eq.s32 %p1, %r5, 1; @%p1 st.global.b32 [%d10], %r1", "race: global store.*loaded"),
    ("setp.eq.s32 %p1, %r5, 1; @%p1 st.global.b32 [%d10], %r1; bar.sync 0; ld.global.b32 %r3, [%d10]",
     "race: global (load.*stored|store.*loaded)"),
    ("atom.global.add.u32 %r3, [%d10], 1; bar.sync 0; setp.eq.s32 %p1, %r5, 1; @%p1 st.global.b32 [%d10], %r1",
     "race: global store.*updated"),
])  # fmt: skip
def test_programs_race_whatever_the_barriers(body, message, monkeypatch):
    for at_once in (4096, 64):  # in one wave, or one after the other
        monkeypatch.setattr("ptx_machine.THREADS_AT_ONCE", at_once)
        x, y = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
        with pytest.raises(PTXError, match=message):
            launch(f"{HERE} mov.u32 %r5, %ctaid.x;\n{body};", {"x": x, "y": y}, threads=64, grid=2)


def test_errors_name_the_line_of_the_kernel():
    text = HEAD.format(parameters=".param .u64 x", threads=32, body="ld.param.b64 %d1, [x];\n.loc 7 41 3\nld.global.b32 %r2, [%d1+4];")
    text += '.file 7 "/somewhere/kernels.py"\n'
    with pytest.raises(PTXError, match=r"`ld.global.b32 %r2, \[%d1\+4\]` \(kernels.py:41\)"):
        Machine(ptx.parse(text), (1, 1, 1), 32, 0, {"x": torch.zeros(1)}).run()


def test_every_opcode_has_a_test():
    """Stands last: what no test above ran is not known to be right."""
    names = set(OPERATIONS) | {"bra", "ret", "exit"}
    hints = {"membar", "createpolicy", "prefetch", "griddepcontrol", "discard"}  # change nothing
    assert names - SEEN - hints == set()
