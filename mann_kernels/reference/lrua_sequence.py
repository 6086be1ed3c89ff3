"""An episode of memory steps whose keys are known beforehand (feed-forward controller)."""

import torch

from mann_kernels.reference.lrua_step import lrua_step


def where_active(lengths, t, new, old):
    """`new` for the examples whose step t is real, `old` for the padded ones. lengths [B] or None (all are real)."""
    if lengths is None:
        return new
    active = (t < lengths).reshape(-1, *[1] * (new.dim() - 1))
    return torch.where(active, new, old)


def of_step(least_used, t):
    """The slots of step t as an option of one step; least_used int [T,B,R], or None: each step chooses."""
    return {} if least_used is None else {"least_used": least_used[t]}


def lrua_sequence(
    memory, usage, read_weights, key, gate, beta=None, add=None, lengths=None, *,
    one_step=lrua_step, least_used=None, **options,
):  # fmt: skip
    """key [T,B,R,W], gate [T,B,R], beta [T,B,R]?, add [T,B,R,W]?, lengths int [B]?; state and options as in lrua_step
    -> reads [T,B,R,W], memory, usage, read_weights. one_step: what is called as lrua_step.
    least_used: int [T,B,R], the slots that an earlier run chose at each step.

    Step t of example b is padding when t >= lengths[b]: it reads zeros and leaves the state alone.
    """
    reads = []
    for t in range(key.shape[0]):
        step = one_step(
            memory,
            usage,
            read_weights,
            key[t],
            gate[t],
            None if beta is None else beta[t],
            None if add is None else add[t],
            **options,
            **of_step(least_used, t),
        )
        reads.append(where_active(lengths, t, step[0], torch.zeros_like(step[0])))
        memory = where_active(lengths, t, step[1], memory)
        usage = where_active(lengths, t, step[2], usage)
        read_weights = where_active(lengths, t, step[3], read_weights)
    reads = torch.stack(reads) if reads else torch.zeros_like(key)
    return reads, memory, usage, read_weights
