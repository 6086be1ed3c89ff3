import functools
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from against_reference import OnePercentOff
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import mann_kernels
from bench import __main__ as front
from bench import bench_metanet_update, devices, harness, operators, run, store
from bench import calls as call_costs
from bench.bench_content_address import address
from bench.mann import SHAPES, Shape
from bench.operators import Case
from mann_kernels import _backend

TINY = Shape(3, 2, 4, 5, 9, 6, 2)
CPU = devices.Cpu()
BENCHES = operators.operators()
ADDRESS, MANN, UPDATE = (BENCHES[op] for op in ("content_address", "mann_sequence", "metanet_update"))


def invoke(*arguments):
    return CliRunner().invoke(front.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("op", _backend.OPS)
def test_eager_contestant_is_right(op):
    bench = BENCHES[op]
    drawn = bench.inputs(bench.verified[0], 0).values()
    want = bench.reference()(*drawn)
    for function in (bench.eager, *bench.alternatives.values()):
        for a, b in zip(function(*drawn), want, strict=True):
            torch.testing.assert_close(a, b, check_dtype=False)


@pytest.mark.parametrize("op", BENCHES)
def test_kernels_verify(op):
    rows = harness.verify([BENCHES[op]], CPU)
    assert all(row["ok"] for row in rows)
    whole = op == UPDATE.op
    assert {row["dtype"] for row in rows} == ({"float64"} if whole else {"float32", "float64", "bfloat16"})
    assert {row["backend"] for row in rows} == {"cpp"}
    assert set(rows[0]) == {"op", "device", "backend", "dtype", "shape", "quantity", "error", "budget", "ok"}


def test_a_gradient_one_percent_off_is_refused():
    wrong = {ADDRESS.op: lambda memory, key: mann_kernels.content_address(OnePercentOff.apply(memory), key)}
    rows = harness.verify([ADDRESS], CPU, candidates=wrong)
    assert {row["quantity"] for row in rows if not row["ok"]} == {"dmemory"}


def test_a_whole_update_with_one_wrong_gradient_is_refused():
    def wrong(*tensors):
        tensors = [*tensors[:2], tensors[2] + 0.01 * (tensors[2] - tensors[2].detach()), *tensors[3:]]
        return bench_metanet_update.ours(*tensors)

    rows = harness.verify([UPDATE], CPU, candidates={UPDATE.op: wrong})
    assert len(rows) == 3 * 36
    assert {row["quantity"] for row in rows if not row["ok"]} == {"dbase_learner.0.weight"}


def test_nothing_is_timed_after_a_failed_verification(monkeypatch, tmp_path):
    row = dict.fromkeys(("op", "device", "backend", "dtype", "shape", "quantity"), "x")
    row |= {"error": 1.0, "budget": 0.0, "ok": False}
    monkeypatch.setattr(harness, "verify", lambda benches, device, dtypes: [row])
    monkeypatch.setattr(harness, "Comparison", lambda *args: pytest.fail("timed"))
    result = invoke("--quick", "--device", "cpu", "--json", tmp_path / "out.json")
    assert result.exit_code == 1
    assert not (tmp_path / "out.json").exists()


def test_verify_only_writes_json(tmp_path):
    path = tmp_path / "out.json"
    result = invoke("--device", "cpu", "--verify-only", "--op", "content_address", "--json", path)
    assert result.exit_code == 0, result.output
    written = json.loads(path.read_text())
    assert {"machine", *store.TABLES} <= set(written)
    assert written["timings"] == written["benchmarks"] == []
    assert {row["device"] for row in written["verification"]} == {"cpu"}


@pytest.mark.parametrize(
    "arguments",
    [("--op", "x"), ("--shape", "x"), ("--suite", "x"), ("--device", "x"), ("--precision", "tf32", "--device", "cpu")],
)
def test_unknown_options(arguments):
    assert invoke(*arguments).exit_code == 2


def test_tf32_is_allowed_while_it_is_timed():
    def allowed():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = allowed()
    assert before[0] is False
    with run.of_precision(None):
        assert allowed() == before
    with run.of_precision("tf32"):
        assert allowed() == (True, True)
    assert allowed() == before


def test_nothing_to_time(monkeypatch):
    monkeypatch.setattr(_backend, "default", lambda op, device, dtype, sizes=None: ("reference", "no compiler"))
    result = invoke("--device", "cpu", "--op", "content_address")
    assert result.exit_code == 1
    assert "Not timed on cpu: content_address: no compiler" in result.output
    assert result.output.endswith("Nothing was timed\n")


def test_every_operator_has_a_bench():
    assert list(BENCHES) == [*_backend.OPS, UPDATE.op]
    assert {bench.suite for bench in BENCHES.values()} == {"mann", "metanet"}
    for op, bench in BENCHES.items():
        assert set(bench.parts or (op,)) <= set(_backend.OPS)
        assert bench.planned("cuda", quick=True)[0].name == bench.cases(False)[0].name
    names = {op: [case.name for case in bench.planned("cpu", quick=True)] for op, bench in BENCHES.items()}
    assert names["augmented_linear"] == ["fc 64-64", "fc 64-5"]
    assert names["augmented_conv2d"] == ["conv 28", "conv 7", "conv 2"]
    assert names["mann_sequence"] == ["paper", "paper@T=6", "wide"]
    assert [case.name for case in MANN.planned("cpu", True, ["single"])] == ["single"]
    everything = [case.name for case in MANN.planned("cuda", quick=False)]
    assert {"long", "batch", "single@T=12"} <= set(everything)
    assert "batch" not in [case.name for case in MANN.planned("cpu", quick=False)]


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("quick", "passes"), [(False, {"fwd", "fwd+bwd"}), pytest.param(True, {"fwd+bwd"}, marks=pytest.mark.long)]
)
def test_rows_of_timings(quick, passes, monkeypatch):
    monkeypatch.setattr(devices.Cpu, "seconds", 0.3)
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="eager")
    )  # Inductor takes ten seconds
    rows = harness.time_case(ADDRESS, Case("tiny", TINY), CPU, "float32", 1, quick)
    assert {row["contestant"] for row in rows} == {"mann_kernels", "eager", "compile_step"}
    assert {row["pass"] for row in rows} == passes
    assert all(row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] for row in rows)
    assert {(row["device"], row["note"]) for row in rows} == {("cpu", None)}
    assert all((row["of_ours"] == 1) == (row["contestant"] == "mann_kernels") for row in rows)


def test_what_a_call_costs(monkeypatch):
    """The parts add up to forward and backward pass; the operators alone are those of the package, in order."""
    monkeypatch.setattr(call_costs, "TURNS", 3)
    found = call_costs.row(ADDRESS, CPU)
    assert found.keys() == call_costs.PARTS.keys()
    assert min(found["operator"], found["backward"], found["checks"]) > 0
    with call_costs.Recorded() as record:
        harness.Work(ADDRESS, ADDRESS.inputs(TINY, 0), torch.float32).train(mann_kernels.content_address)
    assert [call[0]._opname for call in record.calls] == ["content_address", "content_address_backward"]


def test_a_training_step_is_the_operator_alone():
    """Forward and backward, and neither a loss nor its gradient."""
    made = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made.append(func.name())
            return func(*args, **(kwargs or {}))

    work = harness.Work(ADDRESS, ADDRESS.inputs(TINY, 0), torch.float32)
    for _ in range(2):  # at the first call the gradient is drawn
        made.clear()
        with Calls():
            work.train(mann_kernels.content_address)
    assert [name for name in made if "detach" not in name] == [
        "mann::content_address",
        "mann::content_address_backward",
    ]


def test_saved_bytes_of_a_known_graph():
    work = harness.Work(ADDRESS, ADDRESS.inputs(TINY, 0), torch.float32)
    # of exp only its result [B, N, W] is kept
    assert harness.saved_mb(work, lambda memory, key: memory.exp()) == pytest.approx(2 * 9 * 6 * 4 / 2**20)


@pytest.mark.parametrize(("shape", "less"), [("long", 6), ("wide", 15)])
def test_less_is_saved_for_backward(shape, less):
    work = harness.Work(MANN, MANN.inputs(replace(SHAPES[shape], B=2), 0), torch.float32)
    kinds = (mann_kernels.mann_sequence, MANN.eager)
    ours, eager = (harness.saved_mb(work, function) for function in kinds)
    assert ours * less < eager


def test_work_grows_with_the_shape():
    paper = SHAPES["paper"]
    one, whole = (BENCHES[op].work(paper, 4)["fwd"].flops for op in ("lrua_step", "lrua_sequence"))
    assert whole == 50 * one


def test_real_episodes_take_the_place_of_the_input(tmp_path):
    images = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones((7, 3, 20, 20), np.uint8)
    np.savez(tmp_path / "data.npz", images=images, class_vinyals=np.zeros(7, np.uint8))
    shape = replace(SHAPES["paper"], T=40, B=3)
    x = MANN.real(tmp_path / "data.npz", shape)["x"]
    assert x.shape == (40, 3, 405)
    assert (x[0, :, 400:] == 0).all()
    assert (x[1:15, :, 400:].sum(-1) == 1).all()
    assert torch.equal(x[15:30], x[:15])  # there are no more images
    assert MANN.real(tmp_path / "data.npz", TINY) == {}
    with pytest.raises(SystemExit, match=r"--data: .*none.npz: no such file"):
        MANN.real(tmp_path / "none.npz", shape)


def test_all_sittings_count():
    first, second = ({"a": [1.0, 2.0], "b": [3.0, 4.0]}, {}), ({"a": [5.0]}, {"b": "failed"})
    assert harness.pooled([first, first]) == ({"a": [1.0, 2.0] * 2, "b": [3.0, 4.0] * 2}, {})
    assert harness.pooled([first, second]) == ({"a": [1.0, 2.0, 5.0]}, {"b": "failed"})
    assert harness.pooled([second, first]) == ({"a": [5.0, 1.0, 2.0]}, {"b": "failed"})


def test_a_slow_spell_of_the_machine_is_not_in_the_ratio():
    spells = [1.0] * 5 + [1.4] * 4
    ours, other = [2 * spell for spell in spells], [5 * spell for spell in spells]
    other[3] *= 100  # something else, once
    assert harness.ratios(other, ours)["of_ours"] == pytest.approx(2.5)
    apart = harness.ratios([2.0, 4.0, 9.0, 16.0], [2.0, 2.0, 3.0])  # the last has nobody beside it
    assert apart == {"of_ours_q1": 1.5, "of_ours": 2.0, "of_ours_q3": 2.5}
    assert set(harness.ratios(other, []).values()) == {None}


@pytest.mark.parametrize(("took", "warmed"), [(400.0, 1), (600.0, 0)])
def test_later_sittings_do_not_warm_up_what_takes_long(took, warmed):
    called = []
    for before, calls in (((), 3), ([({"a": [took]}, {})], warmed)):
        times, notes = harness.interleave({"a": lambda: called.append(1)}, CPU, 0.0, 2, before)
        assert (len(called), len(times["a"]), notes) == (calls + 2, 2, {})
        called.clear()


@pytest.mark.compiles
def test_what_was_compiled_stays_compiled(monkeypatch):
    """Comparisons are all made before they are timed again: compiling for one must not undo another's."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    made = [(operators.compiled_anew(address), size) for size in range(2, 14)]  # more than torch keeps for one
    for compiled in (len(made), len(made)):
        for function, size in made:
            function(torch.ones(1, size, 3), torch.ones(1, 2, 3))
        assert counter.frame_count == compiled


def test_a_run_that_is_cut_short_keeps_what_it_has(monkeypatch, tmp_path):
    """By the user, by its minutes or by a lost device; and it can be gone on with."""
    ends = {"second": KeyboardInterrupt, "third": devices.DeviceLost("gone"), "fourth": run.TimeUp}
    made = []

    class Comparison:
        def __init__(self, bench, case, *rest):
            made.append(case.name)
            if case.name in ends:
                raise ends[case.name]
            self.name = case.name

        def sit(self):
            pass

        def rows(self):
            row = dict.fromkeys(store.TABLES["timings"]) | {"threads": 1, "same_work": True, "op": ADDRESS.op}
            row |= {"shape": self.name, "pass": "fwd", "device": "cpu", "dtype": "float32", "median_ms": 1.0}
            more = dict.fromkeys(("q1_ms", "q3_ms", "min_ms", "max_ms", "mean_ms", "stddev_ms"), 1.0)
            return [row | more | {"contestant": "mann_kernels", "rounds": 3}]

    names = ("first", "second", "third", "fourth", "fifth")
    few = replace(ADDRESS, cases=lambda quick: [Case(name, TINY) for name in names])
    monkeypatch.setattr(front, "operators", lambda: {ADDRESS.op: few})
    monkeypatch.setattr(harness, "Comparison", Comparison)
    path, left = tmp_path / "a.json", list(names)
    for code, said in (
        (130, "interrupted"),
        (1, "does not answer any more. gone"),
        (0, "ended after 9 minutes"),
        (0, None),
    ):
        made.clear()
        more = ("--resume",) if path.exists() else ()
        more += ("--minutes", "9") if said and "ended" in said else ()
        result = invoke("--device", "cpu", "--json", path, *more)
        assert result.exit_code == code, result.output
        assert made[0] == left[0]  # what is there is not done again
        kept = store.read(path)
        assert {row["shape"] for row in kept["timings"]} == set(names) - set(left) | set(made) - set(ends)
        assert all(row["ok"] for row in kept["verification"])
        assert (said or "") in kept["machine"].get("stopped", "")
        ends.pop(made[-1], None)
        left = [name for name in names if name not in {row["shape"] for row in kept["timings"]}]
    assert left == []


def test_the_minutes_end_a_run_wherever_it_is(monkeypatch, tmp_path):
    """In a contestant too, whose failures are notes otherwise."""

    def endless(*tensors):
        while True:
            time.sleep(0.01)

    few = replace(ADDRESS, cases=lambda quick: [Case("tiny", TINY)], eager=endless)
    monkeypatch.setattr(front, "operators", lambda: {ADDRESS.op: few})
    result = invoke("--device", "cpu", "--minutes", "0.05", "--json", tmp_path / "a.json")
    assert result.exit_code == 1, result.output
    assert "Stopped: ended after 0.05 minutes" in result.output
    assert store.read(tmp_path / "a.json")["machine"]["stopped"] == "ended after 0.05 minutes"


def test_what_matters_most_comes_first(monkeypatch):
    gpu = SimpleNamespace(type="cuda", timed=("float32", "bfloat16"), has_graphs=True)
    monkeypatch.setattr(run, "with_kernels", lambda benches, device, console: benches)
    planned = run.Run.jobs(
        SimpleNamespace(where=[CPU, gpu], timings=[], console=None),
        run.Selection(list(BENCHES.values()), None, False, None),
        in_parts=True,
    )
    assert (planned[0].bench.op, planned[0].case.name, planned[0].part) == ("mann_sequence", "paper", "graphs")
    assert [job.part for job in planned if job.device is gpu][-1] == "compiled"
    parts = list(dict.fromkeys((job.device.type, job.part) for job in planned))
    assert parts == [("cuda", part) for part in ("graphs", "plain", "compiled")] + [
        ("cpu", "plain"),
        ("cpu", "compiled"),
    ]
    ranks = [job.case.rank for job in planned if job.device is gpu and job.part == "graphs"]
    assert ranks == sorted(ranks)
    assert {job.bench.op for job in planned[:4]} == {"mann_sequence", "metanet_update"}
