"""Where the suites run, and how each place is measured: its clock, its memory, its facts, and on a GPU its graphs.

Both classes answer the same calls, so that the harness has one path. Everything of the GPU's goes through `cuda` below, by
its public names.
"""

import ctypes
import functools
import shutil
import subprocess
import time

import torch
from torch import cuda

#: Written between two measurements, or twice the second-level cache where that is more.
FLUSH_BYTES = 2**28
#: What nvidia-smi is asked for; it changes nothing.
GPU_STATE = ("driver_version", "pstate", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "power.draw")
#: Calls before the first measured one, and before a capture.
WARM_UP = 3


#: Of glibc's mallopt: how much at the end of the heap is given back, and from which size on a block lies outside it; and what glibc
#: itself moves them to, at most, where large blocks are freed.
MALLOC = {-1: 2 * 2**25, -3: 2**25}


def keep_freed_memory() -> None:
    """Set the C library to what it comes to in a long training, where it can be told to.

    A page that was given back is cleared when it comes again, which takes longer than to fill it. Until the library has seen
    large blocks freed, which of the contestants that meets is chance.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for option, value in MALLOC.items() if mallopt is not None else ():
        mallopt(option, value)


class DeviceLost(RuntimeError):
    """The device no longer answers: nothing after it can be measured in this process."""


class Cpu:
    type = "cpu"
    verified = ("float32", "float64", "bfloat16")
    timed = ("float32",)
    seconds, warm_up_seconds = 5.0, 0.0
    sittings = 6  # a machine that others use is slowed down for seconds or minutes
    has_graphs = False
    input_sets = 1

    def __init__(self):
        self.device = torch.device("cpu")

    def problem(self) -> str | None:
        return None

    def measure(self, function) -> float:
        """Time one call, in milliseconds."""
        before = time.perf_counter()
        function()
        return (time.perf_counter() - before) * 1e3

    def synchronize(self) -> None:
        """Nothing is ever under way."""

    def peak_bytes(self, function) -> int:
        """Bytes by which a call raises what torch has allocated, at its highest, from the profiler's record."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            function()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        level = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            level += event.nbytes()
            peak = max(peak, level)
        return peak

    def facts(self) -> dict:
        """Return no facts: those of the CPU are the machine's."""
        return {}

    def state(self) -> dict:
        return {}


class Cuda:
    """The current CUDA (or ROCm) device. float32 products are float32's: TF32 is turned off, for everyone."""

    type = "cuda"
    verified = ("float32", "float64", "bfloat16", "float16")
    timed = ("float32", "bfloat16")
    seconds, warm_up_seconds = 2.0, 0.5  # half a second of work for the clocks to rise
    sittings = 1
    has_graphs = True
    input_sets = 3  # taken in turn, so that no call finds its inputs where the last one left them

    def __init__(self):
        # twice the same: torch refuses to read the older switch where it disagrees with the newer one
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.fp32_precision = "ieee"
        self.device = torch.device("cuda", cuda.current_device())
        self.properties = cuda.get_device_properties(self.device)
        self.flush_bytes = max(FLUSH_BYTES, 2 * self.properties.L2_cache_size)

    @functools.cached_property
    def flush(self) -> torch.Tensor:
        return torch.empty(self.flush_bytes, dtype=torch.int8, device=self.device)

    def problem(self) -> str | None:
        """Why nothing can be measured here, found by trying: one product, between two events."""
        capability, builds = f"{self.properties.major}.{self.properties.minor}", " ".join(cuda.get_arch_list())
        where = f"{self.properties.name} (compute capability {capability}, this torch is built for {builds})"
        try:
            matrix = torch.eye(256, device=self.device)
            times = [self.measure(lambda: matrix @ matrix) for _ in range(WARM_UP)]
            right = torch.equal(matrix @ matrix, matrix)
        except RuntimeError as error:
            return f"{where} does not run a matrix product: {first_line(error)}"
        if not right:
            return f"{where} computes a wrong matrix product"
        return None if min(times) > 0 else f"{where} measures {times} ms for matrix products: its events do not work"

    def measure(self, function) -> float:
        """Milliseconds of one call from an idle device and a cold cache, the time to launch it included.

        The device is idle at the first event, so a call of many small kernels takes as long as the host needs to launch them.
        """
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        self.flush.zero_()
        cuda.synchronize(self.device)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def synchronize(self) -> None:
        cuda.synchronize(self.device)

    def peak_bytes(self, function) -> int:
        """Bytes by which a call raises what torch has allocated, at its highest."""
        cuda.synchronize(self.device)
        cuda.reset_peak_memory_stats(self.device)
        before = cuda.memory_allocated(self.device)
        function()
        cuda.synchronize(self.device)
        return cuda.max_memory_allocated(self.device) - before

    def graphs(self, make) -> list["Replay"]:
        """Each function that make() returns as a CUDA graph.

        Their tensors are made, warmed up and captured on one stream: a leaf whose gradient was first taken on another one,
        or a library handle first opened inside a capture, would end the capture.
        """
        before, stream = cuda.current_stream(self.device), cuda.Stream(self.device)
        stream.wait_stream(before)
        replays = []
        try:
            with cuda.stream(stream):
                functions = make()
                for function in functions:
                    for _ in range(WARM_UP):
                        function()
            for function in functions:
                graph = cuda.CUDAGraph()
                with cuda.graph(graph, stream=stream):
                    function()
                replays.append(Replay(graph, function))
        finally:
            cuda.set_stream(before)  # a capture that failed leaves its own stream the current one
        cuda.synchronize(self.device)
        return replays

    def facts(self) -> dict:
        p = self.properties
        return {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_mb": p.total_memory // 2**20,
            "l2_mb": p.L2_cache_size / 2**20,
            "flushed_mb": self.flush_bytes / 2**20,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "triton": triton_version(),
            "float32_products": f"{torch.backends.cuda.matmul.fp32_precision} (TF32 off)",
        }

    def state(self) -> dict:
        """Clocks, temperature and power as the driver tells them; `unknown` says why it does not."""
        command = ["nvidia-smi", f"--id=GPU-{self.properties.uuid}", f"--query-gpu={','.join(GPU_STATE)}"]
        try:
            done = subprocess.run([*command, "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired) as error:
            return {"unknown": first_line(error)}
        values = [value.strip() for value in done.stdout.split(",")]
        if done.returncode or len(values) != len(GPU_STATE):
            return {"unknown": f"nvidia-smi: {(done.stdout + done.stderr).strip()}"}
        return dict(zip(GPU_STATE, values, strict=True))


class Replay:
    """A captured graph, and the function whose tensors it reads and writes: they must live as long."""

    def __init__(self, graph, function):
        self.graph, self.function = graph, function

    def __call__(self):
        self.graph.replay()


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def why_no_gpu() -> str | None:
    """Why only the CPU is measured; None where torch has a CUDA device."""
    if cuda.is_available():
        return None
    if torch.version.cuda or torch.version.hip:
        return f"torch {torch.__version__} finds no CUDA device"
    here = ", though nvidia-smi is here: install a CUDA build" if shutil.which("nvidia-smi") else ""
    return f"torch {torch.__version__} is a build for the CPU{here}"


def attempt(device, function):
    """Call a function; return its result and None, or None and a note why it failed: what is asked too much of a
    machine is no crash.

    Raises:
        DeviceLost: where the device does not answer any more.
    """
    try:
        return function(), None
    except torch.OutOfMemoryError:
        note = "out of memory"
    except Exception as error:  # whatever a contestant raises is its result
        note = f"{type(error).__name__}: {first_line(error)}"
    try:
        device.synchronize()
    except RuntimeError as error:
        raise DeviceLost(f"{device.type}: after {note}: {first_line(error)}") from error
    return None, note


def devices(wanted: str | None = None) -> list[Cpu | Cuda]:
    """The device asked for; by default the CPU, and the current CUDA device where there is one.

    Raises:
        ValueError: the device asked for is not here.
    """
    missing = why_no_gpu()
    if wanted == "cuda" and missing is not None:
        raise ValueError(f"got 'cuda', but {missing}")
    names = [wanted] if wanted else ["cpu"] if missing else ["cpu", "cuda"]
    return [{"cpu": Cpu, "cuda": Cuda}[name]() for name in names]
