"""A stand-in for torch.cuda that works on the CPU: names and signatures are those of the installed torch, what they do is noted."""

import contextlib
import inspect
import time
from types import SimpleNamespace

import torch

PROPERTIES = SimpleNamespace(
    name="Stand-in", major=9, minor=0, multi_processor_count=132, total_memory=2**36, L2_cache_size=2**29, uuid="0-1"
)


class FakeCuda:
    """`log` has every call in order. `broken` maps the name of a call to what it raises."""

    def __init__(self):
        self.log, self.broken, self.current, self.capturing = [], {}, "default", None
        self.available = True

    def _is_available(self):
        return self.available

    def __getattr__(self, name):
        real = inspect.signature(getattr(torch.cuda, name))  # AttributeError where torch has no such name

        def call(*args, **kwargs):
            real.bind(*args, **kwargs)
            self.note(name)
            return getattr(self, f"_{name}")(*args, **kwargs)

        return call

    def note(self, name):
        self.log.append(name)
        if name in self.broken:
            raise self.broken[name]
        assert self.capturing is None or name in ("stream", "current_stream"), f"{name} inside a capture"

    def method(self, kind, name, does=lambda *args: None):
        """A method of a torch.cuda class, with its signature."""
        real = inspect.signature(getattr(getattr(torch.cuda, kind), name))

        def call(*args, **kwargs):
            real.bind(None, *args, **kwargs)
            self.note(f"{kind}.{name}")
            return does(*args, **kwargs)

        return call

    def _current_device(self):
        return 0

    def _get_device_properties(self, device):
        return PROPERTIES

    def _get_arch_list(self):
        return ["sm_90"]

    def _synchronize(self, device):
        pass

    def _reset_peak_memory_stats(self, device):
        pass

    def _memory_allocated(self, device):
        return 3 * 2**20

    def _max_memory_allocated(self, device):
        return 5 * 2**20

    def _current_stream(self, device):
        return self.current

    def _set_stream(self, stream):
        self.current = stream

    def _Stream(self, device):
        return SimpleNamespace(wait_stream=self.method("Stream", "wait_stream"))

    @contextlib.contextmanager
    def _stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def _Event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(at=None)
        event.record = self.method("Event", "record", lambda: setattr(event, "at", time.perf_counter()))
        event.synchronize = self.method("Event", "synchronize")
        event.elapsed_time = self.method("Event", "elapsed_time", lambda end: (end.at - event.at) * 1e3)
        return event

    def _CUDAGraph(self):
        return SimpleNamespace(captured=0, replay=self.method("CUDAGraph", "replay"))

    @contextlib.contextmanager
    def _graph(self, graph, stream):
        """As the real one, it leaves the capturing stream the current one where the capture fails."""
        self.current, self.capturing = stream, graph
        try:
            yield
        finally:
            self.capturing = None
        graph.captured += 1
        self.current = "default"
