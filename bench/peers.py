"""Contestants that one would take instead of writing the loop oneself: two well-known ways to write this model, and the
`dnc` package.

The two ways are written here from the mathematics, in the structure of public code: what is one matrix product, what a loop over
heads. They return what the reference returns: that code has keys of their own for writing, and the first of the two compares with
the memory before the write. `dnc` computes another model, with a matrix of temporal links, at the same sizes.
"""

import contextlib
import functools
import importlib.util
import io

import torch
import torch.nn.functional as F

from bench.mann import DECAY, EPS, Shape

#: Link matrices of all steps, and what else of their size is kept for the backward pass, may take so much.
LINK_BYTES, LINK_COPIES = 2**31, 8


def _lstm(gates, c):
    gate_in, gate_forget, cell, gate_out = gates.chunk(4, 1)
    c = torch.sigmoid(gate_forget) * c + torch.sigmoid(gate_in) * torch.tanh(cell)
    return torch.sigmoid(gate_out) * torch.tanh(c), c


def _one_product(weight_ih, weight_hh, bias):
    """Gates as one product of everything that goes into the cell."""
    weight = torch.cat([weight_ih, weight_hh], 1)
    return lambda x, h, reads: F.linear(torch.cat([x, h, reads], 1), weight, bias)


def _three_products(weight_ih, weight_hh, bias):
    """Gates as the sum of a product each of the input, the reads and the hidden state."""
    hidden = weight_hh.shape[0] // 4
    weight_h, weight_reads = weight_hh[:, :hidden], weight_hh[:, hidden:]
    return lambda x, h, reads: F.linear(x, weight_ih, bias) + F.linear(reads, weight_reads) + F.linear(h, weight_h)


def _cosine(key, memory):
    """Take the cosine of one key [B, W] with all slots."""
    dot = torch.matmul(memory, key[..., None])[..., 0]
    return dot / torch.sqrt((key * key).sum(1, keepdim=True) * (memory * memory).sum(2) + EPS)


def heads_apart(h, reads, memory, usage, read_weights, weight_head, bias_head):
    """One product for what the heads need and one sort; then a head at a time: its cosine, exponentials over their sum, its outer
    product onto the memory, its weighted sum of the slots (as ntm/mann_cell.py of snowkylin/ntm)."""
    heads, width, slots = reads.shape[1], reads.shape[2], memory.shape[1]
    head = F.linear(h, weight_head, bias_head)
    order = torch.argsort(usage, dim=1, stable=True)
    chosen = F.one_hot(order[:, :heads], slots)
    memory = memory * (1 - F.one_hot(order[:, 0], slots))[..., None]
    keys, written = [], []
    for i in range(heads):
        keys.append(torch.tanh(head[:, i * width : (i + 1) * width]))
        sigma = torch.sigmoid(head[:, heads * width + i, None])
        written.append(sigma * read_weights[:, i] + (1 - sigma) * chosen[:, i])
    for key, weights in zip(keys, written, strict=True):
        memory = memory + torch.matmul(weights[..., None], key[:, None])
    found = []
    for key in keys:
        exponentials = torch.exp(_cosine(key, memory))
        found.append(exponentials / exponentials.sum(1, keepdim=True))
    reads = torch.stack([(weights[..., None] * memory).sum(1) for weights in found], 1)
    read_weights = torch.stack(found, 1)
    usage = DECAY * usage + read_weights.sum(1).detach() + torch.stack(written).sum(0).detach()
    return reads, memory, usage, read_weights


def heads_together(h, reads, memory, usage, read_weights, weight_head, bias_head):
    """A product each for keys and gates; then all heads at once: rows set to zero and weights added by index, one batched product
    each for the write, the cosines and the reads (as mann/model.py of tristandeleu/ntm-one-shot)."""
    batch, heads, width = reads.shape
    keys = heads * width
    key = torch.tanh(F.linear(h, weight_head[:keys], bias_head[:keys])).view(batch, heads, width)
    sigma = torch.sigmoid(F.linear(h, weight_head[keys:], bias_head[keys:]))[..., None]
    least = torch.argsort(usage, dim=1, stable=True)[:, :heads]
    written = (sigma * read_weights).scatter_add(2, least[..., None], 1 - sigma)
    memory = memory.scatter(1, least[:, :1, None].expand(batch, 1, width), 0.0)
    memory = memory + torch.bmm(written.transpose(1, 2), key)
    scale = torch.sqrt((key * key).sum(2)[..., None] * (memory * memory).sum(2)[:, None] + EPS)
    found = torch.softmax(torch.bmm(key, memory.transpose(1, 2)) / scale, 2)
    usage = DECAY * usage + found.sum(1).detach() + written.sum(1).detach()
    return torch.bmm(found, memory), memory, usage, found


def _over_time(products, memory_step):
    def run(x, h, c, reads, memory, usage, read_weights, weight_ih, weight_hh, bias, weight_head, bias_head):
        gates = products(weight_ih, weight_hh, bias)
        outputs = []
        for step in x:
            h, c = _lstm(gates(step, h, reads.flatten(1)), c)
            reads, memory, usage, read_weights = memory_step(
                h, reads, memory, usage, read_weights, weight_head, bias_head
            )
            outputs.append(torch.cat([h, reads.flatten(1)], 1))
        return torch.stack(outputs), h, c, reads, memory, usage, read_weights

    return run


#: The same work, by name.
ALTERNATIVES = {
    "heads_apart": _over_time(_one_product, heads_apart),
    "heads_together": _over_time(_three_products, heads_together),
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
    """Make a module of the package dnc at the same sizes: one LSTM layer, N cells of W, R read heads and one write
    head."""
    import dnc

    sizes = {"nr_cells": s.N, "cell_size": s.W, "read_heads": s.R, "num_layers": 1, "num_hidden_layers": 1}
    place = -1 if device.type == "cpu" else device.index or 0
    return getattr(dnc, kind)(s.I, s.H, rnn_type="lstm", batch_first=False, gpu_id=place, **sizes).to(device)


def passes(kind: str, s: Shape, x: torch.Tensor):
    made = module(kind, s, x.device)
    gradient = torch.randn(s.T, s.B, s.I, device=x.device)

    def run():
        return made(x, (None, None, None), reset_experience=True)[0]

    def forward():
        with torch.no_grad():
            run()

    def train():
        made.zero_grad(set_to_none=True)
        run().backward(gradient)

    return forward, train
