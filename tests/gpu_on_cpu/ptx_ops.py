"""The opcodes that compute: integers and bits, floats, comparisons, moves and conversions.

An opcode is a function of the wave and the instruction that looks up the operands once and gives step(mask), where mask is None if
all threads take part. What a step computes for the other threads is thrown away.
"""

from functools import partial

import numpy as np
import ptx_numbers as numbers
from ptx import PTXError
from ptx_memory import LOCAL_WINDOW, SHARED_WINDOW
from ptx_numbers import FLOATS, PACKED, TYPES

OPERATIONS = {}  # opcode -> function(wave, instruction)
INTEGERS = {kind + bits for kind in "bsu" for bits in ("16", "32", "64")}
ROUNDINGS = ("rn", "rz", "rm", "rp")


def operation(*opcodes):
    def add(bind):
        OPERATIONS.update(dict.fromkeys(opcodes, bind))
        return bind

    return add


def put(target, value, mask):
    """Write to a register of the threads in `mask`."""
    if mask is None:
        np.copyto(target, value)
    else:
        np.copyto(target, value, where=mask if target.ndim == 1 else mask[:, None])


def flags_of(instruction, allowed, types, operands):
    """The modifiers but the type, as a set; refuses what is not known."""
    *flags, kind = instruction.modifiers or ("",)
    unknown = [flag for flag in flags if flag not in allowed]
    if kind not in types:
        unknown.append(kind)
    if unknown:
        raise instruction.error(f"unknown modifier .{unknown[0]}")
    if len(instruction.operands) != operands:
        raise instruction.error(f"got {len(instruction.operands)} operands, want {operands}")
    return set(flags)


def bind(wave, instruction, compute, target_type, *source_types):
    """step for target = compute(*sources)."""
    target = wave.target(instruction.operands[0], target_type)
    sources = [
        wave.source(operand, kind) for operand, kind in zip(instruction.operands[1:], source_types, strict=True)
    ]

    def step(mask):
        put(target, compute(*sources), mask)

    return step


# Integers and bits


def shift_left(value, by):
    bits = value.dtype.itemsize * 8
    return np.where(by < bits, value << np.minimum(by, np.uint32(bits - 1)).astype(value.dtype), value.dtype.type(0))


def shift_right(value, by):
    last = np.minimum(by, np.uint32(value.dtype.itemsize * 8 - 1)).astype(value.dtype)
    out = value >> last
    return out if value.dtype.kind == "i" else np.where(by > last, value.dtype.type(0), out)


def divide_integers(a, b):
    """Toward zero; a division by zero gives all ones, as the hardware does."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = np.floor_divide(a, safe)
    if quotient.dtype.kind == "i":
        quotient = quotient + ((np.remainder(a, safe) != 0) & ((a < 0) != (safe < 0)))
    return np.where(b == 0, np.array(-1).astype(quotient.dtype), quotient)


def remainder(a, b):
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))


def high_product(a, b):
    if a.dtype.itemsize < 8:
        wide = np.dtype(f"{a.dtype.kind}{a.dtype.itemsize * 2}").type
        return ((a.astype(wide) * b.astype(wide)) >> wide(a.dtype.itemsize * 8)).astype(a.dtype)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = np.asarray(a).astype(np.uint64), np.asarray(b).astype(np.uint64)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    high = x1 * y1 + (middle >> half) + ((x0 * y1 + (middle & low)) >> half)
    if a.dtype.kind == "i":  # a two's complement number is the unsigned one less 2^64 where it is negative
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.astype(a.dtype)


def extract(value, start, length):
    """bfe: bits from `start`; beyond the register come zeros, or copies of the sign."""
    bits = value.dtype.itemsize * 8
    start, length = start & np.uint32(255), length & np.uint32(255)
    if value.dtype.kind == "u":
        kept = shift_right(value, start)
        return np.where(length >= bits, kept, kept & (shift_left(np.ones_like(value), length) - value.dtype.type(1)))
    end = np.minimum(start.astype(np.int64) + length, bits)
    up = shift_left(value, (bits - end).astype(np.uint32))  # the last bit wanted is the sign now
    out = shift_right(up, (bits - end + np.minimum(start, bits - 1)).astype(np.uint32))
    return np.where(length == 0, value.dtype.type(0), np.where(start >= bits, shift_right(value, np.uint32(bits - 1)), out))


def insert(value, into, start, length):
    """bfi."""
    start, length = start & np.uint32(255), length & np.uint32(255)
    one = np.ones_like(into)
    ones = np.where(length >= into.dtype.itemsize * 8, ~np.zeros_like(into), shift_left(one, length) - one)
    mask = shift_left(ones, start)
    return (into & ~mask) | (shift_left(value, start) & mask)


def lop3(a, b, c, table):
    out = np.zeros_like(a)
    for i in range(8):
        if int(table) >> i & 1:
            out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return out


def count_leading_zeros(value):
    bits = value.dtype.itemsize * 8
    out = np.full(np.shape(value), bits, np.uint32)
    for i in range(bits):
        out = np.where((value >> value.dtype.type(i)) & value.dtype.type(1), np.uint32(bits - 1 - i), out)
    return out


def permute_bytes(a, b, selector):
    """prmt: every byte of the result is one of the eight of b:a, or its sign, as a nibble of `selector` says."""
    both = np.asarray(a).astype(np.uint64) | (np.asarray(b).astype(np.uint64) << np.uint64(32))
    out = np.zeros(np.broadcast(both, selector).shape, np.uint32)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> (np.uint64(8) * (nibble & np.uint32(7)).astype(np.uint64))) & np.uint64(255)
        byte = np.where(nibble & np.uint32(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def funnel_shift(a, b, by, left, clamp):
    """shf: the 64 bits b:a shifted; the upper word of the left shift, the lower of the right one."""
    by = np.minimum(by, np.uint32(32)) if clamp else by & np.uint32(31)
    both = np.asarray(a).astype(np.uint64) | (np.asarray(b).astype(np.uint64) << np.uint64(32))
    if left:
        return ((both << by.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)
    return (both >> by.astype(np.uint64)).astype(np.uint32)


#: opcode -> (sources, function), all of the instruction's type.
SIMPLE = {
    "add": (2, np.add), "sub": (2, np.subtract), "neg": (1, np.negative), "abs": (1, np.abs),
    "min": (2, np.minimum), "max": (2, np.maximum), "div": (2, divide_integers), "rem": (2, remainder),
    "and": (2, np.bitwise_and), "or": (2, np.bitwise_or), "xor": (2, np.bitwise_xor), "not": (1, np.invert),
    "cnot": (1, lambda value: (value == 0).astype(value.dtype)),
}  # fmt: skip


@operation("div", "rem", "and", "or", "xor", "not", "cnot")
def simple(wave, instruction):
    count, function = SIMPLE[instruction.opcode]
    kind = instruction.type
    types = INTEGERS | {"pred"} if instruction.opcode in ("and", "or", "xor", "not") else INTEGERS
    flags_of(instruction, (), types, count + 1)
    return bind(wave, instruction, function, kind, *[kind] * count)


@operation("shl", "shr")
def shift(wave, instruction):
    flags_of(instruction, (), INTEGERS, 3)
    function = shift_left if instruction.opcode == "shl" else shift_right
    return bind(wave, instruction, function, instruction.type, instruction.type, "u32")


@operation("bfe")
def bit_field_extract(wave, instruction):
    kind = instruction.type
    flags_of(instruction, (), INTEGERS, 4)
    return bind(wave, instruction, extract, kind, kind, "u32", "u32")


@operation("bfi")
def bit_field_insert(wave, instruction):
    flags_of(instruction, (), ("b32", "b64"), 5)
    return bind(wave, instruction, insert, *[instruction.type] * 3, "u32", "u32")


@operation("lop3")
def logic(wave, instruction):
    flags_of(instruction, (), ("b32",), 5)
    return bind(wave, instruction, lop3, *["b32"] * 5)


@operation("popc", "clz", "brev")
def count_bits(wave, instruction):
    flags_of(instruction, (), ("b32", "b64"), 2)
    kind = instruction.type
    if instruction.opcode == "brev":
        bits = 8 * np.dtype(TYPES[kind]).itemsize

        def reverse(value):
            return sum((((value >> value.dtype.type(i)) & value.dtype.type(1)) << value.dtype.type(bits - 1 - i)) for i in range(bits))

        return bind(wave, instruction, reverse, kind, kind)
    function = count_leading_zeros if instruction.opcode == "clz" else lambda value: np.bitwise_count(value).astype(np.uint32)
    return bind(wave, instruction, function, "u32", kind)


@operation("prmt")
def permute(wave, instruction):
    flags_of(instruction, (), ("b32",), 4)
    return bind(wave, instruction, permute_bytes, *["b32"] * 4)


@operation("shf")
def funnel(wave, instruction):
    flags = flags_of(instruction, ("l", "r", "wrap", "clamp"), ("b32",), 4)
    function = partial(funnel_shift, left="l" in flags, clamp="clamp" in flags)
    return bind(wave, instruction, function, *["b32"] * 4)


WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def multiply(wave, instruction):
    """mul and mad of integers."""
    kind, count = instruction.type, 2 if instruction.opcode == "mul" else 3
    flags = flags_of(instruction, ("lo", "hi", "wide"), INTEGERS - {"b16", "b32", "b64"}, count + 1)
    if len(flags) != 1:
        raise instruction.error("want one of .lo, .hi, .wide")
    (part,) = flags
    wide = WIDER.get(kind) if part == "wide" else kind
    if wide is None:
        raise instruction.error(f"unknown modifier .{kind}")
    dtype = TYPES[wide]

    def product(a, b, *c):
        if part == "wide":
            out = np.multiply(a, b, dtype=dtype)
        else:
            out = a * b if part == "lo" else high_product(a, b)
        return out + c[0] if c else out

    return bind(wave, instruction, product, wide, kind, kind, *[wide] * (count - 2))


# Floats


def float_function(opcode, flags, kind, worst):
    """What computes `opcode` for floats of `kind`."""
    mode = next((flag for flag in flags if flag in ROUNDINGS), "rn")
    native = kind in ("f32", "f64") and mode == "rn"
    if opcode in ("add", "sub") and native:
        return np.add if opcode == "add" else np.subtract
    if opcode in ("add", "sub") and kind != "f64":
        sign = 1.0 if opcode == "add" else -1.0
        wide = partial(numbers.widen, kind=kind)
        return lambda a, b: numbers.narrow(numbers.exact_sum(wide(a), sign * wide(b)), kind, mode)
    if opcode == "mul" and native:
        return np.multiply
    if opcode == "mul" and kind != "f64":
        wide = partial(numbers.widen, kind=kind)
        return lambda a, b: numbers.narrow(np.atleast_1d(wide(a) * wide(b)), kind, mode)
    if opcode in ("fma", "mad") and (kind != "f64" or mode == "rn"):
        return partial(numbers.fma, kind=kind, mode=mode)
    if opcode in ("min", "max"):
        return partial(numbers.minimum, kind=kind, largest=opcode == "max", keep_nan="NaN" in flags)
    if opcode in ("neg", "abs"):
        bits = np.dtype(TYPES[kind]).itemsize * 8
        unsigned = np.dtype(f"u{bits // 8}").type
        if opcode == "neg":
            return lambda a: (np.asarray(a).view(unsigned) ^ unsigned(1 << (bits - 1))).view(TYPES[kind])
        return lambda a: (np.asarray(a).view(unsigned) & unsigned((1 << (bits - 1)) - 1)).view(TYPES[kind])
    if opcode == "div" and kind == "f32" and flags & {"approx", "full"}:
        return partial(numbers.divide, worst=worst)
    if opcode == "div" and native:
        return np.divide
    if opcode == "sqrt" and native and "approx" not in flags:
        return np.sqrt
    if opcode == "rcp" and native and "approx" not in flags:
        return np.reciprocal
    if opcode == "rcp" and kind == "f64" and flags == {"approx", "ftz"}:
        return numbers.reciprocal_of_upper_half
    if opcode in numbers.APPROXIMATE and kind == "f32" and ("approx" in flags or opcode == "tanh"):
        return lambda a: numbers.approximate(opcode, a, worst)
    if opcode == "copysign" and kind in ("f32", "f64"):
        return lambda sign, size: np.copysign(size, sign)
    raise PTXError("unknown modifiers")


@operation("fma", "sqrt", "rcp", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh", "copysign")
def floats(wave, instruction):
    opcode, kind = instruction.opcode, instruction.type
    scalar = PACKED.get(kind, kind)
    known = {"add": ROUNDINGS, "sub": ROUNDINGS, "mul": ROUNDINGS, "fma": ROUNDINGS, "mad": ROUNDINGS}.get(
        opcode, ("rn", "approx") if opcode not in ("neg", "abs", "min", "max", "copysign", "div") else ()
    )
    known = {"div": ("rn", "approx", "full"), "min": ("NaN",), "max": ("NaN",)}.get(opcode, known)
    count = {"fma": 3, "mad": 3}.get(opcode, 2 if opcode in ("add", "sub", "mul", "div", "min", "max", "copysign") else 1)
    flags = flags_of(instruction, (*known, "ftz", "sat"), FLOATS | set(PACKED), count + 1)
    function = float_function(opcode, flags, scalar, wave.worst)
    flushed = "ftz" in flags and scalar == "f32"

    def compute(*sources):
        if flushed:
            sources = [numbers.flush(source) for source in sources]
        out = numbers.canonical(function(*sources), scalar)
        if "sat" in flags:
            out = numbers.saturate(out)
        return numbers.flush(out) if flushed else out

    if not flushed and "sat" not in flags and opcode in ("neg", "abs"):
        compute = function  # a NaN keeps its bits
    return bind(wave, instruction, compute, kind, *[kind] * count)


@operation("add", "sub", "neg", "abs", "min", "max", "mul", "mad", "div")
def arithmetic(wave, instruction):
    opcode = instruction.opcode
    if instruction.type in FLOATS or instruction.type in PACKED:
        return floats(wave, instruction)
    if opcode in ("mul", "mad"):
        return multiply(wave, instruction)
    count, function = SIMPLE[opcode]
    types = {kind for kind in INTEGERS if kind[0] != "b"}
    relu = flags_of(instruction, ("relu",) if opcode in ("min", "max") else (), types, count + 1)
    compute = (lambda a, b: np.maximum(function(a, b), 0)) if relu else function
    return bind(wave, instruction, compute, instruction.type, *[instruction.type] * count)


# Comparisons and choices

COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
OPPOSITE = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}


def comparison(name, kind):
    if kind in FLOATS:
        if kind == "bf16":
            inner = comparison(name, "f32")
            return lambda a, b: inner(numbers.widen(a, kind), numbers.widen(b, kind))
        if name == "num":
            return lambda a, b: (a == a) & (b == b)
        if name == "nan":
            return lambda a, b: (a != a) | (b != b)
        if name in OPPOSITE:  # true where a NaN is compared
            inner = comparison(OPPOSITE[name], kind)
            return lambda a, b: ~inner(a, b)
        if name == "ne":
            return lambda a, b: (a < b) | (a > b)
    name = UNSIGNED.get(name, name) if kind[0] == "u" else name
    if name not in COMPARE:
        raise PTXError(f"unknown modifier .{name}")
    return COMPARE[name]


@operation("setp")
def set_predicate(wave, instruction):
    compare, *rest = instruction.modifiers[:-1]
    kind, operands = instruction.type, instruction.operands
    combine = next((each for each in rest if each in COMBINE), None)
    if set(rest) - {combine, "ftz"} or kind not in INTEGERS | FLOATS:
        raise instruction.error(f"unknown modifier .{[*(set(rest) - {combine, 'ftz'}), kind][0]}")
    if len(operands) != (4 if combine else 3):
        raise instruction.error(f"got {len(operands)} operands, want {4 if combine else 3}")
    function, other = comparison(compare, kind), wave.predicate(operands[3]) if combine else None
    a, b = wave.source(operands[1], kind), wave.source(operands[2], kind)
    names = operands[0] if isinstance(operands[0], tuple) else (operands[0],)
    targets = [wave.target(name, "pred") for name in names]

    def step(mask):
        x, y = (numbers.flush(a), numbers.flush(b)) if "ftz" in rest and kind == "f32" else (a, b)
        found = function(x, y)
        for target, value in zip(targets, (found, ~found), strict=False):
            put(target, COMBINE[combine](value, other()) if combine else value, mask)

    return step


@operation("selp")
def select(wave, instruction):
    kind = instruction.type
    flags_of(instruction, (), INTEGERS | {"f32", "f64"}, 4)
    choose = wave.predicate(instruction.operands[3])
    a, b = wave.source(instruction.operands[1], kind), wave.source(instruction.operands[2], kind)
    target = wave.target(instruction.operands[0], kind)
    return lambda mask: put(target, np.where(choose(), a, b), mask)


@operation("mov")
def move(wave, instruction):
    kind = instruction.type
    flags_of(instruction, (), INTEGERS | FLOATS | {"pred"}, 2)
    to, source = instruction.operands
    if type(source) is tuple:  # the first is the lowest
        part = f"b{8 * np.dtype(TYPES[kind]).itemsize // len(source)}"
        whole, dtype = wave.target(to, kind), TYPES[kind]
        parts = [wave.source(each, part) for each in source]
        bits = np.dtype(TYPES[part]).itemsize * 8

        def pack(mask):
            out = np.zeros(wave.lanes, dtype)
            for i, each in enumerate(parts):
                out |= np.asarray(each).astype(dtype) << dtype(i * bits)
            put(whole, out, mask)

        return pack
    if type(to) is tuple:
        part = f"b{8 * np.dtype(TYPES[kind]).itemsize // len(to)}"
        value, dtype = wave.source(source, kind), TYPES[part]
        bits = np.dtype(dtype).itemsize * 8
        targets = [(i * bits, wave.target(each, part)) for i, each in enumerate(to) if each != "_"]

        def unpack(mask):
            for by, target in targets:
                put(target, (value >> value.dtype.type(by)).astype(dtype), mask)

        return unpack
    value, target = wave.source(source, kind), wave.target(to, kind)
    return lambda mask: put(target, value, mask)


@operation("cvta")
def convert_address(wave, instruction):
    """Between the generic address space and another: shared and local are windows in it, global is all the rest."""
    flags = flags_of(instruction, ("to", "global", "shared", "local"), ("u64", "u32"), 2)
    windows = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "global": 0}
    (space,) = flags - {"to"}
    kind = instruction.type
    window = TYPES[kind](windows[space] if kind == "u64" else 0)
    return bind(wave, instruction, lambda a: a - window if "to" in flags else a + window, kind, kind)


@operation("cvt")
def convert(wave, instruction):
    *flags, to, source = instruction.modifiers
    if to == "bf16x2" and source == "f32" or to == "f16x2" and source == "f32":
        return _convert_two(wave, instruction, flags, to)
    types = (INTEGERS - {"b16", "b32", "b64"}) | FLOATS | {"s8", "u8", "tf32"}
    if to not in types or source not in types:
        raise instruction.error(f"unknown modifier .{to if to not in types else source}")
    unknown = set(flags) - {*ROUNDINGS, *numbers.ROUND_TO_INTEGER, "ftz", "sat", "rna"}
    if unknown or len(instruction.operands) != 2:
        raise instruction.error(f"unknown modifier .{unknown.pop()}" if unknown else "want 2 operands")
    return bind(wave, instruction, conversion(flags, to, source), to, source)


def _convert_two(wave, instruction, flags, to):
    """cvt.rn.bf16x2.f32 d, a, b: a is the upper half."""
    if flags != ["rn"] or len(instruction.operands) != 3:
        raise instruction.error("unknown modifiers")
    scalar = PACKED[to]
    single = conversion(flags, scalar, "f32")
    target, (a, b) = wave.target(instruction.operands[0], to), (wave.source(o, "f32") for o in instruction.operands[1:])

    def step(mask):
        upper, lower = np.broadcast_arrays(single(np.atleast_1d(a)), single(np.atleast_1d(b)))
        put(target, np.stack([lower, upper], axis=-1), mask)

    return step


def conversion(flags, to, source):
    """What converts `source` to `to`."""
    mode = next((flag for flag in flags if flag in ROUNDINGS), "rn")
    whole = next((numbers.ROUND_TO_INTEGER[flag] for flag in flags if flag in numbers.ROUND_TO_INTEGER), None)
    if to == "tf32":
        if flags != ["rna"] or source != "f32":
            raise PTXError("unknown modifiers of a conversion to tf32")
        return lambda value: numbers.to_tf32(np.asarray(value).view(np.uint32))
    if source not in FLOATS and to not in FLOATS:
        dtype = TYPES[to]
        if "sat" in flags:
            limits = np.iinfo(dtype)
            return lambda value: np.clip(value, *_bounds(limits, value.dtype)).astype(dtype)
        return lambda value: np.asarray(value).astype(dtype)
    if source not in FLOATS:
        if mode != "rn":
            raise PTXError(f"unknown modifier .{mode} from an integer")
        if to in ("f32", "f64"):
            return lambda value: np.asarray(value).astype(TYPES[to])
        return lambda value: numbers.narrow(np.atleast_1d(np.asarray(value).astype(np.float64)), to)

    def prepare(value):
        value = numbers.flush(value) if "ftz" in flags and source == "f32" else value
        wide = np.atleast_1d(numbers.widen(value, source))
        return wide if whole is None else whole(wide)

    if to not in FLOATS:
        if whole is None:
            raise PTXError("a conversion to an integer without its rounding")
        return lambda value: numbers.to_integer(prepare(value), to, source)

    def to_float(value):
        out = numbers.canonical(numbers.narrow(prepare(value), to, mode), to)
        out = numbers.saturate(out) if "sat" in flags else out
        return numbers.flush(out) if "ftz" in flags and to == "f32" else out

    return to_float


def _bounds(limits, dtype):
    own = np.iinfo(dtype)
    return max(limits.min, own.min), min(limits.max, own.max)
