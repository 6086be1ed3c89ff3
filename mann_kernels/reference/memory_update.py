"""Erase and write: section 3.2 ("set to zero") and eq. 8 (23 of the supplement)."""

import torch


def memory_update(memory, write_weights, add, least_used, *, erase="least"):
    """memory [B,N,W], write_weights [B,R,N], add [B,R,W], least_used int [B,R] -> memory [B,N,W].

    erase="least" zeroes the single least-used slot first (the paper's singular), "all" every slot of least_used.
    """
    erased_slots = least_used[..., :1] if erase == "least" else least_used
    erased = torch.zeros(memory.shape[:-1], dtype=torch.bool, device=memory.device)
    erased = erased.scatter(-1, erased_slots.long(), True)
    kept = memory.masked_fill(erased[..., None], 0)
    # eq. 8, summed over heads
    return kept + write_weights.transpose(-1, -2) @ add
