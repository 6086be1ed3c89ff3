import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import mann_kernels
from bench import __main__ as front
from bench import devices, harness, limits, sweep
from bench.mann import Shape
from bench.operators import Axis, operators

TINY = Shape(3, 2, 4, 5, 9, 6, 2)
MANN = operators()["mann_sequence"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(sweep, "SECONDS", 0.0)


def test_the_exponent_of_a_power_law():
    assert sweep.exponent([(x, 3 * x**1.7) for x in (2, 8, 64)]) == pytest.approx(1.7)
    assert sweep.exponent([(4, 5.0)]) is None
    assert sweep.predicted([(1, 1.0), (2, 4.0)], 8) == pytest.approx(64)
    assert sweep.predicted([(1, 1.0), (2, 1.1)], 8) == pytest.approx(4.4)  # at least proportional
    assert sweep.predicted([], 8) == 0


#: The operator with a short axis.
SHORT = replace(MANN, axes={"T": Axis(TINY, (2, 4, 8, 16), 4)})


def entrants(monkeypatch, called, slow=lambda T: 0.0):
    """Ours, and one whose calls are counted by T and take as long as is said."""
    ours, eager = (MANN.eager,) * 2
    clock = [0.0]

    def tired(x, *rest):
        called.append(x.shape[0])
        clock[0] += slow(x.shape[0])
        return eager(x, *rest)

    class Clock(devices.Cpu):
        def measure(self, function):
            before = clock[0]
            function()
            return (clock[0] - before) * 1e3 + 0.001

    named = (("mann_kernels", ours), ("eager", tired))
    monkeypatch.setattr(
        sweep, "entrants", lambda bench, axis, compiled, graphs: [sweep.Contestant(*one) for one in named]
    )
    return Clock()


def test_a_point_that_would_take_too_long_is_not_run(monkeypatch):
    called = []
    device = entrants(monkeypatch, called, lambda T: 0.3 * T)
    rows = sweep.run(SHORT, "T", device, "float32", 1, sweep.Bounds(seconds=1.5))
    notes = {row["value"]: row["note"] for row in rows if row["contestant"] == "eager"}
    # 0.6 s and 1.2 s are measured; 2.4 s is foreseen
    assert notes == {2: None, 4: None, 8: sweep.OUT_OF_TIME, 16: sweep.OUT_OF_TIME}
    assert set(called) == {2, 4}
    assert {row["note"] for row in rows if row["contestant"] == "mann_kernels"} == {None}
    stopped = next(row for row in rows if row["note"])
    assert (stopped["median_ms"], stopped["saved_mb"]) == (None, None)


def test_a_point_that_would_hold_too_much_is_not_run(monkeypatch):
    called = []
    device = entrants(monkeypatch, called)
    work = harness.Work(MANN, MANN.inputs(TINY.at(4), 0), torch.float32)
    saved = harness.saved_mb(work, MANN.eager)
    rows = sweep.run(SHORT, "T", device, "float32", 1, sweep.Bounds(memory_mb=1.5 * sweep.HELD * saved))
    notes = {row["value"]: row["note"] for row in rows if row["contestant"] == "eager"}
    assert notes == {2: None, 4: None, 8: sweep.OUT_OF_MEMORY, 16: sweep.OUT_OF_MEMORY}
    assert set(called) == {2, 4}


def test_exponents_are_fitted_where_the_size_dominates(monkeypatch):
    rows = sweep.run(SHORT, "T", entrants(monkeypatch, [], lambda T: 0.01 * T), "float32", 1, sweep.Bounds())
    for row in rows:
        if row["contestant"] == "eager" and row["value"] == 2:
            row["min_ms"] = 1e9  # outside of the range
    fit = next(fit for fit in sweep.fits(rows) if fit["contestant"] == "eager")
    assert (fit["variable"], fit["from"], fit["to"]) == ("T", 4, 16)
    assert fit["time"] == pytest.approx(1, abs=0.01)
    assert 0.5 < fit["saved"] < 1.1


def saved_bytes(function, T, N, W):
    shape = Shape(T, 2, 5, 7, N, W, 2)
    work = harness.Work(MANN, MANN.inputs(shape, 0), torch.float32)
    return harness.saved_mb(work, function) * 2**20


def test_no_memory_is_saved_for_a_step():
    """Between two copies, what a step adds depends on the width alone; the eager loop keeps the whole memory."""

    def of_a_step(function, N, W):
        return (saved_bytes(function, 40, N, W) - saved_bytes(function, 8, N, W)) / 32

    few, many = (of_a_step(mann_kernels.mann_sequence, N, 16) for N in (64, 512))
    assert 0 < few == many
    wider = [of_a_step(mann_kernels.mann_sequence, N, 64) for N in (64, 512)]
    assert few < wider[0] == wider[1] < 64 * 16 * 4  # less than the smallest memory of one example
    assert of_a_step(MANN.eager, 512, 64) > 2 * 512 * 64 * 4


def test_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "SIDE", {"cpu": 64})
    monkeypatch.setattr(limits, "COPIED", {"cpu": 2**12})
    few = {name: Axis(TINY, values, 2) for name, values in (("T", (2, 4)), ("N", (4, 8)))}
    monkeypatch.setattr(front, "operators", lambda: {MANN.op: replace(MANN, axes=few)})
    path = tmp_path / "a.json"
    arguments = ["sweep", "--device", "cpu", "--variable", "T", "--variable", "N", "--json", str(path)]
    result = CliRunner().invoke(front.app, arguments)
    assert result.exit_code == 0, result.output
    assert "Exponents where the size dominates" in result.output
    stored = json.loads(path.read_text())
    assert {(row["variable"], row["value"]) for row in stored["sweep"]} == {("T", 2), ("T", 4), ("N", 4), ("N", 8)}
    assert {row["note"] for row in stored["sweep"]} == {None}
    assert all(row["ok"] for row in stored["verification"])
    assert stored["machine"]["limits"]["cpu"]["float32"]["product_gflop_s"] > 0
    assert CliRunner().invoke(front.app, ["sweep", "--variable", "X"]).exit_code == 2
