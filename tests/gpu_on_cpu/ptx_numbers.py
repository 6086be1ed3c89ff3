"""Numbers as a GPU computes them, on numpy arrays: roundings, fused multiply-add, narrow floats, conversions, approximations.

bf16 and tf32 have no numpy type: their bits travel as uint16 and uint32. Everything is exact to the bit, except what PTX itself
calls approximate: see `approximate`.
"""

import numpy as np

TYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "tf32": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
#: Several numbers in one register: an array [lanes,2].
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}
FLOATS = {"f16", "bf16", "f32", "f64"}
NAN = {"f32": 0x7FFFFFFF, "f16": 0x7FFF, "bf16": 0x7FFF}  # what arithmetic gives for every NaN
TINY = {"f32": 2.0**-126, "f16": 2.0**-14, "bf16": 2.0**-126}  # the least normal number
INF32 = np.uint32(0x7F800000)


def widen(value, kind):
    """Any float as float64, exactly; float64 stays."""
    value = np.asarray(value)
    if kind == "bf16":
        value = (value.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return value.astype(np.float64)


def _sticky(high, low):
    """high + low, |low| at most half a unit of high, as the float64 whose last bit says that it is not exact (odd)."""
    bits = np.atleast_1d(high).view(np.int64)
    odd = (bits - ((low < 0) != (high < 0))) | 1
    return np.where((low == 0) | ~np.isfinite(high), bits, odd).view(np.float64)


def _two_sum(a, b):
    """a + b and what rounding took from it (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def exact_sum(a, b):
    """a + b of float64 numbers, rounded to odd: rounding it once more to any narrower type is rounding once."""
    total, lost = _two_sum(a, b)
    return _sticky(total, np.where(np.isfinite(total), lost, 0.0))


def narrow(exact, kind, mode="rn"):
    """A float64 number, exact or rounded to odd, as float `kind`."""
    if kind == "f64":
        return exact
    if kind == "f16":
        out, one = exact.astype(np.float16), np.uint16(1)
    elif kind == "f32":
        out, one = exact.astype(np.float32), np.uint32(1)
    else:
        return _narrow_bf16(exact, mode)
    if mode != "rn":
        back, bits = out.astype(np.float64), out.view(TYPES["b16"] if kind == "f16" else np.uint32).copy()
        away = {"rz": np.abs(back) > np.abs(exact), "rm": back > exact, "rp": back < exact}[mode]
        # one unit down where the magnitude must shrink, one up where it must grow
        grow = away & ({"rz": False, "rm": exact < 0, "rp": exact > 0}[mode])
        bits[grow] += one
        bits[away & ~grow] -= one
        out = bits.view(out.dtype)
    return out


def _narrow_bf16(exact, mode):
    single = narrow(exact, "f32", "rz")
    bits = np.where(single.astype(np.float64) != exact, single.view(np.uint32) | np.uint32(1), single.view(np.uint32))
    if mode == "rn":
        bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    elif mode != "rz":
        raise NotImplementedError(f"bf16 rounded by {mode}")
    return np.where(np.isnan(exact), np.uint16(0x7FFF), (bits >> np.uint32(16)).astype(np.uint16))


def canonical(value, kind):
    """Every NaN with the bits that the hardware gives it; float64 keeps what it has."""
    if kind in NAN:
        nan = np.isnan(value) if kind != "bf16" else (value & 0x7FFF) > 0x7F80
        if nan.any():
            bits = np.array(NAN[kind], np.uint16 if value.itemsize == 2 else np.uint32)
            return np.where(nan, bits.view(value.dtype), value)
    return value


def flush(value):
    """A subnormal float32 as zero of its sign."""
    value = np.asarray(value)
    return np.where(np.abs(value) < np.float32(TINY["f32"]), np.copysign(np.float32(0), value), value)


def saturate(value):
    """Into [0, 1]; NaN becomes 0."""
    return np.fmin(np.fmax(value, value.dtype.type(0)), value.dtype.type(1))


def fma(a, b, c, kind="f32", mode="rn"):
    """a * b + c, rounded once."""
    if kind == "f64":
        if mode != "rn":
            raise NotImplementedError(f"fma.{mode}.f64")
        return _fma64(a, b, c)
    a, b, c = (widen(value, kind) for value in (a, b, c))
    product = a * b  # exact: 24 and 24 bits are 48
    total = product + c
    if kind == "f32" and mode == "rn":
        # Rounding twice differs from rounding once only at what looks like a tie, and below the normal numbers.
        tie = (np.atleast_1d(total).view(np.int64) & 0x1FFFFFFF) == 0x10000000
        if not tie.any() and not ((np.abs(total) < TINY["f32"]) & (total != 0)).any():
            return total.astype(np.float32)
    return narrow(exact_sum(product, c), kind, mode)


def _split_product(a, b):
    """a * b as a sum of two float64 numbers (Dekker)."""
    product = a * b
    halves = []
    for value in (a, b):
        big = value * 134217729.0
        high = big - (big - value)
        halves.append((high, value - high))
    (ah, al), (bh, bl) = halves
    return product, ((ah * bh - product) + ah * bl + al * bh) + al * bl


def _fma64(a, b, c):
    """By Boldo and Melquiond: exact products and sums, the small parts rounded to odd."""
    a, b, c = np.broadcast_arrays(a, b, c)
    high, low = _split_product(a, b)
    middle, least = _two_sum(c, low)
    top, rest = _two_sum(high, middle)
    out = top + exact_sum(least, rest)
    # beyond 2^996 the split overflows; infinities and NaN are as in the plain formula
    return np.where(np.isfinite(out), out, a * b + c)


def minimum(a, b, kind, largest=False, keep_nan=False):
    """min or max: a NaN loses, unless keep_nan; -0 is less than +0."""
    wide = kind in ("f16", "bf16")
    x, y = (widen(value, kind) if wide else np.asarray(value) for value in (a, b))
    out = (np.fmax if largest else np.fmin)(x, y)
    bits = np.uint64 if out.dtype == np.float64 else np.uint32
    x, y = np.broadcast_arrays(x, y)
    x_bits, y_bits = np.ascontiguousarray(x).view(bits), np.ascontiguousarray(y).view(bits)
    out = np.where(x == y, ((x_bits & y_bits) if largest else (x_bits | y_bits)).view(out.dtype), out)
    if keep_nan:
        out = np.where(np.isnan(x) | np.isnan(y), np.array(np.nan, out.dtype), out)
    return narrow(out, kind) if wide else out


ROUND_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integer(value, kind, source):
    """A whole number in a float type as an integer, at the nearest end of its range where it is outside."""
    limits = np.iinfo(TYPES[kind])
    value = value.astype(np.float64)
    nan = np.isnan(value)
    # 2^63 - 1 is no float64: compare with the power of two beyond the range, then convert what is inside
    inside = ~nan & (value < 2.0**limits.bits if limits.min == 0 else value < 2.0 ** (limits.bits - 1))
    inside &= value >= limits.min
    out = np.where(value > 0, limits.max, limits.min).astype(TYPES[kind])
    out[inside] = value[inside].astype(TYPES[kind])
    of_nan = 0 if source != "f64" and limits.bits < 64 else 1 << (limits.bits - 1)
    out[nan] = np.array(of_nan, f"u{limits.bits // 8}").view(TYPES[kind])
    return out


def to_tf32(bits):
    """float32 bits to the nearest with 10 bits of mantissa, ties away from zero (cvt.rna.tf32.f32)."""
    finite = (bits & INF32) != INF32
    return np.where(finite, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)


#: The largest errors that the PTX manual allows: relative, or absolute where that is more. At zero the functions are exact.
APPROXIMATE = {
    "ex2": (np.exp2, 2.0**-22, 0.0),
    "lg2": (np.log2, 2.0**-22, 2.0**-22),
    "rcp": (np.reciprocal, 2.0**-23, 0.0),
    "sqrt": (np.sqrt, 2.0**-23, 0.0),
    "rsqrt": (lambda x: 1.0 / np.sqrt(x), 2.0**-22.9, 0.0),
    "sin": (np.sin, 0.0, 2.0**-20.5),
    "cos": (np.cos, 0.0, 2.0**-20.5),
    "tanh": (np.tanh, 2.0**-11, 0.0),
}
DIVISION_ERROR = 2.0  # of div.approx and div.full, in units in the last place


def _wrong(exact, key, error):
    """`exact` off by `error`, up or down by some bits of `key`: what an accurate kernel must survive."""
    return exact + np.where((key ^ (key >> np.uint32(7))) & np.uint32(1), error, -error)


def approximate(opcode, value, worst):
    """An approximate float32 function: rounded from float64, or with the largest error that is allowed."""
    function, relative, absolute = APPROXIMATE[opcode]
    value = np.atleast_1d(np.asarray(value, np.float32))
    exact = function(value.astype(np.float64))
    if worst:
        error = np.where(value == 0, 0.0, np.maximum(relative * np.abs(exact), absolute))
        exact = np.where(np.isfinite(exact), _wrong(exact, value.view(np.uint32), error), exact)
    return exact.astype(np.float32)


def divide(a, b, worst):
    """a / b in float32 as div.approx and div.full may give it."""
    a, b = np.broadcast_arrays(np.atleast_1d(a), b)
    exact = a.astype(np.float64) / b.astype(np.float64)
    if worst:
        error = DIVISION_ERROR * np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
        exact = np.where(np.isfinite(exact), _wrong(exact, np.ascontiguousarray(b).view(np.uint32), error), exact)
    return exact.astype(np.float32)


def reciprocal_of_upper_half(value):
    """rcp.approx.ftz.f64: only the upper 32 bits of the argument count, and only those of the result are given."""
    mask = np.uint64(0xFFFFFFFF00000000)
    upper = (np.atleast_1d(value).view(np.uint64) & mask).view(np.float64)
    upper = np.where(np.abs(upper) < 2.0**-1022, np.copysign(0.0, upper), upper)
    out = (1.0 / upper).view(np.uint64) & mask
    return out.view(np.float64)
