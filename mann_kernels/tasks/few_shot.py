"""The few-shot protocol, a support set with answers, then queries; and classification in it."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from mann_kernels.tasks._kind import check_sizes, numbers, on_cpu, uniform


class Tasks(NamedTuple):
    """G tasks of S support examples and L queries; no example is in both halves.

    Attributes:
        support_x, support_y: [G, S, ...] and int64 [G, S], or float [G, S, O] in a regression.
        query_x, query_y: [G, L, ...] and int64 [G, L], or float [G, L, O].
        descriptor: [G, D], what tells the tasks apart, where that is known.
    """

    support_x: torch.Tensor
    support_y: torch.Tensor
    query_x: torch.Tensor
    query_y: torch.Tensor
    descriptor: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> "Tasks":
        """Move the tasks to another device."""
        fields: list[Any] = [None if field is None else field.to(device) for field in self]
        return Tasks(*fields)


class FewShotTasks:
    """Draws tasks from examples that are sorted by class.

    Args:
        examples: [classes, examples of each, ...], uint8 (then 0..255 becomes 0..1) or floating point; tasks are made on their
            device.
        ways: classes of a task.
        shots: support examples of each class of a task.
        queries: query examples of each class of a task.
        turns: turn each class of a task by 0, 90, 180 or 270 degrees; the examples are then images [.., side, side].

    Raises:
        ValueError: more ways than classes, more shots and queries than examples, or what cannot be turned.
    """

    def __init__(
        self, examples: torch.Tensor, ways: int = 5, shots: int = 1, queries: int = 10, *, turns: bool = False
    ):
        check_sizes(ways=ways, shots=shots, queries=queries)
        if ways > examples.shape[0]:
            raise ValueError(f"ways: got {ways}, want at most {examples.shape[0]}, the classes there are")
        if shots + queries > examples.shape[1]:
            raise ValueError(
                f"shots, queries: got {shots} + {queries}, want at most {examples.shape[1]}, the examples of a class"
            )
        if turns and (examples.dim() < 4 or examples.shape[-1] != examples.shape[-2]):
            raise ValueError(f"turns: got examples of shape {list(examples.shape[2:])}, want square images")
        self.examples, self.ways, self.shots, self.queries, self.turns = examples, ways, shots, queries, turns
        self.input_size, self.output_size = examples.shape[2:].numel(), ways

    @property
    def labels(self) -> torch.Tensor:
        """The labels of a task's classes, [ways]: 0..ways-1; where `ways` was made smaller later, spread over those there were.

        A learner that takes the support set in parts then meets labels in the part in which it met them before.
        """
        return torch.arange(self.ways, device=self.examples.device) * self.output_size // self.ways

    def sample(self, G: int, generator: torch.Generator) -> Tasks:
        """G independent tasks: classes and examples drawn uniformly without replacement, the classes' labels in order.

        The support examples are ordered shot by shot, with the classes in order of their labels within each; so are the queries.
        """
        device = self.examples.device
        classes, chosen, turns = (drawn.to(device) for drawn in self._draw(G, generator))
        x = self.examples[classes, chosen]
        x = self._turned(x, turns) if self.turns else x
        x = numbers(x) / 255 if x.dtype == torch.uint8 else x
        y = self.labels.expand(chosen.shape)
        halves = (
            tensor[:, part].flatten(1, 2) for part in (slice(self.shots), slice(self.shots, None)) for tensor in (x, y)
        )
        return Tasks(*halves)

    @on_cpu
    def _draw(self, G, generator):
        """All that is random, drawn where the generator is: classes [G, 1, ways], examples [G, examples of a class, ways],
        quarter turns [G, ways]."""
        number, each = self.examples.shape[:2]
        classes = uniform(G, number, generator=generator).argsort(-1)[:, None, : self.ways]
        chosen = uniform(G, each, self.ways, generator=generator).argsort(1)[:, : self.shots + self.queries]
        turns = torch.randint(4, (G, self.ways), generator=generator) if self.turns else torch.empty(0)
        return classes, chosen, turns

    def _turned(self, x, turns):
        """x [G, examples of a class, ways, ..., side, side], each class of each task turned as a whole."""
        side = x.shape[-1]
        pixel = torch.arange(side * side, device=x.device).view(side, side)
        source = torch.stack([pixel.rot90(quarters).flatten() for quarters in range(4)])[
            turns
        ]  # [G, ways, side * side]
        source = source.view(len(x), 1, self.ways, *(1 for _ in x.shape[3:-2]), side * side)
        return x.flatten(-2).gather(-1, source.expand(*x.shape[:-2], -1)).view(x.shape)

    def loss(self, output: torch.Tensor, tasks: Tasks) -> torch.Tensor:
        """Mean cross-entropy of the queries, from logits [G, ways*queries, ways]."""
        return F.cross_entropy(output.flatten(0, 1), tasks.query_y.flatten())

    def scores(self, output: torch.Tensor, tasks: Tasks) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Right answers and queries of each task [G]. Of a learner that knows more classes those of the task count."""
        right = self.labels[output[..., self.labels].argmax(-1)] == tasks.query_y
        return {"accuracy": (right.sum(-1), torch.full((len(right),), right.shape[1], device=right.device))}
