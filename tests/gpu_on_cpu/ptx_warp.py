"""The opcodes in which the threads of a warp work together: shuffles, votes, reductions, matrices."""

import numpy as np
import ptx_barriers
import ptx_numbers as numbers
from ptx import PTXError
from ptx_access import address_of
from ptx_ops import flags_of, operation, put

BITS = np.uint32(1) << np.arange(32, dtype=np.uint32)
WHOLE = 0xFFFFFFFF


def bits_of_warps(wave, predicate):
    """uint32 [warps]: one bit for every thread whose predicate is true."""
    return (predicate.reshape(-1, 32) * BITS).sum(axis=1, dtype=np.uint32)


def members(wave, instruction, operand):
    """A function of the mask that checks that the threads named by the member mask take part; gives the mask's bits."""
    named = wave.source(operand, "u32")

    def check(mask):
        if mask is None:
            return named
        here = bits_of_warps(wave, mask)[wave.warp]
        missing = mask & ((named & ~here) != 0)
        if missing.any():
            thread = int(np.flatnonzero(missing)[0])
            raise instruction.error(
                f"missing lanes: thread {thread % wave.machine.threads} names threads that do not take part"
            )
        return named

    return check


@operation("shfl")
def shuffle(wave, instruction):
    flags = flags_of(instruction, ("sync", "up", "down", "bfly", "idx"), ("b32",), 5)
    mode = next(iter(flags - {"sync"}), None)
    to, value, by, clamp, mask_operand = instruction.operands
    check, value = members(wave, instruction, mask_operand), wave.source(value, "b32")
    by, clamp = wave.source(by, "u32"), wave.source(clamp, "u32")
    first, second = to if isinstance(to, tuple) else (to, None)
    target = wave.target(first, "b32")
    inside_target = wave.target(second, "pred") if second else None
    lane = (np.arange(wave.lanes) % 32).astype(np.int64)

    def partner():
        step, end = np.asarray(by).astype(np.int64) & 31, np.asarray(clamp).astype(np.int64)
        segment, end = (end >> 8) & 31, end & 31
        last = (lane & segment) | (end & ~segment)
        other = {
            "up": lambda: lane - step,
            "down": lambda: lane + step,
            "bfly": lambda: lane ^ step,
            "idx": lambda: (lane & segment) | (step & ~segment),
        }[mode]()
        inside = other >= last if mode == "up" else other <= last
        return wave.first_of_warp + np.where(inside, other, lane), inside

    fixed = partner() if by.ndim == 0 and clamp.ndim == 0 else None

    def step(mask):
        check(mask)
        where, inside = fixed or partner()
        if mask is not None and not mask[where[mask]].all():
            raise instruction.error("missing lanes: a thread reads from one that does not take part")
        put(target, np.take(np.broadcast_to(value, wave.lanes), where), mask)
        if inside_target is not None:
            put(inside_target, inside, mask)

    return step


@operation("vote")
def vote(wave, instruction):
    flags = flags_of(instruction, ("sync", "all", "any", "uni", "ballot"), ("pred", "b32"), 3)
    (mode,) = flags - {"sync"}
    check = members(wave, instruction, instruction.operands[2])
    predicate, target = wave.predicate(instruction.operands[1]), wave.target(instruction.operands[0], instruction.type)

    def step(mask):
        named = check(mask)
        yes = np.broadcast_to(predicate(), wave.lanes)
        yes = bits_of_warps(wave, yes if mask is None else yes & mask)[wave.warp] & named
        put(
            target,
            {"all": yes == named, "any": yes != 0, "uni": (yes == 0) | (yes == named), "ballot": yes}[mode],
            mask,
        )

    return step


@operation("activemask")
def active_mask(wave, instruction):
    flags_of(instruction, (), ("b32",), 1)
    target = wave.target(instruction.operands[0], "b32")
    everyone = np.ones(wave.lanes, bool)
    return lambda mask: put(target, bits_of_warps(wave, everyone if mask is None else mask)[wave.warp], mask)


@operation("elect")
def elect(wave, instruction):
    """One thread of the warp, the first, is chosen."""
    if instruction.modifiers != ("sync",) or len(instruction.operands) != 2:
        raise instruction.error("want elect.sync d|p, members")
    name, chosen = instruction.operands[0]
    check = members(wave, instruction, instruction.operands[1])
    target, predicate = wave.target(name, "b32"), wave.target(chosen, "pred")
    lane = np.arange(wave.lanes) % 32

    def step(mask):
        named = np.broadcast_to(np.asarray(check(mask)).astype(np.int64), wave.lanes)
        first = np.bitwise_count(((named & -named) - 1).astype(np.uint64)).astype(np.uint32)
        put(target, first, mask)
        put(predicate, lane == first, mask)

    return step


REDUCE = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


@operation("redux")
def reduce(wave, instruction):
    kind = instruction.type
    flags = flags_of(instruction, ("sync", *REDUCE, "abs", "NaN"), ("s32", "u32", "b32", "f32"), 3)
    name = next(each for each in REDUCE if each in flags)
    check = members(wave, instruction, instruction.operands[2])
    value, target = wave.source(instruction.operands[1], kind), wave.target(instruction.operands[0], kind)

    def step(mask):
        if mask is not None and (mask.reshape(-1, 32).any(axis=1) != mask.reshape(-1, 32).all(axis=1)).any():
            raise instruction.error("missing lanes: a reduction over a part of a warp")
        if (np.asarray(check(mask)) != WHOLE).any():
            raise instruction.error("missing lanes: a reduction over a part of a warp")
        rows = np.broadcast_to(value, wave.lanes).reshape(-1, 32)
        if kind == "f32":
            rows = np.abs(rows) if "abs" in flags else rows
            out = {"min": np.fmin, "max": np.fmax}[name].reduce(rows, axis=1)
            out = np.where(np.isnan(rows).any(axis=1), np.float32(np.nan), out) if "NaN" in flags else out
        else:
            out = REDUCE[name].reduce(rows, axis=1)
        put(target, np.repeat(out, 32), mask)

    return step


@operation("bar", "barrier")
def warp_barrier(wave, instruction):
    """bar.warp.sync and the first half of the barrier of a cluster; the others end a block of instructions."""
    if "arrive" in instruction.modifiers:
        return ptx_barriers.arrive(wave, instruction)
    if instruction.modifiers != ("warp", "sync") or len(instruction.operands) != 1:
        raise instruction.error("unknown modifiers")
    check = members(wave, instruction, instruction.operands[0])
    return lambda mask: check(mask)


# Matrices. Fragments are gathered to [warps, rows, columns], and the products are taken there.


def whole_warps(wave, instruction, mask):
    """The numbers of the warps that take part, each with all its threads."""
    if mask is None:
        return np.arange(wave.lanes // 32)
    rows = mask.reshape(-1, 32)
    if (rows.any(axis=1) != rows.all(axis=1)).any():
        raise instruction.error("missing lanes: a matrix instruction by a part of a warp")
    return np.flatnonzero(rows.all(axis=1))


@operation("ldmatrix", "stmatrix")
def matrix_access(wave, instruction):
    """1, 2 or 4 matrices of 8 x 8 numbers of 16 bits: thread 8 i + j has the address of row j of matrix i."""
    loads = instruction.opcode == "ldmatrix"
    shared = [each for each in instruction.modifiers if each.split("::")[0] == "shared"]
    flags = flags_of(instruction, ("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", *shared), ("b16",), 2)
    count = next((int(each[1:]) for each in flags if each in ("x1", "x2", "x4")), 0)
    names, address = instruction.operands if loads else instruction.operands[::-1]
    names = names if type(names) is tuple else (names,)
    if len(shared) != 1 or count != len(names):
        raise instruction.error(f"got {len(names)} registers, want {count}, in shared memory")
    registers = [wave.target(name, "b32") if loads else wave.source(name, "b32") for name in names]
    address = address_of(wave, address)
    # thread 4 r + c holds numbers 2 c and 2 c + 1 of row r
    row, column = np.divmod(np.arange(32), 4)
    pairs = np.stack([row * 8 + 2 * column, row * 8 + 2 * column + 1], axis=1)  # [32,2] of the 64 numbers
    if "trans" in flags:
        pairs = pairs % 8 * 8 + pairs // 8

    def step(mask):
        warps = whole_warps(wave, instruction, mask)
        lanes = (warps[:, None] * 32 + np.arange(8 * count)).ravel()
        rows = address()[lanes]
        part = np.zeros(wave.lanes, bool)
        part[lanes] = True
        active = wave.active(None if part.all() else part)
        if loads:
            data = wave.shared.load(instruction, rows, 2, 8, active).reshape(len(warps), count, 64)
            for i, register in enumerate(registers):
                words = np.ascontiguousarray(data[:, i][:, pairs]).view(np.uint32)
                register.reshape(-1, 32)[warps] = words.reshape(len(warps), 32)
        else:
            data = np.empty((len(warps), count, 64), np.uint16)
            for i, register in enumerate(registers):
                words = np.ascontiguousarray(register.reshape(-1, 32)[warps]).view(np.uint16)
                data[:, i, pairs.ravel()] = words.reshape(len(warps), 64)
            wave.shared.store(instruction, rows, data.reshape(-1, 8), active)

    return step


def _fragments(m, n, k, kind):
    """(row, column) of what each thread holds of a [m,k], b [k,n] and c [m,n]: arrays [registers * packed, 32]."""
    lane = np.arange(32)
    group, thread = lane // 4, lane % 4
    packed = {"f16": 2, "bf16": 2}.get(kind, 1)
    a, b = [], []
    for i in range(m * k // 32):  # rows alternate between the upper and the lower half, then come the next columns
        pair, part = divmod(i, packed)
        rows = m // 8
        a.append((group + 8 * (pair % rows), thread * packed + part + 4 * packed * (pair // rows)))
    for i in range(k * n // 32):
        pair, part = divmod(i, packed)
        b.append((thread * packed + part + 4 * packed * pair, group))
    c = [(group + 8 * (i // 2), 2 * thread + i % 2) for i in range(m * n // 32)]
    return a, b, c


#: (shape, type of a and b, type of c and d)
PRODUCTS = {
    ("m16n8k4", "tf32", "f32"), ("m16n8k8", "tf32", "f32"), ("m16n8k8", "bf16", "f32"), ("m16n8k16", "bf16", "f32"),
    ("m16n8k8", "f16", "f32"), ("m16n8k16", "f16", "f32"), ("m8n8k4", "f64", "f64"),
    ("m16n8k4", "f64", "f64"), ("m16n8k8", "f64", "f64"), ("m16n8k16", "f64", "f64"),
}  # fmt: skip


@operation("mma")
def matrix_product(wave, instruction):
    """d = a b + c. The order of the sum is the chip's own; here it is exact for narrow types, and rounded once."""
    modifiers = instruction.modifiers
    if len(modifiers) != 9 or modifiers[:2] != ("sync", "aligned") or modifiers[3:5] != ("row", "col"):
        raise instruction.error("unknown modifiers")
    shape, d, kind, other, c = modifiers[2], *modifiers[5:]
    if (shape, kind, c) not in PRODUCTS or kind != other or c != d:
        raise instruction.error(f"unknown matrix product {shape} of {kind}, {other}, {c} to {d}")
    m, nk = shape[1:].split("n")
    m, n, k = int(m), *map(int, nk.split("k"))
    places = _fragments(m, n, k, kind)
    register = {"f16": "f16x2", "bf16": "bf16x2"}.get(kind, kind)
    out, *operands = instruction.operands
    packed = 2 if register != kind else 1
    wants = [len(places[2]), len(places[0]) // packed, len(places[1]) // packed, len(places[2])]
    if [len(each) for each in instruction.operands] != wants:
        raise instruction.error(f"want {wants} registers")
    sources = [
        [wave.source(name, each) for name in names]
        for names, each in zip(operands, (register, register, c), strict=True)
    ]
    targets = [wave.target(name, d) for name in out]

    def gather(registers, where, shape, kind, warps):
        matrix = np.zeros((len(warps), *shape))
        values = [each for register in registers for each in (register.T if register.ndim == 2 else (register,))]
        for value, (row, column) in zip(values, where, strict=True):
            value = np.broadcast_to(value, wave.lanes).reshape(-1, 32)[warps]
            if kind == "tf32":
                value = (value & np.uint32(0xFFFFE000)).view(np.float32)
            matrix[:, row, column] = numbers.widen(value, kind)
        return matrix

    def step(mask):
        warps = whole_warps(wave, instruction, mask)
        a, b, total = (
            gather(registers, where, size, each, warps)
            for registers, where, size, each in zip(
                sources, places, ((m, k), (k, n), (m, n)), (kind, kind, c), strict=True
            )
        )
        total = total + a @ b
        for target, (row, column) in zip(targets, places[2], strict=True):
            target.reshape(-1, 32)[warps] = total[:, row, column].astype(target.dtype)

    return step


@operation("wgmma")
def warp_group_product(wave, instruction):
    raise PTXError(
        "warp group products are unknown to this machine: compile for sm_80, or give blocks of less than 64 rows"
    )
