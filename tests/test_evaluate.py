"""The commands that test and draw what was trained."""

import csv

import pytest
import torch
from commands import TINY, invoke
from matplotlib.axes import Axes
from packed import write_packed

from mann_kernels.compare import main as compare


def test_the_commands_from_training_to_pictures(tmp_path):
    """Scalars for TensorBoard are those of the log; evaluation repeats, and its pictures are there."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from mann_kernels.evaluate import main as evaluate

    out, options = tmp_path / "run", [*TINY.split(), "--log-every", "2", "--test-every", "4"]
    call = ["gp-regression", "--length", "6", "--out", str(out), "--tensorboard", *options]
    assert invoke(*call, "--updates", "4").exit_code == 0
    result = invoke(*call, "--updates", "8", "--resume")
    assert result.exit_code == 0, result.output
    assert "8 updates, 16 tasks" in result.output
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    with (out / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("loss", "nll_2", "exact_5", "test_nll", "seconds"):
        want = [(int(row["update"]), pytest.approx(float(row[name]))) for row in rows if row[name]]
        assert [(event.step, event.value) for event in events.Scalars(name)] == want
    shown = [invoke(str(out), "--tasks", "3", "--plots", str(tmp_path / "plots"), command=evaluate) for _ in range(2)]
    assert shown[0].exit_code == 0, shown[0].output
    assert shown[0].output == shown[1].output
    assert "exact_5" in shown[0].output
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"training.png", "points.png", "memory.png"}
    result = invoke(str(out), "--nearest", command=evaluate)
    assert result.exit_code == 2
    assert "--nearest: got gp-regression, want few-shot" in " ".join(result.output.replace("│", " ").split())
    missing = invoke(str(tmp_path / "none"), command=evaluate)
    assert missing.exit_code == 2
    assert "want the checkpoint of a run" in " ".join(missing.output.replace("│", " ").split())


def test_several_runs_in_one_picture(tmp_path, monkeypatch):
    """A line for each, through its tests alone, over the tasks of the training."""
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, *a, **options: drawn.append((*a, options)) or plot(self, *a, **options)
    )
    for name, rows in {"a": "1,4,,,1\n2,8,0.5,0.1,2", "b": "3,6,0.25,0.1,1"}.items():
        (tmp_path / f"{name}.csv").write_text(f"update,tasks,test_accuracy,test_accuracy_half_width,seconds\n{rows}\n")
    out = tmp_path / "both.png"
    result = invoke(str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), "--out", str(out), command=compare)
    assert result.exit_code == 0, result.output
    assert out.read_bytes().startswith(b"\x89PNG")
    assert drawn == [([8.0], [0.5], {"label": "a"}), ([6.0], [0.25], {"label": "b"})]
    (tmp_path / "a.csv").write_text("update,tasks,test_accuracy,seconds\n1,2,,3\n")
    for wrong, said in (("a.csv", "a: got 1 rows without test_accuracy, want"), ("c", "no log there, want")):
        result = invoke(str(tmp_path / wrong), "--out", str(out), command=compare)
        assert result.exit_code == 2
        assert said in " ".join(result.output.replace("│", " ").split())


def test_evaluation_shows_the_paper_beside(tmp_path):
    from mann_kernels.evaluate import main as evaluate

    data, out = write_packed(tmp_path / "small.npz", classes=30, drawers=10), tmp_path / "run"
    call = ["omniglot", "--data", str(data), "--out", str(out), "--updates", "1", *TINY.split()]
    result = invoke(*call)
    assert result.exit_code == 0, result.output
    result = invoke(str(out / "checkpoint.safetensors"), "--data", str(data), "--tasks", "4", command=evaluate)
    assert result.exit_code == 0, result.output
    assert all(number in result.output for number in ("36.4", "82.8", "91.0", "92.6", "94.9", "98.1"))
    result = invoke(str(out), command=evaluate)
    assert result.exit_code == 2
    assert "--data: got none, and omniglot is made of Omniglot" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("more", "augment", "turns", "title"),
    [
        ([], False, False, "3 test tasks"),
        (["--turns"], False, True, "3 test tasks, turned"),
        (["--augment"], True, True, "3 test tasks, augmented"),
    ],
)
def test_evaluation_of_fifteen_classes_augmented_or_not(tmp_path, monkeypatch, more, augment, turns, title):
    from mann_kernels import evaluate

    data, out = write_packed(tmp_path / "small.npz", classes=96, drawers=10), tmp_path / "run"
    call = ["omniglot", "--data", str(data), "--out", str(out), "--updates", "1", *TINY.split()]
    call += ["--ways", "15", "--length", "100", "--labels", "string"]
    assert invoke(*call).exit_code == 0
    asked, seen, keep = [], [], evaluate.measure

    def measure(learner, tasks, *rest):
        asked.append(learner)
        seen.append(tasks)
        return keep(learner, tasks, *rest)

    monkeypatch.setattr(evaluate, "measure", measure)
    call = (str(out), "--data", str(data), "--tasks", "3", *more, "--nearest")
    result = invoke(*call, command=evaluate.main)
    assert result.exit_code == 0, result.output
    assert [type(learner).__name__ for learner in asked] == ["Recurrent", "NearestNeighbour"]
    assert (seen[0].augment, seen[0].turns) == (augment, turns)
    assert result.output.splitlines()[0].rstrip().endswith(title)
    assert all(number in result.output for number in ("62.6", "79.3", "86.6", "88.7", "95.3", "18.7", "37.0"))
    assert "93.1" not in result.output  # of 5 classes


@pytest.mark.parametrize("learner", ["metanet", "context-recurrent"])
def test_fewer_classes_than_in_training(tmp_path, monkeypatch, learner):
    """Tasks of 3 classes for a learner of 4, of which one is never right."""
    from mann_kernels import evaluate

    data, out = write_packed(tmp_path / "small.npz"), tmp_path / "run"
    call = ["few-shot", "--data", str(data), "--out", str(out), "--learner", learner, "--ways", "4", "--queries", "2"]
    result = invoke(*call, "--updates", "1", "--tasks-per-update", "1", "--test-tasks", "2", "--interim-tasks", "2")
    assert result.exit_code == 0, result.output
    seen, keep = [], evaluate.measure
    monkeypatch.setattr(
        evaluate, "measure", lambda learner, tasks, *rest: seen.append(tasks) or keep(learner, tasks, *rest)
    )
    call = (str(out), "--data", str(data), "--tasks", "2", "--ways")
    result = invoke(*call, "3", command=evaluate.main)
    assert result.exit_code == 0, result.output
    assert "2 test tasks of 3 classes" in " ".join(result.output.split())
    batch = seen[0].sample(2, torch.Generator())
    assert batch.support_x.shape[1] == 3
    last = torch.zeros(2, 6, 4).index_fill(2, torch.tensor(3), 1.0)
    assert seen[0].scores(last, batch)["accuracy"][0].tolist() == [2, 2]  # the first of those that count
    result = invoke(*call, "5", command=evaluate.main)
    assert result.exit_code == 2
    assert "--ways: got 5, want at most 4" in " ".join(result.output.replace("│", " ").split())
