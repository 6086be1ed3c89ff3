"""Every opcode of the PTX machine that computes, alone in a kernel of a warp, against numpy and Python's own numbers."""

from fractions import Fraction

import numpy as np
import ptx_numbers
import pytest
import torch
from one_kernel import DTYPES, check, run_one

RANDOM = np.random.default_rng(0)
U32 = np.concatenate(
    [RANDOM.integers(0, 2**32, 26, dtype=np.uint32), np.array([0, 1, 2**31, 2**32 - 1, 7, 31], np.uint32)]
)
V32 = np.roll(U32, 5)
U64 = np.concatenate([RANDOM.integers(0, 2**64, 28, dtype=np.uint64), np.array([0, 1, 2**63, 2**64 - 1], np.uint64)])
V64 = np.roll(U64, 3)
U16 = U32.astype(np.uint16)
V16 = np.roll(U16, 3)
SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, 1e-40, 3e38, 0.5, 1.5]
F32 = np.concatenate([RANDOM.standard_normal(22), SPECIAL]).astype(np.float32)
G32 = np.roll(F32, 7)
H32 = np.roll(F32[:22], 5)
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
        ("add.s16x2 {d}, {0}, {1}", [[0x7FFF0001, 0xFFFFFFFF], [0x0001FFFF, 0x00010002]], "u32", "u32", [0x80000000, 0x00000001]),
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
        ("setp.lt.s32 %p1, {0}, {1}; setp.eq.or.s32 %p1|%p2, {0}, {1}, %p1; selp.b32 {d}, 1, 0, %p2", [S32, T32], "s32", "s32",
         (S32 != T32) | (S32 < T32)),
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
    HALVES = np.array(
        [0.5, 1.5, 2.5, -0.5, -1.5, 2.7, -2.7, 3e9, -3e9, np.nan, np.inf, -np.inf, 300.0, -1e-40], np.float32
    )
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
        ("mad.rn.f32 {d}, {0}, {1}, {1}", [F32[:22], H32], "f32", "f32",
         (F32[:22].astype(np.float64) * H32 + H32).astype(np.float32)),
        ("max.f32 {d}, {0}, {1}, 0f3F000000", [NANS, OTHER], "f32", "f32", [1.0, 1.0, 0.5, 0.5, 0.5, 3.0]),
        ("min.xorsign.abs.f32 {d}, {0}, 0f3F000000", [np.float32([0.25, -0.25, 3.0, -3.0])], "f32", "f32",
         [0.25, -0.25, 0.5, -0.5]),
        ("add.rn.f32.bf16 {d}, {0}, 0f3DCCCCCD", [B16[:22]], "bf16", "f32", FB[:22] + np.float32(0.1)),
        ("sub.f32.f16 {d}, {0}, 0f3DCCCCCD", [H16[:22]], "f16", "f32", H16[:22].astype(np.float32) - np.float32(0.1)),
        ("fma.rn.f32.bf16 {d}, {0}, {1}, 0f3DCCCCCD", [B16[:22], C16[:22]], "bf16", "f32",
         (FB[:22].astype(np.float64) * GB[:22] + np.float32(0.1)).astype(np.float32)),
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
        ("cvt.rna.tf32.f32 {d}, {0}", [np.float32([1 + 2.0**-11, -1 - 2.0**-11])], "f32", "b32",
         np.float32([1 + 2.0**-10, -1 - 2.0**-10]).view(np.uint32)),
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
@pytest.mark.parametrize(
    "name", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
)
def test_float_comparisons(name, kind):
    a, b = np.float32([1, 2, 2, np.nan, 1, np.nan, -0.0]), np.float32([2, 1, 2, 1, np.nan, np.nan, 0.0])
    some = np.isnan(a) | np.isnan(b)
    with np.errstate(invalid="ignore"):
        ordered = {
            "eq": a == b,
            "ne": a != b,
            "lt": a < b,
            "le": a <= b,
            "gt": a > b,
            "ge": a >= b,
            "num": ~some,
            "nan": some,
        }
        want = ordered[name[:2]] | some if name[2:] == "u" and name != "num" else ordered[name]
    want = want if name == "nan" or name.endswith("u") else want & ~some
    sources = [bf16(x) if kind == "bf16" else x.astype(DTYPES[kind]) for x in (a, b)]
    check(f"setp.{name}.{kind} %p1, {{0}}, {{1}}; selp.b32 {{d}}, 1, 0, %p1", sources, [kind] * 2, "u32", want)


def exact_fma(a, b, c, kind):
    """By fractions, rounded to nearest even."""
    out = []
    for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True):
        total = Fraction(x) * Fraction(y) + Fraction(z)
        value = kind(
            total.numerator / total.denominator
        )  # Python divides exactly; float32 may be off by the second rounding
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
    # products that are ties, after an even and an odd last bit, and a sum that a first rounding to 53 bits would lose
    small = 2.0 ** -(bits // 2)
    a[:6], b[:3], b[3:6] = 1 + 2.0 ** -(bits - bits // 2), 1 + small, 1 + 3 * small
    c[:6] = [2.0**-120, -(2.0**-120), 0.0] * 2
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
    for opcode, (function, relative, absolute) in ptx_numbers.APPROXIMATE.items():
        values = abs(F32[:22]) + np.float32(0.1)
        got = run_one(f"{opcode}.approx.f32 {{d}}, {{0}}", [values], ["f32"], "f32", worst=True).astype(np.float64)
        exact = function(values.astype(np.float64))
        allowed = np.maximum(relative * abs(exact), absolute) + 2.0**-24 * abs(exact)
        off = abs(got - exact)
        assert (off <= allowed).all(), opcode
        assert (off > 0.3 * allowed).any(), opcode
    got = run_one("div.full.f32 {d}, {0}, {1}", [F32[:22], H32], ["f32"] * 2, "f32", worst=True)
    units = np.abs(got.view(np.int32).astype(np.int64) - (F32[:22] / H32).view(np.int32))
    assert 2 <= units.max() <= 3  # and what the rounding adds


def test_two_float32_numbers_in_a_register():
    a, b = (np.stack([x[:22], y[:22]], 1).ravel() for x, y in ((F32, G32), (G32, F32)))
    for text, want in (
        ("add.rn.f32x2 {d}, {0}, {1}", a + b),
        ("fma.rn.f32x2 {d}, {0}, {1}, {1}", a.astype(np.float64) * b + b),
    ):
        check(
            text,
            [a.view(np.uint64), b.view(np.uint64)],
            ["b64"] * 2,
            "b64",
            nan(want.astype(np.float32)).view(np.uint64),
        )


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_packed_numbers(kind):
    a, b = (np.stack([x[:22], y[:22]], 1) for x, y in ((F32, H32), (H32, F32)))
    to = (lambda x: bf16(x)) if kind == "bf16x2" else (lambda x: x.astype(np.float16).view(np.uint16))
    back = (lambda x: (x.astype(np.uint32) << np.uint32(16)).view(np.float32)) if kind == "bf16x2" else (
        lambda x: x.view(np.float16).astype(np.float32))  # fmt: skip
    x, y = to(a), to(b)
    sources = [np.ascontiguousarray(each).view(np.uint32).ravel() for each in (x, y)]
    for opcode, function in (("add", np.add), ("mul", np.multiply)):
        want = to(function(back(x), back(y)))
        check(
            f"{opcode}.{kind} {{d}}, {{0}}, {{1}}",
            sources,
            ["b32"] * 2,
            "b32",
            np.ascontiguousarray(want).view(np.uint32).ravel(),
        )
