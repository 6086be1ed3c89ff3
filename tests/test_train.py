"""The training loop, its checkpoints and the command, on a small file of made-up characters."""

import csv
import os
from dataclasses import replace

import kills
import pytest
import torch
import torch.nn.functional as F
from commands import TINY, invoke
from packed import write_packed
from torch import nn

from mann_kernels.tasks import FewShotTasks, OmniglotEpisodes, load_omniglot
from mann_kernels.train import loop
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
    run = make(data, tmp_path, replace(SETTINGS, learning_rate=3e-3, test_every=40))
    before = run.test(40)["accuracy"][0]
    losses = drain(run, 120)
    assert sum(losses[-10:]) < sum(losses[:10])
    assert run.test(40)["accuracy"][0] > before + 0.1
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["update"]) for row in rows] == list(range(2, 121, 2))
    assert [bool(row["test_accuracy_half_width"]) for row in rows] == [update % 40 == 0 for update in range(2, 121, 2)]
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
    target, name = ((loop, "save_checkpoint"), (os, "replace"))[moment == "within"]
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
        right = (torch.rand(200, 3, generator=generator) < 0.9) & (torch.arange(3) < counts[:, None])
        mean, half = mean_and_half_width(right.sum(1), counts)
        hits += abs(mean - 0.9) < half
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


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--learner", "maml"], "--learner: got 'maml'"),
        (["--learner", "multi-task"], "--learner: got 'multi-task', want for few-shot one of metanet"),
        (["--device", "abacus"], "--device: got 'abacus': Expected one of cpu"),
        (["--counts", "some"], "--counts: got 'some', want one of random, equal"),
        (["--data", "none.npz"], "none.npz: no such file"),
        (["--ways", "40"], "ways: got 40, want at most 16"),
        (["--protocol", "own"], "--protocol: got 'own', want one of fixed, original"),
        (["--train-split", "all"], "--train-split: got 'all', want one of train, background"),
    ],
)
def test_the_command_refuses(data, tmp_path, more, message):
    result = invoke(*command(data, tmp_path / "run", *more))
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def run_of(monkeypatch, *call):
    """The run that a command would start, before its first update."""
    from mann_kernels.train import __main__

    made = []
    monkeypatch.setattr(__main__, "show", lambda run, *limits: made.append(run))
    result = invoke(*call)
    assert result.exit_code == 0, result.output
    return made[0]


@pytest.mark.parametrize("protocol", [[], ["--protocol", "fixed"], ["--protocol", "original"]], ids=str)
def test_what_a_protocol_draws(tmp_path, monkeypatch, protocol):
    """From the tasks themselves: which classes they are made of, how often one is twice in a task, and how they are turned."""
    data = write_packed(tmp_path / "small.npz")
    run = run_of(
        monkeypatch, "few-shot", "--data", str(data), "--out", str(tmp_path / "run"), *protocol, "--queries", "2"
    )
    settings, original = run.settings, "original" in protocol
    assert (settings.optimizer, settings.learning_rate, settings.schedule) == ("adam", 1e-3, "constant")
    assert (settings.tasks_per_update, settings.test_tasks) == (1, 400)
    assert settings.clip == (1.0 if original else 10.0)  # of the mean over 10 answers, where the sum is clipped at 10

    seed = 0 if original else None
    classes = {}
    for part, split in (("train", "background" if original else "train"), ("test", "test")):
        first = load_omniglot(data, split, seed=seed)
        turns = torch.stack([first.rot90(k, (-2, -1)) for k in range(4)])  # [4, classes, drawers, 1, 28, 28]
        source = getattr(run, f"{part}_tasks")
        ways = min(5, len(first))
        source.ways = ways
        x = source.sample(300, torch.Generator().manual_seed(0)).support_x
        whole = (x * 255).round().to(torch.uint8).flatten(2)
        known = turns.flatten(3).flatten(0, 2)
        number = (whole.flatten(0, 1)[:, None, :60] == known[:, :60]).all(2).int().argmax(1)
        assert torch.equal(known[number], whole.flatten(0, 1))
        turn, character = number // (len(known) // 4), number // first.shape[1] % len(first)
        turn, character = turn.view(300, ways), character.view(300, ways)
        twice = (character.sort(1).values.diff(dim=1) == 0).any(1).float().mean()
        assert set(character.flatten().tolist()) == set(range(len(first)))
        assert twice == 0 if original else twice > 0.3
        shares = torch.bincount(turn.flatten(), minlength=4) / turn.numel()
        if original and part == "test":
            assert shares.tolist() == [1, 0, 0, 0]
        else:
            assert (shares - 0.25).abs().max() < 0.05
        classes[part] = {one.numpy().tobytes() for one in first[:, 0]}
    assert not classes["train"] & classes["test"]
    assert [len(part) for part in classes.values()] == ([18, 6] if original else [16, 4])


def test_an_option_wins_over_its_protocol(tmp_path, monkeypatch):
    call = ["few-shot", "--data", str(write_packed(tmp_path / "small.npz")), "--protocol", "original", "--queries", "4"]
    rest = ["--split-seed", "3", "--train-split", "train", "--rotations", "classes", "--clip", "7", "--ways", "4"]
    settings = run_of(monkeypatch, *call, *rest, "--out", str(tmp_path / "a")).settings
    assert (settings.split_seed, settings.train_split, settings.rotations, settings.clip) == (3, "train", "classes", 7)
    settings = run_of(monkeypatch, *call, "--rotations", "classes", "--out", str(tmp_path / "b")).settings
    assert (settings.split_seed, settings.train_split, settings.rotations, settings.clip) == (
        0,
        "background",
        "classes",
        0.5,
    )
    lake = [*call[:3], "--queries", "4", "--ways", "4", "--class-split", "lake"]
    lake = run_of(monkeypatch, *lake, "--out", str(tmp_path / "d"))
    assert [len(tasks.examples) for tasks in (lake.train_tasks, lake.test_tasks)] == [4 * 16, 4 * 8]
    result = invoke("copy", "--protocol", "original", "--out", str(tmp_path / "c"))
    assert result.exit_code == 2
    assert "--protocol: got 'original' for copy" in " ".join(result.output.replace("│", " ").split())


def test_an_older_checkpoint_lacks_newer_settings(data, tmp_path, monkeypatch):
    """It goes on where what it lacks is still its default."""
    drain(make(data, tmp_path), 2)
    facts = loop.read_facts(tmp_path / "checkpoint.safetensors")
    del facts["settings"]["bits"]
    monkeypatch.setattr(loop, "read_facts", lambda path: facts)
    assert make(data, tmp_path, resume=True).update == 2
    with pytest.raises(ValueError, match=r"got bits=3 \(it began with 8\)"):
        make(data, tmp_path, replace(SETTINGS, bits=3), resume=True)


def test_schedules():
    assert SETTINGS.learning_rate_at(12345) == 1e-3
    cosine = replace(SETTINGS, schedule="cosine", schedule_updates=100)
    rates = [cosine.learning_rate_at(update) for update in (0, 50, 99, 100, 150, 200)]
    assert rates == pytest.approx([1e-3, 5e-4, 2.467e-7, 5e-4, 2.5e-4, 2.5e-4], rel=1e-3)


def test_optimizers():
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    made = replace(SETTINGS, optimizer="rmsprop", learning_rate=1e-4).make_optimizer(parameters)
    group = made.param_groups[0]
    assert isinstance(made, torch.optim.RMSprop)
    assert (group["lr"], group["alpha"], group["momentum"]) == (1e-4, 0.95, 0.9)
    assert isinstance(SETTINGS.make_optimizer(parameters), torch.optim.Adam)


def test_a_curriculum(tmp_path, monkeypatch):
    """From three classes to five, one more every two updates; resumed in the middle; tested on as many as one likes."""
    from mann_kernels.evaluate import main as evaluate

    sizes, sample = [], OmniglotEpisodes.sample

    def sampled(self, B, generator):
        sizes.append((self.ways, self.length))
        return sample(self, B, generator)

    monkeypatch.setattr(OmniglotEpisodes, "sample", sampled)
    data, out = write_packed(tmp_path / "small.npz", classes=36, drawers=10), tmp_path / "run"
    strings = ["omniglot", "--data", str(data), "--out", str(out), "--labels", "string", "--ways", "3", *TINY.split()]
    call = [*strings, "--updates-per-way", "2", "--most-ways"]
    for updates in ("3", "7"):
        result = invoke(*call, "5", "--updates", updates, "--resume")
        assert result.exit_code == 0, result.output
    grown = [3, 3, 4, 3, 4, 5, 5, 5, 3]  # a test after three updates and after seven, of as many as at the beginning
    assert sizes == [(ways, 10 * ways) for ways in grown]
    result = invoke(str(out), "--data", str(data), "--tasks", "2", "--ways", "6", command=evaluate)
    assert result.exit_code == 0, result.output
    assert sizes[-1] == (6, 60)
    new = ["--out", str(tmp_path / "other")]
    for wrong, said in (
        ([*call, "31", *new], "ways: got 31, want 2 to 30"),
        (
            [*call, "5", "--length", "9", *new],
            "--most-ways: got 5, want it for omniglot with --labels string and without",
        ),
        ([*call, "5", "--labels", "onehot", *new], "--most-ways: got 5, want it for omniglot with --labels string"),
        (["copy", "--most-ways", "5", *new], "--most-ways: got 5, want it for omniglot"),
    ):
        result = invoke(*wrong)
        assert result.exit_code == 2
        assert said in " ".join(result.output.replace("│", " ").split())


@pytest.mark.compiles
def test_the_command_survives_being_killed(tmp_path):
    """Killed without warning and gone on with: in the end the same bits. Twenty times: python tests/kills.py."""
    # many times as long as it takes until the kill, or on a fast machine it would end before
    call = [*TINY.split(), "--length", "5", "--updates", "500", "--log-every", "10", "--test-every", "500"]
    found = kills.survive(call, tmp_path, kills=1, seed=0, longest=0.1)
    assert found.same
    assert 0 < found.updates[0] < 500
