"""The opcodes that compute with integers and bits, or move them; how an opcode is bound.

An opcode is a function of the wave and the instruction that looks up the operands once and gives step(mask), where mask is None if
all threads take part. What a step computes for the other threads is thrown away.
"""

from functools import partial

import numpy as np
from ptx_memory import WINDOWS
from ptx_numbers import FLOATS, TYPES

OPERATIONS = {}  # opcode -> function(wave, instruction)
INTEGERS = {kind + bits for kind in "bsu" for bits in ("16", "32", "64")}


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
    sources = [wave.source(operand, kind) for operand, kind in zip(instruction.operands[1:], source_types, strict=True)]

    def step(mask):
        put(target, compute(*sources), mask)

    return step


# Integers and bits


def shift_left(value, by):
    """Beyond the register nothing is left, as numpy has it too."""
    return value << np.minimum(by, np.uint32(value.dtype.itemsize * 8)).astype(value.dtype)


def shift_right(value, by):
    return value >> np.minimum(by, np.uint32(value.dtype.itemsize * 8)).astype(value.dtype)


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
    return np.where(
        length == 0, value.dtype.type(0), np.where(start >= bits, shift_right(value, np.uint32(bits - 1)), out)
    )


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
            return sum(
                (((value >> value.dtype.type(i)) & value.dtype.type(1)) << value.dtype.type(bits - 1 - i))
                for i in range(bits)
            )

        return bind(wave, instruction, reverse, kind, kind)
    function = (
        count_leading_zeros if instruction.opcode == "clz" else lambda value: np.bitwise_count(value).astype(np.uint32)
    )
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
        out = high_product(a, b) if part == "hi" else np.multiply(a, b, dtype=dtype)
        return out + c[0] if c else out

    return bind(wave, instruction, product, wide, kind, kind, *[wide] * (count - 2))


# Choices and moves


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
    """Between the generic address space and another: the others are windows in it, global is all the rest."""
    flags = flags_of(instruction, ("to", *WINDOWS), ("u64", "u32"), 2)
    (space,) = flags - {"to"}
    kind = instruction.type
    window = TYPES[kind](WINDOWS[space] if kind == "u64" else 0)
    return bind(wave, instruction, lambda a: a - window if "to" in flags else a + window, kind, kind)
