"""Sizes and cases that the benches of MANN's operators have in common."""

from dataclasses import dataclass, replace

from bench.counts import Product
from bench.operators import Case

EPS, DECAY = 1e-6, 0.99  # the operators' defaults


@dataclass(frozen=True)
class Shape:
    """Steps, batch, input, hidden units, slots, width of a slot, heads."""

    T: int
    B: int
    I: int  # noqa: E741
    H: int
    N: int
    W: int
    R: int

    def at(self, T: int) -> "Shape":
        """Give the same sizes over T steps."""
        return replace(self, T=T)


SHAPES = {
    "paper": Shape(50, 16, 405, 200, 128, 40, 4),
    "single": Shape(50, 1, 405, 200, 128, 40, 4),
    "small": Shape(50, 16, 20, 64, 128, 20, 1),
    "wide": Shape(20, 16, 64, 200, 1024, 64, 4),
    "long": Shape(800, 16, 405, 200, 128, 40, 4),
    "batch": Shape(50, 256, 405, 200, 128, 40, 4),
    "many slots": Shape(20, 1, 64, 200, 32768, 32, 4),
    "a million slots": Shape(8, 1, 64, 200, 1 << 20, 32, 4),
}
#: What is timed on a GPU alone.
ON_GPU = ("batch", "many slots", "a million slots")
#: What verification runs on: odd sizes, more slots than a tile, more heads than a group, and the paper's with few steps.
VERIFIED = (Shape(4, 3, 5, 9, 7, 5, 2), Shape(3, 2, 4, 17, 300, 9, 6), Shape(5, 4, 405, 200, 128, 40, 4))


def devices_of(name: str) -> tuple[str, ...]:
    """Where a size is timed unless it is asked for."""
    return ("cuda",) if name in ON_GPU else Case.devices


def cases(quick: bool) -> list[Case]:
    """The sizes at which an operator on a memory is timed."""
    ranks = {"paper": 1, "wide": 3, "batch": 3}
    return [Case(name, SHAPES[name], rank, devices_of(name)) for name, rank in ranks.items()]


def over_slots(s: Shape, times: int) -> Product:
    """Products of all heads with all slots, as many as are needed to write, to match or to read."""
    return Product(times, s.B * s.R * s.N * s.W)
