"""The opcodes that reach memory: loads, stores, atomics, asynchronous copies."""

from functools import partial

import numpy as np
import ptx_numbers as numbers
from ptx import SIZES, SPACES, Address, PTXError
from ptx_memory import UNSIGNED, WINDOWS, Active
from ptx_numbers import TYPES
from ptx_ops import operation, put

#: Say how long a value stays in which cache, or which order other threads see: nothing that this machine has.
HINTS = {
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "relaxed", "acquire", "release", "weak", "volatile", "cta", "gpu", "sys",
    "L1::evict_last", "L1::evict_first", "L1::evict_normal", "L1::no_allocate", "L1::evict_unchanged",
    "L2::evict_last", "L2::evict_first", "L2::evict_normal", "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B",
}  # fmt: skip


def address_of(wave, address):
    """A function that gives an address of every thread, as int64."""
    base = address.base if isinstance(address, Address) else None
    if base is None:
        raise PTXError(f"{address} is no address")
    if base in wave.registers:
        register, offset = wave.registers[base], address.offset
        return lambda: register.astype(np.int64) + offset
    place = int(base) if base.isdigit() else wave.symbol(base)
    if place is None:
        raise PTXError(f"unknown symbol {base}")
    fixed = np.full(wave.lanes, place + address.offset, np.int64)
    return lambda: fixed


def parse_access(instruction):
    """(space or None for a generic address, type, elements) of ld and st."""
    *modifiers, kind = instruction.modifiers
    space, count = None, 1
    for modifier in modifiers:
        name = modifier.split("::")[0]
        if name in SPACES:
            space = "global" if name == "const" else name
        elif modifier in ("v2", "v4", "v8"):
            count = int(modifier[1:])
        elif modifier not in HINTS:
            raise instruction.error(f"unknown modifier .{modifier}")
    if kind not in SIZES:
        raise instruction.error(f"unknown modifier .{kind}")
    return space, kind, count


def chosen(addresses, active):
    return addresses if active.lanes is None else addresses[active.lanes]


def space_of(wave, instruction, addresses):
    """The space that generic addresses point into, and the addresses there."""
    window = int(addresses[0]) >> 60
    if (addresses >> 60 != window).any():
        raise instruction.error("generic addresses of several state spaces")
    names = {space >> 60: name for name, space in WINDOWS.items()}
    if window not in names:
        raise instruction.error(f"out of bounds: generic address {int(addresses[0]):#x}")
    return names[window], addresses - (window << 60)


def local_elements(wave, instruction, addresses, item, count, active):
    size = item * count
    if addresses.min() < 0 or addresses.max() + size > wave.kernel.local_bytes:
        raise instruction.error(f"out of bounds: local memory has {wave.kernel.local_bytes} bytes")
    if (addresses & (size - 1)).any():
        raise instruction.error(f"misaligned: local access of {size} bytes")
    lanes = np.arange(wave.lanes) if active.lanes is None else active.lanes
    return (addresses + lanes * wave.local_pitch)[:, None] // item + np.arange(count)


@operation("ld")
def load(wave, instruction):
    space, kind, count = parse_access(instruction)
    if len(instruction.operands) != 2 + ("L2::cache_hint" in instruction.modifiers):
        raise instruction.error(f"got {len(instruction.operands)} operands, want 2")
    names = instruction.operands[0] if isinstance(instruction.operands[0], tuple) else (instruction.operands[0],)
    if len(names) != count:
        raise instruction.error(f"got {len(names)} registers, want {count}")
    targets = [wave.target(name, kind) for name in names]
    if space == "param":
        return load_parameter(wave, instruction, kind, count, targets)
    address, item, dtype = address_of(wave, instruction.operands[1]), SIZES[kind], TYPES[kind]

    def step(mask):
        active = wave.active(mask)
        addresses, where = chosen(address(), active), space
        if where is None:
            where, addresses = space_of(wave, instruction, addresses)
        if where == "local":
            elements = local_elements(wave, instruction, addresses, item, count, active)
            values = wave.local.view(UNSIGNED[item])[elements]
        elif where == "param":
            values = parameter_elements(wave, instruction, addresses, item, count)
        else:
            memory = wave.memory if where == "global" else wave.shared
            values = memory.load(instruction, addresses, item, count, active)
        for i, target in enumerate(targets):
            value = values[:, i].view(dtype)
            if mask is None:
                target[:] = value
            else:
                target[active.lanes] = value

    return step


def load_parameter(wave, instruction, kind, count, targets):
    """Of a parameter by its name, which is the same for all threads, or by an address that was computed."""
    address, data = instruction.operands[1], wave.machine.parameters
    if address.base in data:
        data = data[address.base][address.offset :] if address.offset >= 0 else b""
        if len(data) < SIZES[kind] * count:
            raise instruction.error("out of bounds: no such parameter")
        values = np.frombuffer(data, TYPES[kind], count)

        def same(mask):
            for value, target in zip(values, targets, strict=True):
                put(target, value, mask)

        return same
    address = address_of(wave, address)

    def step(mask):
        active = wave.active(mask)
        values = parameter_elements(wave, instruction, chosen(address(), active), SIZES[kind], count)
        for i, target in enumerate(targets):
            target[slice(None) if mask is None else active.lanes] = values[:, i].view(TYPES[kind])

    return step


def parameter_elements(wave, instruction, addresses, item, count):
    data, size = wave.parameters, item * count
    if addresses.min() < 0 or addresses.max() + size > data.size:
        raise instruction.error(f"out of bounds: the parameters have {data.size} bytes")
    if (addresses & (size - 1)).any():
        raise instruction.error(f"misaligned: load of {size} bytes of a parameter")
    return data[: data.size - data.size % item].view(UNSIGNED[item])[addresses[:, None] // item + np.arange(count)]


@operation("st")
def store(wave, instruction):
    space, kind, count = parse_access(instruction)
    if len(instruction.operands) != 2 + ("L2::cache_hint" in instruction.modifiers):
        raise instruction.error(f"got {len(instruction.operands)} operands, want 2")
    names = instruction.operands[1] if isinstance(instruction.operands[1], tuple) else (instruction.operands[1],)
    if len(names) != count or space == "param":
        raise instruction.error(f"got {len(names)} registers, want {count}")
    item = SIZES[kind]
    sources = [wave.source(name, f"b{8 * item}") for name in names]
    address = address_of(wave, instruction.operands[0])

    def step(mask):
        active = wave.active(mask)
        addresses, where = chosen(address(), active), space
        if where is None:
            where, addresses = space_of(wave, instruction, addresses)
        values = np.empty((addresses.size, count), UNSIGNED[item])
        for i, source in enumerate(sources):
            values[:, i] = source if active.lanes is None or np.ndim(source) == 0 else source[active.lanes]
        if where == "local":
            elements = local_elements(wave, instruction, addresses, item, count, active)
            wave.local.view(UNSIGNED[item])[elements] = values
        elif where == "param":
            raise instruction.error("a store to a parameter")
        else:
            memory = wave.memory if where == "global" else wave.shared
            memory.store(instruction, addresses, values, active)

    return step


# Atomics


def compare_and_swap(old, expected, new):
    return np.where(old == expected, new, old)


ATOMIC = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "exch": lambda old, new: new, "cas": compare_and_swap,
    "inc": lambda old, top: np.where(old >= top, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, top: np.where((old == 0) | (old > top), top, old - old.dtype.type(1)),
}  # fmt: skip


@operation("atom", "red")
def atomic(wave, instruction):
    *modifiers, kind = instruction.modifiers
    gives = instruction.opcode == "atom"
    name = next((each for each in modifiers if each in ATOMIC), None)
    spaces = [each.split("::")[0] for each in modifiers if each.split("::")[0] in ("global", "shared")]
    known = {*spaces, *ATOMIC, "acq_rel", "noftz", "relaxed", "acquire", "release", "cta", "gpu", "sys", "shared::cta"}
    unknown = [each for each in modifiers if each not in known]
    if name is None or unknown or len(spaces) > 1 or kind not in TYPES:
        raise instruction.error(f"unknown modifier .{(unknown or [kind])[0]}")
    want = gives + 1 + (2 if name == "cas" else 1)
    if len(instruction.operands) != want:
        raise instruction.error(f"got {len(instruction.operands)} operands, want {want}")
    item, dtype = SIZES[kind], TYPES[kind]
    apply = ATOMIC[name]
    if kind in ("f16", "bf16"):
        wide = partial(numbers.widen, kind=kind)
        apply = {"add": lambda a, b: numbers.narrow(numbers.exact_sum(wide(a), wide(b)), kind)}[name]
    target = wave.target(instruction.operands[0], kind) if gives else None
    address = address_of(wave, instruction.operands[int(gives)])
    sources = [wave.source(operand, kind) for operand in instruction.operands[gives + 1 :]]

    def step(mask):
        active = wave.active(mask)
        addresses, where = chosen(address(), active), spaces[0] if spaces else None
        if where is None:
            where, addresses = space_of(wave, instruction, addresses)
        values = [np.broadcast_to(each, wave.lanes) for each in sources]
        values = values if active.lanes is None else [each[active.lanes] for each in values]
        before = np.empty(addresses.size, dtype)
        if where == "global":
            for buffer, some, at in wave.memory.access(instruction, "atomic", addresses, item, 1, active):
                some = np.arange(addresses.size) if some is None else some
                before[some] = update(buffer.views[item], at[:, 0], apply, [each[some] for each in values], dtype)
        else:
            at = wave.shared.access(instruction, "atomic", addresses, item, 1, active)
            before = update(wave.shared.views[item], at[:, 0], apply, values, dtype)
        if target is not None:
            target[slice(None) if active.lanes is None else active.lanes] = before

    return step


def update(memory, at, apply, values, dtype):
    """One thread after the other, where several have one element; what each found there."""
    before, left = np.empty(at.size, dtype), np.arange(at.size)
    while left.size:
        _, first = np.unique(at[left], return_index=True)
        now = left[first]
        before[now] = memory[at[now]].view(dtype)
        memory[at[now]] = apply(before[now], *(value[now] for value in values)).astype(dtype).view(memory.dtype)
        left = np.delete(left, first)
    return before


# Asynchronous copies: what is copied stands in shared memory after the wait for its group


@operation("cp")
def copy_async(wave, instruction):
    modifiers, operands = instruction.modifiers, instruction.operands
    if modifiers[:1] != ("async",):
        raise instruction.error("unknown modifiers")
    if modifiers[1:] == ("commit_group",):
        return lambda mask: _commit(wave, mask)
    if modifiers[1:] in (("wait_group",), ("wait_all",)):
        left = operands[0] if operands else 0
        return lambda mask: _wait(wave, mask, left, all_of_them="wait_all" in modifiers)
    hints = [each for each in modifiers[1:] if each not in ("ca", "cg") and not each.startswith("L2::")]
    if hints != ["shared", "global"] and hints != ["shared::cta", "global"]:
        raise instruction.error("unknown modifiers")
    if len(operands) not in (3, 4) or operands[2] not in (4, 8, 16):
        raise instruction.error("want shared and global addresses, 4, 8 or 16 bytes, and how many of them to read")
    to, source, size = address_of(wave, operands[0]), address_of(wave, operands[1]), operands[2]
    read = wave.source(operands[3], "u32") if len(operands) == 4 else np.uint32(size)

    def step(mask):
        wanted = np.broadcast_to(read, wave.lanes)
        here = np.ones(wave.lanes, bool) if mask is None else mask
        if not np.isin(wanted[here], (0, size)).all():
            raise instruction.error("a copy of some of its bytes")
        data = np.zeros((wave.lanes, size // 4), np.uint32)
        reading = here & (wanted == size)
        if reading.any():
            active = wave.active(None if reading.all() else reading)
            data[reading] = wave.memory.load(instruction, chosen(source(), active), 4, size // 4, active)
        lanes = np.flatnonzero(here)
        wave.pending.append((instruction, lanes, wave.commits[lanes], to()[lanes], data[lanes]))

    return step


def _commit(wave, mask):
    wave.commits[slice(None) if mask is None else mask] += 1


def _wait(wave, mask, groups_left, all_of_them):
    """Finish the copies of the threads in `mask` but for their last `groups_left` groups."""
    rest = []
    for instruction, lanes, groups, to, data in wave.pending:
        done = (groups < wave.commits[lanes] - groups_left) | all_of_them
        if mask is not None:
            done &= mask[lanes]
        if done.any():
            active = Active(lanes[done], wave.stamps[lanes[done]], wave.program[lanes[done]])
            active = wave.everyone if active.lanes.size == wave.lanes else active
            wave.shared.store(instruction, to[done], data[done], active)
        if not done.all():
            rest.append((instruction, lanes[~done], groups[~done], to[~done], data[~done]))
    wave.pending = rest


@operation("fence", "membar", "createpolicy", "prefetch", "griddepcontrol", "nop", "discard")
def no_operation(wave, instruction):
    """Orders or hints that change nothing here: every access is seen at once."""
    return lambda mask: None
