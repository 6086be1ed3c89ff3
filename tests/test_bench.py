import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from typer.testing import CliRunner

import mann_kernels
from bench import __main__ as front
from bench import contestants, devices, harness, metanet_update, store
from bench.counts import work
from bench.episodes import omniglot
from bench.stems import SHAPES, Shape, inputs
from bench.suites import MANN, METANET, SUITES, Case, suite_of
from mann_kernels import _backend

TINY = Shape(3, 2, 4, 5, 9, 6, 2)
CPU = devices.Cpu()


def invoke(*arguments):
    return CliRunner().invoke(front.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("stem", _backend.STEMS)
def test_eager_contestant_is_right(stem):
    suite = suite_of(stem)
    drawn = suite.inputs(stem, suite.verified(stem)[0]).values()
    want = suite.plain(stem)(*drawn)
    for function in (suite.eager[stem], *suite.alternatives.get(stem, {}).values()):
        for a, b in zip(function(*drawn), want, strict=True):
            torch.testing.assert_close(a, b, check_dtype=False)


@pytest.mark.parametrize("stem", [*_backend.STEMS, metanet_update.STEM])
def test_kernels_verify(stem):
    rows = harness.verify([stem], CPU)
    assert all(row["ok"] for row in rows)
    whole = stem == metanet_update.STEM
    assert {row["dtype"] for row in rows} == ({"float64"} if whole else {"float32", "float64", "bfloat16"})
    assert {row["backend"] for row in rows} == {"cpp"}
    assert set(rows[0]) == {"stem", "device", "backend", "dtype", "shape", "quantity", "error", "budget", "ok"}


def test_a_gradient_one_percent_off_is_refused():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, memory):
            return memory.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    rows = harness.verify(
        ["content_address"],
        CPU,
        {"content_address": lambda memory, key: mann_kernels.content_address(Wrong.apply(memory), key)},
    )
    assert {row["quantity"] for row in rows if not row["ok"]} == {"dmemory"}


def test_a_whole_update_with_one_wrong_gradient_is_refused():
    def wrong(*tensors):
        tensors = [*tensors[:2], tensors[2] + 0.01 * (tensors[2] - tensors[2].detach()), *tensors[3:]]
        return metanet_update.ours(*tensors)

    rows = harness.verify([metanet_update.STEM], CPU, {metanet_update.STEM: wrong})
    assert len(rows) == 2 * 36
    assert {row["quantity"] for row in rows if not row["ok"]} == {"dbase_learner.0.weight"}


def test_nothing_is_timed_after_a_failed_verification(monkeypatch, tmp_path):
    row = dict.fromkeys(("stem", "device", "backend", "dtype", "shape", "quantity"), "x")
    row |= {"error": 1.0, "budget": 0.0, "ok": False}
    monkeypatch.setattr(front.harness, "verify", lambda stems, device: [row])
    monkeypatch.setattr(front.harness, "Comparison", lambda *args: pytest.fail("timed"))
    result = invoke("--quick", "--device", "cpu", "--json", tmp_path / "out.json")
    assert result.exit_code == 1
    assert not (tmp_path / "out.json").exists()


def test_verify_only_writes_json(tmp_path):
    path = tmp_path / "out.json"
    result = invoke("--device", "cpu", "--verify-only", "--stem", "content_address", "--json", path)
    assert result.exit_code == 0, result.output
    written = json.loads(path.read_text())
    assert {"machine", *store.TABLES} <= set(written)
    assert written["timings"] == written["benchmarks"] == []
    assert {row["device"] for row in written["verification"]} == {"cpu"}


@pytest.mark.parametrize("arguments", [("--stem", "x"), ("--shape", "x"), ("--suite", "x"), ("--device", "x")])
def test_unknown_options(arguments):
    assert invoke(*arguments).exit_code == 2


def test_nothing_to_time(monkeypatch):
    monkeypatch.setattr(_backend, "default", lambda stem, device, dtype, sizes=None: ("reference", "no compiler"))
    result = invoke("--device", "cpu", "--stem", "content_address")
    assert result.exit_code == 1
    assert "Not timed on cpu: content_address: no compiler" in result.output
    assert result.output.endswith("Nothing was timed\n")


def test_every_suite_is_complete():
    for suite in SUITES.values():
        assert set(suite.stems) == set(suite.eager) >= set(suite.alternatives)
        assert set(suite.usual) == {"cpu", "cuda"}
        assert set().union(*suite.usual.values()) <= set(suite.shapes)
        assert all(suite_of(stem) is suite for stem in suite.stems)
        planned = list(suite.plan(suite.stems, suite.shapes, False))
        assert {case.stem for case in planned} == set(suite.stems)
        assert all(set(suite.operators(stem)) <= set(_backend.STEMS) for stem in suite.stems)
    named = sorted(stem for suite in SUITES.values() for stem in suite.stems)
    assert named == sorted([*_backend.STEMS, metanet_update.STEM])
    planned = {stem: [case.name for case in METANET.plan([stem], METANET.shapes, True)] for stem in METANET.stems}
    assert planned["augmented_linear"] == ["fc 64-64", "fc 64-5"]
    assert planned["generate_fast_weights"] == planned["summarize_gradients"] == ["omniglot", "miniimagenet"]


@pytest.mark.compiles
@pytest.mark.parametrize(("quick", "passes"), [(False, {"fwd", "fwd+bwd"}), (True, {"fwd+bwd"})])
def test_rows_of_timings(quick, passes, monkeypatch):
    monkeypatch.setattr(devices.Cpu, "seconds", 0.3)
    rows = harness.time_case(MANN, Case("content_address", "tiny", TINY), CPU, "float32", 1, quick)
    assert {row["contestant"] for row in rows} == {"mann_kernels", "eager", "compile_step"}
    assert {row["pass"] for row in rows} == passes
    assert all(row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] for row in rows)
    assert {(row["device"], row["note"]) for row in rows} == {("cpu", None)}
    assert all((row["of_ours"] == 1) == (row["contestant"] == "mann_kernels") for row in rows)


def test_saved_bytes_of_a_known_graph():
    work = harness.Work("content_address", inputs("content_address", TINY), torch.float32)
    # of exp only its result [B, N, W] is kept
    assert harness.saved_mb(work, lambda memory, key: memory.exp()) == pytest.approx(2 * 9 * 6 * 4 / 2**20)


@pytest.mark.parametrize(("shape", "less"), [("long", 6), ("wide", 15)])
def test_less_is_saved_for_backward(shape, less):
    work = harness.Work("mann_sequence", inputs("mann_sequence", replace(SHAPES[shape], B=2)), torch.float32)
    kinds = (mann_kernels.mann_sequence, contestants.EAGER["mann_sequence"])
    ours, eager = (harness.saved_mb(work, function) for function in kinds)
    assert ours * less < eager


def test_work_grows_with_the_shape():
    paper = SHAPES["paper"]
    one, whole = (work(stem, paper, 4, set())["fwd"].flops for stem in ("lrua_step", "lrua_sequence"))
    assert whole == 50 * one


def test_omniglot_episodes(tmp_path):
    images = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones((7, 3, 20, 20), np.uint8)
    np.savez(tmp_path / "data.npz", images=images)
    x = omniglot(tmp_path / "data.npz", 12, 3)
    assert x.shape == (12, 3, 405)
    assert (x[0, :, 400:] == 0).all()
    assert (x[1:, :, 400:].sum(-1) == 1).all()
    for b in range(3):  # the label of a step stands beside the next one, one label for each class
        seen = {(float(x[t, b, 0]), int(x[t + 1, b, 400:].argmax())) for t in range(11)}
        assert len({image for image, _ in seen}) == len(seen) == len({label for _, label in seen})
    with pytest.raises(SystemExit, match="cannot read images"):
        omniglot(tmp_path / "none.npz", 2, 1)


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
    made = [
        (contestants.compiled_anew(contestants.address), size) for size in range(2, 14)
    ]  # more than torch keeps for one
    for compiled in (len(made), len(made)):
        for function, size in made:
            function(torch.ones(1, size, 3), torch.ones(1, 2, 3))
        assert counter.frame_count == compiled
