"""A whole episode: LSTM controller, heads and memory (section 3 and eq. 9 to 16)."""

import torch
import torch.nn.functional as F

from mann_kernels.reference.lrua_sequence import of_step, where_active
from mann_kernels.reference.lrua_step import lrua_step


def split_head(head, heads, width, *, key_strength, write):
    """The columns of the head projection [..., P]: key [..., R,W], gate [..., R], raw beta [..., R]?, add [..., R,W]?."""
    sizes = [heads * width, heads, heads * key_strength, heads * width * (write == "add")]
    key, gate, beta, add = head.split(sizes, dim=-1)
    shape = (*head.shape[:-1], heads, width)
    return key.reshape(shape), gate, beta if key_strength else None, add.reshape(shape) if write == "add" else None


def activate_head(key, gate, beta, add, *, squash):
    """tanh on what is matched and written (squash="tanh"), softplus on the key strength; the gate keeps its logit."""
    if squash == "tanh":
        key, add = torch.tanh(key), None if add is None else torch.tanh(add)
    return key, gate, None if beta is None else F.softplus(beta), add


def mann_sequence(
    x,
    h,
    c,
    reads,
    memory,
    usage,
    read_weights,
    weight_ih,
    weight_hh,
    bias,
    weight_head,
    bias_head,
    lengths=None,
    *,
    write="key",
    key_strength=False,
    squash="tanh",
    one_step=lrua_step,
    least_used=None,
    **options,
):
    """x [T,B,I]; h, c [B,H]; reads [B,R,W]; memory [B,N,W]; usage [B,N]; read_weights [B,R,N];
    weight_ih [4H,I], weight_hh [4H,H+R*W], bias [4H] in nn.LSTM's order (input, forget, cell, output);
    weight_head [P,H], bias_head [P] with P = R*W + R (+ R with key_strength) (+ R*W with write="add")
    -> output [T,B,H+R*W], h, c, reads, memory, usage, read_weights. one_step: what is called as lrua_step.
    least_used: int [T,B,R], the slots that an earlier run chose at each step.
    """
    heads, width = reads.shape[-2:]
    output = []
    for t in range(x.shape[0]):
        # eq. 9 to 16; the previous reads are a second recurrent input (section 3.1)
        recurrent = torch.cat([h, reads.flatten(-2)], dim=-1)
        gates = F.linear(x[t], weight_ih, bias) + F.linear(recurrent, weight_hh)
        gate_in, gate_forget, cell, gate_out = gates.chunk(4, dim=-1)
        new_c = torch.sigmoid(gate_forget) * c + torch.sigmoid(gate_in) * torch.tanh(cell)
        new_h = torch.sigmoid(gate_out) * torch.tanh(new_c)

        head = F.linear(new_h, weight_head, bias_head)
        head = split_head(head, heads, width, key_strength=key_strength, write=write)
        head = activate_head(*head, squash=squash)
        step = one_step(memory, usage, read_weights, *head, **options, **of_step(least_used, t))

        row = torch.cat([new_h, step[0].flatten(-2)], dim=-1)
        output.append(where_active(lengths, t, row, torch.zeros_like(row)))
        h, c = where_active(lengths, t, new_h, h), where_active(lengths, t, new_c, c)
        reads = where_active(lengths, t, step[0], reads)
        memory = where_active(lengths, t, step[1], memory)
        usage = where_active(lengths, t, step[2], usage)
        read_weights = where_active(lengths, t, step[3], read_weights)
    output = torch.stack(output) if output else x.new_zeros(0, x.shape[1], h.shape[-1] + heads * width)
    return output, h, c, reads, memory, usage, read_weights
