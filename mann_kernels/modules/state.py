"""What a MANN carries from step to step, and from call to call."""

from typing import NamedTuple

import torch

from mann_kernels.ops import _check


class MANNState(NamedTuple):
    """The state of a MANN after a step. An unbatched state has no B.

    memory: [B, N, W].
    usage: [B, N], how recently and how much each slot was used. No gradient flows through it.
    read_weights: [B, R, N].
    reads: [B, R, W], what was read last; it is part of the LSTM controller's next input.
    h, c: [B, H], the LSTM controller's; None with a feed-forward controller.

    It is a tuple of tensors: it can be pickled, and torch.load takes it with weights_only=True.
    """

    memory: torch.Tensor
    usage: torch.Tensor
    read_weights: torch.Tensor
    reads: torch.Tensor
    h: torch.Tensor | None = None
    c: torch.Tensor | None = None

    def map(self, function) -> "MANNState":
        """The state with `function` applied to each tensor."""
        return MANNState(*(None if tensor is None else function(tensor) for tensor in self))

    def detach(self) -> "MANNState":
        """The same values without history: the cut of truncated back-propagation through time."""
        return self.map(torch.Tensor.detach)

    def clone(self) -> "MANNState":
        """A copy, with history."""
        return self.map(torch.Tensor.clone)

    def to(self, *args, **kwargs) -> "MANNState":
        """Every tensor moved or converted as by Tensor.to."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))


torch.serialization.add_safe_globals([MANNState])

_SHAPES = {
    "memory": ("N", "W"),
    "usage": ("N",),
    "read_weights": ("R", "N"),
    "reads": ("R", "W"),
    "h": ("H",),
    "c": ("H",),
}


def check_state(state: MANNState, sizes: dict[str, int], like: torch.Tensor, recurrent: bool) -> MANNState:
    """The state, if every field fits; an error names the field.

    sizes: N, W, R, H, and B unless the state is to be unbatched. like: a parameter, for dtype and device.
    recurrent: whether h and c are wanted.
    """
    if not isinstance(state, tuple) or len(state) != len(_SHAPES):
        raise TypeError(f"state: got {type(state).__name__}, want a MANNState (or a tuple of its fields)")
    state = MANNState(*state)
    for name, letters in _SHAPES.items():
        tensor = getattr(state, name)
        want = (*(["B"] if "B" in sizes else []), *letters)
        if name in ("h", "c") and not recurrent:
            if tensor is not None:
                raise ValueError(f"state.{name}: got a value, want None: a feed-forward controller keeps nothing")
            continue
        if tensor is None:
            raise ValueError(f"state.{name}: got None, want a tensor [{', '.join(want)}]")
        _check.same_kind(**{"the parameters": like, f"state.{name}": tensor})
        _check.shape(dict(sizes), f"state.{name}", tensor, *want)
    return state
