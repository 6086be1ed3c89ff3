"""Learners: modules that answer whole episodes, or adapt to a support set and predict."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from mann_kernels.modules import MANN


def as_features(y: torch.Tensor, size: int) -> torch.Tensor:
    """Answers as numbers [..., size]: classes one-hot, those of a regression as they are."""
    return F.one_hot(y, size).to(torch.get_default_dtype()) if y.dtype == torch.int64 else y


def perceptron(*sizes: int) -> nn.Sequential:
    """Linear layers of these sizes with ReLU between them."""
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class FeedForward(nn.Module):
    """No memory at all: every step of an episode [T, B, I] is answered from itself."""

    def __init__(self, input_size: int, output_size: int, hidden_size: int = 200):
        super().__init__()
        self.layers = perceptron(input_size, hidden_size, hidden_size, output_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Recurrent(nn.Module):
    """A recurrent core and a linear readout; the state of the core is what it has learned of a task.

    Args:
        core: called like nn.LSTM: x [T, B, I] and a state -> output [T, B, width] and a state.
        width: of the core's output.
        output_size: of the answer.

    Two protocols. Episodes: x [T, B, I] -> output [T, B, output_size]. Support and queries: I is the size of an example and
    of its answer; the support set is fed one by one, each example beside its answer, and then each query, beside zeros, to the
    state that follows.
    """

    def __init__(self, core: nn.Module, width: int, output_size: int):
        super().__init__()
        self.core, self.readout, self.output_size = core, nn.Linear(width, output_size), output_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.readout(self.core(x)[0])

    def adapt(self, support_x: torch.Tensor, support_y: torch.Tensor):
        """support_x [G, S, ...] and its answers -> the core's state after the last of them."""
        x = torch.cat([support_x.flatten(2), as_features(support_y, self.output_size)], 2)
        return self.core(x.transpose(0, 1))[1]

    def predict(self, query_x: torch.Tensor, state) -> torch.Tensor:
        """query_x [G, L, ...] and a state -> [G, L, output_size]; no query sees another."""
        G, L = query_x.shape[:2]
        x = F.pad(query_x.flatten(2).flatten(0, 1), (0, self.output_size)).unsqueeze(0)
        if isinstance(self.core, nn.LSTM):
            state = tuple(field.repeat_interleave(L, 1) for field in state)
        else:
            state = state.map(lambda field: field.repeat_interleave(L, 0))
        return self.readout(self.core(x, state)[0]).view(G, L, -1)


class Kept(Recurrent):
    """A MANN whose memory is not wiped between episodes (Santoro et al. 2016, section 4.2.1).

    Every episode of a batch begins with the memory, usage and read weights that the one before left in its place; no gradient
    goes back to that one. In training they are buffers, so a checkpoint has them. A test begins with an empty memory.

    Args:
        episodes: of a batch in training, all in one process.
    """

    core: MANN

    def __init__(self, core: MANN, width: int, output_size: int, episodes: int):
        super().__init__(core, width, output_size)
        empty = core.initial_state(episodes)
        for name in ("memory", "usage", "read_weights"):
            self.register_buffer(name, getattr(empty, name))
        self.tested: dict[str, torch.Tensor] = {}

    def train(self, mode: bool = True) -> "Kept":
        self.tested = {}
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, kept = self.core.initial_state(x.shape[1]), dict(self.named_buffers(recurse=False))
        if not self.training:
            kept = self.tested if self.tested and len(self.tested["memory"]) == x.shape[1] else {}
        elif len(kept["memory"]) != x.shape[1]:
            raise ValueError(
                f"x: got {x.shape[1]} episodes, want {len(kept['memory'])}, whose memory is kept, in one process"
            )
        output, state = self.core(x, state._replace(**kept))
        after = {name: getattr(state, name).detach() for name in ("memory", "usage", "read_weights")}
        if not self.training:
            self.tested = after
            return self.readout(output)
        for name, tensor in after.items():
            setattr(self, name, tensor)
        return self.readout(output)


def lstm(input_size: int, output_size: int, hidden_size: int = 200) -> Recurrent:
    """An LSTM without memory, the paper's baseline."""
    return Recurrent(nn.LSTM(input_size, hidden_size), hidden_size, output_size)


def mann(input_size: int, output_size: int, keep: int = 0, **options) -> Recurrent:
    """A MANN with these options, whose memory is kept between batches of `keep` episodes."""
    core = MANN(input_size, **options)
    width = core.hidden_size + core.num_heads * core.slot_size
    return Kept(core, width, output_size, keep) if keep else Recurrent(core, width, output_size)


def set_forget_bias(core: nn.Module, value: float) -> None:
    """Start the forget gates of an LSTM, or of a MANN's, around sigmoid(value)."""
    bias = core.get_parameter("bias_ih_l0" if isinstance(core, nn.LSTM) else "bias")
    size = len(bias) // 4
    with torch.no_grad():
        bias[size : 2 * size] += value


class NearestNeighbour(nn.Module):
    """Answers with the label of the example whose pixels have the largest cosine, the papers' baseline; nothing is trained.

    Args:
        output_size: of the answer, which the input of an episode ends with, as the label of the step before.

    Episodes: x [T, B, I] -> [T, B, output_size], each step the label of one before it, the first step zeros. Support and
    queries: as the other learners.
    """

    def __init__(self, output_size: int):
        super().__init__()
        self.output_size = output_size

    @staticmethod
    def cosines(x: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """x [G, L, D], others [G, S, D] -> [G, L, S]."""
        return F.normalize(x, dim=2) @ F.normalize(others, dim=2).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images, labels = x.transpose(0, 1).split([x.shape[2] - self.output_size, self.output_size], 2)
        later = torch.ones(2 * [len(x)], dtype=torch.bool, device=x.device).triu()
        nearest = self.cosines(images, images).masked_fill(later, -torch.inf).argmax(2)
        answers = labels.roll(-1, 1).gather(1, nearest[..., None].expand_as(labels))
        return F.pad(answers[:, 1:], (0, 0, 1, 0)).transpose(0, 1)

    def adapt(self, support_x: torch.Tensor, support_y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """support_x [G, S, ...] and its answers -> both."""
        return support_x, as_features(support_y, self.output_size)

    def predict(self, query_x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """query_x [G, L, ...] and the support set -> [G, L, output_size]."""
        support_x, labels = state
        nearest = self.cosines(query_x.flatten(2), support_x.flatten(2)).argmax(2)
        return labels.gather(1, nearest[..., None].expand(-1, -1, self.output_size))


class ContextVector(nn.Module):
    """An encoder gives a context h of the support set, and a decoder g(x, h) predicts.

    Args:
        input_size, output_size: of an example and of its answer.
        aggregate: "mean" of the encoded examples, so that their order does not matter, or "recurrent", the last state of a
            GRU over them, so that it does.
        hidden_size: of the context and the layers.
    """

    def __init__(self, input_size: int, output_size: int, aggregate: str = "mean", hidden_size: int = 128):
        super().__init__()
        if aggregate not in ("mean", "recurrent"):
            raise ValueError(f"aggregate: got {aggregate!r}, want 'mean' or 'recurrent'")
        self.output_size = output_size
        self.encoder = perceptron(input_size + output_size, hidden_size, hidden_size)
        self.recurrent = nn.GRU(hidden_size, hidden_size) if aggregate == "recurrent" else None
        self.decoder = Decoder(input_size, hidden_size, output_size, hidden_size)

    def adapt(self, support_x: torch.Tensor, support_y: torch.Tensor) -> torch.Tensor:
        """support_x [G, S, ...] and its answers -> context [G, hidden_size]."""
        encoded = self.encoder(torch.cat([support_x.flatten(2), as_features(support_y, self.output_size)], 2))
        return encoded.mean(1) if self.recurrent is None else self.recurrent(encoded.transpose(0, 1))[1][0]

    def predict(self, query_x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """query_x [G, L, ...], context [G, hidden_size] -> [G, L, output_size]."""
        return self.decoder(query_x, state)


class Decoder(nn.Module):
    """g(x, z): predicts from a query and a vector that stands for its task, given or inferred.

    x [G, L, ...], z [G, D] -> [G, L, output_size].
    """

    def __init__(self, input_size: int, context_size: int, output_size: int, hidden_size: int = 128):
        super().__init__()
        self.layers = perceptron(input_size + context_size, hidden_size, hidden_size, output_size)

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([x.flatten(2), z[:, None].expand(-1, x.shape[1], -1)], 2))
