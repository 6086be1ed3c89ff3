"""Watches every access to memory that Triton's interpreter makes: bounds, races between programs, missing barriers, bytes.

    with MemoryGuard() as guard:
        ...  # launch kernels
    guard.loaded["memory_ptr"], guard.stored["reads_ptr"]  # bytes, by the name of the kernel's argument

The interpreter runs one program after the other, so it never shows what happens when they run at once, and one lane after
the other, so it never shows what a barrier is for. Both are seen here from who touched which element since when.
"""

from collections import Counter

import numpy as np
import torch
from triton.runtime import interpreter

NOBODY, MANY = -1, -2


class GuardError(AssertionError):
    """An access that is wrong on a GPU, whatever the interpreter computed."""


class _Span:
    """What happened to each element of one tensor in the current launch."""

    def __init__(self, name: str, tensor: torch.Tensor):
        self.name, self.size = name, tensor.element_size()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.low, self.count = tensor.data_ptr(), last + 1
        self.high = self.low + self.count * self.size
        self.writer = np.full(self.count, NOBODY)
        self.reader = np.full(self.count, NOBODY)
        self.written_at = np.full(self.count, -1)  # number of the stretch between two barriers
        self.read_at = np.full(self.count, -1)


class MemoryGuard:
    def __init__(self):
        self.loaded, self.stored, self.launches = Counter(), Counter(), 0
        self._spans, self._stretch = [], 0

    def __enter__(self):
        builder, guard = interpreter.interpreter_builder, self
        load, store, barrier = builder.create_masked_load, builder.create_masked_store, builder.create_barrier
        self._launch = interpreter.GridExecutor.__call__

        def guarded_load(pointers, mask, *rest):
            guard._read(pointers, mask)
            return load(pointers, mask, *rest)

        def guarded_store(pointers, value, mask, *rest):
            guard._write(pointers, mask)
            return store(pointers, value, mask, *rest)

        def guarded_barrier(*args):
            guard._stretch += 1
            return barrier(*args)

        def guarded_launch(executor, *args, **kwargs):
            guard._begin(dict(zip(executor.arg_names, args, strict=False)) | kwargs)
            return guard._launch(executor, *args, **kwargs)

        builder.create_masked_load, builder.create_masked_store = guarded_load, guarded_store
        builder.create_barrier = guarded_barrier
        interpreter.GridExecutor.__call__ = guarded_launch
        return self

    def __exit__(self, *_):
        builder = interpreter.interpreter_builder
        del builder.create_masked_load, builder.create_masked_store, builder.create_barrier  # the class's own again
        interpreter.GridExecutor.__call__ = self._launch

    def _begin(self, arguments):
        """A new launch: only the tensors it was given may be touched."""
        self.launches += 1
        tensors = {}
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor) and value.numel():
                tensors.setdefault(value.data_ptr(), (name, value))
        self._spans = [_Span(*tensors[address]) for address in sorted(tensors)]

    @staticmethod
    def _program():
        x, y, z = interpreter.interpreter_builder.grid_idx
        _, ny, nz = interpreter.interpreter_builder.grid_dim
        return (x * ny + y) * nz + z

    def _elements(self, kind, pointers, mask):
        """(span, indices of its elements) of an access; raises where it leaves every tensor or is misaligned."""
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64).ravel()
        lows = np.array([span.low for span in self._spans], dtype=np.int64)
        owner = np.searchsorted(lows, addresses, side="right") - 1
        for number in np.unique(owner):
            mine = addresses[owner == number]
            span = self._spans[max(number, 0)]
            if number < 0 or (mine + span.size > span.high).any():
                bad = mine[0] if number < 0 else mine[mine + span.size > span.high][0]
                raise GuardError(
                    f"out of bounds: program {self._program()} {kind}s {bad - span.low:+d} bytes from the start of {span.name},"
                    f" which has {span.high - span.low}"
                )
            if ((mine - span.low) % span.size).any():
                raise GuardError(f"misaligned: program {self._program()} {kind}s {span.name} between two elements")
            yield span, (mine - span.low) // span.size

    def _fail(self, what, span, element):
        raise GuardError(f"{what}: program {self._program()}, {span.name}[{element}]")

    def _read(self, pointers, mask):
        program = self._program()
        for span, at in self._elements("read", pointers, mask):
            self.loaded[span.name] += at.size * span.size
            foreign = (span.writer[at] != NOBODY) & (span.writer[at] != program)
            if foreign.any():
                self._fail("race, read of what another program writes", span, at[foreign][0])
            fresh = (span.writer[at] == program) & (span.written_at[at] == self._stretch)
            if fresh.any():
                self._fail("no barrier between a write and a read", span, at[fresh][0])
            seen = span.reader[at]
            span.reader[at] = np.where((seen == NOBODY) | (seen == program), program, MANY)
            span.read_at[at] = self._stretch

    def _write(self, pointers, mask):
        program = self._program()
        for span, at in self._elements("write", pointers, mask):
            self.stored[span.name] += at.size * span.size
            if np.unique(at).size != at.size:
                self._fail("two lanes write one element", span, at[0])
            foreign = (span.writer[at] != NOBODY) & (span.writer[at] != program)
            if foreign.any():
                self._fail("race, write to what another program writes", span, at[foreign][0])
            foreign = (span.reader[at] != NOBODY) & (span.reader[at] != program)
            if foreign.any():
                self._fail("race, write to what another program reads", span, at[foreign][0])
            twice = (span.writer[at] == program) & (span.written_at[at] == self._stretch)
            if twice.any():
                self._fail("no barrier between two writes", span, at[twice][0])
            # Also where a block reads and writes back in one shape: if it is smaller than the program, several warps hold it.
            early = (span.reader[at] == program) & (span.read_at[at] == self._stretch)
            if early.any():
                self._fail("no barrier between a read and a write", span, at[early][0])
            span.writer[at], span.written_at[at] = program, self._stretch
