"""Pictures of a MANN's memory over an episode (needs matplotlib)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mann_kernels.modules import MANN, MANNCell, MANNState
from mann_kernels.ops import lrua_write_weights
from mann_kernels.reference.mann_sequence import split_head


class Trace(NamedTuple):
    """A record of what a memory did over an episode.

    Attributes:
        read_weights, write_weights: [T, B, R, N].
        usage: [T, B, N], after each step.
        memory: [T, B, N, W], after each step.
    """

    read_weights: torch.Tensor
    write_weights: torch.Tensor
    usage: torch.Tensor
    memory: torch.Tensor


@torch.no_grad()
def trace_episode(mann: MANN | MANNCell, x: torch.Tensor, state: MANNState | None = None) -> Trace:
    """Run a MANN step by step and keep the memory of each step; x is [T, B, I], whatever `batch_first` says.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it wants.
    """
    if not isinstance(mann, (MANN, MANNCell)):
        raise TypeError(f"mann: got {type(mann).__name__}, want a MANN or a MANNCell")
    if not isinstance(x, torch.Tensor) or x.dim() != 3 or x.shape[2] != mann.input_size or not len(x):
        got = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"x: got {got}, want [T, B, I] with at least one step and I={mann.input_size} (input_size)")
    state = mann.initial_state(x.shape[1]) if state is None else state
    kept = []
    for step in x:
        output, after = _one_step(mann, step, state)
        head = F.linear(output[..., : mann.hidden_size], _whole(mann.weight_head), _whole(mann.bias_head))
        options = {name: mann.head_options[name] for name in ("key_strength", "write")}
        gate = split_head(head, mann.num_heads, mann.slot_size, **options)[1]
        # eq. 7: from the usage and the read weights of the step before
        written, _ = lrua_write_weights(state.usage, state.read_weights, gate, lru=mann.memory_options["lru"])
        kept.append((after.read_weights, written, after.usage, after.memory))
        state = after
    return Trace(*(torch.stack(field) for field in zip(*kept, strict=True)))


def _whole(weight: torch.Tensor) -> torch.Tensor:
    """The weight, all of it where this process has a shard (fully_shard)."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def _one_step(mann, x, state):
    if isinstance(mann, MANNCell):
        return mann(x, state)
    output, state = mann(x.unsqueeze(1 if mann.batch_first else 0), state)
    return output.squeeze(1 if mann.batch_first else 0), state


def sources(trace: Trace, example: int = 0) -> torch.Tensor:
    """Which step's writing is read at each step: [T, T] (reading step, writing step), from the read weights' mean over heads.

    A slot counts as the work of the step that last gave it the largest share of a head's writing: what was written to it
    before then was erased, or is less. Weight on slots that were never chosen is left out.
    """
    reads = trace.read_weights[:, example].mean(1)  # [T, N]
    steps, slots = reads.shape
    chosen = trace.write_weights[:, example].argmax(-1)  # [T, R]
    writer, found = torch.full((slots,), -1), reads.new_zeros(steps, steps)
    for t in range(steps):
        writer[chosen[t].cpu()] = t
        known = (writer >= 0).to(reads.device)
        found[t].index_add_(0, writer.to(reads.device)[known], reads[t, known])
    return found


def draw_episode(
    mann: MANN | MANNCell,
    x: torch.Tensor,
    *,
    state: MANNState | None = None,
    example: int = 0,
    classes: Sequence[int] | torch.Tensor | None = None,
    delay: int = 0,
):
    """The memory of a MANN over an episode as a matplotlib figure: what is read, written, in use and stored.

    Args:
        mann: any MANN or MANNCell.
        x: [T, B, I].
        state: before the episode; None is the initial one.
        example: of the batch.
        classes: of each step [T]. Then the last panel, which step's writing is read at which step, has the steps in order of
            their classes: squares on its diagonal are retrieval from the class's own memories.
        delay: steps after an example at which it is written; 1 for labels that come a step late.

    Returns:
        A figure, not shown and not saved: `figure.savefig(path)`.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it wants.
    """
    trace = trace_episode(mann, x, state)
    T, B = x.shape[:2]
    if not -B <= example < B:
        raise ValueError(f"example: got {example}, want one of the batch of {B}")
    if not 0 <= delay < T:
        raise ValueError(f"delay: got {delay}, want 0 to {T - 1}")
    if classes is not None and len(classes) != T:
        raise ValueError(f"classes: got {len(classes)}, want one for each of {T} steps")
    from matplotlib.figure import Figure

    heads = trace.read_weights.shape[2]
    at = (slice(None), example)
    touched = trace.write_weights[at].amax((0, 1)) > 0.05  # where something was written at some step
    rows = [
        (f"read weights, sum of {heads} heads", trace.read_weights[at].sum(1)),
        (f"write weights, sum of {heads} heads", trace.write_weights[at].sum(1)),
        ("usage", trace.usage[at]),
        ("memory, norm of each slot", trace.memory[at].norm(dim=-1)),
    ]
    figure = Figure(figsize=(13, 11), layout="constrained")
    grid = figure.add_gridspec(3, 2)
    for n, (title, values) in enumerate(rows):
        axes = figure.add_subplot(grid[n // 2, n % 2])
        picture = axes.imshow(
            values[:, touched].t().cpu().numpy(), aspect="auto", interpolation="nearest", cmap="magma"
        )
        axes.set(title=title, xlabel="step", ylabel="slots written to" if n % 2 == 0 else "")
        figure.colorbar(picture, ax=axes)
    axes = figure.add_subplot(grid[2, 0])
    stored = trace.memory[-1, example][touched].cpu().numpy()
    picture = axes.imshow(stored, aspect="auto", interpolation="nearest", cmap="RdBu")
    picture.set_clim(-stored.max(), stored.max())
    axes.set(title="memory after the last step", xlabel="element", ylabel="slots written to")
    figure.colorbar(picture, ax=axes)
    _draw_sources(figure, figure.add_subplot(grid[2, 1]), sources(trace, example).cpu(), classes, delay)
    return figure


def _draw_sources(figure, axes, found, classes, delay):
    """found [reading step, writing step]; an example of step s is written at s + delay."""
    found = F.pad(found[:, delay:], (0, delay))
    if classes is None:
        axes.set(xlabel="step of the example", ylabel="step of the reading")
    else:
        classes = torch.as_tensor(classes).cpu()
        order = classes.argsort(stable=True)
        found = found[order][:, order]
        for border in classes[order].diff().nonzero().flatten().tolist():
            axes.axhline(border + 0.5, color="white", linewidth=0.6)
            axes.axvline(border + 0.5, color="white", linewidth=0.6)
        axes.set(xlabel="step of the example, by class", ylabel="step of the reading, by class")
    picture = axes.imshow(found.numpy(), aspect="auto", interpolation="nearest", cmap="magma")
    axes.set_title("whose memory is read")
    figure.colorbar(picture, ax=axes)
