"""The opcodes that compute with floats, compare, and convert between numbers."""

from functools import partial, reduce

import numpy as np
import ptx_numbers as numbers
from ptx import PTXError
from ptx_numbers import FLOATS, PACKED, TYPES
from ptx_ops import INTEGERS, SIMPLE, bind, flags_of, multiply, operation, put

ROUNDINGS = ("rn", "rz", "rm", "rp")


#: opcode -> (sources, modifiers besides ftz and sat)
FLOAT_OPERATIONS = {
    **dict.fromkeys(("add", "sub", "mul"), (2, ROUNDINGS)),
    **dict.fromkeys(("fma", "mad"), (3, ROUNDINGS)),
    **dict.fromkeys(("min", "max"), (2, ("NaN", "xorsign", "abs"))),
    **dict.fromkeys(("sqrt", "rcp"), (1, ("rn", "approx"))),
    **dict.fromkeys(("rsqrt", "ex2", "lg2", "sin", "cos", "tanh"), (1, ("approx",))),
    **dict.fromkeys(("neg", "abs"), (1, ())),
    "div": (2, ("rn", "approx", "full")),
    "copysign": (2, ()),
}
ROUNDED = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
}


def of_sign(opcode, kind):
    """neg or abs, which change nothing but the sign, of a NaN too."""
    unsigned = np.dtype(f"u{np.dtype(TYPES[kind]).itemsize}").type
    sign = unsigned(1 << (8 * unsigned().itemsize - 1))
    if opcode == "neg":
        return lambda a: (np.asarray(a).view(unsigned) ^ sign).view(TYPES[kind])
    return lambda a: (np.asarray(a).view(unsigned) & ~sign).view(TYPES[kind])


def float_function(opcode, flags, kind, worst):
    """What computes `opcode` for floats of `kind`."""
    mode = next((flag for flag in flags if flag in ROUNDINGS), "rn")
    wide = partial(numbers.widen, kind=kind)
    if flags & {"approx", "full"}:
        if opcode == "rcp" and kind == "f64":
            return numbers.reciprocal_of_upper_half
        if kind == "f32":
            return (
                partial(numbers.divide, worst=worst)
                if opcode == "div"
                else partial(numbers.approximate, opcode, worst=worst)
            )
    elif opcode in ("neg", "abs"):
        return of_sign(opcode, kind)
    elif opcode in ("min", "max"):
        choose = partial(numbers.minimum, kind=kind, largest=opcode == "max", keep_nan="NaN" in flags)
        if kind == "f32" and {"xorsign", "abs"} <= flags:  # of the sizes, with the sign of the product
            return lambda a, b: np.copysign(
                choose(np.abs(a), np.abs(b)), np.copysign(np.float32(1), a) * np.copysign(np.float32(1), b)
            )
        if not flags & {"xorsign", "abs"}:
            return lambda *sources: reduce(choose, sources)
    elif opcode == "copysign":
        return lambda sign, size: np.copysign(size, sign)
    elif opcode in ROUNDED and kind in ("f32", "f64") and mode == "rn":
        return ROUNDED[opcode]
    elif opcode in ("fma", "mad"):
        return partial(numbers.fma, kind=kind, mode=mode)
    elif opcode in ("add", "sub", "mul") and kind != "f64":
        exact = {
            "add": numbers.exact_sum,
            "sub": lambda a, b: numbers.exact_sum(a, -b),
            "mul": lambda a, b: np.atleast_1d(a * b),
        }[opcode]
        return lambda a, b: numbers.narrow(exact(wide(a), wide(b)), kind, mode)
    raise PTXError(f"unknown modifiers for {opcode}.{kind}")


@operation("fma", "sqrt", "rcp", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh", "copysign")
def floats(wave, instruction):
    opcode, kind = instruction.opcode, instruction.type
    count, known = FLOAT_OPERATIONS[opcode]
    if opcode in ("min", "max") and len(instruction.operands) == 4:
        count = 3
    types = [kind] * count
    if opcode in ("add", "sub", "fma") and instruction.modifiers[-2:] in (("f32", "bf16"), ("f32", "f16")):
        instruction = instruction._replace(modifiers=instruction.modifiers[:-1])  # all but the last source are narrow
        types, kind = [kind] * (count - 1) + ["f32"], "f32"
    scalar = PACKED.get(kind, kind)
    flags = flags_of(instruction, (*known, "ftz", "sat"), FLOATS | set(PACKED), count + 1)
    function = float_function(opcode, flags, scalar, wave.worst)
    flushed = "ftz" in flags and scalar == "f32"

    def compute(*sources):
        if types[0] != kind:
            sources = [*(numbers.widen(source, types[0]).astype(np.float32) for source in sources[:-1]), sources[-1]]
        if flushed:
            sources = [numbers.flush(source) for source in sources]
        out = function(*sources)
        if opcode not in ("neg", "abs"):
            out = numbers.canonical(out, scalar)
        if "sat" in flags:
            out = numbers.saturate(out)
        return numbers.flush(out) if flushed else out

    return bind(wave, instruction, compute, kind, *types)


@operation("add", "sub", "neg", "abs", "min", "max", "mul", "mad", "div")
def arithmetic(wave, instruction):
    opcode = instruction.opcode
    if instruction.type in FLOATS or instruction.type in PACKED:
        return floats(wave, instruction)
    if opcode in ("mul", "mad"):
        return multiply(wave, instruction)
    if opcode == "add" and instruction.type in (
        "s16x2",
        "u16x2",
    ):  # two sums side by side; signed or not, the bits are the same
        flags_of(instruction, (), ("s16x2", "u16x2"), 3)

        def side_by_side(a, b):
            high = (a & 0xFFFF0000) + (b & 0xFFFF0000)
            return ((a + b) & 0xFFFF) | (high & 0xFFFF0000)

        return bind(wave, instruction, side_by_side, "u32", "u32", "u32")
    count, function = SIMPLE[opcode]
    types = {kind for kind in INTEGERS if kind[0] != "b"}
    relu = flags_of(instruction, ("relu",) if opcode in ("min", "max") else (), types, count + 1)
    compute = (lambda a, b: np.maximum(function(a, b), 0)) if relu else function
    return bind(wave, instruction, compute, instruction.type, *[instruction.type] * count)


# Comparisons

COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
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
        found = [found, ~found]
        if combine:
            found = [COMBINE[combine](value, other()) for value in found]
        for target, value in zip(targets, found, strict=False):
            put(target, value, mask)

    return step


# Conversions


@operation("cvt")
def convert(wave, instruction):
    *flags, to, source = instruction.modifiers
    if (to == "bf16x2" and source == "f32") or (to == "f16x2" and source == "f32"):
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
