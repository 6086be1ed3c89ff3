"""What one would take instead of writing the loop oneself: two well-known ways to write this model, and the `dnc` package.

The two ways are written here from the mathematics, in the structure of the public code that they are named after; they return
what the reference returns. `dnc` computes another model, with a matrix of temporal links, at the same sizes.
"""

import contextlib
import functools
import importlib.util
import io

import torch
import torch.nn.functional as F

from bench.stems import Shape

EPS, DECAY = 1e-6, 0.99  # the operators' defaults
#: Link matrices of all steps, and what else of their size is kept for the backward pass, may take so much.
LINK_BYTES, LINK_COPIES = 2**31, 8


def _cell(x, h, c, reads, weight_ih, weight_hh, bias):
    gates = F.linear(x, weight_ih, bias) + F.linear(torch.cat([h, reads.flatten(1)], 1), weight_hh)
    gate_in, gate_forget, cell, gate_out = gates.chunk(4, 1)
    c = torch.sigmoid(gate_forget) * c + torch.sigmoid(gate_in) * torch.tanh(cell)
    return torch.sigmoid(gate_out) * torch.tanh(c), c


def _cosine(key, memory):
    """Of one key [B, W] with all slots."""
    dot = (key[:, None] * memory).sum(2)
    return dot / torch.sqrt((key * key).sum(1, keepdim=True) * (memory * memory).sum(2) + EPS)


def heads_apart(reads, memory, usage, read_weights, head):
    """A head at a time, each with its own sorted usage, one-hot choice, cosine and outer product (as in snowkylin/ntm)."""
    heads, width, slots = reads.shape[1], reads.shape[2], memory.shape[1]
    order = torch.argsort(usage, dim=1, stable=True)
    memory = memory * (1 - F.one_hot(order[:, 0], slots))[..., None]
    keys, written = [], []
    for i in range(heads):
        keys.append(torch.tanh(head[:, i * width : (i + 1) * width]))
        sigma = torch.sigmoid(head[:, heads * width + i, None])
        written.append(sigma * read_weights[:, i] + (1 - sigma) * F.one_hot(order[:, i], slots))
    for key, weights in zip(keys, written, strict=True):
        memory = memory + torch.matmul(weights[..., None], key[:, None])
    found = [torch.softmax(_cosine(key, memory), 1) for key in keys]
    reads = torch.stack([torch.matmul(weights[:, None], memory)[:, 0] for weights in found], 1)
    usage = DECAY * usage + sum(found).detach() + sum(written).detach()
    return reads, memory, usage, torch.stack(found, 1)


def rank_one_updates(reads, memory, usage, read_weights, head):
    """Heads together, the choice set into a matrix, a broadcast product written for each head (as in tristandeleu/ntm-one-shot)."""
    heads, width = reads.shape[1:]
    key = torch.tanh(head[:, : heads * width]).unflatten(1, (heads, width))
    sigma = torch.sigmoid(head[:, heads * width :])[..., None]
    least = torch.argsort(usage, dim=1, stable=True)[:, :heads]
    chosen = torch.zeros_like(read_weights).scatter(2, least[..., None], 1.0)
    written = sigma * read_weights + (1 - sigma) * chosen
    memory = memory * (1 - chosen[:, 0, :, None])
    for i in range(heads):
        memory = memory + written[:, i, :, None] * key[:, i, None, :]
    scale = torch.sqrt((key * key).sum(2)[..., None] * (memory * memory).sum(2)[:, None] + EPS)
    found = torch.softmax(torch.bmm(key, memory.transpose(1, 2)) / scale, 2)
    usage = DECAY * usage + found.sum(1).detach() + written.sum(1).detach()
    return torch.bmm(found, memory), memory, usage, found


def _over_time(memory_step):
    def run(x, h, c, reads, memory, usage, read_weights, weight_ih, weight_hh, bias, weight_head, bias_head):
        outputs = []
        for step in x:
            h, c = _cell(step, h, c, reads, weight_ih, weight_hh, bias)
            head = F.linear(h, weight_head, bias_head)
            reads, memory, usage, read_weights = memory_step(reads, memory, usage, read_weights, head)
            outputs.append(torch.cat([h, reads.flatten(1)], 1))
        return torch.stack(outputs), h, c, reads, memory, usage, read_weights

    return run


#: The same work, by stem and name.
ALTERNATIVES = {
    "mann_sequence": {"heads_apart": _over_time(heads_apart), "rank_one_updates": _over_time(rank_one_updates)},
}


INSTALLED = importlib.util.find_spec("dnc") is not None


@functools.cache
def why_no_sam() -> str | None:
    """Why the package's sparse memory does not run, found by trying; None where it does."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it says which index it falls back to
            made = module("SAM", Shape(2, 1, 3, 4, 20, 5, 1), torch.device("cpu"))
            made(torch.zeros(2, 1, 3), (None, None, None), reset_experience=True)
    except Exception as error:  # its index may be missing, or not the one it knows
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def notices() -> list[str]:
    """Which peers are left out here, and why."""
    if not INSTALLED:
        return ["Left out: DNC and SAM (pip install -e .[peers] for the package dnc)"]
    why = why_no_sam()
    return [] if why is None else [f"Left out: SAM of the package dnc ({why})"]


def others(s: Shape, x: torch.Tensor) -> dict:
    """Functions that make the two passes of DNC and SAM, where they run; of DNC where its link matrices fit."""
    found = {}
    if INSTALLED and LINK_COPIES * 4 * s.T * s.B * s.N * s.N <= LINK_BYTES:
        found["dnc"] = lambda: passes("DNC", s, x)
    if INSTALLED and why_no_sam() is None:
        found["sam"] = lambda: passes("SAM", s, x)
    return found


def module(kind: str, s: Shape, device: torch.device) -> torch.nn.Module:
    """Of the package dnc, at the same sizes: one LSTM layer, N cells of W, R read heads and one write head."""
    import dnc

    sizes = {"nr_cells": s.N, "cell_size": s.W, "read_heads": s.R, "num_layers": 1, "num_hidden_layers": 1}
    place = -1 if device.type == "cpu" else device.index or 0
    return getattr(dnc, kind)(s.I, s.H, rnn_type="lstm", batch_first=False, gpu_id=place, **sizes).to(device)


def passes(kind: str, s: Shape, x: torch.Tensor):
    made = module(kind, s, x.device)
    weight = torch.randn(s.T, s.B, s.I, device=x.device)

    def run():
        return made(x, (None, None, None), reset_experience=True)[0]

    def forward():
        with torch.no_grad():
            run()

    def train():
        made.zero_grad(set_to_none=True)
        (run() * weight).sum().backward()

    return forward, train
