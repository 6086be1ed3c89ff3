"""The memory-augmented neural network of Santoro et al. 2016 as layers in the manner of nn.LSTM and nn.LSTMCell."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from mann_kernels.modules._init import flag
from mann_kernels.modules.addressing import SOFTPLUS_INVERSE_OF_1
from mann_kernels.modules.state import MANNState
from mann_kernels.ops import lrua_sequence, mann_sequence
from mann_kernels.ops._check import at_least_one, known_options, number
from mann_kernels.reference.mann_sequence import activate_head, split_head

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Behaviour(TypedDict, total=False):
    """The arguments of a MANN that change what it computes and no size, all of them optional."""

    controller: str
    write: str
    key_strength: bool
    squash: str
    lru: str
    erase: str
    decay: float
    eps: float
    memory_init: float


class MemoryOptions(Behaviour, total=False):
    """`Behaviour` and the sizes of the memory."""

    num_slots: int
    slot_size: int
    num_heads: int


class MANNOptions(MemoryOptions, total=False):
    """All arguments of a MANN but input_size, as a preset takes them."""

    hidden_size: int
    batch_first: bool
    device: torch.device | str | None
    dtype: torch.dtype | None


class _MANNBase(nn.Module):
    """Parameters, options and state that the sequence and the single step have in common."""

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        at_least_one(input_size=input_size, hidden_size=hidden_size, num_slots=num_slots)
        at_least_one(slot_size=slot_size, num_heads=num_heads)
        if num_heads > num_slots:
            raise ValueError(f"num_heads: got {num_heads}, want at most num_slots={num_slots}")
        number("decay", decay, 0, 1)
        number("eps", eps, 0)
        number("memory_init", memory_init)
        flag("key_strength", key_strength)
        known_options(controller=controller, write=write, squash=squash, lru=lru, erase=erase)
        self.input_size, self.hidden_size, self.num_slots = input_size, hidden_size, num_slots
        self.slot_size, self.num_heads, self.controller = slot_size, num_heads, controller
        self.memory_init = memory_init
        self.head_options: dict[str, Any] = {"write": write, "key_strength": key_strength, "squash": squash}
        self.memory_options: dict[str, Any] = {"lru": lru, "erase": erase, "decay": decay, "eps": eps}

        words = num_heads * slot_size
        head = words + num_heads + num_heads * key_strength + words * (write == "add")
        gates = 4 * hidden_size if controller == "lstm" else hidden_size
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight_ih = nn.Parameter(torch.empty(gates, input_size, **kind))
        weight_hh = nn.Parameter(torch.empty(gates, hidden_size + words, **kind)) if controller == "lstm" else None
        self.register_parameter("weight_hh", weight_hh)
        self.bias = nn.Parameter(torch.empty(gates, **kind))
        self.weight_head = nn.Parameter(torch.empty(head, hidden_size, **kind))
        self.bias_head = nn.Parameter(torch.empty(head, **kind))
        self.reset_parameters()

    @classmethod
    def santoro(cls, input_size: int, **overrides: "Unpack[MANNOptions]"):
        """The paper: 4 heads, 128 slots of 40, 200 hidden units, usage decay 0.99, the key itself is written."""
        options: dict[str, Any] = {**overrides}
        return cls(input_size, **options)

    @classmethod
    def tristandeleu(cls, input_size: int, **overrides: "Unpack[MANNOptions]"):
        """The model of the Theano code tristandeleu/ntm-one-shot: as the paper, but decay 0.95 and an add vector of its own."""
        options: dict[str, Any] = {"write": "add", "decay": 0.95, **overrides}
        return cls(input_size, **options)

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(hidden_size), as nn.LSTM; a learned key strength starts at exactly 1."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        if self.head_options["key_strength"]:
            first = self.num_heads * self.slot_size + self.num_heads
            with torch.no_grad():
                self.weight_head[first : first + self.num_heads] = 0
                self.bias_head[first : first + self.num_heads] = SOFTPLUS_INVERSE_OF_1

    def initial_state(self, batch_size: int) -> MANNState:
        """The state an episode starts from: memory `memory_init` everywhere, usage and read weights 1 at slot 0, the rest 0.

        The paper gives none; this is what the public implementations agree on.
        """
        shapes = self._state_shapes(batch_size)
        # not of bias itself, which may be a shard
        kind: dict[str, Any] = {"device": self.bias.device, "dtype": self.bias.dtype}
        fields: list[Any] = [None if shape is None else torch.zeros(shape, **kind) for shape in shapes]
        state = MANNState(*fields)
        state.memory.fill_(self.memory_init)
        state.usage[..., 0] = 1
        state.read_weights[..., 0] = 1
        return state

    def _state_shapes(self, batch: int) -> Any:
        """Give the shape of each field of a MANNState."""
        heads, slots, width = self.num_heads, self.num_slots, self.slot_size
        hidden = (batch, self.hidden_size) if self.controller == "lstm" else None
        of_memory = (batch, slots, width), (batch, slots), (batch, heads, slots), (batch, heads, width)
        shapes: list[Any] = [*of_memory, hidden, hidden]
        return MANNState(*shapes)

    def _checked_state(self, state, batch: int) -> MANNState:
        if state is None:
            return self.initial_state(batch)
        if not isinstance(state, MANNState):
            raise TypeError(f"state: got {type(state).__name__}, want a MANNState (or None)")
        for name, field, want in zip(MANNState._fields, state, self._state_shapes(batch), strict=True):
            got = None if field is None else tuple(field.shape)
            if got != want:
                raise ValueError(f"state.{name}: got {'None' if got is None else f'shape {list(got)}'}, want {want}")
        return state

    def _episode(self, *arguments: Any, **options: Any) -> Any:
        """Run the operator of this layer's controller: mann_sequence, or lrua_sequence with a feed-forward one."""
        return (mann_sequence if self.controller == "lstm" else lrua_sequence)(*arguments, **options)

    def _run(self, x: torch.Tensor, state: MANNState, lengths: torch.Tensor | None) -> tuple[torch.Tensor, MANNState]:
        """x [T,B,I] -> output [T,B,H+R*W] and the state after each example's last real step."""
        memory, usage, read_weights, reads, h, c = state
        if self.controller == "lstm":
            output, h, c, reads, memory, usage, read_weights = self._episode(
                x, h, c, reads, memory, usage, read_weights,
                self.weight_ih, self.weight_hh, self.bias, self.weight_head, self.bias_head, lengths,
                **self.head_options, **self.memory_options,
            )  # fmt: skip
            return output, MANNState(memory, usage, read_weights, reads, h, c)
        hidden = torch.tanh(F.linear(x, self.weight_ih, self.bias))
        options = self.head_options
        head = F.linear(hidden, self.weight_head, self.bias_head)
        head = split_head(
            head, self.num_heads, self.slot_size, key_strength=options["key_strength"], write=options["write"]
        )
        head = activate_head(*head, squash=options["squash"])
        all_reads, memory, usage, read_weights = self._episode(
            memory, usage, read_weights, *head, lengths, **self.memory_options
        )
        if lengths is not None:
            hidden = hidden.masked_fill(_padding(x, lengths), 0)
        reads = _last_reads(all_reads, reads, lengths)
        return torch.cat([hidden, all_reads.flatten(2)], dim=2), MANNState(memory, usage, read_weights, reads)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, num_slots={self.num_slots}, slot_size={self.slot_size}"
        text += f", num_heads={self.num_heads}, controller={self.controller!r}"
        for name, value in {**self.head_options, **self.memory_options}.items():
            text += f", {name}={value!r}"
        return text


class MANN(_MANNBase):
    """A memory-augmented neural network over whole sequences (Santoro et al. 2016), called like nn.LSTM.

    Args:
        input_size: I, features of a step.
        hidden_size: H, units of the controller.
        num_slots: N, rows of the memory.
        slot_size: W, width of a row.
        num_heads: R, read heads, each with a write head of its own; at most num_slots.
        controller: "lstm" (the previous reads are fed back to it) or "feedforward" (one tanh layer; it sees x alone).
        batch_first: x and output are [B, T, ...]; the state is as without.
        write: "key" (the paper) or "add", a separate vector.
        key_strength: learn a factor on the similarities, emitted at each step; without it 1, as in the paper.
        squash: "tanh" or "identity", on keys and add vectors.
        lru: "per_head" (the h-th head writes to the h-th least used slot) or "shared" (every head to all R of them).
        erase: "least" (the least used slot is set to zero before the write) or "all" (all R of them).
        decay: of the usage (gamma of eq. 5).
        eps: inside the root of the cosine's denominator.
        memory_init: what every element of an initial memory is; finite.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        x [T, B, I] (or [T, I] without a batch, or a PackedSequence) -> output [T, B, H + R*W], that is (h, reads) of each
        step, and a MANNState that the next call takes. lengths: int64 tensor or integers [B], each in 0..T: later steps
        are padding, their output is zero, and they change nothing, whatever x holds there.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it wants.

    The parameters are weight_ih [4H, I], weight_hh [4H, H + R*W], bias [4H] in nn.LSTM's order of gates, weight_head [P, H]
    and bias_head [P] (see mann_kernels.mann_sequence); with a feed-forward controller weight_ih [H, I], bias [H] and no
    weight_hh. They start uniform in +-1/sqrt(H).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int = 200,
        num_slots: int = 128,
        slot_size: int = 40,
        num_heads: int = 4,
        controller: str = "lstm",
        *,
        batch_first: bool = False,
        write: str = "key",
        key_strength: bool = False,
        squash: str = "tanh",
        lru: str = "per_head",
        erase: str = "least",
        decay: float = 0.99,
        eps: float = 1e-6,
        memory_init: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            input_size, hidden_size, num_slots, slot_size, num_heads, controller,
            write=write, key_strength=key_strength, squash=squash, lru=lru, erase=erase, decay=decay, eps=eps,
            memory_init=memory_init, device=device, dtype=dtype,
        )  # fmt: skip
        flag("batch_first", batch_first)
        self.batch_first = batch_first

    def forward(
        self,
        x: torch.Tensor | PackedSequence,
        state: MANNState | None = None,
        lengths: torch.Tensor | Sequence[int] | None = None,
    ) -> tuple[torch.Tensor | PackedSequence, MANNState]:
        if isinstance(x, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths: got them beside a PackedSequence, want None: it carries its own")
            return self._forward_packed(x, state)
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x: got {type(x).__name__}, want a torch.Tensor or a PackedSequence")
        want = "[B, T, I]" if self.batch_first else "[T, B, I]"
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size:
            raise ValueError(
                f"x: got shape {list(x.shape)}, want {want} or [T, I], with I={self.input_size} (input_size)"
            )
        if x.dim() == 2:
            state = state if state is None else state.map(lambda field: field.unsqueeze(0))
            output, state = self._forward_batch(x.unsqueeze(1), state, lengths)
            return output.squeeze(1), state.map(lambda field: field.squeeze(0))
        output, state = self._forward_batch(x.transpose(0, 1) if self.batch_first else x, state, lengths)
        return output.transpose(0, 1) if self.batch_first else output, state

    def _forward_batch(self, x, state, lengths):
        state = self._checked_state(state, x.shape[1])
        if lengths is not None:
            lengths = _checked_lengths(lengths, x)
            x = x.masked_fill(_padding(x, lengths), 0)  # NaN in the padding would reach the weight gradients
        return self._run(x, state, lengths)

    def _forward_packed(self, packed, state):
        x, lengths = pad_packed_sequence(packed)  # in the caller's order, and so is the state
        output, state = self._forward_batch(x, state, lengths.to(x.device))
        repacked = pack_padded_sequence(output, lengths, enforce_sorted=packed.sorted_indices is None)
        return PackedSequence(repacked.data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices), state

    def extra_repr(self) -> str:
        return super().extra_repr() + f", batch_first={self.batch_first}"


class MANNCell(_MANNBase):
    """One step of a MANN, called like nn.LSTMCell (Santoro et al. 2016). A state_dict of MANN fits.

    The arguments are MANN's, and so are the parameters: input_size, hidden_size, num_slots, slot_size, num_heads, controller,
    write, key_strength, squash, lru, erase, decay, eps, memory_init, device and dtype.

    Shapes: x [B, I], state (None starts an episode) -> output [B, H + R*W] and the next state, a MANNState.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it wants.
    """

    def forward(self, x: torch.Tensor, state: MANNState | None = None) -> tuple[torch.Tensor, MANNState]:
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x: got {type(x).__name__}, want a torch.Tensor")
        if x.dim() != 2 or x.shape[1] != self.input_size:
            raise ValueError(f"x: got shape {list(x.shape)}, want [B, I] with I={self.input_size} (input_size)")
        output, state = self._run(x.unsqueeze(0), self._checked_state(state, x.shape[0]), None)
        return output.squeeze(0), state


def _checked_lengths(lengths, x: torch.Tensor) -> torch.Tensor:
    if not isinstance(lengths, torch.Tensor):
        lengths = torch.tensor(list(lengths), dtype=torch.int64, device="cpu")
    if lengths.dtype != torch.int64 or tuple(lengths.shape) != (x.shape[1],):
        raise ValueError(f"lengths: got {lengths.dtype} {list(lengths.shape)}, want int64 [B] with B={x.shape[1]}")
    if (
        not torch.compiler.is_compiling()
        and not lengths.is_meta
        and lengths.numel()
        and not (lengths.min() >= 0 and lengths.max() <= x.shape[0])
    ):
        raise ValueError(f"lengths: got {lengths.tolist()}, want each in 0..T with T={x.shape[0]}")
    return lengths.to(x.device)


def _padding(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """True [T,B,1] where a step is padding."""
    return (torch.arange(x.shape[0], device=x.device)[:, None] >= lengths)[..., None]


def _last_reads(all_reads: torch.Tensor, before: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """The reads [B,R,W] of each example's last real step; `before` where there is none."""
    steps = torch.cat([before.unsqueeze(0), all_reads])
    if lengths is None:
        return steps[-1]
    return steps[lengths, torch.arange(steps.shape[1], device=steps.device)]
