"""PTX text, read into instructions: what the machine of ptx_machine.py runs. Of several entry functions in a text one is named."""

import functools
import re
from typing import NamedTuple

#: Bytes of the types that registers, memory and parameters may have.
SIZES = {kind + bits: int(bits) // 8 for kind in "bsuf" for bits in ("8", "16", "32", "64")} | {"bf16": 2, "tf32": 4}

SPACES = ("global", "shared", "local", "param", "const")


class PTXError(Exception):
    """PTX that this machine does not know, or that does what a GPU would not forgive."""


class Float(NamedTuple):
    """0f3F800000 or 0d3FF0000000000000, by its bits."""

    bits: int
    size: int


class Address(NamedTuple):
    base: str
    offset: int


class Pair(NamedTuple):
    """a|b: two destinations, of which the second is a predicate."""

    first: str
    second: str


class Not(NamedTuple):
    register: str


class Instruction(NamedTuple):
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple  # str (register, symbol or "_"), int, Float, Address, Pair, Not, or a tuple of them: {a, b}
    guard: str | None
    guard_negated: bool
    text: str
    source: str  # "file.py:12" of the kernel, or ""
    family: (
        str  # the opcode and the space that it reaches ("ld.global") or the type of float that it computes ("fma.f32")
    )

    def error(self, message):
        where = f" ({self.source})" if self.source else ""
        return PTXError(f"{message} in `{self.text}`{where}")

    @property
    def type(self):
        return self.modifiers[-1] if self.modifiers else ""


class Kernel(NamedTuple):
    name: str
    text: str
    parameters: tuple[tuple[str, str, int], ...]  # (name, type, how many of it)
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # -> index of the instruction that follows
    registers: dict[str, str]  # -> type
    shared: dict[str, int]  # symbol -> offset
    shared_bytes: int  # of the arrays whose size the text gives
    local: dict[str, int]  # symbol -> offset
    local_bytes: int  # of one thread
    constants: dict[str, bytes]
    threads: int | None  # .reqntid


_ITEM = re.compile(r"\s*(?:(?P<label>[$\w]+):|\.loc\s+(?P<loc>\d+\s+\d+)[^\n]*|(?P<brace>[{}])|(?P<statement>[^;]*);)")
_STATEMENT = re.compile(r"(?:@(?P<negated>!?)(?P<guard>%?[\w$]+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*)", re.S)


def _split(text):
    """At the commas that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and not depth:
            parts.append(text[start:i])
            start = i + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def _operand(text, name_of):
    if text[0] == "{":
        return tuple(_operand(part, name_of) for part in _split(text.strip("{}")))
    if text[0] == "[":
        base, _, offset = text.strip("[] ").partition("+")
        return Address(name_of(base.strip()), int(offset.strip() or "0", 0))
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
        return Float(int(match[1] or match[2], 16), 4 if match[1] else 8)
    if re.fullmatch(r"-?\d\w*", text):
        return int(text.rstrip("U"), 0)
    if "|" in text:
        return Pair(*(name_of(part.strip()) for part in text.split("|")))
    return Not(name_of(text[1:])) if text[0] == "!" else name_of(text)


def _arrays(text, space):
    """(name, alignment, size in bytes or None, values or None) of every array in a state space."""
    pattern = rf"\.{space}\s+(?:\.align\s+(\d+)\s+)?\.([bsuf]\d+)\s+([\w$]+)\[(\d*)\](?:\s*=\s*\{{([^}}]*)\}})?\s*;"
    for alignment, kind, name, count, values in re.findall(pattern, text):
        size = SIZES[kind] * int(count) if count else None
        given = [int(value, 0) & (256 ** SIZES[kind] - 1) for value in values.split(",")] if values.strip() else None
        data = b"".join(value.to_bytes(SIZES[kind], "little") for value in given) if given else None
        yield name, int(alignment or SIZES[kind]), size, data


def _place(arrays):
    """Offsets of arrays one after the other; one without a size, of which there may be one, comes after them all."""
    offsets, end, open_ended = {}, 0, []
    for name, alignment, size, _ in arrays:
        if size is None:
            open_ended.append(name)
        else:
            end = -(-end // alignment) * alignment
            offsets[name], end = end, end + size
    return offsets | dict.fromkeys(open_ended, -(-end // 16) * 16), end


class _Body:
    """The instructions between the braces of an entry."""

    def __init__(self, text, files):
        self.instructions, self.labels, self.registers, self.source = [], {}, {}, ""
        scopes, position = [{}], 0
        self.name_of = lambda name: next((scope[name] for scope in reversed(scopes) if name in scope), name)
        while match := _ITEM.match(text, position):
            position = match.end()
            if match["label"]:
                self.labels[match["label"]] = len(self.instructions)
            elif match["loc"]:
                file, line = match["loc"].split()
                self.source = f"{files.get(file, '?')}:{line}" if int(line) else self.source
            elif match["brace"] == "{":
                scopes.append({})
            elif match["brace"]:
                scopes.pop()
            elif match["statement"].startswith(".reg"):
                self._declare(match["statement"], scopes)
            elif match["statement"] and not match["statement"].startswith("."):
                self._instruction(" ".join(match["statement"].split()))
        if text[position:].strip():
            raise PTXError(f"text that is no statement: {text[position:].strip()[:80]!r}")

    def _declare(self, statement, scopes):
        kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()
        for name in _split(names):
            many = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
            for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                unique = each if len(scopes) == 1 else f"{each}@{len(self.registers)}"
                scopes[-1][each] = unique
                self.registers[unique] = kind

    def _instruction(self, statement):
        match = _STATEMENT.fullmatch(statement)
        if not match:
            raise PTXError(f"no instruction: {statement!r}")
        opcode, *modifiers = match["opcode"].split(".")
        operands = tuple(_operand(part, self.name_of) for part in _split(match["operands"]))
        guard = match["guard"] and self.name_of(match["guard"])
        space = next((each for each in modifiers if each.split("::")[0] in SPACES), None)
        space = space.split("::")[0] if space and opcode != "cvta" else None
        kind = modifiers[-1] if modifiers and opcode not in ("cvt", "mov", "selp", "setp") else ""
        family = ".".join(filter(None, (opcode, space or (kind if "f" in kind else None))))
        self.instructions.append(
            Instruction(
                opcode, tuple(modifiers), operands, guard, bool(match["negated"]), statement, self.source, family
            )
        )


@functools.lru_cache(maxsize=8)
def _read(given):
    """The text without comments, the names of its files, and where each entry begins."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", given, flags=re.S)
    files = dict(re.findall(r'\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]+)"', text))
    return text, files, list(re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text))


def entries(given: str) -> list[re.Match]:
    """Of each entry, [1] is its name."""
    return _read(given)[2]


@functools.lru_cache(maxsize=256)
def parse(given: str, name: str | None = None) -> Kernel:
    """The entry `name`, or the only one."""
    text, files, found = _read(given)
    first = found[0].start() if found else len(text)
    found = [entry for entry in found if name in (None, entry[1])]
    if len(found) != 1 or ".func" in text:
        raise PTXError(f"got {len(found)} entries{' and a .func' if '.func' in text else ''}, want one entry alone")
    (entry,) = found
    depth, end = 1, entry.end()
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    head, body = text[:first], text[entry.end() : end - 1]
    pattern = r"\.param\s+(?:\.align\s+\d+\s+)?\.([bsuf]\d+)[^,\[]*?([\w$]+)(?:\[(\d+)\])?\s*(?:,|$)"
    parameters = re.findall(pattern, entry[2].strip())
    read = _Body(body, files)
    shared, shared_bytes = _place(list(_arrays(head + body, "shared")))
    local, local_bytes = _place(list(_arrays(body, "local")))
    constants = {
        name: values or bytes(size) for space in ("global", "const") for name, _, size, values in _arrays(head, space)
    }
    threads = re.search(r"\.reqntid\s+(\d+)", entry[3])
    return Kernel(
        entry[1],
        given,
        tuple((name, kind, int(count or 1)) for kind, name, count in parameters),
        tuple(read.instructions),
        read.labels,
        read.registers,
        shared,
        shared_bytes,
        local,
        local_bytes,
        constants,
        int(threads[1]) if threads else None,
    )
