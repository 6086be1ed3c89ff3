"""Properties of the Omniglot episodes, on images that tell their class and their own number."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mann_kernels.tasks import OmniglotEpisodes
from mann_kernels.tasks.episodes import CHARACTERS, LETTERS, Episodes
from mann_kernels.train import learners

CLASSES, DRAWERS, SIDE = 12, 20, 6


def numbered():
    """uint8 [12, 20, 1, 6, 6]: the class in one corner, the drawer in the next, the rest 0."""
    images = torch.zeros(CLASSES, DRAWERS, 1, SIDE, SIDE, dtype=torch.uint8)
    images[..., 0, 0] = 1 + torch.arange(CLASSES)[:, None, None]
    images[..., 0, 1] = 1 + torch.arange(DRAWERS)[:, None]
    return images


def draw(B, seed=0, **options):
    source = OmniglotEpisodes(numbered(), **options)
    return source, source.sample(B, torch.Generator().manual_seed(seed))


def class_and_drawer(episodes):
    """int64 [T, B] each, read off the pixels."""
    return ((episodes.x[..., n] * 255).round().long() - 1 for n in (0, 1))


@pytest.mark.parametrize("labels", ["onehot", "string"])
def test_a_label_is_seen_a_step_late_and_never_before(labels):
    source, episodes = draw(40, labels=labels)
    seen = episodes.x[..., SIDE * SIDE :]
    assert seen.shape[-1] == source.output_size == {"onehot": 5, "string": 25}[labels]
    known = F.one_hot(episodes.y).float() if labels == "onehot" else F.one_hot(episodes.y, LETTERS).flatten(2).float()
    assert (seen[0] == 0).all()
    assert torch.equal(seen[1:], known[:-1])


@pytest.mark.parametrize("labels", ["onehot", "string"])
def test_what_is_seen_at_a_step_says_nothing_of_its_label(labels):
    """Over many episodes, every label, and every letter of a string, is as frequent with every class, and at every step."""
    B = 3000
    _, episodes = draw(B, labels=labels)
    classes, _ = class_and_drawer(episodes)
    # Each class of an episode once: the later presentations repeat it.
    first = episodes.presentation == 1
    for y in [episodes.y] if labels == "onehot" else episodes.y.unbind(-1):
        counts = torch.bincount(classes[first] * 5 + y[first], minlength=CLASSES * 5).double() / (B * 5 / CLASSES / 5)
        assert (counts - 1).abs().max() < 4.5 * (CLASSES / B) ** 0.5
        steps = torch.stack([torch.bincount(row, minlength=5) for row in y]).double() / (B / 5)
        assert (steps - 1).abs().max() < 4.5 * (5 / B) ** 0.5


def test_a_class_has_one_label_and_no_example_is_shown_twice():
    _, episodes = draw(100)
    classes, drawers = class_and_drawer(episodes)
    for b in range(100):
        pairs = set(zip(classes[:, b].tolist(), episodes.y[:, b].tolist(), strict=True))
        assert len({c for c, _ in pairs}) == len({label for _, label in pairs}) == len(pairs) <= 5
        assert len((classes[:, b] * DRAWERS + drawers[:, b]).unique()) == 50


def test_strings_of_an_episode_are_distinct():
    _, episodes = draw(200, ways=10, labels="string")
    classes, _ = class_and_drawer(episodes)
    codes = (episodes.y * LETTERS ** torch.arange(CHARACTERS)).sum(-1)
    for b in range(200):
        pairs = set(zip(classes[:, b].tolist(), codes[:, b].tolist(), strict=True))
        assert len({c for c, _ in pairs}) == len({code for _, code in pairs}) == len(pairs)


def test_every_episode_of_a_batch_has_its_own_classes_labels_and_order():
    _, episodes = draw(300)
    classes, _ = class_and_drawer(episodes)
    assert len({tuple(sorted(classes[:, b].unique().tolist())) for b in range(300)}) > 150
    assert len({tuple(episodes.y[:, b].tolist()) for b in range(300)}) == 300


def test_counts():
    _, equal = draw(50, counts="equal")
    assert (F.one_hot(equal.y).sum(0) == 10).all()
    assert (equal.presentation.amax(0) == 10).all()
    _, episodes = draw(2000)
    counts = F.one_hot(episodes.y).sum(0).double()
    # 50 of 100 without replacement: hypergeometric, mean 10, variance 50 * 0.2 * 0.8 * 50 / 99
    assert counts.mean() == 10
    assert counts.var() == pytest.approx(50 * 0.2 * 0.8 * 50 / 99, rel=0.1)


def test_presentations_are_counted_from_one():
    _, episodes = draw(20)
    for b in range(20):
        for label in range(5):
            mine = episodes.presentation[episodes.y[:, b] == label, b]
            assert torch.equal(mine, torch.arange(1, len(mine) + 1))


def test_turns_belong_to_a_class_and_are_exact():
    images = torch.randint(256, (CLASSES, DRAWERS, 1, 20, 20), dtype=torch.uint8)
    images[..., 0, 0] = torch.arange(CLASSES)[:, None, None]  # any corner tells the class and the turn
    source = OmniglotEpisodes(images, turns=True)
    episodes = source.sample(30, torch.Generator().manual_seed(0))
    turned = torch.stack([torch.rot90(images[:, :, 0], k, (-2, -1)) for k in range(4)]).flatten(0, 2).flatten(1).float()
    found = torch.cdist(episodes.x[..., :400].flatten(0, 1) * 255, turned).min(-1)
    assert found.values.max() < 2  # the pictures are thousands apart: the rest is the rounding of sine and cosine
    turns = (found.indices // (CLASSES * DRAWERS)).view(50, 30)
    assert len(turns.unique()) == 4
    for b in range(30):
        assert all(len(turns[episodes.y[:, b] == label, b].unique()) <= 1 for label in range(5))


def test_augmentation_turns_and_shifts_a_little():
    """A bar turns by at most pi/16, and its middle moves by at most 10/105 of the side each way (turned as well)."""
    images = torch.zeros(5, 20, 1, 40, 40, dtype=torch.uint8)
    images[..., 10:30, 18:22] = 255
    seen = OmniglotEpisodes(images, augment=True).sample(40, torch.Generator().manual_seed(0)).x[..., :1600]
    seen = seen.reshape(-1, 40, 40)
    place = torch.arange(40.0) - 19.5
    row, column = ((seen.sum(dim) * place).sum(-1) / seen.sum((1, 2)) for dim in (2, 1))
    most = 40 * 10 / 105
    assert most < row.abs().max() < most * (np.cos(np.pi / 16) + np.sin(np.pi / 16)) + 0.1
    assert 0.9 * most**2 / 3 < row.square().mean() < 1.1 * most**2 / 3
    assert 0.9 * most**2 / 3 < column.square().mean() < 1.1 * most**2 / 3
    down, right = place[:, None] - row[:, None, None], place - column[:, None, None]
    moments = [(seen * product).sum((1, 2)) for product in (down * down, right * right, down * right)]
    angle = torch.atan2(2 * moments[2], moments[0] - moments[1]) / 2
    assert 0.17 < angle.abs().max() < np.pi / 16 + 0.01


def test_warps_belong_to_a_class_of_an_episode():
    """A bar right of the middle: mirrored in half of the classes, stretched by up to a third along either axis, sheared."""
    images = torch.zeros(5, 20, 1, 40, 40, dtype=torch.uint8)
    images[..., 14:26, 24:30] = 255
    episodes = OmniglotEpisodes(images, warps=True).sample(60, torch.Generator().manual_seed(0))
    seen = episodes.x[..., :1600].transpose(0, 1).reshape(60, 50, 40, 40)
    of_class = torch.stack(
        [seen[b, (episodes.y[:, b] == label).nonzero()[0, 0]] for b in range(60) for label in range(5)]
    )
    for b in range(60):
        assert torch.equal(seen[b], of_class.view(60, 5, 40, 40)[b, episodes.y[:, b]])
    place, weight = torch.arange(40.0) - 19.5, of_class.sum((1, 2))
    column, row = ((of_class.sum(dim) * place).sum(-1) / weight for dim in (1, 2))
    assert 0.4 < (column < 0).float().mean() < 0.6
    assert 6.9 * 3 / 4 < column.abs().min() < 6
    assert 8.5 < column.abs().max() < 7.1 * 4 / 3
    assert row.abs().max() < 0.1
    down = (of_class.sum(2) * (place - row[:, None]).square()).sum(1) / weight
    stretch = down / (12**2 / 12)
    assert (3 / 4) ** 2 - 0.03 < stretch.min() < 0.7
    assert 1.5 < stretch.max() < (4 / 3) ** 2 + 0.03
    slant = (of_class * place[:, None] * (place - column[:, None])[:, None]).sum((1, 2)) / weight / down
    assert -0.42 < slant.min() < -0.2
    assert 0.2 < slant.max() < 0.42


def test_half_of_the_warped_classes_are_joined():
    """Every class of one grey: those of an episode in two have another's beyond a line, in all of their images the same."""
    greys = torch.arange(40, 240, 20, dtype=torch.uint8)
    images = greys[:, None, None, None, None].expand(10, 20, 1, 20, 20)
    episodes = OmniglotEpisodes(images, warps=True).sample(200, torch.Generator().manual_seed(0))
    seen = episodes.x[..., :400].transpose(0, 1)
    counts = torch.stack([((seen - grey / 255).abs() < 1e-4).sum(-1) for grey in greys.tolist()], -1)  # [B, T, greys]
    first = [[(episodes.y[:, b] == label).nonzero()[0, 0] for label in range(5)] for b in range(200)]
    for b in range(200):
        assert torch.equal(counts[b], counts[b, first[b]][episodes.y[:, b]])
    colours = torch.cat([counts[b, first[b]] for b in range(200)]).gt(20).sum(-1)
    assert set(colours.tolist()) == {1, 2}
    assert 0.45 * 0.9 < (colours == 2).float().mean() < 0.45 * 1.1  # one in ten is joined with its own


def test_episodes_of_another_size():
    """With fewer classes the input is as wide as before; a size that does not fit leaves the one before."""
    source = OmniglotEpisodes(numbered(), 4, labels="onehot")
    source.resize(2)
    episodes = source.sample(5, torch.Generator().manual_seed(0))
    assert episodes.x.shape == (20, 5, source.input_size) == (20, 5, SIDE * SIDE + 4)
    assert set(episodes.y.flatten().tolist()) == {0, 1}
    for wrong, said in (((13,), "ways: got 13, want 2 to 12"), ((2, 50), "length: got 50, want 1 to 40")):
        with pytest.raises(ValueError, match=said):
            source.resize(*wrong)
    assert (source.ways, source.length) == (2, 20)


def nearest(episodes, guess):
    """The answer at each step: that of the nearest image before, and `guess` [B, ...] at the first."""
    pixels = episodes.x[..., : SIDE * SIDE].transpose(0, 1)
    far = (
        torch.cdist(pixels, pixels) + torch.full((50, 50), torch.inf).triu()
    )  # [B, T, T], no step sees itself or later ones
    answers = episodes.y.transpose(0, 1)
    found = answers[torch.arange(len(far))[:, None], far.argmin(-1)]
    found[:, 0] = guess
    return found.transpose(0, 1)


@pytest.mark.parametrize("ways", [3, 5])
def test_nearest_neighbour_is_right_at_a_first_instance_once_in_n_squared(ways):
    """It can be right at the first step alone, one of N first instances, and guesses one of N strings there."""
    B = 3000
    source, episodes = draw(B, ways=ways, length=50, labels="string", counts="random")
    generator = torch.Generator().manual_seed(1)
    guess = torch.empty(B, CHARACTERS, dtype=torch.int64)
    for b in range(B):
        own = episodes.y[:, b].unique(dim=0)
        guess[b] = own[torch.randint(len(own), (), generator=generator)]
    letters = F.one_hot(nearest(episodes, guess), LETTERS).flatten(2).float()
    right, asked = source.scores(letters, episodes)["accuracy_1"]
    p = 1 / ways**2
    assert right.sum() / asked.sum() == pytest.approx(p, abs=4 * (p * (1 - p) / (ways * B)) ** 0.5)
    assert source.scores(letters, episodes)["accuracy_2"][0].sum() / B > 2 * p


def test_a_memoryless_learner_stays_at_chance():
    """Trained on few classes, so that it could learn them by heart were there anything to learn."""
    torch.manual_seed(0)
    source, generator = OmniglotEpisodes(numbered(), counts="equal"), torch.Generator().manual_seed(0)
    learner = learners.FeedForward(source.input_size, source.output_size, 64)
    optimizer = torch.optim.Adam(learner.parameters(), 3e-3)
    for _ in range(200):
        episodes = source.sample(16, generator)
        optimizer.zero_grad()
        source.loss(learner(episodes.x), episodes).backward()
        optimizer.step()
    episodes = source.sample(1000, generator)
    scores = source.scores(learner(episodes.x), episodes)
    for k in (2, 5, 10):
        right, asked = scores[f"accuracy_{k}"]
        assert right.sum() / asked.sum() == pytest.approx(0.2, abs=0.03)


def test_scores_and_loss_count_what_they_say():
    source, episodes = draw(8)
    perfect = F.one_hot(episodes.y, 5).float() * 50
    for right, asked in source.scores(perfect, episodes).values():
        assert torch.equal(right, asked)
    assert source.loss(perfect, episodes) < 1e-6
    wrong_at_second = torch.where((episodes.presentation == 2)[..., None], -perfect, perfect)
    scores = source.scores(wrong_at_second, episodes)
    assert scores["accuracy_2"][0].sum() == 0
    assert torch.equal(*scores["accuracy_3"])
    source, episodes = draw(8, labels="string")
    perfect = F.one_hot(episodes.y, LETTERS).flatten(2).float() * 50
    assert source.loss(perfect, episodes) < 1e-6
    assert torch.equal(*source.scores(perfect, episodes)["accuracy"])
    assert source.loss(torch.zeros_like(perfect), episodes) == pytest.approx(5 * np.log(5))
    perfect[..., 0:LETTERS] *= -1  # the first character wrong: the whole label is
    assert source.scores(perfect, episodes)["accuracy"][0].sum() == 0


def test_the_generator_decides():
    first, again, other = (draw(3, seed, augment=True, turns=True)[1] for seed in (0, 0, 1))
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)
    assert isinstance(first.to("cpu"), Episodes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 13}, "ways: got 13, want 2 to 12"),
        ({"length": 101}, "length: got 101, want 1 to 100"),
        ({"length": 51, "counts": "equal"}, "length: got 51, want a multiple of ways=5"),
        ({"labels": "numbers"}, "labels: got 'numbers', want one of onehot, string"),
        ({"counts": "some"}, "counts: got 'some', want one of random, equal"),
    ],
)
def test_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        OmniglotEpisodes(numbered(), **options)
