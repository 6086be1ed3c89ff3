import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mann_kernels
from bench import contestants, harness, metanet_update
from bench.episodes import omniglot
from bench.stems import SHAPES, Shape, flops, inputs
from bench.suites import family_of, in_metanet
from mann_kernels import _backend

TINY = Shape(3, 2, 4, 5, 9, 6, 2)


@pytest.mark.parametrize("stem", _backend.STEMS)
def test_eager_contestant_is_right(stem):
    family = family_of(stem)
    drawn = family.inputs(stem, family.verified[0] if in_metanet(stem) else TINY).values()
    want = contestants.plain(stem)(*drawn)
    for function in (contestants.EAGER[stem], *contestants.ALTERNATIVES.get(stem, {}).values()):
        for a, b in zip(function(*drawn), want, strict=True):
            torch.testing.assert_close(a, b, check_dtype=False)


@pytest.mark.parametrize("stem", [*_backend.STEMS, metanet_update.STEM])
def test_kernels_verify(stem):
    rows = harness.verify([stem])
    assert all(row["ok"] for row in rows)
    assert {row["dtype"] for row in rows} == set(family_of(stem).dtypes)
    assert set(rows[0]) == {"stem", "backend", "dtype", "shape", "quantity", "error", "budget", "ok"}


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
        {"content_address": lambda memory, key: mann_kernels.content_address(Wrong.apply(memory), key)},
    )
    assert {row["quantity"] for row in rows if not row["ok"]} == {"dmemory"}


def test_a_whole_update_with_one_wrong_gradient_is_refused():
    def wrong(*tensors):
        tensors = [*tensors[:2], tensors[2] + 0.01 * (tensors[2] - tensors[2].detach()), *tensors[3:]]
        return metanet_update.ours(*tensors)

    rows = harness.verify([metanet_update.STEM], {metanet_update.STEM: wrong})
    assert len(rows) == 2 * 36
    assert {row["quantity"] for row in rows if not row["ok"]} == {"dbase_learner.0.weight"}


def test_nothing_is_timed_after_a_failed_verification(monkeypatch, tmp_path):
    import typer

    from bench import __main__ as front

    row = dict.fromkeys(("stem", "backend", "dtype", "shape", "quantity"), "x") | {
        "error": 1.0,
        "budget": 0.0,
        "ok": False,
    }
    monkeypatch.setattr(front.harness, "verify", lambda stems: [row])
    monkeypatch.setattr(front.harness, "time_stem", lambda *args: pytest.fail("timed"))
    app = typer.Typer()
    app.command()(front.main)
    result = CliRunner().invoke(app, ["--quick", "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 1
    assert not (tmp_path / "out.json").exists()


def test_verify_only_writes_json(tmp_path):
    import typer

    from bench import __main__ as front

    app = typer.Typer()
    app.command()(front.main)
    path = tmp_path / "out.json"
    result = CliRunner().invoke(app, ["--verify-only", "--stem", "content_address", "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert set(json.loads(path.read_text())) == {"machine", "verification", "timings"}
    assert CliRunner().invoke(app, ["--stem", "nothing"]).exit_code == 2


@pytest.mark.compiles
def test_rows_of_timings():
    rows = harness.time_stem("content_address", "tiny", TINY, 1, quick=True)
    assert {row["contestant"] for row in rows} == {"mann_kernels", "eager", "compile_step"}
    assert {row["pass"] for row in rows} == {"fwd", "fwd+bwd"}
    assert all(row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] for row in rows)


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


def test_flops_grow_with_the_work():
    paper = SHAPES["paper"]
    assert flops("mann_sequence", paper.at(100)) == 2 * flops("mann_sequence", paper)
    assert flops("lrua_sequence", paper) == 50 * flops("lrua_step", paper)


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
