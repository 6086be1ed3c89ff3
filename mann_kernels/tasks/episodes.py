"""Episodes: sequences whose answer at each step is to be given from what came before."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from mann_kernels.tasks._kind import check_sizes, numbers, on_cpu, uniform

#: Which presentations of a class the paper's tables tell apart.
PRESENTATIONS = (1, 2, 3, 4, 5, 10)
#: String labels: so many characters, each of so many letters (Santoro et al. 2016, section 4.2).
CHARACTERS, LETTERS = 5, 5
COUNTS = ("random", "equal")
LABELS = ("onehot", "string")


class Episodes(NamedTuple):
    """A batch of B episodes of T steps: input, answers, and which steps are to be answered.

    Attributes:
        x: [T, B, I], the input.
        y: [T, B] or [T, B, ...], the answers.
        presentation: int64 [T, B], counts from 1 how often the class of this step has been shown; None without classes.
        asked: bool [T, B], the steps that are to be answered; None: all are.
        exact: [T, B], the loss of the best that can be known at each step; None where that is not known.
    """

    x: torch.Tensor
    y: torch.Tensor
    presentation: torch.Tensor | None = None
    asked: torch.Tensor | None = None
    exact: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> "Episodes":
        """Move the episodes to another device."""
        fields: list[Any] = [None if field is None else field.to(device) for field in self]
        return Episodes(*fields)


def before(y: torch.Tensor) -> torch.Tensor:
    """[T, ...] one step later, with zeros at the first: what may be seen of the answers at each step."""
    return torch.cat([torch.zeros_like(y[:1]), y[:-1]])


def _coordinates(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How far right of and below the centre each of the h * w pixels of an image is, in half sides."""
    height, width = pixels.shape[-2:]
    down, right = ((torch.arange(size, device=pixels.device) * 2 + 1) / size - 1 for size in (height, width))
    return right.repeat(height), down.repeat_interleave(width)


def _joined(pixels: torch.Tensor, others: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
    """pixels [B, T, 1, h, w] on one side of a line and others on the other, where right * cut[0] + down * cut[1] > cut[2]."""
    right, down = _coordinates(pixels)
    beyond = cut[..., :1] * right + cut[..., 1:2] * down > cut[..., 2:]
    return torch.where(beyond.view(pixels.shape), others, pixels)


def _placed(pixels: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """pixels [B, T, 1, h, w] by place [B, T, 2, 3], which maps (right, down, 1) of each pixel to its source, in half sides;
    bilinear, zero outside."""
    height, width = pixels.shape[-2:]
    right, down = _coordinates(pixels)
    # Faster than affine_grid, which multiplies a 3 x 2 matrix for each image.
    where = (place[..., :1] * right + place[..., 1:2] * down + place[..., 2:]).transpose(-2, -1)
    where = where.reshape(-1, height, width, 2)
    return F.grid_sample(pixels.flatten(0, 1), where, align_corners=False).view(pixels.shape)


class OmniglotEpisodes:
    """Classification with time-offset labels (Santoro et al. 2016, section 4.1): input (x_t, y_{t-1}), answer y_t.

    Every episode of a batch has classes, labels and examples of its own, drawn without replacement.

    Args:
        examples: uint8 [classes, examples of each, 1, side, side], 255 is ink; episodes are made on their device.
        ways: classes of an episode.
        length: its steps; None is 10 * ways.
        labels: "onehot" or "string", five characters of five letters each, [.., 25].
        counts: how often a class appears: "random", as in the paper (`length` of all the examples of the episode's classes),
            or "equal".
        augment: turn each image by up to pi/16 and shift it by up to 10/105 of its side, as in the paper.
        turns: turn each class of an episode by 0, 90, 180 or 270 degrees.
        warps: make classes that there are none of: join one class of an episode in two with another along a line near the
            centre, mirror one in two, stretch each by up to a third along either axis, and shear it by up to 0.3. Not in the
            paper.

    Raises:
        ValueError: naming the argument that does not fit the examples or the others.
    """

    def __init__(
        self,
        examples: torch.Tensor,
        ways: int = 5,
        length: int | None = None,
        *,
        labels: str = "onehot",
        counts: str = "random",
        augment: bool = False,
        turns: bool = False,
        warps: bool = False,
    ):
        for name, value, known in (("labels", labels, LABELS), ("counts", counts, COUNTS)):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, want one of {', '.join(known)}")
        self.examples, self.labels, self.counts = examples, labels, counts
        self.augment, self.turns, self.warps = augment, turns, warps
        self.resize(ways, length)
        self.output_size = ways if labels == "onehot" else CHARACTERS * LETTERS
        self.input_size = examples.shape[-2:].numel() + self.output_size

    def resize(self, ways: int, length: int | None = None) -> None:
        """Make the episodes that come of other sizes; with one-hot labels a learner takes no more classes than before.

        Raises:
            ValueError: as the constructor.
        """
        classes, each = self.examples.shape[:2]
        length = 10 * ways if length is None else length
        check_sizes(ways=ways, length=length)
        if not 2 <= ways <= classes:
            raise ValueError(f"ways: got {ways}, want 2 to {classes}, the classes there are")
        if not 1 <= length <= ways * each:
            raise ValueError(f"length: got {length}, want 1 to {ways * each}, the examples of an episode")
        if self.counts == "equal" and length % ways:
            raise ValueError(f"length: got {length}, want a multiple of ways={ways} for equal counts")
        self.ways, self.length = ways, length
        self.most = length // ways if self.counts == "equal" else min(length, each)

    def sample(self, B: int, generator: torch.Generator) -> Episodes:
        """B independent episodes on the device of the examples; y is the label [T, B], or the string's five letters [T, B, 5]."""
        device = self.examples.device
        label, example, place, letters, other, cut = (drawn.to(device) for drawn in self._draw(B, generator))
        pixels = self._pixels(example)
        if cut.numel():
            pixels = _joined(pixels, self._pixels(other), cut)
        if place.numel():
            pixels = _placed(pixels, place)
        known = F.one_hot(label, self.output_size if self.labels == "onehot" else self.ways)
        presentation = known.cumsum(1).gather(2, label[..., None])[..., 0]
        y = label
        if self.labels == "string":
            y, known = letters, F.one_hot(letters, LETTERS).flatten(2)
        x = torch.cat([pixels.flatten(2), numbers(known)], 2).transpose(0, 1)
        x[..., -self.output_size :] = before(x[..., -self.output_size :])
        return Episodes(x, y.transpose(0, 1), presentation.t())

    def _pixels(self, example):
        return numbers(self.examples.flatten(0, 1)[example]) / 255

    @on_cpu
    def _draw(self, B, generator):
        """All that is random, drawn where the generator is, the same for every device: labels and examples [B, T], the
        place of each image [B, T, 2, 3], letters [B, T, 5], the examples that these are joined with [B, T] and along which
        line [B, T, 3]; what has no use is empty."""
        number, each = self.examples.shape[:2]
        classes = uniform(B, number, generator=generator).topk(self.ways).indices
        order = uniform(B, self.ways, each, generator=generator)
        if self.counts == "equal":
            chosen = order.topk(self.length // self.ways).indices + torch.arange(self.ways)[:, None] * each
            shuffle = uniform(B, self.length, generator=generator).argsort()
            chosen = chosen.flatten(1).gather(1, shuffle)
        else:
            chosen = order.flatten(1).topk(self.length).indices
        label, example = chosen // each, chosen % each
        place = self._places(label, generator) if self.augment or self.turns or self.warps else torch.empty(0)
        letters = self._strings(label, generator) if self.labels == "string" else torch.empty(0)
        other, cut = self._joins(label, example, generator) if self.warps else (torch.empty(0),) * 2
        return label, classes.gather(1, label) * each + example, place, letters, other, cut

    def _joins(self, label, example, generator):
        """Draw, for each image of an episode, the example that it is joined with [B, T], and the line [B, T, 3], see _joined."""
        B, (number, each) = label.shape[0], self.examples.shape[:2]
        classes = torch.randint(number, (B, self.ways), generator=generator)
        shift = torch.randint(each, (B, self.ways), generator=generator)
        whole = uniform(B, self.ways, generator=generator) >= 0.5
        angle = uniform(B, self.ways, generator=generator) * (2 * math.pi)
        edge = (uniform(B, self.ways, generator=generator) * 0.6 - 0.3).masked_fill(whole, math.inf)
        cut = torch.stack([angle.cos(), angle.sin(), edge], -1)[torch.arange(B)[:, None], label]
        return classes.gather(1, label) * each + (example + shift.gather(1, label)) % each, cut

    def _places(self, label, generator):
        """Turns, shifts and warps of the images of an episode: [B, T, 2, 3], see _placed."""

        def within(limit, *shape):
            return (uniform(*shape, generator=generator) * 2 - 1) * limit

        B = label.shape[0]
        angle, shift = torch.zeros(label.shape), torch.zeros(*label.shape, 2)
        if self.augment:
            angle = within(math.pi / 16, *label.shape)
            shift = within(2 * 10 / 105, *label.shape, 2)
        if self.turns:
            turns = torch.randint(4, (B, self.ways), generator=generator)
            angle += turns.gather(1, label) * (math.pi / 2)
        sin, cos = angle.sin(), angle.cos()
        place = torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))
        if self.warps:
            mirrored = torch.randint(2, (B, self.ways), generator=generator) * 2 - 1
            along, across = within(math.log(4 / 3), 2, B, self.ways).exp()
            shear = within(0.3, B, self.ways)
            warp = torch.stack([mirrored * along, shear, torch.zeros_like(shear), across], -1)
            place = warp[torch.arange(B)[:, None], label].unflatten(-1, (2, 2)) @ place
        return torch.cat([place, shift[..., None]], -1)

    def _strings(self, label, generator):
        """Distinct strings for the classes of an episode: letters [B, T, 5]."""
        codes = uniform(label.shape[0], LETTERS**CHARACTERS, generator=generator).topk(self.ways).indices
        return codes.gather(1, label)[..., None] // LETTERS ** torch.arange(CHARACTERS) % LETTERS

    def loss(self, output: torch.Tensor, episodes: Episodes) -> torch.Tensor:
        """Cross-entropy per step (a string's is the sum over its characters), from output [T, B, output_size]."""
        if self.labels == "onehot":
            return F.cross_entropy(output.flatten(0, 1), episodes.y.flatten())
        letters = output.unflatten(-1, (CHARACTERS, LETTERS)).flatten(0, 2)
        return CHARACTERS * F.cross_entropy(letters, episodes.y.flatten())

    def scores(self, output: torch.Tensor, episodes: Episodes) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Right answers and answers of each episode [B]: in all, and at each of PRESENTATIONS that can occur."""
        if self.labels == "onehot":
            right = output.argmax(-1) == episodes.y
        else:
            right = (output.unflatten(-1, (CHARACTERS, LETTERS)).argmax(-1) == episodes.y).all(-1)
        assert episodes.presentation is not None
        asked = {"accuracy": torch.ones_like(right)}
        asked |= {f"accuracy_{k}": episodes.presentation.eq(k) for k in PRESENTATIONS if k <= self.most}
        return {name: ((right & of).sum(0), of.sum(0)) for name, of in asked.items()}
