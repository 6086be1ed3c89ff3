"""The training loop, its checkpoints and the command, on a small file of made-up characters."""

import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import typer
from packed import write_packed
from torch import nn
from typer.testing import CliRunner

from mann_kernels.tasks import FewShotTasks, load_omniglot
from mann_kernels.train import checkpoint, loop
from mann_kernels.train.loop import Run, mean_and_half_width
from mann_kernels.train.settings import Settings

SETTINGS = Settings(
    "few-shot",
    "prototypes",
    ways=3,
    queries=2,
    tasks_per_update=1,
    log_every=2,
    test_every=4,
    interim_tasks=5,
    test_tasks=8,
)


class Prototypes(nn.Module):
    """The least learner: the class whose mean embedding is nearest. Random in training, so torch's generator matters too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Flatten(2), nn.Linear(784, 16), nn.Dropout(0.1))

    def adapt(self, support_x, support_y):
        weight = F.one_hot(support_y).mT.float()
        return weight / weight.sum(-1, keepdim=True) @ self.embed(support_x)

    def predict(self, query_x, state):
        return -torch.cdist(self.embed(query_x), state)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_packed(tmp_path_factory.mktemp("data") / "small.npz")


def make(data, folder, settings=SETTINGS, resume=False):
    torch.manual_seed(settings.seed)
    tasks = [FewShotTasks(load_omniglot(data, split), 3, 1, 2) for split in ("train", "test")]
    return Run(Prototypes(), *tasks, settings, folder, resume=resume)


def drain(run, updates):
    return [done["loss"] for done in run.train(updates)]


def weights(run):
    return run.learner.state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_logs(data, tmp_path):
    run = make(data, tmp_path, replace(SETTINGS, learning_rate=3e-3))
    before = run.test(40)["accuracy"][0]
    losses = drain(run, 120)
    assert sum(losses[-10:]) < sum(losses[:10])
    assert run.test(40)["accuracy"][0] > before + 0.1
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["update"]) for row in rows] == list(range(2, 121, 2))
    assert [bool(row["test_accuracy_half_width"]) for row in rows] == [update % 4 == 0 for update in range(2, 121, 2)]
    assert float(rows[0]["loss"]) == pytest.approx(sum(losses[:2]) / 2, abs=1e-6)
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracy.png", "checkpoint.safetensors", "log.csv"]


def test_resumed_is_the_run_that_was_not_interrupted(data, tmp_path):
    whole = make(data, tmp_path / "whole")
    losses = drain(whole, 10)
    drain(make(data, tmp_path / "parts"), 4)
    resumed = make(data, tmp_path / "parts", resume=True)
    assert resumed.update == 4
    assert drain(resumed, 10) == losses[4:]
    assert same(weights(resumed), weights(whole))
    first, second = ((tmp_path / name / "log.csv").read_text().splitlines() for name in ("whole", "parts"))
    # without the seconds; the first part was tested on all tasks where it ended
    kept = [[line.split(",")[:4] for line in lines] for lines in (first, second)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("moment", ["before", "within"])
def test_stopped_around_a_checkpoint(data, tmp_path, monkeypatch, moment):
    """The log is a row ahead of the checkpoint, or the file is half written: the last whole checkpoint counts."""
    whole = make(data, tmp_path / "whole")
    drain(whole, 10)
    run, calls = make(data, tmp_path / "parts"), []
    target, name = ((loop, "save_checkpoint"), (checkpoint.os, "replace"))[moment == "within"]
    keep = getattr(target, name)

    def stop(*args):
        calls.append(args)
        if (moment == "before" and len(calls) == 3) or (
            moment == "within" and "checkpoint" in str(args[1]) and run.update == 6
        ):
            raise KeyboardInterrupt
        return keep(*args)

    monkeypatch.setattr(target, name, stop)
    with pytest.raises(KeyboardInterrupt):
        drain(run, 10)
    monkeypatch.undo()
    resumed = make(data, tmp_path / "parts", resume=True)
    assert resumed.update == 4
    assert [int(row["update"]) for row in resumed.rows] == [2, 4]
    drain(resumed, 10)
    assert same(weights(resumed), weights(whole))
    assert not [path for path in (tmp_path / "parts").iterdir() if path.name.startswith(".")]


def test_time_is_a_limit_too(data, tmp_path):
    run = make(data, tmp_path)
    assert len(list(run.train(1000, minutes=0.0))) == 0
    assert len(list(run.train(1000, minutes=1e-9))) == 1
    assert run.rows[-1]["update"] == 1
    assert run.rows[-1]["test_accuracy"]


def test_a_test_changes_nothing(data, tmp_path):
    run = make(data, tmp_path)
    before = run.generator.get_state(), torch.get_rng_state(), {k: v.clone() for k, v in weights(run).items()}
    assert run.test(7) == run.test(7)
    assert torch.equal(before[0], run.generator.get_state())
    assert torch.equal(before[1], torch.get_rng_state())
    assert same(before[2], weights(run))


def test_the_update_comes_from_the_query_half_alone(data, tmp_path):
    """With a loss that does not depend on the queries nothing is learned."""
    run = make(data, tmp_path)
    predict = run.learner.predict
    run.learner.predict = lambda query_x, state: predict(query_x, state) * 0
    before = {name: tensor.clone() for name, tensor in weights(run).items()}
    next(run.train(2))
    assert same(before, weights(run))
    run.learner.predict = predict
    next(run.train(2))
    assert not same(before, weights(run))


def test_confidence_interval():
    totals, ones = torch.tensor([0.0, 1.0] * 50), torch.ones(100)
    want = 0.5, pytest.approx(1.96 * (0.25 * 100 / 99) ** 0.5 / 10)
    assert mean_and_half_width(totals, ones) == want
    assert mean_and_half_width(7 * totals, 7 * ones) == want


def test_confidence_interval_of_answers_that_are_not_everywhere():
    """Tasks have 0 to 3 answers: over many repeats, 95 % of the intervals hold the mean."""
    generator, hits = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        counts = torch.randint(4, (200,), generator=generator)
        right = (torch.rand(200, 3, generator=generator) < 0.3) & (torch.arange(3) < counts[:, None])
        mean, half = mean_and_half_width(right.sum(1), counts)
        hits += abs(mean - 0.3) < half
    assert 0.92 < hits / 400 < 0.98


def test_a_run_in_the_way_and_other_settings(data, tmp_path):
    drain(make(data, tmp_path), 2)
    with pytest.raises(ValueError, match="a run is there already; go on with it"):
        make(data, tmp_path)
    with pytest.raises(ValueError, match=r"got clip=1.0 \(it began with 10.0\), want the settings the run began with"):
        make(data, tmp_path, replace(SETTINGS, clip=1.0), resume=True)


def command(data, folder, *more):
    sizes = [
        "--ways",
        "3",
        "--queries",
        "2",
        "--log-every",
        "1",
        "--test-every",
        "100",
        "--interim-tasks",
        "2",
        "--test-tasks",
        "2",
    ]
    return ["few-shot", "--data", str(data), "--out", str(folder), *map(str, sizes), *more]


def invoke(*args):
    from mann_kernels.train.__main__ import main

    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(args))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--learner", "maml"], "--learner: got 'maml'"),
        (["--learner", "multi-task"], "--learner: got 'multi-task', want for few-shot one of metanet"),
        (["--counts", "some"], "--counts: got 'some', want one of random, equal"),
        (["--data", "none.npz"], "none.npz: no such file"),
        (["--ways", "40"], "ways: got 40, want at most 16"),
    ],
)
def test_the_command_refuses(data, tmp_path, more, message):
    result = invoke(*command(data, tmp_path / "run", *more))
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.compiles
def test_the_command_survives_being_killed(data, tmp_path):
    """MetaNet itself: killed without warning, gone on with, and in the end the same weights, bit for bit."""
    threads = torch.get_num_threads()
    try:
        result = invoke(*command(data, tmp_path / "whole", "--updates", "6"))
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert "6 updates, 6 tasks" in result.output
    call = [
        sys.executable,
        "-m",
        "mann_kernels.train",
        *command(data, tmp_path / "parts", "--updates", "6", "--resume"),
    ]
    root = Path(__file__).parent.parent
    process = subprocess.Popen(call, cwd=root, stdout=subprocess.DEVNULL, env={**os.environ})
    while process.poll() is None and not (tmp_path / "parts" / "checkpoint.safetensors").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run(call, cwd=root, capture_output=True, text=True, check=True)
    assert "6 updates, 6 tasks" in done.stdout
    a, b = ((tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    from safetensors.torch import load_file

    assert same(load_file(a), load_file(b))
