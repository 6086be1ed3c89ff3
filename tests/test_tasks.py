"""The tasks that need no data: what they ask is what they say, and their yardsticks are exact."""

import math

import pytest
import torch
from against_reference import on_gpu
from torch.distributions import MultivariateNormal, Normal

from mann_kernels import tasks
from mann_kernels.tasks import AssociativeRecall, Copy, FewShotTasks, GPRegression, OmniglotEpisodes, Sinusoids


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_copy_asks_for_what_was_shown_and_shows_it_once():
    episodes = Copy(7, 4).sample(30, generator())
    assert episodes.x.shape == (15, 30, 5)
    assert torch.equal(episodes.y[8:], episodes.x[:7, :, :4])
    assert torch.equal(episodes.asked, (torch.arange(15) > 7)[:, None].expand(15, 30))
    assert (episodes.x[8:] == 0).all()
    assert torch.equal(episodes.x[..., 4].nonzero()[:, 0], torch.full((30,), 7))
    assert 0.4 < episodes.x[:7, :, :4].mean() < 0.6


def test_copy_of_shorter_sequences():
    source, draw = Copy(5, 2, shorter=True), generator()
    lengths = {len(source.sample(1, draw).x) // 2 for _ in range(100)}
    assert lengths == {1, 2, 3, 4, 5}


def test_recall_asks_for_the_value_of_each_key():
    source = AssociativeRecall(6, 3)
    episodes = source.sample(50, generator())
    assert episodes.x.shape == (12, 50, 7)
    for b in range(50):
        known = {tuple(row[:3].tolist()): row[3:6] for row in episodes.x[:6, b]}
        assert len(known) == 6
        for t in range(6, 12):
            assert torch.equal(episodes.y[t, b], known.pop(tuple(episodes.x[t, b, :3].tolist())))
        assert not known
    assert (episodes.x[6:, :, 3:6] == 0).all()
    assert torch.equal(episodes.asked, episodes.x[..., 6] == 1)
    assert len({tuple(episodes.x[6:, b, :3].flatten().tolist()) for b in range(50)}) > 40


@pytest.mark.parametrize("source", [Copy(5, 3), AssociativeRecall(4, 3)], ids=["copy", "recall"])
def test_bits_are_scored_where_they_are_asked_for(source):
    episodes = source.sample(8, generator())
    perfect = (episodes.y * 2 - 1) * 40
    perfect[~episodes.asked] *= -1  # says nothing
    assert source.loss(perfect, episodes) < 1e-6
    scores = source.scores(perfect, episodes)
    assert torch.equal(*scores["accuracy"])
    assert torch.equal(*scores["solved"])
    perfect[-1, 0, 0] *= -1
    scores = source.scores(perfect, episodes)
    assert (scores["accuracy"][1] - scores["accuracy"][0]).tolist() == [1] + [0] * 7
    assert scores["solved"][0].tolist() == [0] + [1] * 7


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_gp_answers_are_seen_a_step_late(dimensions):
    episodes = GPRegression(dimensions, 9).sample(20, generator())
    assert episodes.x.shape == (9, 20, dimensions + 1)
    assert episodes.y.shape == (9, 20)
    assert (episodes.x[0, :, -1] == 0).all()
    assert torch.equal(episodes.x[1:, :, -1], episodes.y[:-1])
    assert episodes.x[..., :-1].abs().max() <= 2


@pytest.mark.parametrize("dimensions", [1, 2])
def test_gp_yardstick_is_the_exact_posterior(dimensions):
    """The density of t points over that of the t - 1 before, from the whole covariance each time."""
    source = GPRegression(dimensions, 6, scale=0.7, noise=0.2)
    episodes = source.sample(4, generator())
    x, y = episodes.x[..., :-1].transpose(0, 1).double(), episodes.y.t().double()
    covariance = torch.exp(-(x[:, :, None] - x[:, None]).square().sum(-1) / (2 * 0.7**2)) + 0.2**2 * torch.eye(6)
    before = torch.zeros(4, dtype=torch.float64)
    for t in range(1, 7):
        joint = MultivariateNormal(torch.zeros(t, dtype=torch.float64), covariance[:, :t, :t]).log_prob(y[:, :t])
        torch.testing.assert_close(episodes.exact[t - 1].double(), before - joint, rtol=0, atol=2e-5)  # float32 x and y
        before = joint


def test_gp_loss_is_the_likelihood_of_the_answer_alone():
    source = GPRegression(1, 5)
    episodes = source.sample(6, generator())
    output = torch.randn(5, 6, 2, generator=generator(1))
    deviation = torch.nn.functional.softplus(output[..., 1]) + 1e-3
    want = -Normal(output[..., 0], deviation).log_prob(episodes.y)
    torch.testing.assert_close(source.nll(output, episodes), want)
    torch.testing.assert_close(source.loss(output, episodes), want.mean())
    scores = source.scores(output, episodes)
    total, count = scores["nll"]
    assert total.sum() / count.sum() == pytest.approx(want.mean().item())
    assert scores["nll_2"][0].mean() == pytest.approx(want[1].mean().item())
    assert scores["exact_5"][0].mean() == pytest.approx(episodes.exact[4].mean().item())


def test_gp_yardstick_falls_with_the_points_seen():
    exact = GPRegression(1, 30).sample(500, generator()).exact.mean(1)
    assert exact[0] == pytest.approx(0.5 * math.log(2 * math.pi * math.e * 1.01), abs=0.1)
    assert exact[0] > exact[3] > exact[29]
    assert exact[29] > math.log(0.1) + 0.5 * math.log(2 * math.pi * math.e)  # never below what the noise leaves


def test_sinusoids_follow_their_descriptor():
    tasks = Sinusoids(4, 6).sample(300, generator())
    amplitude, phase = (tasks.descriptor[:, n, None, None] for n in (0, 1))
    for x, y, points in ((tasks.support_x, tasks.support_y, 4), (tasks.query_x, tasks.query_y, 6)):
        assert x.shape == y.shape == (300, points, 1)
        torch.testing.assert_close(y, amplitude * torch.sin(x + phase))
    assert 0.1 <= amplitude.min() < 0.5 < 4.5 < amplitude.max() <= 5
    assert 0 <= phase.min() < 0.3 < 2.8 < phase.max() <= math.pi
    for g in range(300):
        assert not set(tasks.support_x[g].flatten().tolist()) & set(tasks.query_x[g].flatten().tolist())
    source = Sinusoids(4, 6)
    assert source.loss(tasks.query_y, tasks) == 0
    total, count = source.scores(tasks.query_y + 2, tasks)["squared_error"]
    assert total.sum() / count.sum() == pytest.approx(4)


@pytest.mark.parametrize(
    "source", [Copy(), AssociativeRecall(), GPRegression(), Sinusoids()], ids=lambda s: type(s).__name__
)
def test_the_generator_decides(source):
    first, again, other = (source.sample(2, generator(seed)) for seed in (0, 0, 1))
    for a, b, c in zip(first, again, other, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
        assert a is None or a.dtype == torch.bool or not torch.equal(a, c)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Copy(0), "length: got 0, want at least 1"),
        (lambda: AssociativeRecall(5, 2), "pairs: got 5, want 1 to 4"),
        (lambda: AssociativeRecall(2, 20), "bits: got 20, want 1 to 16"),
        (lambda: GPRegression(4), "dimensions: got 4, want 1, 2 or 3"),
        (lambda: GPRegression(noise=0.0), "noise: got 0.0, want more than 0"),
        (lambda: Sinusoids(0), "shots: got 0, want at least 1"),
    ],
)
def test_what_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


EVERY_TASK = {
    "Copy": lambda: Copy(4, 3, shorter=True),
    "AssociativeRecall": lambda: AssociativeRecall(3, 4),
    "GPRegression": lambda: GPRegression(2, 5),
    "Sinusoids": lambda: Sinusoids(3, 4),
    "OmniglotEpisodes": lambda: OmniglotEpisodes(examples(), 3, length=6, augment=True, turns=True, warps=True),
    "OmniglotEpisodes of strings": lambda: OmniglotEpisodes(examples(), 3, labels="string", counts="equal", length=6),
    "FewShotTasks": lambda: FewShotTasks(examples(), 3, 1, 2),
    "FewShotTasks with turns": lambda: FewShotTasks(examples(), 3, 1, 2, turns=True),
}


def examples():
    return torch.arange(6 * 5 * 64, dtype=torch.uint8, device="cpu").view(6, 5, 1, 8, 8)


def test_every_task_is_here():
    made = {name.split()[0] for name in EVERY_TASK}
    assert made == {name for name, value in vars(tasks).items() if hasattr(value, "sample")}


@pytest.mark.parametrize("name", EVERY_TASK)
def test_default_devices_and_dtypes(name):
    """The same task of the same seed, on the CPU and in the default dtype, whatever the defaults are; its loss and scores too."""
    task = EVERY_TASK[name]()
    want = task.sample(3, generator())
    number = task.output_size
    shape = (*want.x.shape[:2], number) if hasattr(want, "x") else (*want.query_x.shape[:2], number)

    def answer(batch, like):
        output = torch.full(shape, 0.5, device="cpu", dtype=like)
        return [task.loss(output, batch), *(part for score in task.scores(output, batch).values() for part in score)]

    for device, dtype in (("meta", torch.float32), ("cpu", torch.float64)):
        torch.set_default_device(device)
        torch.set_default_dtype(dtype)
        try:
            got = EVERY_TASK[name]().sample(3, generator())
            answers = answer(got, dtype)
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
        for a, b in zip(got, want, strict=True):
            if b is not None:
                assert a.device.type == "cpu"
                assert a.dtype == (dtype if b.is_floating_point() else b.dtype)
                assert torch.allclose(a.double(), b.double(), atol=1e-5)
        assert all(tensor.device.type == "cpu" for tensor in answers)
        for a, b in zip(answers, answer(want, torch.float32), strict=True):
            assert torch.allclose(a.double(), b.double(), rtol=1e-4)


@pytest.mark.parametrize("device", ["meta", on_gpu("cuda")])
@pytest.mark.parametrize("name", [name for name in EVERY_TASK if name.startswith(("Omniglot", "FewShot"))])
def test_made_where_the_examples_are(name, device):
    """Images on another device give the same tasks. A meta tensor has no data: what waited for it would fail."""
    task, want = EVERY_TASK[name](), EVERY_TASK[name]().sample(3, generator())
    task.examples = task.examples.to(device)
    for a, b in zip(task.sample(3, generator()), want, strict=True):
        if b is not None:
            assert (a.device.type, a.dtype, a.shape) == (device, b.dtype, b.shape)
            assert device == "meta" or torch.allclose(a.double().cpu(), b.double(), atol=1e-4)
