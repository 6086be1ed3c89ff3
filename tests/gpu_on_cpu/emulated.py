"""Triton launches on CPU tensors: compiled for a GPU that is not here, and run instruction by instruction by the PTX machine.

    with emulated("sm_90") as launches, mann_kernels.backend("triton"):
        ...  # operators, on CPU tensors
    launches[0].global_bytes["memory_ptr"]

Triton's own JIT specialises, compiles and caches each kernel, as it would for that GPU; only its driver is another one.
"""

import contextlib
from types import SimpleNamespace

import ptx
import torch
from ptx_machine import Machine
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mann_kernels import _backend

#: Bytes of shared memory that one program may have: the opt-in limit of the compute capability.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


def _keep_ptx(*where):
    """Triton's hook into its compiler: the last stage, ptxas, gives way to one that hands on the PTX."""
    if not where:
        return "kept as PTX", "kept as PTX"  # becomes part of the key of Triton's cache
    _, stages, *_ = where
    stages["cubin"] = lambda text, metadata: text.encode()


class _Driver:
    """What Triton asks of a GPU driver, with the machine in place of a GPU."""

    def __init__(self, arch, launches, options):
        self.target, self.launches, self.options = GPUTarget("cuda", arch, 32), launches, options
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_MEMORY[arch]},
            load_binary=lambda name, binary, shared, device: (self, ptx.parse(binary.decode()), 0, 0, 1024),
        )

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def launcher_cls(self, source, metadata):
        names = [name for name, kind in source.signature.items() if kind != "constexpr"]
        places = [i for i, kind in enumerate(source.signature.values()) if kind != "constexpr"]
        threads = 32 * metadata.num_warps

        def launch(x, y, z, stream, kernel, packed, extra, enter, leave, *arguments):
            if metadata.num_ctas > 1:
                raise NotImplementedError("clusters of programs")
            active = driver.active  # the kernel may have been loaded under an earlier one
            named = {name: arguments[place] for name, place in zip(names, places, strict=True)}
            machine = Machine(kernel, (x, y, z), threads, metadata.shared, named, **active.options)
            active.launches.append(machine.run())

        return launch


@contextlib.contextmanager
def emulated(target="sm_90", **options):
    """Within the block Triton kernels run on CPU tensors, in code compiled for `target`; yields the list of their Stats.

    `options` are those of Machine.
    """
    before, hook, missing = driver._active, knobs.runtime.add_stages_inspection_hook, _backend.missing
    launches = []

    def nothing_missing_on_cpu(name, stem, device, dtype, sizes=None):
        return None if (name, device) == ("triton", "cpu") else missing(name, stem, device, dtype, sizes)

    driver.set_active(_Driver(int(target.removeprefix("sm_")), launches, options))
    knobs.runtime.add_stages_inspection_hook = _keep_ptx
    _backend.missing = nothing_missing_on_cpu
    try:
        yield launches
    finally:
        driver._active, knobs.runtime.add_stages_inspection_hook, _backend.missing = before, hook, missing
