"""Layer augmentation: a slow and a fast weight side by side in a fully connected layer (Munkhdalai & Yu 2017, section 3.3)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


def fast_weights(tasks, per_task, fast, mix=None):
    """The fast weight [..., O, ...] of every example, or one that they share, with sizes of 1 to broadcast.

    tasks: x has a dimension of tasks before that of examples. per_task: fast has one weight per task (and no mix).
    """
    if mix is not None:  # eq. 9: the examples' attention over the S rows of the fast-weight memory
        return torch.einsum("gls,gs...->gl...", mix, fast) if tasks else torch.einsum("ls,s...->l...", mix, fast)
    return fast.unsqueeze(1) if per_task else fast


def activated_sum(slow, fast, activation, sides=None):
    """act(slow) + act(fast), two separate activations; sides: bool, slow's and fast's, where an earlier run's ReLU let pass."""
    if sides is None:
        return ACTIVATIONS[activation](slow) + ACTIVATIONS[activation](fast)
    return sum(torch.where(side, z, torch.zeros_like(z)) for side, z in zip(sides, (slow, fast), strict=True))


def augmented_linear(x, weight, fast, mix=None, bias=None, *, form="hidden", activation="relu", sides=None):
    """x [L,I] or [G,L,I], weight [O,I], bias [O]?
    fast: [O,I] for everything; [L,O,I] per example of x [L,I]; [G,O,I] per task of x [G,L,I];
    with mix [L,S] or [G,L,S]: [S,O,I] or [G,S,O,I]
    -> like x, with O in place of I. sides: bool [2, of the output], of the ReLUs of an earlier run.
    """
    tasks = x.dim() == 3
    per_example = fast_weights(tasks, tasks and fast.dim() == 3, fast, mix)
    by_fast = (per_example @ x.unsqueeze(-1)).squeeze(-1)
    # output layer: slow + fast
    return activated_sum(F.linear(x, weight, bias), by_fast, "identity" if form == "output" else activation, sides)
