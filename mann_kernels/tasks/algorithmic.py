"""Tasks that need no data and only memory: copying a sequence, and recalling what came with a key."""

import torch
import torch.nn.functional as F

from mann_kernels.tasks._kind import check_sizes, numbers, on_cpu, uniform
from mann_kernels.tasks.episodes import Episodes


class _Bits:
    """Random bits to be given back at some steps of an episode."""

    def loss(self, output: torch.Tensor, episodes: Episodes) -> torch.Tensor:
        """Cross-entropy per bit that is asked for, from logits [T, B, bits]."""
        asked = episodes.asked
        return F.binary_cross_entropy_with_logits(output[asked], episodes.y[asked])

    def scores(self, output: torch.Tensor, episodes: Episodes) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Count for each episode [B] the right bits and all bits, and whether all of them are right."""
        assert episodes.asked is not None
        asked = episodes.asked[..., None].expand_as(episodes.y)
        right = ((output > 0) == (episodes.y > 0)) & asked
        count = asked.sum((0, 2))
        solved = right.sum((0, 2)) == count
        return {"accuracy": (right.sum((0, 2)), count), "solved": (solved, torch.ones_like(count))}


class Copy(_Bits):
    """Copy (Graves et al. 2014, section 4.1): a sequence of random vectors, a mark, then the same vectors are to be given back.

    Args:
        length: vectors of a sequence.
        bits: of a vector.
        shorter: draw the length of each batch from 1..length.

    x [2 * length + 1, B, bits + 1]: the vectors, the mark in the last column, then zeros.
    """

    def __init__(self, length: int = 20, bits: int = 8, *, shorter: bool = False):
        check_sizes(length=length, bits=bits)
        self.length, self.shorter, self.output_size, self.input_size = length, shorter, bits, bits + 1

    @on_cpu
    def sample(self, B: int, generator: torch.Generator) -> Episodes:
        """B independent sequences of one length."""
        length = self.length
        if self.shorter:
            length = int(torch.randint(1, length + 1, (), generator=generator))
        bits = torch.randint(2, (length, B, self.output_size), generator=generator)
        x, y = torch.zeros(2 * length + 1, B, self.input_size), torch.zeros(2 * length + 1, B, self.output_size)
        x[:length, :, :-1], x[length, :, -1], y[length + 1 :] = bits, 1, bits
        return Episodes(x, y, asked=(torch.arange(len(x)) > length)[:, None].expand(-1, B))


class AssociativeRecall(_Bits):
    """Pairs of a key and a value, one a step; then each key is shown alone, in another order, and its value is to be given.

    Args:
        pairs: of an episode; at most 2**bits.
        bits: of a key, and of a value.

    The keys of an episode are distinct. x [2 * pairs, B, 2 * bits + 1]: key, value, and 1 where the value is asked for.
    """

    def __init__(self, pairs: int = 10, bits: int = 8):
        check_sizes(bits=bits, pairs=pairs)
        if not 1 <= bits <= 16:
            raise ValueError(f"bits: got {bits}, want 1 to 16")
        if not 1 <= pairs <= 2**bits:
            raise ValueError(f"pairs: got {pairs}, want 1 to {2**bits}, the keys there are")
        self.pairs, self.output_size, self.input_size = pairs, bits, 2 * bits + 1

    @on_cpu
    def sample(self, B: int, generator: torch.Generator) -> Episodes:
        """B independent episodes."""
        bits = self.output_size
        codes = uniform(B, 2**bits, generator=generator).topk(self.pairs).indices
        keys = codes[..., None] // 2 ** torch.arange(bits) % 2  # [B, pairs, bits]
        values = torch.randint(2, keys.shape, generator=generator)
        order = uniform(B, self.pairs, generator=generator).argsort()[..., None].expand_as(keys)
        shown = torch.cat([keys, values, torch.zeros_like(keys[..., :1])], 2)
        asked = torch.cat([keys.gather(1, order), torch.zeros_like(values), torch.ones_like(keys[..., :1])], 2)
        x = torch.cat([shown, asked], 1).transpose(0, 1)
        y = torch.cat([torch.zeros_like(values), values.gather(1, order)], 1).transpose(0, 1)
        return Episodes(numbers(x), numbers(y), asked=x[..., -1] > 0)
