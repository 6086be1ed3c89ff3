"""Least-recently-used write weights: eq. 6 and 7 (21 and 22 of the supplement)."""

import torch


def least_used_slots(usage, count):
    """The `count` slots of smallest usage, ascending, ties to the lowest index; NaN counts as largest.

    usage [B,N] -> int32 [B,count]. Exactly `count`: the literal "<=" of eq. 6 marks every tied slot, and with a constant
    initial memory all slots tie at every step for ever.
    """
    return torch.sort(usage.detach(), dim=-1, stable=True).indices[..., :count].to(torch.int32)


def interpolate(read_weights, gate, own_slot, *, lru="per_head"):
    """eq. 7: previous read_weights [B,R,N], gate [B,R] (before the sigmoid), own_slot bool [B,R,N] -> write_weights [B,R,N]."""
    own_slot = own_slot.to(read_weights.dtype)
    if lru == "shared":  # every head writes to all n = R least-used slots
        own_slot = own_slot.sum(-2, keepdim=True)
    interpolation = torch.sigmoid(gate)[..., None]
    return interpolation * read_weights + (1 - interpolation) * own_slot


def lrua_write_weights(usage, read_weights, gate, *, lru="per_head", least_used=None):
    """usage [B,N], previous read_weights [B,R,N], gate [B,R] (before the sigmoid) -> write_weights [B,R,N], least_used [B,R].

    usage and read_weights are those of the previous step. No gradient reaches usage: it only chooses indices.
    least_used: int [B,R], chosen by an earlier run, whose choice counts when a pass is recomputed.
    """
    heads, slots = read_weights.shape[-2:]
    if least_used is None:
        least_used = least_used_slots(usage, heads)
    own_slot = least_used[..., None] == torch.arange(slots, device=usage.device)
    return interpolate(read_weights, gate, own_slot, lru=lru), least_used
