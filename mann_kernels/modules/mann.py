"""MANN: a controller, its heads and an external memory, in the manner of nn.LSTM."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from mann_kernels.modules._init import ONE_BEFORE_SOFTPLUS, check_sizes
from mann_kernels.modules.state import MANNState, check_state
from mann_kernels.ops import _check, lrua_sequence, mann_sequence
from mann_kernels.ops.lrua_step import check_options
from mann_kernels.ops.mann_sequence import SQUASH, WRITE
from mann_kernels.reference.mann_sequence import activate_head, split_head

CONTROLLERS = ("lstm", "feedforward")

_PAPER = {
    "hidden_size": 200,
    "num_slots": 128,
    "slot_size": 40,
    "num_heads": 4,
    "controller": "lstm",
    "write": "key",
    "key_strength": False,
    "squash": "tanh",
    "lru": "per_head",
    "erase": "least",
    "decay": 0.99,
    "eps": 1e-6,
    "memory_init": 1e-6,
}
_TRISTANDELEU = {**_PAPER, "write": "add", "decay": 0.95}


class _MANNBase(nn.Module):
    """Parameters, options and state of MANN and MANNCell."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int = 200,
        num_slots: int = 128,
        slot_size: int = 40,
        num_heads: int = 4,
        controller: str = "lstm",
        *,
        write: str = "key",
        key_strength: bool = False,
        squash: str = "tanh",
        lru: str = "per_head",
        erase: str = "least",
        decay: float = 0.99,
        eps: float = 1e-6,
        memory_init: float = 1e-6,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_sizes(
            input_size=input_size,
            hidden_size=hidden_size,
            num_slots=num_slots,
            slot_size=slot_size,
            num_heads=num_heads,
        )
        _check.heads_fit({"R": num_heads, "N": num_slots})
        _check.choice("controller", controller, *CONTROLLERS)
        _check.choice("write", write, *WRITE)
        _check.choice("squash", squash, *SQUASH)
        check_options(lru, erase)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: got {decay}, want a number from 0 to 1")
        if not eps >= 0:
            raise ValueError(f"eps: got {eps}, want a number of at least 0")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_slots = num_slots
        self.slot_size = slot_size
        self.num_heads = num_heads
        self.controller = controller
        self.write = write
        self.key_strength = bool(key_strength)
        self.squash = squash
        self.lru = lru
        self.erase = erase
        self.decay = decay
        self.eps = eps
        self.memory_init = memory_init

        words = num_heads * slot_size
        rows = 4 * hidden_size if controller == "lstm" else hidden_size
        head = words * (1 + (write == "add")) + num_heads * (1 + self.key_strength)
        kind = {"device": device, "dtype": dtype}
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size, **kind))
        self.register_parameter("weight_hh", None)
        if controller == "lstm":
            self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size + words, **kind))
        self.bias = nn.Parameter(torch.empty(rows, **kind))
        self.weight_head = nn.Parameter(torch.empty(head, hidden_size, **kind))
        self.bias_head = nn.Parameter(torch.empty(head, **kind))
        self.reset_parameters()

    @classmethod
    def santoro(cls, input_size: int, **overrides):
        """The paper (Santoro et al. 2016): 200 hidden units, 128 slots of 40, 4 heads, usage decay 0.99; each head writes
        its key to a least-used slot of its own, and only the least-used slot is erased. `overrides` are any arguments."""
        return cls(input_size, **{**_PAPER, **overrides})

    @classmethod
    def tristandeleu(cls, input_size: int, **overrides):
        """The most used public code (tristandeleu/ntm-one-shot, in Theano): as the paper, but what is written is a vector of
        its own, and the usage decay is 0.95. `overrides` are any arguments."""
        return cls(input_size, **{**_TRISTANDELEU, **overrides})

    @property
    def output_size(self) -> int:
        """H + R*W, the width of the output."""
        return self.hidden_size + self.num_heads * self.slot_size

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every parameter from U(-1/sqrt(H), 1/sqrt(H)), as nn.LSTM does; key strengths start at exactly 1."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        if self.key_strength:
            self._split(self.weight_head.t())[2].zero_()
            self._split(self.bias_head)[2].fill_(ONE_BEFORE_SOFTPLUS)

    def initial_state(self, batch_size: int | None = None) -> MANNState:
        """The state at the start of an episode, unbatched for None.

        Memory is memory_init everywhere, all usage and all read weights are on slot 0, the rest is zero: the public codes'
        convention, as the paper gives none.
        """
        batch = () if batch_size is None else (batch_size,)
        like, heads, slots, width = self.weight_ih, self.num_heads, self.num_slots, self.slot_size
        usage, read_weights = like.new_zeros(*batch, slots), like.new_zeros(*batch, heads, slots)
        usage[..., 0] = 1
        read_weights[..., 0] = 1
        recurrent = [None, None]
        if self.controller == "lstm":
            recurrent = [like.new_zeros(*batch, self.hidden_size) for _ in range(2)]
        memory = like.new_full((*batch, slots, width), self.memory_init)
        return MANNState(memory, usage, read_weights, like.new_zeros(*batch, heads, width), *recurrent)

    def extra_repr(self) -> str:
        sizes = (
            f"{self.input_size}, {self.hidden_size}, num_slots={self.num_slots}, slot_size={self.slot_size}, "
            f"num_heads={self.num_heads}, controller={self.controller!r}"
        )
        options = [name for name in list(_PAPER)[6:] if getattr(self, name) != _PAPER[name]]
        return ", ".join([sizes, *(f"{name}={getattr(self, name)!r}" for name in options)])

    def _split(self, head):
        return split_head(head, self.num_heads, self.slot_size, key_strength=self.key_strength, write=self.write)

    def _check_input(self, x, *ranks: tuple[str, ...]) -> torch.Tensor:
        """x, of the parameters' dtype (converted under autocast), with one of the shapes."""
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x: got {type(x).__name__}, want a torch.Tensor")
        if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
            x = x.to(self.weight_ih.dtype)
        _check.same_kind(**{"the parameters": self.weight_ih, "x": x})
        if x.dim() not in [len(letters) for letters in ranks] or x.shape[-1] != self.input_size:
            want = " or ".join(f"[{', '.join(letters)}]" for letters in ranks)
            raise ValueError(f"x: got shape {list(x.shape)}, want {want} with I={self.input_size}")
        return x

    def _start(self, state: MANNState | None, batch_size: int | None) -> MANNState:
        """The checked state, or the initial one, with a batch dimension (of 1 when batch_size is None)."""
        if state is None:
            return self.initial_state(1 if batch_size is None else batch_size)
        sizes = {"N": self.num_slots, "W": self.slot_size, "R": self.num_heads, "H": self.hidden_size}
        if batch_size is not None:
            sizes["B"] = batch_size
        state = check_state(state, sizes, self.weight_ih, self.controller == "lstm")
        return state.map(lambda tensor: tensor.unsqueeze(0)) if batch_size is None else state

    def _run(self, x, state, lengths) -> tuple[torch.Tensor, MANNState]:
        """x [T, B, I], a checked state, int64 lengths [B] or None -> output [T, B, H + R*W], state."""
        run = self._run_lstm if self.controller == "lstm" else self._run_feedforward
        padding = None
        if lengths is not None:
            # A NaN in the padding would reach the gradient of weight_ih as 0 * NaN.
            padding = torch.arange(x.shape[0], device=x.device)[:, None] >= lengths
            x = x.masked_fill(padding[..., None], 0)
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return run(x, state, lengths, padding)
        return run(x, state, lengths, padding)

    def _run_lstm(self, x, state, lengths, padding):
        memory, usage, read_weights, reads, h, c = state
        output, h, c, reads, memory, usage, read_weights = mann_sequence(
            *(x, h, c, reads, memory, usage, read_weights),
            *(self.weight_ih, self.weight_hh, self.bias, self.weight_head, self.bias_head, lengths),
            **{"write": self.write, "key_strength": self.key_strength, "squash": self.squash},
            **self._memory_options(),
        )
        return output, MANNState(memory, usage, read_weights, reads, h, c)

    def _run_feedforward(self, x, state, lengths, padding):
        h = torch.tanh(F.linear(x, self.weight_ih, self.bias))
        head = self._split(F.linear(h, self.weight_head, self.bias_head))
        key, gate, beta, add = activate_head(*head, squash=self.squash)
        reads, memory, usage, read_weights = lrua_sequence(
            *(state.memory, state.usage, state.read_weights),
            *(key, gate, beta, add, lengths),
            **self._memory_options(),
        )
        if padding is not None:
            h = h.masked_fill(padding[..., None], 0)
        last = _last_real(reads, lengths, state.reads)
        return torch.cat([h, reads.flatten(2)], dim=2), MANNState(memory, usage, read_weights, last)

    def _memory_options(self):
        return {"lru": self.lru, "erase": self.erase, "decay": self.decay, "eps": self.eps}


def _last_real(reads, lengths, before):
    """What was read in the last real step [B, R, W]; `before` where there was none. reads [T, B, R, W]."""
    steps, batch = reads.shape[:2]
    if steps == 0:
        return before
    if lengths is None:
        return reads[-1]
    last = reads[(lengths - 1).clamp(0, steps - 1), torch.arange(batch, device=reads.device)]
    return torch.where((lengths > 0)[:, None, None], last, before)


def _check_lengths(lengths, steps: int, batch: int, device: torch.device) -> torch.Tensor:
    """lengths as an int64 tensor [B] on the device of x.

    The values are checked where they can be read at no cost: a list, or a CPU tensor outside torch.compile.
    """
    if isinstance(lengths, (list, tuple)):
        if not all(isinstance(length, int) for length in lengths):
            raise TypeError(f"lengths: got {lengths!r}, want ints")
        lengths = torch.tensor(lengths, dtype=torch.int64)
    _check.step_lengths({"B": batch}, lengths, getattr(lengths, "device", device))
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = (lengths < 0) | (lengths > steps)
        if wrong.any():
            raise ValueError(f"lengths: got {lengths[wrong][0].item()}, want from 0 to T={steps}")
    return lengths.to(device)


class MANN(_MANNBase):
    """Memory-augmented neural network (Santoro et al. 2016) over whole sequences, called like nn.LSTM.

    Args:
        input_size: I; in the paper the input is (x_t, y_{t-1}).
        hidden_size: H, of the controller.
        num_slots: N, rows of memory, at least num_heads.
        slot_size: W, width of a row.
        num_heads: R; each head reads with one key and has one write.
        controller: "lstm", whose recurrent input is the previous h and reads, or "feedforward", h = tanh(W x + b), which sees
            neither.
        batch_first: x and output are [B, T, ...]; the state never changes its layout.
        write: "key", a head writes what it looks for (the paper); "add", a vector of its own.
        key_strength: each head learns a factor on its similarities (softplus of a head output); False is 1 (the paper).
        squash: "tanh" or "identity", on keys and on what is written.
        lru: "per_head", head h writes to the h-th least-used slot; "shared", every head to all R of them.
        erase: "least", only the least-used slot is set to zero before the write; "all", all R of them.
        decay: of the usage, per step; 0.99 in the paper.
        eps: inside the root of the cosine.
        memory_init: the constant that fills the initial memory.
        device, dtype: of the parameters.

    `output, state = mann(x, state=None, lengths=None)` with

        x: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
        state: a MANNState, from an earlier call or `initial_state`; None starts an episode.
        lengths: the number of real steps of each example, an int64 tensor [B] or a list; later steps are padding, which
            changes nothing: their output is zero, whatever x has there.
        output: [T, B, H + R*W], (h, reads) of every step, in the layout of x (a PackedSequence for a PackedSequence).
        state: the MANNState after the last real step of each example.

    Parameters: weight_ih [4H, I], weight_hh [4H, H + R*W], bias [4H] in nn.LSTM's order of gates (with a feed-forward
    controller weight_ih [H, I], bias [H]), and from h to the heads weight_head [P, H], bias_head [P], whose order is given at
    mann_kernels.mann_sequence. All start from U(-1/sqrt(H), 1/sqrt(H)), but key strengths start at 1.

    Under torch.autocast the layer computes in the dtype of its parameters.

    Raises:
        TypeError, ValueError: naming the argument, for a shape, dtype, device or option that does not fit.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int = 200,
        num_slots: int = 128,
        slot_size: int = 40,
        num_heads: int = 4,
        controller: str = "lstm",
        batch_first: bool = False,
        **options,
    ):
        super().__init__(input_size, hidden_size, num_slots, slot_size, num_heads, controller, **options)
        self.batch_first = batch_first

    def extra_repr(self) -> str:
        return super().extra_repr() + (", batch_first=True" if self.batch_first else "")

    def forward(
        self,
        x: torch.Tensor | PackedSequence,
        state: MANNState | None = None,
        lengths: torch.Tensor | list[int] | None = None,
    ) -> tuple[torch.Tensor | PackedSequence, MANNState]:
        if isinstance(x, PackedSequence):
            return self._forward_packed(x, state, lengths)
        x = self._check_input(x, ("B", "T", "I") if self.batch_first else ("T", "B", "I"), ("T", "I"))
        if x.dim() == 2:
            if lengths is not None:
                raise ValueError("lengths: got a value, want None: an unbatched x is one sequence without padding")
            output, state = self._run(x.unsqueeze(1), self._start(state, None), None)
            return output.squeeze(1), state.map(lambda tensor: tensor.squeeze(0))
        if self.batch_first:
            x = x.transpose(0, 1)
        state = self._start(state, x.shape[1])
        if lengths is not None:
            lengths = _check_lengths(lengths, *x.shape[:2], x.device)
        output, state = self._run(x, state, lengths)
        return output.transpose(0, 1) if self.batch_first else output, state

    def _forward_packed(self, packed, state, lengths):
        if lengths is not None:
            raise ValueError("lengths: got a value, want None: a PackedSequence has its own")
        x, lengths = pad_packed_sequence(packed)
        x = self._check_input(x, ("T", "B", "I"))
        output, state = self._run(x, self._start(state, x.shape[1]), lengths.to(x.device))
        if packed.sorted_indices is not None:
            output = output.index_select(1, packed.sorted_indices)
            lengths = lengths[packed.sorted_indices.cpu()]
        data = pack_padded_sequence(output, lengths).data
        return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices), state


class MANNCell(_MANNBase):
    """One step of a MANN, for inference and for loops of your own.

    Takes the arguments of MANN but batch_first, and has the same parameters under the same names: the state_dict of one
    loads into the other.

    `output, state = cell(x, state=None)` with x [B, I] (or [I] unbatched), output [B, H + R*W] = (h, reads) and a MANNState.
    Raises as MANN does.
    """

    def forward(self, x: torch.Tensor, state: MANNState | None = None) -> tuple[torch.Tensor, MANNState]:
        x = self._check_input(x, ("B", "I"), ("I",))
        batched = x.dim() == 2
        state = self._start(state, x.shape[0] if batched else None)
        output, state = self._run(x.reshape(1, -1, self.input_size), state, None)
        if batched:
            return output.squeeze(0), state
        return output.reshape(-1), state.map(lambda tensor: tensor.squeeze(0))
