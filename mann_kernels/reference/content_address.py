"""Content-based addressing: eq. 2 and 3 (17 and 18 of the supplement)."""

import torch


def similarity(memory, key, beta=None, *, eps=1e-6):
    """beta * cosine of memory [B,N,W] and key [B,R,W] -> [B,R,N]; beta [B,R] or None (= 1, the paper)."""
    # eq. 2, with eps inside the root so that an all-zero row has similarity 0 and a finite gradient
    dot = key @ memory.transpose(-1, -2)
    key_square = (key * key).sum(-1)
    row_square = (memory * memory).sum(-1)
    cosine = dot / torch.sqrt(key_square[..., :, None] * row_square[..., None, :] + eps)
    return cosine if beta is None else beta[..., None] * cosine


def content_address(memory, key, beta=None, *, eps=1e-6):
    """memory [B,N,W], key [B,R,W], beta [B,R] or None -> read_weights [B,R,N]."""
    return torch.softmax(similarity(memory, key, beta, eps=eps), dim=-1)  # eq. 3; the paper has no key strength
