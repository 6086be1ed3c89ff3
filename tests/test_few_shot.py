from dataclasses import replace

import numpy as np
import pytest
import torch
from packed import write_packed

from mann_kernels.tasks import FewShotTasks, load_omniglot, omniglot, with_rotations
from mann_kernels.train.settings import Settings


def numbered(classes=12, each=9):
    """Every example tells its class and its own number."""
    return torch.stack(torch.meshgrid(torch.arange(classes), torch.arange(each), indexing="ij"), -1).float()


@pytest.fixture
def tasks():
    return FewShotTasks(numbered(), ways=5, shots=2, queries=4).sample(300, torch.Generator().manual_seed(0))


def test_shapes(tasks):
    assert tasks.support_x.shape == (300, 10, 2)
    assert tasks.query_x.shape == (300, 20, 2)
    assert tasks.support_y.shape == (300, 10)
    assert tasks.query_y.shape == (300, 20)
    assert tasks.query_y.dtype == torch.int64


def test_a_label_is_one_class_and_a_class_one_label(tasks):
    x, y = torch.cat([tasks.support_x, tasks.query_x], 1), torch.cat([tasks.support_y, tasks.query_y], 1)
    for g in range(300):
        pairs = {(int(a), int(b)) for a, b in zip(x[g, :, 0], y[g], strict=True)}
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == 5


def test_every_class_has_its_examples_and_none_is_in_both_halves(tasks):
    for half, count in ((tasks.support_y, 2), (tasks.query_y, 4)):
        assert (torch.nn.functional.one_hot(half, 5).sum(1) == count).all()
    x = torch.cat([tasks.support_x, tasks.query_x], 1)
    for examples in (x[..., 0] * 9 + x[..., 1]).long():
        assert len(examples.unique()) == 30


def test_classes_labels_and_examples_are_uniform():
    tasks = FewShotTasks(numbered(), ways=5, shots=2, queries=4).sample(2000, torch.Generator().manual_seed(0))
    for values, number in (
        (tasks.support_x[..., 0], 12),
        (tasks.support_x[..., 1], 9),
        (tasks.query_x[..., 1], 9),
        (tasks.support_x[tasks.support_y == 0][:, 0], 12),  # the classes that get label 0
    ):
        counts = torch.bincount(values.flatten().long(), minlength=number).double()
        assert (counts / counts.mean() - 1).abs().max() < 0.25


def test_the_generator_decides():
    source = FewShotTasks(numbered(), queries=3)
    first, again, other = (source.sample(2, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first[:4], again[:4], strict=True))
    assert not torch.equal(first.support_x, other.support_x)


def test_each_class_of_a_task_is_turned_as_a_whole():
    """By a turn of its own, uniform, the same for support and queries; what was drawn is what is drawn without turns."""
    examples = torch.arange(12 * 9 * 16).view(12, 9, 1, 4, 4).float()
    plain, turned = (
        FewShotTasks(examples, 5, 2, 4, turns=turns).sample(400, torch.Generator().manual_seed(0))
        for turns in (False, True)
    )
    assert torch.equal(plain.query_y, turned.query_y)
    found = []
    for halves in ((plain.support_x, turned.support_x), (plain.query_x, turned.query_x)):
        of = torch.stack([(halves[0].rot90(k, (-2, -1)) == halves[1]).flatten(2).all(2) for k in range(4)])
        assert (of.sum(0) == 1).all()
        by_class = of.int().argmax(0).unflatten(1, (-1, 5))
        assert (by_class == by_class[:, :1]).all()
        found.append(by_class[:, 0])
    assert torch.equal(*found)
    counts = torch.bincount(found[0].flatten(), minlength=4).double()
    assert (counts / 500 - 1).abs().max() < 0.15
    pairs = torch.bincount(4 * found[0][:, 0] + found[0][:, 1], minlength=16)  # classes turn independently
    assert pairs.min() > 10
    for shape in ((3,), (1, 4, 5)):
        with pytest.raises(ValueError, match=r"turns: got examples of shape .* want square images"):
            FewShotTasks(torch.zeros(9, 9, *shape), queries=3, turns=True)


def test_too_few_classes_or_examples():
    for options, message in (
        ({"ways": 13}, "ways: got 13, want at most 12"),
        ({"shots": 3, "queries": 7}, r"shots, queries: got 3 \+ 7, want at most 9"),
        ({"shots": 0}, "shots: got 0, want at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            FewShotTasks(numbered(), **{"queries": 3, **options})


def test_omniglot_splits(tmp_path):
    path = write_packed(tmp_path / "small.npz")
    parts = {split: load_omniglot(path, split) for split in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [16, 4, 4]
    assert parts["train"].shape == (16, 6, 1, 28, 28)
    assert parts["train"].dtype == torch.uint8
    file = np.load(path)
    assert np.array_equal(parts["test"][:, :, 0].numpy(), file["images"][file["class_vinyals"] == 2])
    x = FewShotTasks(parts["train"], 5, 1, 3).sample(1, torch.Generator()).support_x
    assert x.dtype == torch.float32
    assert 0 <= x.min() < x.max() <= 1


def test_lakes_split(tmp_path):
    path = write_packed(tmp_path / "small.npz")
    file = np.load(path)
    for number, split in enumerate(omniglot.LAKE_SPLITS):
        want = file["images"][file["class_split"] == number]
        assert np.array_equal(load_omniglot(path, split)[:, :, 0].numpy(), want)
        with pytest.raises(ValueError, match=f"seed: got 1 for '{split}', want None"):
            load_omniglot(path, split, seed=1)
    np.savez(tmp_path / "lacks.npz", images=file["images"], class_vinyals=file["class_vinyals"])
    with pytest.raises(ValueError, match="cannot read `images` and `class_split` from it"):
        load_omniglot(tmp_path / "lacks.npz", "lake-background")


def test_a_split_of_ones_own(tmp_path):
    """Drawn by a seed: every class is in one part, in the file's shares, and not where the file has it."""
    path = write_packed(tmp_path / "small.npz")
    every = np.load(path)["images"]

    def classes(split, seed):
        images = load_omniglot(path, split, seed=seed)[:, :, 0].numpy()
        return [next(n for n, known in enumerate(every) if np.array_equal(known, one)) for one in images]

    drawn = {split: classes(split, 1) for split in ("train", "validation", "test", "background")}
    assert sorted(drawn["background"] + drawn["test"]) == list(range(24))
    assert sorted(drawn["train"] + drawn["validation"]) == drawn["background"]
    assert [len(drawn[split]) for split in ("train", "validation", "test")] == [
        16,
        2,
        6,
    ]  # of 1028, 172 and 423 of 1623
    assert drawn["test"] == classes("test", 1)
    assert drawn["test"] not in (classes("test", 2), classes("test", None))


def test_rotations_are_classes_of_their_own():
    images = torch.arange(2 * 3 * 4).view(2, 3, 1, 2, 2)
    turned = with_rotations(images)
    assert turned.shape == (8, 3, 1, 2, 2)
    assert torch.equal(turned[:2], images)
    for k in range(1, 4):
        want = np.rot90(images[:, :, 0].numpy(), k, (2, 3)).copy()
        assert torch.equal(turned[2 * k : 2 * k + 2, :, 0], torch.from_numpy(want))


def test_background_is_what_is_not_for_testing(tmp_path):
    path = write_packed(tmp_path / "small.npz")
    file = np.load(path)
    want = file["images"][file["class_vinyals"] < 2]
    assert np.array_equal(load_omniglot(path, "background")[:, :, 0].numpy(), want)


def test_packed_bits_and_smaller_images(tmp_path):
    """105 x 105 in bits is 255 where there is ink; a pixel of 20 x 20 is the mean of its 5.25 x 5.25, whole pixels or parts."""
    ink = np.random.default_rng(0).integers(0, 2, (3, 2, 105, 105), np.uint8)
    np.savez(tmp_path / "bits.npz", images=np.packbits(ink, axis=-1), class_vinyals=np.uint8([0, 2, 0]))
    images = load_omniglot(tmp_path / "bits.npz", "train")
    assert np.array_equal(images[:, :, 0].numpy(), ink[[0, 2]] * 255)
    small = load_omniglot(tmp_path / "bits.npz", "train", side=20)
    assert small.shape == (2, 2, 1, 20, 20)
    fine = np.repeat(np.repeat(ink[[0, 2]], 4, -1), 4, -2).reshape(2, 2, 20, 21, 20, 21).mean((3, 5)) * 255
    assert np.abs(small[:, :, 0].numpy() - fine).max() < 0.51
    with pytest.raises(ValueError, match="got images of 105 pixels, want at least 200"):
        load_omniglot(tmp_path / "bits.npz", "train", side=200)


@pytest.mark.parametrize("inner", ["", "omniglot-py", "python"])
def test_a_folder_of_drawings(tmp_path, inner, monkeypatch):
    """As torchvision unpacks it, as the archives are, and as their repository has them: ink is black there."""
    image = pytest.importorskip("PIL.Image")
    for name, value in (("VALIDATION_FROM", 2), ("TEST_FROM", 3), ("CLASSES", 4)):
        monkeypatch.setattr(omniglot, name, value)
    ink = np.random.default_rng(0).integers(0, 2, (4, 3, 5, 5)).astype(bool)
    names = ["background/Greek/character01", "background/Greek/character02", "background/Latin/character01"]
    for name, drawn in zip([*names, "evaluation/Aurek/character01"], ink, strict=True):
        folder = tmp_path / inner / f"images_{name}"
        folder.mkdir(parents=True)
        for n, one in enumerate(drawn):
            image.fromarray(~one).save(folder / f"0001_{n + 1:02}.png")
    parts = {"train": [0, 1], "validation": [2], "background": [0, 1, 2], "test": [3]}
    parts |= {"lake-background": [0, 1, 2], "lake-evaluation": [3]}
    for split, classes in parts.items():
        images = load_omniglot(tmp_path, split)
        assert images.dtype == torch.uint8
        assert np.array_equal(images[:, :, 0].numpy(), ink[classes] * 255)
    (tmp_path / inner / "images_background/Greek/character01/0001_03.png").unlink()
    with pytest.raises(ValueError, match="want 1623 classes of 20 drawings"):
        load_omniglot(tmp_path, "train")


def test_bad_files(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"none.npz: no such file, want one of: an .npz with `images`.* torchvision.* images_background.zip",
    ):
        load_omniglot(tmp_path / "none.npz", "train")
    with pytest.raises(ValueError, match="split: got 'all', want one of train, validation, background, test"):
        load_omniglot(tmp_path / "none.npz", "all")
    with pytest.raises(
        FileNotFoundError, match=r"no images_background and images_evaluation in it, want one of: an .npz"
    ):
        load_omniglot(tmp_path, "train")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"text.npz: cannot read `images`"):
        load_omniglot(tmp_path / "text.npz", "train")
    np.savez(tmp_path / "lacks.npz", images=np.zeros((2, 2, 4, 4), np.uint8))
    with pytest.raises(ValueError, match="class_vinyals"):
        load_omniglot(tmp_path / "lacks.npz", "train")
    np.savez(tmp_path / "oblong.npz", images=np.zeros((2, 2, 4, 3), np.uint8), class_vinyals=np.zeros(2, np.uint8))
    with pytest.raises(ValueError, match=r"got images uint8 \[2, 2, 4, 3\], .* want square images"):
        load_omniglot(tmp_path / "oblong.npz", "train")
    np.savez(tmp_path / "float.npz", images=np.zeros((2, 2, 4, 4)), class_vinyals=np.zeros(2, np.uint8))
    with pytest.raises(ValueError, match=r"got images float64 \[2, 2, 4, 4\]"):
        load_omniglot(tmp_path / "float.npz", "train")


@pytest.mark.parametrize(
    ("learner", "trained", "tested", "figure"),
    [
        ("metanet", 5, 5, 98.95),
        ("metanet", 20, 5, 99.55),
        ("metanet-", 10, 10, 98.32),
        ("metanet-", 10, 5, None),
        ("mann", 5, 5, None),
    ],
)
def test_the_paper_beside_few_shot_tasks(learner, trained, tested, figure):
    from mann_kernels.evaluate import papers_figures

    settings = Settings(task="few-shot", learner=learner, ways=trained)
    assert papers_figures(settings, learner, tested) == {"accuracy": figure}
    assert papers_figures(replace(settings, shots=5), learner, tested) == {}


@pytest.mark.parametrize(("ways", "labels"), [(2, [0, 3]), (3, [0, 2, 4]), (4, [0, 1, 3, 4]), (6, [0, 1, 2, 3, 4, 5])])
def test_fewer_classes_have_labels_all_over(ways, labels):
    """An answer is right if it is the largest of those of the task."""
    source = FewShotTasks(torch.rand(7, 3, 1, 4, 4), 6, 1, 2)
    source.ways = ways
    tasks = source.sample(3, torch.Generator().manual_seed(0))
    assert tasks.support_y.tolist() == [labels] * 3
    assert tasks.query_y.tolist() == [labels * 2] * 3
    output = torch.nn.functional.one_hot(tasks.query_y, 6).float()
    absent = [label for label in range(6) if label not in labels]
    output[..., absent] = 2.0
    output[0, 0, labels[1]] = 1.5  # instead of the first
    right, asked = source.scores(output, tasks)["accuracy"]
    assert right.tolist() == [2 * ways - 1, 2 * ways, 2 * ways]
    assert asked.tolist() == [2 * ways] * 3
