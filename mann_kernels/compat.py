"""A MANN under the call conventions of what it takes the place of, and weights of the most used public model.

`LSTM` is called as nn.LSTM, `DNC` as the class of that name in the `dnc` package; `load_tristandeleu` fills a MANN from arrays.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from mann_kernels.modules import MANN, MANNState
from mann_kernels.ops._check import at_least_one, number

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mann_kernels.modules.mann import Behaviour, MemoryOptions

#: What a `DNC` carries from call to call: controller_hidden, memory and read_vectors.
Triple = tuple[Any, Any, torch.Tensor | None]

__all__ = ["DNC", "LSTM", "load_tristandeleu"]


def _only(**arguments) -> None:
    """Arguments of the other class that have one value here: name=(got, the one value)."""
    for name, (got, want) in arguments.items():
        if got != want:
            raise ValueError(f"{name}: got {got!r}, want {want!r}: a MANN has nothing else")


class LSTM(nn.Module):
    """A MANN in the place of an nn.LSTM: the same arguments, shapes and states (Santoro et al. 2016, Hochreiter et al. 1997).

    The arguments input_size, hidden_size, batch_first, proj_size, device and dtype are nn.LSTM's. Of num_layers, bias, dropout
    and bidirectional only nn.LSTM's defaults can be had.

    Args:
        options: those of MANN (num_slots, slot_size, num_heads, write, ...).

    Shapes:
        x [T, B, I] (or [B, T, I], [T, I], a PackedSequence) -> output [T, B, hidden_size], or proj_size, a linear map of the
        controller's h and the reads, and (h_n, c_n). h_n [1, B, hidden_size or proj_size] is the last output; c_n
        [1, B, cell_size] is all that goes on to the next call, memory included, as one tensor, so that code which detaches,
        moves or reorders the two of them needs no change. It has the attributes of an nn.LSTM, `flatten_parameters` too, which
        does nothing. hx may also be that of an nn.LSTM, both [1, B, hidden_size]: the
        controller begins there, with a fresh memory.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it wants.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
        **options: "Unpack[MemoryOptions]",
    ):  # fmt: skip
        super().__init__()
        _only(
            num_layers=(num_layers, 1), bias=(bias, True), dropout=(dropout, 0.0), bidirectional=(bidirectional, False)
        )
        _only(controller=(options.get("controller", "lstm"), "lstm"))
        at_least_one(input_size=input_size, hidden_size=hidden_size)
        if not isinstance(proj_size, int) or isinstance(proj_size, bool):
            raise TypeError(f"proj_size: got {type(proj_size).__name__}, want an int")
        if not 0 <= proj_size < hidden_size:
            raise ValueError(f"proj_size: got {proj_size}, want 0 (none) to {hidden_size - 1}, less than hidden_size")
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.mann = MANN(input_size, hidden_size, batch_first=batch_first, **kind, **options)
        self.mode, self.input_size, self.hidden_size, self.proj_size = "LSTM", input_size, hidden_size, proj_size
        self.num_layers, self.bias, self.batch_first = num_layers, bias, batch_first
        self.dropout, self.bidirectional = float(dropout), bidirectional
        self.output_size = proj_size or hidden_size
        reads = self.mann.num_heads * self.mann.slot_size
        self.project = nn.Linear(hidden_size + reads, self.output_size, **kind)

    def flatten_parameters(self) -> None:
        """Nothing: the weights are where they should be. Called by code that is written for nn.LSTM."""

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The parameters of the one layer, as nn.LSTM groups them; their names and shapes are MANN's."""
        return [list(self.parameters())]

    def reset_parameters(self) -> None:
        """As when it was made."""
        self.mann.reset_parameters()
        self.project.reset_parameters()

    @property
    def cell_size(self) -> int:
        """Numbers of an example's state."""
        return sum(torch.Size(shape).numel() for shape in self.mann._state_shapes(1))

    def forward(
        self, x: torch.Tensor | PackedSequence, hx: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor | PackedSequence, tuple[torch.Tensor, torch.Tensor]]:
        alone = isinstance(x, torch.Tensor) and x.dim() == 2
        output, state = self.mann(x, None if hx is None else self._unpacked(hx, alone))
        if isinstance(output, PackedSequence):
            output = PackedSequence(self.project(output.data), *output[1:])
        else:
            output = self.project(output)
        if alone:
            state = state.map(lambda field: field.unsqueeze(0))
        h_n = self.project(torch.cat([state.h, state.reads.flatten(1)], 1)).unsqueeze(0)
        c_n = torch.cat([field.flatten(1) for field in state], 1).unsqueeze(0)
        return output, (h_n.squeeze(1), c_n.squeeze(1)) if alone else (h_n, c_n)

    def _unpacked(self, hx, alone: bool) -> MANNState:
        if not isinstance(hx, tuple | list) or len(hx) != 2 or not all(isinstance(part, torch.Tensor) for part in hx):
            raise TypeError(f"hx: got {type(hx).__name__}, want a pair of tensors, (h_n, c_n)")
        h, c = (part.unsqueeze(1) for part in hx) if alone else hx
        sizes = {"h": (h, (self.output_size, self.hidden_size)), "c": (c, (self.cell_size, self.hidden_size))}
        for name, (part, widths) in sizes.items():
            if part.dim() != 3 or part.shape[0] != 1 or part.shape[2] not in widths:
                raise ValueError(
                    f"hx: got {name} of shape {list(part.shape)}, want [1, B, {' or '.join(map(str, widths))}]"
                )
        if c.shape[2] == self.hidden_size:
            state = self.mann.initial_state(c.shape[1])._replace(h=h[0], c=c[0])
        else:
            shapes = self.mann._state_shapes(c.shape[1])
            parts = c[0].split([torch.Size(shape[1:]).numel() for shape in shapes], 1)
            state = MANNState(*(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)))
        return state.map(lambda field: field.squeeze(0)) if alone else state


class DNC(nn.Module):
    """Not a DNC, but a MANN under the constructor, call, state and attributes of `dnc.DNC` (the PyPI package, 1.1.0 and 2.0).

    LRUA stands in the place of the DNC's allocation and temporal links (Santoro et al. 2016), and the reads do reach the
    controller.

    The arguments input_size, hidden_size and batch_first are that class's; output has input_size features. Of rnn_type,
    num_layers, bias, dropout, bidirectional, nonlinearity, independent_linears and debug only the defaults can be had.
    share_memory and clip change nothing: there is one layer, and nothing grows without bound.

    Args:
        num_hidden_layers: 1 here, where that class has 2.
        nr_cells: slots of the memory.
        read_heads: heads.
        cell_size: the width of a slot.
        gpu_id: -1 is the CPU.
        device: in the place of gpu_id.
        options: those of MANN (write, key_strength, ...).

    Shapes:
        forward(x [B, T, input_size], (controller_hidden, memory, read_vectors), reset_experience, pass_through_memory)
        -> output [B, T, input_size] and the same triple: controller_hidden, a list of one pair (h, c), each
        [1, B, hidden_size]; memory, a dict of `memory` [B, N, W], `read_weights` [B, R, N] and `usage_vector` [B, N];
        read_vectors [B, R*W]. Each of the three may be None. reset_experience empties the memory and keeps the controller.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it wants.
    """

    def __init__(
        self, input_size: int, hidden_size: int, rnn_type: str = "lstm", num_layers: int = 1, num_hidden_layers: int = 1,
        bias: bool = True, batch_first: bool = True, dropout: float = 0, bidirectional: bool = False, nr_cells: int = 5,
        read_heads: int = 2, cell_size: int = 10, nonlinearity: str = "tanh", gpu_id: int = -1,
        independent_linears: bool = False, share_memory: bool = True, debug: bool = False, clip: float = 20,
        device: torch.device | str | None = None, **options: "Unpack[Behaviour]",
    ):  # fmt: skip
        super().__init__()
        _only(rnn_type=(rnn_type, "lstm"), num_layers=(num_layers, 1), num_hidden_layers=(num_hidden_layers, 1))
        _only(bias=(bias, True), dropout=(dropout, 0), bidirectional=(bidirectional, False), debug=(debug, False))
        _only(nonlinearity=(nonlinearity, "tanh"), independent_linears=(independent_linears, False))
        at_least_one(input_size=input_size, hidden_size=hidden_size)
        at_least_one(nr_cells=nr_cells, read_heads=read_heads, cell_size=cell_size)
        number("clip", clip, 0)
        device = f"cuda:{gpu_id}" if device is None and gpu_id >= 0 else device
        given = {
            "input_size": input_size, "hidden_size": hidden_size, "rnn_type": rnn_type, "num_layers": num_layers,
            "num_hidden_layers": num_hidden_layers, "bias": bias, "batch_first": batch_first, "dropout": dropout,
            "bidirectional": bidirectional, "nr_cells": nr_cells, "read_heads": read_heads, "cell_size": cell_size,
            "nonlinearity": nonlinearity, "gpu_id": gpu_id, "independent_linears": independent_linears,
            "share_memory": share_memory, "debug": debug, "clip": clip, "w": cell_size, "r": read_heads,
        }  # fmt: skip
        for name, value in given.items():
            setattr(self, name, value)
        self.read_vectors_size, self.output_size = read_heads * cell_size, hidden_size
        self.nn_input_size = input_size + self.read_vectors_size
        self.nn_output_size = hidden_size + self.read_vectors_size
        self.mann = MANN(
            input_size, hidden_size, nr_cells, cell_size, read_heads, batch_first=batch_first, device=device, **options
        )
        self.output = nn.Linear(hidden_size + read_heads * cell_size, input_size, device=device)

    def forward(
        self, input: torch.Tensor, hx: "Triple | None" = (None, None, None),
        reset_experience: bool = False, pass_through_memory: bool = True,
    ) -> "tuple[torch.Tensor, Triple]":  # fmt: skip
        _only(pass_through_memory=(pass_through_memory, True))
        if hx is not None and (not isinstance(hx, tuple | list) or len(hx) != 3):
            raise TypeError(f"hx: got {type(hx).__name__}, want (controller_hidden, memory, read_vectors) or None")
        if not isinstance(input, torch.Tensor) or input.dim() != 3:
            got = f"shape {list(input.shape)}" if isinstance(input, torch.Tensor) else type(input).__name__
            raise ValueError(f"input: got {got}, want [B, T, I], or [T, B, I] without batch_first")
        batch = input.shape[0 if self.mann.batch_first else 1]
        state = self._state(hx or (None, None, None), batch, reset_experience)
        output, state = self.mann(input, state)
        memory = {"memory": state.memory, "read_weights": state.read_weights, "usage_vector": state.usage}
        hidden = [(state.h.unsqueeze(0), state.c.unsqueeze(0))]
        return self.output(output), (hidden, memory, state.reads.flatten(1))

    def _state(self, hx, batch: int, reset_experience: bool) -> MANNState:
        hidden, memory, reads = hx
        state = self.mann.initial_state(batch)
        if hidden is not None and hidden[0] is not None:
            state = state._replace(h=hidden[0][0].squeeze(0), c=hidden[0][1].squeeze(0))
        if memory is not None and not reset_experience:
            memory = memory[0] if isinstance(memory, list) else memory  # a list of one in version 2.0
            missing = {"memory", "read_weights", "usage_vector"} - set(memory)
            if missing:
                raise ValueError(f"hx: got a memory without {', '.join(sorted(missing))}, want what a call returned")
            names = {"memory": "memory", "read_weights": "read_weights", "usage": "usage_vector"}
            state = state._replace(**{name: memory[theirs] for name, theirs in names.items()})
        if reads is not None and not reset_experience:
            state = state._replace(reads=reads.unflatten(1, state.reads.shape[1:]))
        return state


#: The gates of an LSTM as that code has them (forget, input, output, cell), in nn.LSTM's order.
_GATES = (1, 0, 3, 2)


def load_tristandeleu(mann: MANN, arrays: Mapping, classify: nn.Linear | None = None) -> None:
    """Put the weights of the Theano model tristandeleu/ntm-one-shot into a MANN made by `MANN.tristandeleu`.

    Args:
        mann: of the sizes of the arrays; it is changed in place.
        arrays: by the names of that code, anything that torch.as_tensor takes: W_xh [I, 4H], W_rh [R*W, 4H], W_hh [H, 4H],
            b_h [4H]; W_key, W_add [R, H, W], b_key, b_add [R, W]; W_sigma [R, H, 1], b_sigma [R, 1]; and, if `classify` is
            given, W_o [H + R*W, classes], b_o [classes].
        classify: the layer after it, from (h, reads) to classes.

    Raises:
        ValueError: an array that is missing, not known, or of another shape; a MANN that does not add.
    """
    if mann.controller != "lstm" or mann.head_options["write"] != "add" or mann.head_options["key_strength"]:
        raise ValueError("mann: got another model, want one made by MANN.tristandeleu(input_size, ...)")
    sizes = {"I": mann.input_size, "H": mann.hidden_size, "R": mann.num_heads, "W": mann.slot_size}
    I, H, R, W = sizes.values()  # noqa: E741
    shapes = {"W_xh": (I, 4 * H), "W_rh": (R * W, 4 * H), "W_hh": (H, 4 * H), "b_h": (4 * H,)}
    shapes |= {"W_key": (R, H, W), "b_key": (R, W), "W_add": (R, H, W), "b_add": (R, W)}
    shapes |= {"W_sigma": (R, H, 1), "b_sigma": (R, 1)}
    if classify is not None:
        shapes |= {"W_o": (H + R * W, classify.out_features), "b_o": (classify.out_features,)}
    missing, unknown = sorted(set(shapes) - set(arrays)), sorted(set(arrays) - set(shapes) - {"W_o", "b_o"})
    if missing or unknown:
        raise ValueError(
            f"arrays: got {sorted(arrays)}, want {sorted(shapes)} (missing {missing}, not known {unknown})"
        )
    a = {name: torch.as_tensor(arrays[name]) for name in shapes}
    for name, shape in shapes.items():
        if tuple(a[name].shape) != shape:
            raise ValueError(f"arrays[{name!r}]: got shape {list(a[name].shape)}, want {list(shape)} with {sizes}")

    def gates(array):  # [..., 4H] -> [4H, ...], in this package's order
        return array.unflatten(-1, (4, H))[..., _GATES, :].flatten(-2).t()

    def heads(name):  # [R, H, W] -> [R*W, H]
        return a[f"W_{name}"].transpose(1, 2).flatten(0, 1), a[f"b_{name}"].flatten()

    rows, biases = zip(*(heads(name) for name in ("key", "sigma", "add")), strict=True)
    with torch.no_grad():
        mann.weight_ih.copy_(gates(a["W_xh"]))
        mann.get_parameter("weight_hh").copy_(gates(torch.cat([a["W_hh"], a["W_rh"]])))
        mann.bias.copy_(gates(a["b_h"][None]).squeeze(1))
        mann.weight_head.copy_(torch.cat(rows))
        mann.bias_head.copy_(torch.cat(biases))
        if classify is not None:
            classify.weight.copy_(a["W_o"].t())
            classify.bias.copy_(a["b_o"])
