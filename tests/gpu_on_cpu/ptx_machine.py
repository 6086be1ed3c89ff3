"""A GPU of numpy arrays: runs the PTX of one launch, every thread at once, instruction by instruction.

    stats = Machine(ptx.parse(text), grid=(2, 1, 1), threads=256, shared=metadata.shared, arguments={"x_ptr": x, "N": 7}).run()

A register is an array over all threads. Threads that stand at the same instruction run together; where they part, those at the
lower address go first, so that they meet again. Tensors are read and written in place. Every opcode is bound once, to its
registers' arrays, before anything runs; ptx_ops.py, ptx_access.py and ptx_warp.py hold the opcodes.
"""

import dataclasses
from collections import Counter

import numpy as np
import ptx
import ptx_access  # noqa: F401  (they name the opcodes they bind)
import ptx_floats  # noqa: F401
import ptx_warp  # noqa: F401
import torch
from ptx import Float, PTXError
from ptx_barriers import Barriers, ClusterMemory
from ptx_memory import CLUSTER_SHIFT, WARP_BITS, Active, GlobalMemory, SharedMemory
from ptx_numbers import PACKED, TYPES
from ptx_ops import OPERATIONS

LEAVES = ("bra", "ret", "exit", "bar", "barrier")
THREADS_AT_ONCE = 4096
ENDLESS = 5_000_000  # blocks


@dataclasses.dataclass
class Stats:
    """What a launch did. Bytes are counted once for each warp and instruction, however many of its threads ask for them."""

    kernel: ptx.Kernel = dataclasses.field(repr=False)
    programs: int
    threads: int  # of a program
    shared_bytes: int  # of a program
    cluster: int = 1  # programs
    loaded: Counter = dataclasses.field(default_factory=Counter)  # bytes, by the name of the argument
    stored: Counter = dataclasses.field(default_factory=Counter)
    sectors: Counter = dataclasses.field(default_factory=Counter)  # of 32 bytes
    distinct_loaded: Counter = dataclasses.field(default_factory=Counter)  # bytes that were loaded at least once
    distinct_stored: Counter = dataclasses.field(default_factory=Counter)
    shared_wavefronts: int = 0
    shared_ideal: int = 0
    conflicts_at: Counter = dataclasses.field(default_factory=Counter)  # bank conflicts by line of the source
    unlike_stores: int = 0  # to shared memory, by several threads, of floats that differ in their last bits
    barriers: int = 0  # of all programs together
    cluster_barriers: int = 0  # of all clusters together
    warp_instructions: Counter = dataclasses.field(default_factory=Counter)  # by family: "ld.global", "fma.f32", "shl"

    @property
    def global_bytes(self):
        return self.loaded + self.stored

    @property
    def bank_conflicts(self):
        return self.shared_wavefronts - self.shared_ideal

    @property
    def flops(self):
        """Operations on floats without tensor cores, by type; those of idle threads and of padding are in it."""
        counts = Counter()
        for family, warps in self.warp_instructions.items():
            opcode, _, kind = family.partition(".")
            if kind in ("f32", "f64") and opcode != "mma":
                counts[kind] += warps * 32 * (2 if opcode == "fma" else 1)
        return counts


class Machine:
    """One launch: `arguments` are the kernel's tensors (or None) and numbers, by name and in order.

    Of `cluster` programs that follow each other, each reaches the shared memory of the others. `buffers` are what pointers inside
    arguments lead to, by name. `worst` gives approximate instructions the largest error that the PTX manual allows, not none.
    """

    def __init__(self, kernel, grid, threads, shared, arguments, cluster=1, buffers=None, worst=False):
        if threads % 32 or not 0 < threads <= 1024 or kernel.threads not in (None, threads):
            raise PTXError(f"got {threads} threads, want whole warps, {kernel.threads or 'at most 1024'}")
        if grid[0] % cluster:
            raise PTXError(f"got a grid of {grid[0]} programs, want whole clusters of {cluster}")
        self.kernel, self.grid, self.threads, self.cluster, self.worst = kernel, tuple(grid), threads, cluster, worst
        self.programs, self.shared_bytes = int(np.prod(grid)), max(shared, kernel.shared_bytes)
        self.stats = Stats(kernel, self.programs, threads, self.shared_bytes, cluster)
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)} | (
            buffers or {}
        )
        self.constants = {name: torch.tensor(list(data), dtype=torch.uint8) for name, data in kernel.constants.items()}
        self.memory = GlobalMemory({**tensors, **self.constants}, self.programs, self.stats)
        self.parameters = self._pack(list(arguments.values()))

    def _pack(self, values):
        """{name: bytes} of the parameters; those that no argument is given for are the compiler's own pointers, here null."""
        if len(values) > len(self.kernel.parameters):
            raise PTXError(f"got {len(values)} arguments, want {len(self.kernel.parameters)}")
        packed = {}
        for (name, kind, count), value in zip(
            self.kernel.parameters, values + [None] * len(self.kernel.parameters), strict=False
        ):
            if isinstance(value, bytes) or count > 1:
                packed[name] = value or b""
                if len(packed[name]) != ptx.SIZES[kind] * count:
                    raise PTXError(f"got {len(packed[name])} bytes for {name}, want {ptx.SIZES[kind] * count}")
                continue
            value = 0 if value is None else value.data_ptr() if isinstance(value, torch.Tensor) else value
            dtype = TYPES[kind]
            if isinstance(value, float) and kind[0] != "f":
                dtype = {4: np.float32, 8: np.float64}[ptx.SIZES[kind]]
            elif not isinstance(value, float) and kind[0] != "f":
                value = int(value) % 256 ** ptx.SIZES[kind]
                dtype = f"u{ptx.SIZES[kind]}"
            packed[name] = np.array(value, dtype).tobytes()
        return packed

    def run(self) -> Stats:
        at_once = self.cluster * max(1, THREADS_AT_ONCE // (self.threads * self.cluster))
        with np.errstate(all="ignore"):
            for first in range(0, self.programs, at_once):
                Wave(self, np.arange(first, min(first + at_once, self.programs))).run()
        for buffer in self.memory.buffers:
            self.stats.distinct_loaded[buffer.name] = buffer.item * buffer.shadow.count("load", "atomic")
            self.stats.distinct_stored[buffer.name] = buffer.item * buffer.shadow.count("store", "atomic")
        return self.stats


def leaves(instruction):
    """Whether other instructions than the next may follow, or some threads wait here."""
    return instruction.opcode in LEAVES and not {"warp", "arrive"} & set(instruction.modifiers)


class Block:
    """Instructions that are entered at the first and left at the last."""

    def __init__(self):
        self.steps, self.leave, self.classes, self.warps = [], None, Counter(), 0
        self.meets = False  # an instruction that waits for the other threads of the warp


class Wave:
    """The programs of a launch that run at once."""

    def __init__(self, machine, programs):
        self.machine, self.kernel, self.memory, self.worst = machine, machine.kernel, machine.memory, machine.worst
        self.stats, self.count = machine.stats, len(programs)
        threads, lanes = machine.threads, len(programs) * machine.threads
        self.lanes, self.program = lanes, np.repeat(np.arange(len(programs)), threads)
        thread = np.tile(np.arange(threads), len(programs))
        self.warp = np.arange(lanes) // 32
        self.first_of_warp = np.arange(lanes) // 32 * 32
        self.number, self.epoch = np.repeat(programs, threads), np.zeros(lanes, np.int64)
        self.warp_in_program = thread // 32
        self.registers = self._registers(thread)
        if any(each.opcode == "mapa" for each in self.kernel.instructions):
            self.shared = ClusterMemory(self, machine.shared_bytes, self._granule())
        else:
            self.shared = SharedMemory(machine.shared_bytes, len(programs), self._granule(), self.stats)
        self.places, self.parameters = self._parameters()
        self.local_pitch = -(-self.kernel.local_bytes // 8) * 8
        self.local = np.full(lanes * self.local_pitch, 0xFF, np.uint8)
        self.pending, self.commits = [], np.zeros(lanes, np.int64)  # of cp.async
        self.gone = np.zeros(lanes, bool)
        self.barriers = Barriers(self)
        self.stamp()
        self.blocks = self._bind()

    def _registers(self, thread):
        """Every register starts as ones in all bits: NaN, where it is a float."""
        registers = {}
        for name, kind in self.kernel.registers.items():
            if kind == "pred":
                registers[name] = np.zeros(self.lanes, bool)
            else:
                registers[name] = np.full(self.lanes, -1, f"i{ptx.SIZES[kind]}").view(f"u{ptx.SIZES[kind]}")
        x, y, _ = self.machine.grid
        special = {"%tid.x": thread, "%laneid": thread % 32, "%warpid": thread // 32, "%ntid.x": self.machine.threads}
        special |= {"%ctaid.x": self.number % x, "%ctaid.y": self.number // x % y, "%ctaid.z": self.number // (x * y)}
        special |= dict(zip(("%nctaid.x", "%nctaid.y", "%nctaid.z"), self.machine.grid, strict=True))
        special |= {"%tid.y": 0, "%tid.z": 0, "%ntid.y": 1, "%ntid.z": 1}
        special |= {"%cluster_ctarank": self.number % self.machine.cluster, "%cluster_nctarank": self.machine.cluster}
        for name, value in special.items():
            registers[name] = np.broadcast_to(np.asarray(value, np.uint32), self.lanes)
        return registers

    def _parameters(self):
        """({name: its first byte}, all bytes), each parameter aligned as any number wants it."""
        places, data = {}, b""
        for name, value in self.machine.parameters.items():
            places[name] = len(data)
            data += value + bytes(-len(value) % 16)
        return places, np.frombuffer(data, np.uint8)

    def _granule(self):
        """The narrowest access to shared memory: races are told apart by it."""
        sizes = [4]
        for instruction in self.kernel.instructions:
            if instruction.family in ("ld.shared", "st.shared", "atom.shared", "red.shared"):
                sizes.append(ptx.SIZES.get(instruction.type, 4))
        return min(sizes)

    def stamp(self):
        """Who touches memory now: see ptx_memory.py."""
        stretch = self.epoch * self.machine.programs + self.number
        self.stamps = self.barriers.half << CLUSTER_SHIFT | stretch << WARP_BITS | self.warp_in_program
        self.everyone = Active(None, self.stamps, self.program)

    def active(self, mask):
        if mask is None:
            return self.everyone
        lanes = np.flatnonzero(mask)
        return Active(lanes, self.stamps[lanes], self.program[lanes])

    # Operands

    def symbol(self, name):
        for table in (self.kernel.shared, self.kernel.local, self.places):
            if name in table:
                return table[name]
        if name in self.machine.constants:
            return self.machine.constants[name].data_ptr()
        return None

    def source(self, operand, kind):
        """A live view of a register as `kind`, or a number."""
        dtype = np.dtype(TYPES[PACKED.get(kind, kind)])
        size = dtype.itemsize * (2 if kind in PACKED else 1)
        if isinstance(operand, str) and operand in self.registers:
            register = self.registers[operand]
            if (register.dtype == np.bool_) != (kind == "pred") or register.itemsize < size:
                raise PTXError(f"register {operand} read as {kind}")
            if kind in PACKED:
                return register.view(dtype).reshape(self.lanes, -1)
            return register if kind == "pred" else register.view(dtype)[:: register.itemsize // size]
        if isinstance(operand, str):
            operand = self.symbol(operand) if self.symbol(operand) is not None else operand
        if isinstance(operand, int) and kind == "pred":
            return np.bool_(operand)
        if isinstance(operand, Float) and operand.size == size:
            operand = operand.bits
        elif not isinstance(operand, int) or (dtype.kind == "f" and kind not in PACKED):
            raise PTXError(f"operand {operand} read as {kind}")
        value = np.array([operand % 256**size], f"u{size}").view(dtype)
        return value if kind in PACKED else value[0]

    def target(self, operand, kind):
        """A register to write `kind` to, as an array that takes it; narrower than the register, it is extended."""
        if operand == "_":
            return np.empty((self.lanes, 2) if kind in PACKED else self.lanes, TYPES[PACKED.get(kind, kind)])
        if not isinstance(operand, str) or (operand[:1] == "%" and operand not in self.kernel.registers):
            raise PTXError(f"{operand} is no register to write to")
        register, dtype = self.registers[operand], np.dtype(TYPES[PACKED.get(kind, kind)])
        size = dtype.itemsize * (2 if kind in PACKED else 1)
        if (register.dtype == np.bool_) != (kind == "pred") or register.itemsize < size:
            raise PTXError(f"register {operand} written as {kind}")
        if kind == "pred":
            return register
        if kind in PACKED:
            return register.view(dtype).reshape(self.lanes, 2)
        if register.itemsize == size:
            return register.view(dtype)
        if dtype.kind not in "iu":
            raise PTXError(f"register {operand} written as {kind}")
        return register.view(f"{dtype.kind}{register.itemsize}")

    def predicate(self, operand):
        """A function that gives a predicate now."""
        if isinstance(operand, ptx.Not):
            source = self.source(operand.register, "pred")
            return lambda: ~source
        source = self.source(operand, "pred")
        return lambda: source

    # Binding and running

    def _bind(self):
        code = self.kernel.instructions
        starts = {0, *self.kernel.labels.values()}
        starts |= {i + 1 for i, each in enumerate(code) if leaves(each)}
        starts = sorted(start for start in starts if start < len(code))
        number = {start: i for i, start in enumerate(starts)} | {len(code): None}
        blocks = []
        for start, end in zip(starts, (*starts[1:], len(code)), strict=True):
            block = Block()
            block.leave = self._go_to(number[end])
            for instruction in code[start:end]:
                name = instruction.opcode
                block.classes[instruction.family] += 1
                block.meets |= "sync" in instruction.modifiers and name not in LEAVES
                if leaves(instruction):
                    block.leave = self._leave(instruction, number, number[end])
                    continue
                if name not in OPERATIONS:
                    raise instruction.error(f"unknown opcode {name!r}")
                try:
                    step = OPERATIONS[name](self, instruction)
                except PTXError as error:
                    raise error if "`" in str(error) else instruction.error(error) from None
                block.steps.append(self._guarded(instruction, step) if instruction.guard else step)
            blocks.append(block)
        return blocks

    def _guarded(self, instruction, step):
        guard, negated = self.source(instruction.guard, "pred"), instruction.guard_negated

        def guarded(mask):
            active = ~guard if negated else guard
            if mask is not None:
                active = active & mask
            elif active.all():
                return step(None)
            if active.any():
                step(active)

        return guarded

    @staticmethod
    def _go_to(number):
        return lambda mask: ((number, mask),)

    def _leave(self, instruction, number, following):
        """What a branch, a return or a barrier does: gives ((block, mask), ...) to go on with; block None is the end."""
        if instruction.opcode == "bra":
            label = instruction.operands[-1]
            if len(instruction.operands) != 1 or label not in self.kernel.labels:
                raise instruction.error("no label to branch to")
            where = number[self.kernel.labels[label]]
            go = self._go_to(where)
        elif instruction.opcode in ("ret", "exit"):
            go = self._go_to(None)
        else:
            kind = self.barriers.cluster if "cluster" in instruction.modifiers else self.barriers.block
            go = kind(instruction, following)
        if not instruction.guard:
            return go
        guard, negated = self.source(instruction.guard, "pred"), instruction.guard_negated

        def leave(mask):
            chosen = ~guard if negated else guard
            if mask is None and chosen.all():
                return go(None)
            active = chosen.copy() if mask is None else chosen & mask
            if not active.any():
                return ((following, mask),)
            rest = ~active if mask is None else mask & ~active
            return go(active if rest.any() else mask) + (((following, rest),) if rest.any() else ())

        return leave

    def _next(self, ready):
        """The first block, but for one whose threads would have to wait there for others of their warps, still on another way."""
        for number in sorted(ready) if len(ready) > 1 else ():
            if not self.blocks[number].meets:
                return number
            warps = ready[number].reshape(-1, 32).any(axis=1)
            elsewhere = [mask.reshape(-1, 32).any(axis=1) for other, mask in ready.items() if other != number]
            if not (warps & np.logical_or.reduce(elsewhere)).any():
                return number
        return min(ready)

    def run(self):
        ready, visits = {0: None}, 0
        while ready or self.barriers.waiting:
            if not ready:
                ready = self.barriers.release()
            number = self._next(ready)
            mask = ready.pop(number)
            block = self.blocks[number]
            block.warps += self.lanes // 32 if mask is None else int(mask.reshape(-1, 32).any(axis=1).sum())
            visits += 1
            if visits > ENDLESS:
                raise PTXError("the kernel does not end")
            for step in block.steps:
                step(mask)
            for target, part in block.leave(mask):
                if target is None:
                    self.gone |= True if part is None else part
                elif target in ready:
                    both = ready[target] | part
                    ready[target] = None if both.all() else both
                else:
                    ready[target] = part
        for block in self.blocks:
            for name, count in block.classes.items():
                self.stats.warp_instructions[name] += count * block.warps
        self.stats.cluster_barriers += self.barriers.of_clusters()
