"""The states of the layers: of a MANN from one step to the next, of a MetaNet after a support set."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import _register_namedtuple


class MANNState(NamedTuple):
    """The whole state of a MANN; every field is a tensor, so it can be saved, moved, detached and carried on.

    Attributes:
        memory: [B, N, W].
        usage: [B, N]; no gradient flows through it.
        read_weights: [B, R, N].
        reads: [B, R, W], what was read last.
        h, c: [B, H], the LSTM controller; None with a feed-forward controller.
    """

    memory: torch.Tensor
    usage: torch.Tensor
    read_weights: torch.Tensor
    reads: torch.Tensor
    h: torch.Tensor | None = None
    c: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "MANNState":
        """The state with `function` applied to each of its tensors."""
        fields: list[Any] = [None if field is None else function(field) for field in self]
        return MANNState(*fields)

    def detach(self) -> "MANNState":
        """The same numbers without their history: ends backpropagation through time here."""
        return self.map(torch.Tensor.detach)

    def clone(self) -> "MANNState":
        """Copy every tensor."""
        return self.map(torch.Tensor.clone)

    def to(self, *args: Any, **kwargs: Any) -> "MANNState":
        """The state on another device or in another dtype, with the arguments of torch.Tensor.to."""
        return self.map(lambda field: field.to(*args, **kwargs))


class MetaNetState(NamedTuple):
    """The state of a MetaNet after a support set; every field is a tensor, so it can be saved, moved and detached.

    Attributes:
        index: [G, S, K], the keys of the support examples.
        memory: [G, S, P], the fast weights of the base learner, a row for each support example; with "metanet+" a last
            row S holds the task-level ones.
        task_fast: [G, Q], the task-level fast weights of the embedding; None with "metanet-".

    From a support set without the dimension G, none of them has it.
    """

    index: torch.Tensor  # type: ignore[assignment]  # over the method of a tuple, which no one calls
    memory: torch.Tensor
    task_fast: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "MetaNetState":
        """The state with `function` applied to each of its tensors."""
        fields: list[Any] = [None if field is None else function(field) for field in self]
        return MetaNetState(*fields)

    def detach(self) -> "MetaNetState":
        """The same numbers without their history."""
        return self.map(torch.Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> "MetaNetState":
        """The state on another device or in another dtype, with the arguments of torch.Tensor.to."""
        return self.map(lambda field: field.to(*args, **kwargs))


# torch.load takes them from a file as it takes tensors; under these names torch.export and AOTInductor keep them in theirs.
torch.serialization.add_safe_globals([MANNState, MetaNetState])
for _state in (MANNState, MetaNetState):
    _register_namedtuple(_state, serialized_type_name=f"mann_kernels.{_state.__name__}")
