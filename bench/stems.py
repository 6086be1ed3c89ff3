"""What each stem is timed and verified on: shapes and inputs."""

from dataclasses import dataclass

import torch

STEMS = (
    "content_address",
    "lrua_write_weights",
    "memory_update",
    "lrua_step",
    "lrua_sequence",
    "mann_sequence",
)


@dataclass(frozen=True)
class Shape:
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    N: int
    W: int
    R: int

    def at(self, T: int) -> "Shape":
        return Shape(T, self.B, self.I, self.H, self.N, self.W, self.R)


SHAPES = {
    "paper": Shape(50, 16, 405, 200, 128, 40, 4),
    "single": Shape(50, 1, 405, 200, 128, 40, 4),
    "small": Shape(50, 16, 20, 64, 128, 20, 1),
    "wide": Shape(20, 16, 64, 200, 1024, 64, 4),
    "long": Shape(800, 16, 405, 200, 128, 40, 4),
    "batch": Shape(50, 256, 405, 200, 128, 40, 4),
}
#: What verification runs on: odd sizes, more slots than a tile, more heads than a group, and the paper's with few steps.
VERIFIED = (Shape(4, 3, 5, 9, 7, 5, 2), Shape(3, 2, 4, 17, 300, 9, 6), Shape(5, 4, 405, 200, 128, 40, 4))


def constant(stem: str) -> set[str]:
    """Inputs without a gradient in every contestant: data and the state an episode starts from."""
    state = {"memory", "read_weights"} if stem == "mann_sequence" else set()
    return {"x", "usage", "h", "c", "reads", "least_used"} | state


def inputs(stem: str, s: Shape, seed: int = 0) -> dict[str, torch.Tensor]:
    """float64 inputs of a stem by name, those of an episode at its start."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    read_weights = torch.softmax(normal(s.B, s.R, s.N), -1)
    state = {"memory": normal(s.B, s.N, s.W), "usage": normal(s.B, s.N).abs(), "read_weights": read_weights}
    step = {"key": normal(s.B, s.R, s.W), "gate": normal(s.B, s.R)}
    if stem == "content_address":
        return {"memory": state["memory"], "key": step["key"]}
    if stem == "lrua_write_weights":
        return {"usage": state["usage"], "read_weights": read_weights, "gate": step["gate"]}
    if stem == "memory_update":
        slots = state["usage"].argsort(-1)[:, : s.R].int()
        return {"memory": state["memory"], "write_weights": read_weights, "add": step["key"], "least_used": slots}
    if stem == "lrua_step":
        return {**state, **step}
    if stem == "lrua_sequence":
        return {**state, "key": normal(s.T, s.B, s.R, s.W), "gate": normal(s.T, s.B, s.R)}
    words, k = s.R * s.W, s.H**-0.5
    return {
        "x": normal(s.T, s.B, s.I),
        "h": torch.zeros(s.B, s.H, dtype=torch.float64),
        "c": torch.zeros(s.B, s.H, dtype=torch.float64),
        "reads": torch.zeros(s.B, s.R, s.W, dtype=torch.float64),
        **state,
        "weight_ih": normal(4 * s.H, s.I) * k / 2,
        "weight_hh": normal(4 * s.H, s.H + words) * k / 2,
        "bias": normal(4 * s.H) * k,
        "weight_head": normal(words + s.R, s.H) * k,
        "bias_head": normal(words + s.R) * k,
    }
