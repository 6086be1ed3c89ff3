"""The learners in both protocols, and the settings that build them."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from packed import write_packed

import mann_kernels
from mann_kernels.tasks import Copy, FewShotTasks, Sinusoids
from mann_kernels.testing import assert_accurate
from mann_kernels.train import build, learners
from mann_kernels.train.loop import Run, answer
from mann_kernels.train.settings import Settings

SMALL = Settings(
    "copy", "mann", ways=3, queries=2, length=6, bits=3, hidden_size=9, num_slots=10, slot_size=4, num_heads=2
)
SMALL = replace(SMALL, tasks_per_update=3, log_every=5, test_every=5, interim_tasks=4, test_tasks=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_packed(tmp_path_factory.mktemp("data") / "small.npz")


def few_shot(ways=4, shots=2):
    images = torch.rand(9, 12, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    return FewShotTasks(images, ways, shots, 3).sample(6, torch.Generator().manual_seed(1))


def made(name, size=25, ways=4):
    torch.manual_seed(0)
    return {
        "context-mean": lambda: learners.ContextVector(size, ways, "mean", 16),
        "context-recurrent": lambda: learners.ContextVector(size, ways, "recurrent", 16),
        "lstm": lambda: learners.lstm(size + ways, ways, 16),
        "mann": lambda: learners.mann(size + ways, ways, hidden_size=16, num_slots=12, slot_size=5, num_heads=2),
        "mann-feedforward": lambda: learners.mann(
            size + ways, ways, hidden_size=16, num_slots=12, slot_size=5, num_heads=2, controller="feedforward"
        ),
    }[name]()


NAMES = ["context-mean", "context-recurrent", "lstm", "mann", "mann-feedforward"]


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_support_set(name):
    """Does not matter to the mean, and does to what is recurrent."""
    tasks, learner = few_shot(), made(name).double()
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    x, y = tasks.support_x.double(), tasks.support_y
    first = learner.predict(tasks.query_x.double(), learner.adapt(x, y))
    second = learner.predict(tasks.query_x.double(), learner.adapt(x[:, order], y[:, order]))
    far = (first - second).abs().max()
    assert far < 1e-12 if name == "context-mean" else far > 1e-6


def test_the_nearest_neighbour_of_episodes_and_tasks():
    """Against one cosine at a time: of the steps before, whose labels were given, and of the support set."""
    x = torch.rand(7, 3, 6 + 4, generator=torch.Generator().manual_seed(0))
    answers = learners.NearestNeighbour(4)(x)
    assert not answers[0].any()
    for t, b in itertools.product(range(1, 7), range(3)):
        nearest = max(range(t), key=lambda s: F.cosine_similarity(x[t, b, :6], x[s, b, :6], 0))
        assert answers[t, b].equal(x[nearest + 1, b, 6:])
    tasks, learner = few_shot(), learners.NearestNeighbour(4)
    answers = learner.predict(tasks.query_x, learner.adapt(tasks.support_x, tasks.support_y)).argmax(-1)
    for g, n in itertools.product(*map(range, answers.shape)):
        near = F.cosine_similarity(tasks.support_x[g].flatten(1), tasks.query_x[g, n].flatten()[None])
        assert answers[g, n] == tasks.support_y[g, near.argmax()]


@pytest.mark.parametrize("name", NAMES)
def test_answers_of_the_support_set_matter_and_no_query_sees_another(name):
    tasks, learner = few_shot(), made(name).double()
    x, y, queries = tasks.support_x.double(), tasks.support_y, tasks.query_x.double()
    state = learner.adapt(x, y)
    whole = learner.predict(queries, state)
    assert whole.shape == (6, 12, 4)
    torch.testing.assert_close(learner.predict(queries[:, 5:7], state), whole[:, 5:7])
    for n in range(8):  # each example of the support set counts
        other = y.clone()
        other[:, n] = (y[:, n] + 1) % 4
        assert (learner.predict(queries, learner.adapt(x, other)) - whole).abs().max() > 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_comes_from_the_queries_alone(name):
    """It is that of the query loss; what the queries' loss does not depend on has none."""
    tasks, learner, source = few_shot(), made(name), FewShotTasks(torch.rand(9, 12, 1, 5, 5), 4, 2, 3)
    loss = source.loss(answer(learner, tasks), tasks)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in learner.parameters())
    learner.zero_grad(set_to_none=False)
    (answer(learner, tasks) * 0).sum().backward()
    assert all((p.grad == 0).all() for p in learner.parameters())
    # The support set's own labels enter as input: no loss is taken on them.
    other = tasks._replace(query_y=(tasks.query_y + 1) % 4)
    assert source.loss(answer(learner, other), other) != loss


def test_a_task_may_be_given_or_inferred():
    tasks = Sinusoids(5, 4).sample(3, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    given = learners.Decoder(1, 2, 1, 16)
    assert answer(given, tasks).shape == tasks.query_y.shape
    other = tasks._replace(descriptor=tasks.descriptor + 1)
    assert not torch.equal(answer(given, tasks), answer(given, other))
    assert torch.equal(answer(given, tasks), answer(given, tasks._replace(support_y=tasks.support_y + 1)))
    inferred = learners.ContextVector(1, 1, "mean", 16)
    assert answer(inferred, tasks).shape == tasks.query_y.shape
    assert torch.equal(answer(inferred, tasks), answer(inferred, other))


@pytest.mark.parametrize("learner", ["mann", "lstm", "context-mean", "context-recurrent", "multi-task"])
def test_they_learn_sinusoids(learner, tmp_path):
    settings = replace(SMALL, task="sinusoid", learner=learner, shots=5, queries=5, hidden_size=32)
    settings = replace(settings, tasks_per_update=16, learning_rate=5e-3, test_tasks=100, log_every=1000)
    torch.manual_seed(0)
    tasks = build.tasks(settings, None)
    run = Run(build.learner(settings, tasks[0]), *tasks, settings, tmp_path)
    before = run.test(100)["squared_error"][0]
    for _ in range(120):
        run._one_update()
    assert run.test(100)["squared_error"][0] < 0.9 * before


@pytest.mark.parametrize("task", build.TASKS)
def test_every_learner_trains_on_every_task_it_fits(task, data, tmp_path, monkeypatch):
    monkeypatch.setitem(build.OF_OMNIGLOT, "omniglot", 8)  # the small file has few pixels to spare
    for learner in build.LEARNERS:
        settings = replace(SMALL, task=task, learner=learner)
        tasks = build.tasks(settings, data)
        if learner not in build.FITTING[task]:
            with pytest.raises(
                ValueError, match=f"--learner: got '{learner.replace('+', '.')}', want for {task} one of"
            ):
                build.learner(settings, tasks[0])
            continue
        run = Run(build.learner(settings, tasks[0]), *tasks, settings, tmp_path / learner)
        before = [p.clone() for p in run.learner.parameters()]
        assert math.isfinite(run._one_update()["loss"])  # without the log and its picture
        if learner != "metanet-fast-only":  # whose hidden units may all be off, and then stay so
            assert any(not torch.equal(a, b) for a, b in zip(before, run.learner.parameters(), strict=True))


def test_forget_bias():
    plain, biased = (build.learner(replace(SMALL, forget_bias=b), Copy(6, 3)) for b in (0.0, 1.0))
    biased.core.load_state_dict(plain.core.state_dict())
    learners.set_forget_bias(biased.core, 1.0)
    change = biased.core.bias - plain.core.bias
    assert change.tolist() == [0.0] * 9 + [pytest.approx(1.0)] * 9 + [0.0] * 18


def test_a_memory_that_is_kept(tmp_path):
    """An episode goes on with memory, usage and read weights of the one before, and with nothing else; a test begins anew."""
    settings, episodes = replace(SMALL, keep_memory=True), Copy(6, 3)
    learner = build.learner(settings, episodes)
    core = learner.core
    first, second = (
        episodes.sample(settings.tasks_per_update, torch.Generator().manual_seed(seed)).x for seed in (0, 1)
    )
    learner(first)
    _, state = core(first)
    output = learner(second)
    began = core.initial_state(first.shape[1])
    began = began._replace(memory=state.memory, usage=state.usage, read_weights=state.read_weights)
    assert torch.equal(output, learner.readout(core(second, began)[0]))
    assert not any(buffer.requires_grad for buffer in learner.buffers())
    kept = [buffer.clone() for buffer in learner.buffers()]
    learner.eval()
    plain = build.learner(replace(settings, keep_memory=False), episodes)
    plain.load_state_dict(learner.state_dict(), strict=False)
    assert torch.equal(learner(first[:, :3]), plain(first[:, :3]))
    assert not torch.equal(learner(first[:, :3]), plain(first[:, :3]))
    assert torch.equal(learner(first[:, :2]), plain(first[:, :2]))
    assert all(map(torch.equal, learner.buffers(), kept))
    with pytest.raises(ValueError, match="x: got 1 episodes, want"):
        learner.train()(first[:, :1])
    assert torch.equal(learner.eval()(first[:, :2]), plain(first[:, :2]))
    for wrong in (replace(settings, learner="lstm"), replace(settings, task="sinusoid")):
        with pytest.raises(ValueError, match=r"--keep-memory: got .* want it for mann and tasks of episodes"):
            build.learner(wrong, build.tasks(wrong, None)[0])


def test_a_kept_memory_is_in_the_checkpoint(tmp_path):
    """Stopped and gone on with: the same bits."""
    settings, weights = replace(SMALL, keep_memory=True, log_every=2), []
    for name, ends in {"whole": (4,), "parts": (2, 4)}.items():
        for end in ends:
            torch.manual_seed(0)
            tasks = build.tasks(settings, None)
            run = Run(build.learner(settings, tasks[0]), *tasks, settings, tmp_path / name, resume=True)
            assert sum(1 for _ in run.train(end)) == end - (2 if len(ends) == 2 and end == 4 else 0)
        weights.append(run.learner.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def losses(name, dtype, folder, updates=50):
    """Of the same run on one implementation, in one dtype."""
    settings = replace(SMALL, task="associative-recall", length=4, write="add", key_strength=True, log_every=1000)
    torch.manual_seed(0)
    source, _ = build.tasks(settings, None)
    learner, sample = build.learner(settings, source).to(dtype), source.sample

    def in_dtype(number, draw):
        episodes = sample(number, draw)
        return episodes._replace(x=episodes.x.to(dtype), y=episodes.y.to(dtype))

    source.sample = in_dtype
    with mann_kernels.backend(name):
        run = Run(learner, source, source, settings, folder)
        return torch.tensor([run._one_update()["loss"] for _ in range(updates)])


def test_kernels_and_reference_train_alike(tmp_path):
    """50 updates from the same seed: in float64 the curves are the same, in float32 as near to that as the reference's is."""
    exact = losses("reference", torch.float64, tmp_path / "exact").double()
    assert exact[-5:].mean() < exact[:5].mean()
    torch.testing.assert_close(losses("cpp", torch.float64, tmp_path / "cpp64").double(), exact, rtol=1e-6, atol=0)
    single = losses("reference", torch.float32, tmp_path / "single")
    assert_accurate(losses("cpp", torch.float32, tmp_path / "cpp"), single, exact, "losses")
