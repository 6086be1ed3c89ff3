"""The bench on a CUDA device: with a stand-in for torch.cuda, and where there is one on a real one."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import PROPERTIES, FakeCuda
from typer.testing import CliRunner

from bench import __main__ as front
from bench import devices, harness, limits, peers, pictures, store, sweep, tables
from bench.bench_content_address import address
from bench.mann import Shape
from bench.operators import Axis, Case, kernels_of, operators
from mann_kernels import _backend, _library

TINY = Shape(3, 2, 4, 5, 9, 6, 2)
ADDRESS, MANN, UPDATE = (operators()[op] for op in ("content_address", "mann_sequence", "metanet_update"))
METANET = [op for op, bench in operators().items() if bench.suite == "metanet"]
CPU = devices.Cpu()


def invoke(*arguments):
    return CliRunner().invoke(front.app, [str(argument) for argument in arguments])


@pytest.fixture
def fake(monkeypatch):
    """torch.cuda as bench.devices sees it, on CPU tensors."""
    fake = FakeCuda()
    monkeypatch.setattr(devices, "cuda", fake)
    monkeypatch.setattr(devices, "FLUSH_BYTES", 2**10)
    monkeypatch.setattr(devices.Cuda, "seconds", 0.2)
    monkeypatch.setattr(limits, "SIDE", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(limits, "COPIED", {"cpu": 2**12, "cuda": 2**12})
    monkeypatch.setattr(devices.Cuda, "warm_up_seconds", 0.0)
    before = torch.backends.cudnn.allow_tf32, torch.backends.fp32_precision
    yield fake
    torch.backends.cudnn.allow_tf32, torch.backends.fp32_precision = before


@pytest.fixture
def gpu(fake, monkeypatch):
    monkeypatch.setattr(PROPERTIES, "L2_cache_size", 2**12)
    monkeypatch.setattr(_library, "cuda_kernels", frozenset())  # whether they are built here or not
    gpu = devices.Cuda()
    gpu.device = torch.device("cpu")
    fake.log.clear()
    return gpu


def test_devices_by_default(fake):
    assert [device.type for device in devices.devices()] == ["cpu", "cuda"]
    assert [device.type for device in devices.devices("cuda")] == ["cuda"]
    fake.available = False
    assert [device.type for device in devices.devices()] == ["cpu"]


def test_a_gpu_that_is_not_here(fake, monkeypatch):
    fake.available = False
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/bin/nvidia-smi")
    assert devices.why_no_gpu() is not None
    result = invoke("--device", "cuda")
    assert result.exit_code == 2
    assert "got 'cuda', but torch" in " ".join(result.output.split())


def test_float32_is_float32_on_the_gpu(gpu):
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.rnn.fp32_precision == "ieee"
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_gpu_measurement_starts_idle_and_cold(gpu, fake):
    assert gpu.flush.numel() == 2 * 2**12
    gpu.flush.fill_(1)
    took = gpu.measure(lambda: fake.log.append("function") or gpu.flush.sum().item() or fake.log.append("flushed"))
    assert took > 0
    order = ["synchronize", "Event.record", "function", "flushed", "Event.record", "Event.synchronize"]
    assert [name for name in fake.log if name != "Event"] == [*order, "Event.elapsed_time"]
    assert gpu.peak_bytes(lambda: None) == 2 * 2**20


def test_a_gpu_is_tried_first(gpu, fake):
    assert gpu.problem() is None
    fake.broken["Event.record"] = RuntimeError("no kernel image is available\nmore")
    want = "Stand-in (compute capability 9.0, this torch is built for sm_90) does not run a matrix product: no kernel image"
    assert gpu.problem().startswith(want)


def test_graphs_are_captured_on_the_stream_of_their_warm_up(gpu, fake):
    streams, calls = [], []

    def make():
        streams.append(fake.current)
        return [lambda: (streams.append(fake.current), calls.append(fake.capturing))] * 2

    replays = gpu.graphs(make)
    assert len(set(map(id, streams))) == 1
    assert streams[0] != "default"
    assert fake.current == "default"
    assert [capturing is not None for capturing in calls] == [False] * 6 + [True] * 2
    assert [replay.graph.captured for replay in replays] == [1, 1]
    before = len(calls)
    replays[0]()
    assert fake.log[-1] == "CUDAGraph.replay"
    assert len(calls) == before


def test_inputs_are_taken_in_turn_from_several_sets(gpu):
    """By the plain contestants and by their graphs, whose replays read the tensors that they were captured with."""
    seen = []

    def watched(memory, key):
        seen.append((memory.data_ptr(), float(memory.detach().sum())))
        return address(memory, key)

    rows_on_gpu(gpu, "content_address", eager=watched)
    drawn = [float(ADDRESS.inputs(TINY, seed)["memory"].float().sum()) for seed in range(gpu.input_sets)]
    assert len(set(drawn)) == gpu.input_sets
    assert {round(total, 3) for _, total in seen} == {round(total, 3) for total in drawn}
    made = harness.in_turn([(lambda i=i: i, lambda i=i: -i) for i in range(3)])
    assert [made[0]() for _ in range(4)] == [0, 1, 2, 0]
    assert [made[1]() for _ in range(4)] == [0, -1, -2, 0]
    assert len({place for place, _ in seen}) >= 2 * gpu.input_sets


def test_a_capture_that_fails_is_a_note_and_leaves_the_stream(gpu, fake):
    def breaks():
        if fake.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    made, note = devices.attempt(gpu, lambda: gpu.graphs(lambda: [breaks]))
    assert made is None
    assert note == "RuntimeError: operation not permitted when stream is capturing"
    assert fake.current == "default"


def test_a_lost_device_ends_the_run(gpu, fake, monkeypatch):
    fake.broken["synchronize"] = RuntimeError("an illegal memory access was encountered")
    with pytest.raises(devices.DeviceLost, match="after RuntimeError: boom: an illegal memory access"):
        devices.attempt(gpu, lambda: (_ for _ in ()).throw(RuntimeError("boom")))
    del fake.broken["synchronize"]

    def lost(benches, device, dtypes):
        raise devices.DeviceLost("cuda: gone")

    monkeypatch.setattr(front, "devices", lambda wanted: [gpu])
    monkeypatch.setattr(harness, "verify", lost)
    result = invoke("--device", "cuda", "--op", "content_address")
    assert result.exit_code == 1
    assert "does not answer any more. cuda: gone" in " ".join(result.output.split())


def rows_on_gpu(gpu, op, dtype="float32", shape=TINY, **changes):
    """A run of a tiny case on the stand-in, without the minutes of compiling."""
    bench = replace(operators()[op], **changes)
    quick = replace(bench, compiled=lambda loop: bench.eager)
    return harness.time_case(quick, Case("tiny", shape), gpu, dtype, 1, quick=False)


@pytest.mark.parametrize("dtype", devices.Cuda.timed)
def test_rows_of_a_gpu(gpu, fake, dtype):
    rows = rows_on_gpu(gpu, "mann_sequence", dtype)
    plain = ["mann_kernels", "eager", *peers.ALTERNATIVES, "compile_step", "lstm", "gemm_floor"]
    assert [row["contestant"] for row in rows] == [*plain, *(f"{name} graph" for name in plain)] * 2
    assert {(row["device"], row["dtype"], row["note"]) for row in rows} == {("cuda", dtype, None)}
    assert all(row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] and row["rounds"] >= 3 for row in rows)
    # each of two passes: three calls to warm up, then the measured ones; a graph of every set of inputs
    measured = sum(row["rounds"] for row in rows if row["contestant"].endswith("graph"))
    assert fake.log.count("CUDAGraph.replay") == len(plain) * 2 * 3 + measured
    assert fake.log.count("graph") == len(plain) * 2 * gpu.input_sets
    peaks = {row["contestant"]: row["peak_mb"] for row in rows if row["pass"] == "fwd+bwd"}
    assert peaks["mann_kernels"] == peaks["eager"] == 2.0
    assert tables.timings_table(rows).row_count == len(rows)


def test_cuda_and_triton_kernels_are_verified_and_timed_beside_each_other(gpu, monkeypatch):
    asked = []

    def select(op, tensor, *rest):
        asked.append(_backend._requested)
        return "reference" if tensor.dtype == torch.float16 else "cpp"

    monkeypatch.setattr(_library, "cuda_kernels", frozenset(["content_address"]))
    monkeypatch.setattr(_library, "cuda_missing", None)
    monkeypatch.setattr(_backend, "select", select)
    second = next(iter({"triton", "cuda"} - {_backend.default("content_address", "cuda", torch.float32)[0]}))
    rows = harness.verify([ADDRESS], gpu)
    assert all(row["ok"] for row in rows)
    found = {dtype: {row["backend"] for row in rows if row["dtype"] == dtype} for dtype in gpu.verified}
    both, one = {"triton", "cuda"}, {"triton"}
    assert found == {"float32": both, "bfloat16": both, "float64": one, "float16": one}
    assert set(asked) == {None, second}
    asked.clear()
    rows = rows_on_gpu(gpu, "content_address")
    plain = ["mann_kernels", f"mann_kernels {second}", "eager", "compile_step"]
    assert [row["contestant"] for row in rows] == [*plain, *(f"{name} graph" for name in plain)] * 2
    assert {row["note"] for row in rows} == {None}
    assert set(asked) == {None, second}


@pytest.mark.parametrize("op", METANET)
def test_rows_of_metanet_on_a_gpu(gpu, op):
    bench = operators()[op]
    rows = rows_on_gpu(gpu, op, shape=bench.verified[0])
    plain = ["mann_kernels", "eager", *bench.alternatives, "compile_step"]
    assert [row["contestant"] for row in rows] == [*plain, *(f"{name} graph" for name in plain)] * 2
    assert {(row["device"], row["note"]) for row in rows} == {("cuda", None)}
    kept = {row["contestant"] for row in rows if row["saved_mb"] is not None}
    # torch.func, in a whole update written out, does not run under hooks on what is saved
    assert kept == set(plain) - {"compile_step"} - ({"eager"} if bench is UPDATE else set())
    assert {row["contestant"] for row in rows if row["peak_mb"] is not None} == set(plain)


def test_a_sweep_has_graphs_too(gpu, fake, monkeypatch):
    monkeypatch.setattr(sweep, "SECONDS", 0.0)
    short = replace(MANN, axes={"T": Axis(TINY, (2, 4), 2)})
    rows = sweep.run(short, "T", gpu, "float32", 1, sweep.Bounds())
    plain = ["mann_kernels", "eager"]
    assert [row["contestant"] for row in rows] == [*plain, *(f"{name} graph" for name in plain)] * 2
    assert {row["note"] for row in rows} == {None}
    assert fake.log.count("graph") == len(rows) / 2
    assert fake.log.count("CUDAGraph.replay") >= len(rows) / 2 * sweep.ROUNDS
    assert {row["contestant"] for row in rows if row["saved_mb"] is not None} == set(plain)
    styles = {line.get_label(): line.get_linestyle() for line in pictures.sweep(rows).axes[0].lines}
    assert styles == {"mann_kernels": "-", "eager": "-", "mann_kernels graph": "--", "eager graph": "--"}
    # one that has taken too long is not called any more, not for a capture either, however short its graph is
    fake.log.clear()
    monkeypatch.setattr(gpu, "measure", lambda function: 0.1 if isinstance(function, devices.Replay) else 2000.0)
    rows = sweep.run(short, "T", gpu, "float32", 1, sweep.Bounds(seconds=1))
    assert [row["note"] for row in rows[4:]] == [sweep.OUT_OF_TIME] * 4
    assert fake.log.count("graph") == 2


def test_out_of_memory_is_a_row(gpu):
    def too_large(memory, key):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    rows = rows_on_gpu(gpu, "content_address", eager=too_large)
    notes = {row["contestant"]: row["note"] for row in rows}
    assert notes["mann_kernels"] is notes["mann_kernels graph"] is None
    assert notes["eager"] == notes["eager graph"] == notes["compile_step"] == "out of memory"
    failed = next(row for row in rows if row["contestant"] == "eager")
    assert (failed["median_ms"], failed["rounds"]) == (None, 0)
    assert tables.timings_table(rows).row_count == len(rows) == 10


def test_one_that_fails_later_is_left_out(gpu):
    calls = []

    def tires():
        calls.append(1)
        if len(calls) > 4:
            raise torch.OutOfMemoryError

    times, notes = harness.interleave({"tires": tires, "lasts": lambda: None}, gpu, 0.0, 11)
    assert notes == {"tires": "out of memory"}
    assert list(times) == ["lasts"]
    assert len(times["lasts"]) == 3


def test_a_kernel_that_raises_is_not_verified(gpu):
    def broken(memory, key):
        raise ValueError("OutOfResources: shared memory")

    rows = harness.verify([ADDRESS], gpu, candidates={ADDRESS.op: broken})
    assert {(row["ok"], row["device"], row["backend"]) for row in rows} == {(False, "cuda", "triton")}
    assert rows[0]["quantity"] == "ValueError: OutOfResources: shared memory"
    assert tables.failures_table(rows).row_count == len(rows) == 4 * 3


def test_a_whole_run_on_a_gpu(gpu, monkeypatch, tmp_path):
    """The front end with both devices: everything is verified first; one of ours that cannot be timed fails the run."""
    order = []
    monkeypatch.setattr(front, "devices", lambda wanted: [CPU, gpu])
    monkeypatch.setattr(harness, "verify", lambda benches, device, dtypes: order.append(("verify", device.type)) or [])

    class Comparison:
        def __init__(self, bench, case, device, dtype, threads, quick, data, part):
            order.append((device.type, dtype, case.name))
            self.head = {"op": bench.op, "shape": case.name, "pass": "fwd", "device": device.type, "dtype": dtype}
            self.sittings = 0

        def sit(self):
            self.sittings += 1

        def rows(self):
            assert self.sittings == (CPU.sittings if self.head["device"] == "cpu" else 1)
            row = dict.fromkeys(store.TABLES["timings"]) | {"threads": 1, "same_work": True, **self.head}
            note = "out of memory" if row["shape"] == "wide" else "slow"
            return [row | {"contestant": "mann_kernels", "note": note}]

    monkeypatch.setattr(harness, "Comparison", Comparison)
    path = tmp_path / "out.json"
    result = invoke("--op", "lrua_step", "--json", path)
    assert result.exit_code == 1, result.output
    assert order[:2] == [("verify", "cpu"), ("verify", "cuda")]
    assert order[2:4] == [("cpu", "float32", "paper"), ("cpu", "float32", "wide")]
    assert set(order[4:]) == {("cuda", dtype, name) for dtype in gpu.timed for name in ("paper", "wide", "batch")}
    assert result.exit_code == 1
    assert "8 of our own could not be timed" in result.output
    facts = json.loads(path.read_text())["machine"]
    assert facts["devices"]["cuda"]["capability"] == "9.0"
    assert set(facts["devices_after"]) == {"cpu", "cuda"}


def test_facts_of_a_gpu(gpu, monkeypatch):
    assert gpu.facts()["name"] == "Stand-in"
    asked = []

    def nvidia_smi(command, **kwargs):
        asked.append(command)
        return SimpleNamespace(returncode=0, stdout="580.1, P0, 1980 MHz, 1980 MHz, 2619 MHz, 41, 98.2 W\n", stderr="")

    monkeypatch.setattr(devices.subprocess, "run", nvidia_smi)
    assert gpu.state()["temperature.gpu"] == "41"
    assert "--id=GPU-0-1" in asked[0]
    monkeypatch.setattr(
        devices.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=6, stdout="No devices", stderr="")
    )
    assert gpu.state() == {"unknown": "nvidia-smi: No devices"}

    def absent(*args, **kwargs):
        raise FileNotFoundError("no nvidia-smi")

    monkeypatch.setattr(devices.subprocess, "run", absent)
    assert gpu.state() == {"unknown": "no nvidia-smi"}


@pytest.mark.gpu
def test_the_bench_on_a_real_gpu():
    """What the tests above do with a stand-in."""
    gpu = devices.Cuda()
    assert gpu.problem() is None
    assert all(row["ok"] for row in harness.verify([ADDRESS], gpu))
    quick = replace(MANN, compiled=lambda loop: MANN.eager)
    for dtype in gpu.timed:
        ours = kernels_of(MANN, gpu.type, getattr(torch, dtype))
        rows = harness.time_case(quick, Case("tiny", TINY), gpu, dtype, 1, quick=True)
        assert len(rows) == (len(ours) + 4 + len(peers.ALTERNATIVES)) * 2
        assert {row["note"] for row in rows} == {None}
        assert all(0 < row["median_ms"] < 1e3 for row in rows)
