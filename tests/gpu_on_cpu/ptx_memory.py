"""Memory of the PTX machine: bounds, alignment, races and first writes of every access, and what it costs.

Who touched an element, and when, is one number, a stamp: the stretch between two barriers of one program (a number that no other
stretch has), and the warp. Two warps that touch an element in one stretch, one of them writing, race; so do two programs, ever.
"""

import ctypes
from typing import NamedTuple

import numpy as np

WARP_BITS = 6  # of a stamp; warps are 0 to 31
CLUSTER_SHIFT = 44  # where a stamp counts the halves of cluster barriers that the thread came through
RANK_SHIFT = 24  # of an address in shared memory: from there on, one more than the rank of another block of the cluster
SEVERAL = (1 << WARP_BITS) - 1  # in place of the warp
#: Where the state spaces begin in the generic address space.
WINDOWS = {"global": 0, "shared": 1 << 60, "local": 2 << 60, "param": 3 << 60}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
CONFLICTS = {"load": ("atomic", "store"), "store": ("load", "atomic"), "atomic": ("load", "store")}

PAST = {"load": "loaded", "store": "stored", "atomic": "updated"}


def stretch_of(stamps):
    return (stamps & ((1 << CLUSTER_SHIFT) - 1)) >> WARP_BITS


def parts_of(stamps, programs):
    """(halves of cluster barriers, barriers of the block, program)"""
    epoch, program = np.divmod(stretch_of(stamps), programs)
    return stamps >> CLUSTER_SHIFT, epoch, program


class Active(NamedTuple):
    """The threads that take part in an access."""

    lanes: np.ndarray | None  # their numbers; None for all of them
    stamps: np.ndarray
    programs: np.ndarray


class Shadow:
    """Which warp of which program last loaded, stored and updated each element."""

    def __init__(self, size, programs):
        self.size, self.programs = size, programs
        self.last = {}  # kind -> the stamp of each element, -1 for none
        self.program = {}  # kind -> the program of each element, -1 for none and -2 for several

    def touch(self, kind, at, stamps):
        """Note an access to elements `at`. If it races: what the other access was, and the position in `at`; else None.

        Two stores are for the caller to judge, by `clashes` before this, and by what stands there afterwards.
        """
        for other in CONFLICTS[kind]:
            if (clash := self.clashes(other, at, stamps)).any():
                return other, int(np.flatnonzero(clash)[0])
        if kind not in self.last:
            self.last[kind] = np.full(self.size, -1)
            self.program[kind] = np.full(self.size, -1, np.int32)
        self._note(kind, at, stamps)
        return None

    def clashes(self, other, at, stamps):
        """Where another warp made an access of kind `other` in this stretch, or another program ever: bool, as `at`."""
        if other not in self.last:
            return np.zeros(1, bool)
        last, mine = self.last[other][at], stretch_of(stamps)
        bad = (last >= 0) & (last != stamps) & (stretch_of(last) == mine)
        if self.programs > 1:
            program = self.program[other][at]
            bad |= (program != -1) & (program != mine % self.programs)
        return bad

    def _note(self, kind, at, stamps):
        table = self.last[kind]
        last = table[at]
        together = ((last ^ stamps) >> WARP_BITS == 0) & (last != stamps)
        new = np.where(together, stamps | SEVERAL, stamps)
        table[at] = new
        lost = (table[at] != new) & ((table[at] ^ new) >> WARP_BITS == 0)
        if lost.any():
            table[at[lost]] |= SEVERAL
        if self.programs > 1:
            table, program = self.program[kind], (stretch_of(stamps) % self.programs).astype(np.int32)
            last = table[at]
            new = np.where((last == -1) | (last == program), program, np.int32(-2))
            table[at] = new
            lost = table[at] != new
            if lost.any():
                table[at[lost]] = -2

    def count(self, *kinds):
        """How many elements had an access of one of these kinds."""
        seen = [self.last[kind] >= 0 for kind in kinds if kind in self.last]
        return int(np.any(seen, axis=0).sum()) if seen else 0


def distinct(values, active):
    """How many different values each warp has, summed over the warps."""
    if active.lanes is None:
        rows = np.sort(values.reshape(-1, 32), axis=1)
        return int((rows[:, 1:] != rows[:, :-1]).sum()) + len(rows)
    order = np.lexsort((values, active.stamps))
    values, warps = values[order], active.stamps[order]
    return int(((values[1:] != values[:-1]) | (warps[1:] != warps[:-1])).sum()) + 1


def elements(places, size, item, stamps):
    """The elements of `item` bytes that accesses of `size` bytes at bytes `places` touch, and the stamp for each."""
    if size <= item:
        return places // item, stamps
    count = size // item
    return (places[:, None] // item + np.arange(count)).ravel(), np.repeat(stamps, count)


class Buffer:
    """A tensor that the kernel was given, in its own memory."""

    def __init__(self, name, tensor, programs):
        self.name, self.low, self.item = name, tensor.data_ptr(), tensor.element_size()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.size = (last + 1) * self.item
        self.high = self.low + self.size
        self.base = self.low - self.low % 16  # elements are counted from an aligned address
        span = self.high - self.base
        raw = np.frombuffer((ctypes.c_uint8 * span).from_address(self.base), np.uint8)
        self.views = {n: raw[: span - span % n].view(kind) for n, kind in UNSIGNED.items()}
        self.shadow = Shadow(-(-span // self.item), programs)

    def race(self, kind, touched, stamps):
        """As Shadow.touch, and two warps that store to one element race whatever they store."""
        if kind == "store" and (clash := self.shadow.clashes("store", touched, stamps)).any():
            return "store", int(np.flatnonzero(clash)[0])
        if (race := self.shadow.touch(kind, touched, stamps)) is not None or kind != "store":
            return race
        twice = np.flatnonzero(self.shadow.last["store"][touched] != stamps)  # in this very instruction
        return ("store", int(twice[0])) if twice.size else None


class GlobalMemory:
    def __init__(self, tensors, programs, stats):
        self.stats = stats
        by_address = {}
        for name, tensor in tensors.items():
            if tensor.numel():
                by_address.setdefault(tensor.data_ptr(), (name, tensor))
        self.buffers = [Buffer(*by_address[address], programs) for address in sorted(by_address)]
        self.lows = np.array([buffer.low for buffer in self.buffers], dtype=np.int64)

    def _find(self, instruction, kind, addresses, size):
        """(buffer, positions in `addresses` or None for all) for each buffer that is touched."""
        if not self.buffers:
            raise instruction.error(f"out of bounds: global {kind}, and the kernel was given no tensor")
        low, high = int(addresses.min()), int(addresses.max()) + size
        first = self.buffers[max(int(np.searchsorted(self.lows, low, side="right")) - 1, 0)]
        if first.low <= low and high <= first.high:
            return [(first, None)]
        owner = np.maximum(np.searchsorted(self.lows, addresses, side="right") - 1, 0)
        found = []
        for number in np.unique(owner):
            buffer, chosen = self.buffers[number], np.flatnonzero(owner == number)
            mine = addresses[chosen]
            outside = mine[(mine < buffer.low) | (mine + size > buffer.high)]
            if outside.size:
                bad = int(outside[0])
                near = min(self.buffers, key=lambda each: max(each.low - bad, bad - each.high))
                raise instruction.error(
                    f"out of bounds: global {kind} of {size} bytes by {outside.size} threads, the first"
                    f" {bad - near.low:+d} bytes from the start of {near.name}, which has {near.size}"
                )
            found.append((buffer, chosen))
        return found

    def access(self, instruction, kind, addresses, item, count, active):
        """[(buffer, positions or None for all, elements [threads,count] of `item` bytes)], after every check."""
        size = item * count
        if (addresses & (size - 1)).any():
            raise instruction.error(f"misaligned: global {kind} of {size} bytes")
        out = []
        for buffer, chosen in self._find(instruction, kind, addresses, size):
            places, who = addresses - buffer.base, active
            if chosen is not None:
                places, who = places[chosen], Active(chosen, active.stamps[chosen], active.programs[chosen])
            self._count(kind, buffer, places, size, who)
            touched, stamps = elements(places, size, buffer.item, who.stamps)
            race = buffer.race(kind, touched, stamps)
            if race is not None:
                at = int(touched[race[1]]) - (buffer.low - buffer.base) // buffer.item
                raise instruction.error(
                    f"race: global {kind} at {buffer.name}[{at}], {PAST[race[0]]} by another warp or program"
                    " with no barrier in between"
                )
            at = places // item
            out.append((buffer, chosen, at[:, None] + np.arange(count) if count > 1 else at[:, None]))
        return out

    def _count(self, kind, buffer, places, size, active):
        size *= distinct(places, active)
        if kind != "store":
            self.stats.loaded[buffer.name] += size
        if kind != "load":
            self.stats.stored[buffer.name] += size
        self.stats.sectors[buffer.name] += distinct((places + buffer.base) >> 5, active)

    def load(self, instruction, addresses, item, count, active):
        """[threads,count] elements of `item` bytes."""
        parts = self.access(instruction, "load", addresses, item, count, active)
        if parts[0][1] is None:
            return parts[0][0].views[item][parts[0][2]]
        out = np.empty((len(addresses), count), UNSIGNED[item])
        for buffer, chosen, at in parts:
            out[chosen] = buffer.views[item][at]
        return out

    def store(self, instruction, addresses, values, active):
        """Writes values [threads,count]."""
        item, count = values.itemsize, values.shape[1]
        for buffer, chosen, at in self.access(instruction, "store", addresses, item, count, active):
            mine = values if chosen is None else values[chosen]
            buffer.views[item][at] = mine
            if (buffer.views[item][at] != mine).any():
                raise instruction.error(f"race: two threads store different values to one element of {buffer.name}")


class SharedMemory:
    """The shared memory of every program, one after the other."""

    def __init__(self, size, programs, granule, stats):
        self.size, self.stats, self.granule = size, stats, granule
        self.pitch = -(-size // 16) * 16 + 16
        raw = np.full(programs * self.pitch, 0xFF, np.uint8)
        self.views = {n: raw.view(kind) for n, kind in UNSIGNED.items()}
        self.written = np.zeros(raw.size // granule, bool)
        self.shadow = Shadow(raw.size // granule, 1)  # no program sees the memory of another
        self.patterns = {}

    def locate(self, instruction, addresses, active):
        """(bytes from the start of a program's memory, the programs)"""
        return addresses, active.programs

    def access(self, instruction, kind, addresses, item, count, active, values=None):
        """Elements [threads,count] of `item` bytes, after every check."""
        size = item * count
        if (addresses & (size - 1)).any():
            raise instruction.error(f"misaligned: shared {kind} of {size} bytes")
        addresses, programs = self.locate(instruction, addresses, active)
        if addresses.min() < 0 or addresses.max() + size > self.size:
            bad = addresses[(addresses < 0) | (addresses + size > self.size)][0]
            raise instruction.error(f"out of bounds: shared {kind} at byte {int(bad)} of {self.size}")
        self._count(instruction, addresses, size, active.lanes)
        places = addresses + programs * self.pitch
        at = places // item
        at = at[:, None] + np.arange(count) if count > 1 else at[:, None]
        touched, stamps = elements(places, size, self.granule, active.stamps)
        if kind == "load" and not self.written[touched].all():
            bad = touched[~self.written[touched]][0] * self.granule % self.pitch
            raise instruction.error(f"uninitialised: load of shared byte {int(bad)}, which nothing was stored to")
        if kind == "store":
            self._same_or_alone(instruction, touched, at, values, stamps)
        race = self.shadow.touch(kind, touched, stamps)
        if race is not None:
            bad = int(touched[race[1]]) * self.granule % self.pitch
            raise instruction.error(
                f"race: shared {kind} of byte {bad}, {PAST[race[0]]} by another warp with no barrier in between"
            )
        if kind != "load":
            self.written[touched] = True
        return at

    def _same_or_alone(self, instruction, touched, at, values, stamps):
        """Several warps may store a number that all of them hold, as Triton has them do, but not different ones."""
        clash = self.shadow.clashes("store", touched, stamps)
        if clash.any():
            self._judge(instruction, at, values, clash.reshape(len(at), -1).any(axis=1))

    def _judge(self, instruction, at, values, among=True):
        """Raise where what stands in memory is not what would be stored there, among some of the threads."""
        there = self.views[values.itemsize][at]
        differs = (there != values).any(axis=1) & among
        if differs.any():
            if not alike(there[differs], values[differs], values).all():
                byte = int(at[differs][0, 0]) * values.itemsize % self.pitch
                raise instruction.error(f"race: two threads store different values to shared byte {byte}")
            self.stats.unlike_stores += int(differs.sum())

    def load(self, instruction, addresses, item, count, active):
        return self.views[item][self.access(instruction, "load", addresses, item, count, active)]

    def store(self, instruction, addresses, values, active):
        """Writes values [threads,count]."""
        item = values.itemsize
        at = self.access(instruction, "store", addresses, item, values.shape[1], active, values)
        self.views[item][at] = values
        self._judge(instruction, at, values)

    def _count(self, instruction, addresses, size, lanes):
        """Wavefronts: a warp's access takes one for every 128 bytes it asks for, and more where threads meet in a bank."""
        base = int(addresses.min()) & ~127
        key = (size, (addresses - base).tobytes(), None if lanes is None else lanes.tobytes())
        if key not in self.patterns:
            self.patterns[key] = wavefronts(addresses - base, size, lanes)
        most, ideal = self.patterns[key]
        self.stats.shared_wavefronts += most
        self.stats.shared_ideal += ideal
        if most > ideal:
            self.stats.conflicts_at[instruction.source] += most - ideal


def alike(a, b, stored):
    """Whether bits are equal, or floats apart by what rounding explains, beside the largest number that was `stored` with them.

    Triton has several threads compute and store the same sum, each in its own order, and keeps whichever comes last.
    """
    if a.itemsize == 1:
        return a == b
    if a.itemsize == 2:  # float16 or bfloat16
        return (np.abs(a.view(np.int16).astype(np.int32) - b.view(np.int16)) <= 1) & ((a & 0x7C00) != 0)
    kind, exponent, units = (
        (np.float32, 0x7F800000, 2.0**-17) if a.itemsize == 4 else (np.float64, 0x7FF << 52, 2.0**-46)
    )
    x, y, stored = a.view(kind), b.view(kind), np.abs(stored.view(kind))
    scale = stored[np.isfinite(stored)].max(initial=0)
    # An index has no exponent, unless it is beyond 2^23.
    floats = ((a & exponent) != 0) | (x == 0), ((b & exponent) != 0) | (y == 0)
    return (a == b) | ((np.abs(x - y) <= units * scale) & floats[0] & floats[1])


def wavefronts(addresses, size, lanes=None):
    """(what 32 banks of 4 bytes need, what they need without conflicts) for an access of `size` bytes by each thread."""
    lanes = np.arange(addresses.size) if lanes is None else lanes
    together = min(32, 128 // max(size, 4))  # threads whose words fit into one wavefront
    words = (addresses[:, None] + np.arange(0, max(size, 4), 4)) // 4
    pairs = np.unique(np.stack([np.repeat(lanes // together, words.shape[1]), words.ravel()]), axis=1)
    banks, many = np.unique(np.stack([pairs[0], pairs[1] % 32]), axis=1, return_counts=True)
    groups, position = np.unique(banks[0], return_inverse=True)
    most = np.zeros(groups.size, np.int64)
    np.maximum.at(most, position, many)
    return int(most.sum()), groups.size
