"""MetaNet's d: one fast weight from the gradients of T support examples (Munkhdalai and Yu 2017, eq. 4 and appendix A)."""

import torch
import torch.nn.functional as F

from mann_kernels.reference.generate_fast_weights import preprocess_gradients


def summarize_gradients(grads, weight_ih, weight_hh, bias, weight_out, bias_out, *, p=7.0, sides=None):
    """grads [T,...], weight_ih [4D,2], weight_hh [4D,D], bias [4D] in nn.LSTM's order (input, forget, cell, output),
    weight_out [1,D], bias_out [1] -> fast weights [...].

    Every coordinate runs its own LSTM over the T gradients, from a zero state; the last hidden state is read out.
    sides: bool [2, T, ...], of the features of an earlier run.
    """
    h = c = None
    for features in preprocess_gradients(grads, p, sides):
        gates = F.linear(features, weight_ih, bias)
        if h is not None:  # h and c are zero before the first step
            gates = gates + F.linear(h, weight_hh)
        gate_in, gate_forget, cell, gate_out = gates.chunk(4, dim=-1)
        new = torch.sigmoid(gate_in) * torch.tanh(cell)
        c = new if c is None else torch.sigmoid(gate_forget) * c + new
        h = torch.sigmoid(gate_out) * torch.tanh(c)
    return F.linear(h, weight_out, bias_out).squeeze(-1)
