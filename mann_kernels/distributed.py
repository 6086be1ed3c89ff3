"""A memory larger than one device: its N slots spread over the ranks of a device mesh.

The controller is the same on every rank; memory, usage and read weights are DTensors sharded over the slots. In a step a rank
sends the R least used of its slots (usage and number, in float64), and for each head the maximum, the sum and the weighted read
of its part of the softmax, B*R*(W + 2) numbers, whatever N is. The backward pass sends as many: the gradients of the sums and of
what the controller emitted (B*R more with a key strength, B*R*W more with an add vector). The slots that are chosen are those
that one process would choose; sums over slots are taken on each rank and then added up in the order of the ranks, so the rest
differs from one process by rounding.

torch.distributed carries and DTensor holds. One process per device, started by torchrun.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, full, zeros

from mann_kernels import reference
from mann_kernels.modules import MANN, MANNState
from mann_kernels.reference.content_address import similarity
from mann_kernels.reference.lrua_write_weights import interpolate, least_used_slots

__all__ = ["ShardedMANN"]

#: The dimension of each sharded field of a MANNState that counts the slots.
SLOTS = {"memory": 1, "usage": 1, "read_weights": 2}


class _Copy(Function):
    """Hand a tensor that every rank has whole to this rank's slots; the gradients that come back from the ranks' slots
    add up."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return _Sum.apply(grad, ctx.group), None


class _Sum(Function):
    """The sum over the ranks, whole on every rank. With _Copy and _Gather with _Own: each is the other's gradient."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return _Copy.apply(grad, ctx.group), None


class _Gather(Function):
    """The tensors of all ranks, stacked in their order, whole on every rank."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        stacked = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
        dist.all_gather(list(stacked), tensor.contiguous(), group=group)
        return stacked

    @staticmethod
    def backward(ctx, grad):
        return _Own.apply(grad, ctx.group), None


class _Own(Function):
    """The part of this rank out of such a stack."""

    @staticmethod
    def forward(ctx, stacked, group):
        ctx.group = group
        return stacked[dist.get_rank(group)].clone()

    @staticmethod
    def backward(ctx, grad):
        return _Gather.apply(grad, ctx.group), None


class _Local(Function):
    """This rank's part of a field of the state. As DTensor.to_local, but twice differentiable also in torch 2.10."""

    @staticmethod
    def forward(ctx, tensor, dim):
        ctx.mesh, ctx.shape, ctx.dim = tensor.device_mesh, tensor.shape, dim
        local = tensor.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx, grad):
        return _sharded(grad, ctx.mesh, ctx.shape, ctx.dim), None


def _sharded(local: torch.Tensor, mesh: DeviceMesh, shape: tuple[int, ...], dim: int) -> DTensor:
    """The DTensor of this shape, sharded over dim, of which this is the rank's part; _Local is the way back."""
    # the sizes of the whole: the ranks may not divide the slots
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(dim)], run_check=False, shape=torch.Size(shape), stride=strides)


def _bounds(slots: int, rank: int, world: int) -> tuple[int, int]:
    """The first slot of a rank and the one after its last, as DTensor divides a dimension."""
    chunk = -(-slots // world)
    return min(rank * chunk, slots), min((rank + 1) * chunk, slots)


def _own_slot(usage: torch.Tensor, heads: int, slots: int, group) -> torch.Tensor:
    """bool [B,R,n]: which of this rank's n slots is the h-th least used of all, of which there are R, for any number of ranks.

    usage [B,n]. Every rank offers its R least used (fewer if it has fewer slots), in ascending order; a stable sort of all
    offers, which come in the order of the slots where usages are equal, then takes the lowest slot first, as one process does.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    bounds = [_bounds(slots, each, world) for each in range(world)]
    first, last = bounds[rank]
    offered = least_used_slots(usage, min(heads, last - first)).long()
    # both in float64, which holds every usage and every slot number: one message
    offer = usage.new_full((2, usage.shape[0], heads), -1, dtype=torch.float64)
    offer[0, :, : offered.shape[1]] = usage.detach().gather(1, offered).double()
    offer[1, :, : offered.shape[1]] = (offered + first).double()
    offers = _Gather.apply(offer, group)
    counts = [min(heads, last - first) for first, last in bounds]
    values, numbers = torch.cat([offers[each, ..., :count] for each, count in enumerate(counts)], -1)
    chosen = numbers.gather(1, torch.sort(values, dim=-1, stable=True).indices[:, :heads]).long()
    return chosen[..., None] == torch.arange(first, last, device=usage.device)


def _read(memory: torch.Tensor, key: torch.Tensor, beta: torch.Tensor | None, eps: float, group):
    """reads [B,R,W], whole, and this rank's read weights [B,R,n], for memory [B,n,W], key [B,R,W], beta [B,R] or None.

    Each rank takes the softmax of its slots against its own maximum; maxima, sums and weighted reads then meet in one message.
    """
    similar = similarity(memory, key, beta, eps=eps)
    if similar.shape[-1]:
        largest = similar.detach().amax(-1, keepdim=True)
    else:
        largest = similar.new_full((*similar.shape[:-1], 1), -torch.inf)
    raised = torch.exp(similar - largest)
    parts = _Gather.apply(torch.cat([largest, raised.sum(-1, keepdim=True), raised @ memory], -1), group)
    maxima, sums, reads = parts[..., :1].detach(), parts[..., 1:2], parts[..., 2:]
    shift = torch.exp(maxima - maxima.amax(0))
    total = (shift * sums).sum(0)
    # once more from the common maximum: slots that are alike weigh the same on every rank, and their usages tie as in one process
    read_weights = torch.exp(similar - maxima.amax(0)) / _Copy.apply(total, group)
    return (shift * reads).sum(0) / total, read_weights


def _sharded_step(
    memory, usage, read_weights, key, gate, beta=None, add=None, *, slots, group,
    lru="per_head", erase="least", decay=0.99, eps=1e-6,
):  # fmt: skip
    """reference.lrua_step on this rank's n of the `slots` slots: memory [B,n,W], usage [B,n], read_weights [B,R,n]."""
    emitted = [key, gate[..., None], *([] if beta is None else [beta[..., None]]), *([] if add is None else [add])]
    parts = _Copy.apply(torch.cat(emitted, -1), group).split([part.shape[-1] for part in emitted], -1)
    key, gate = parts[0], parts[1].squeeze(-1)
    beta, add = None if beta is None else parts[2].squeeze(-1), key if add is None else parts[-1]
    own_slot = _own_slot(usage, gate.shape[-1], slots, group)
    write_weights = interpolate(read_weights, gate, own_slot, lru=lru)
    erased = own_slot[:, 0] if erase == "least" else own_slot.any(1)
    memory = memory.masked_fill(erased[..., None], 0) + write_weights.transpose(-1, -2) @ add
    reads, read_weights = _read(memory, key, beta, eps, group)
    usage = decay * usage + read_weights.detach().sum(-2) + write_weights.detach().sum(-2)
    return reads, memory, usage, read_weights


class ShardedMANN(MANN):
    """A MANN whose slots are spread over the ranks of a device mesh: the same layer, for memories that one device cannot hold.

    Beside `mesh` the arguments are MANN's: input_size, hidden_size, num_slots, slot_size, num_heads, controller, batch_first,
    write, key_strength, squash, lru, erase, decay, eps, memory_init, device and dtype.

    Args:
        mesh: a one-dimensional DeviceMesh, as `init_device_mesh("cuda", (world_size,))` or one dimension of a larger mesh.

    Shapes:
        Those of MANN. In the state `memory` [B, N, W], `usage` [B, N] and `read_weights` [B, R, N] are DTensors sharded over
        N, also where the ranks do not divide it; `reads`, `h` and `c` are plain tensors, the same on every rank.

    Raises:
        TypeError, ValueError: as MANN; a mesh that is not a DeviceMesh of one dimension; a state that is not sharded so.

    Every rank calls it with the same x and computes the same loss; each then has the whole gradient of every parameter, so
    nothing more is to be reduced over this mesh. When built, the parameters of the mesh's first rank go to the others. A
    state_dict is MANN's, and of MANN's. Runs as plain PyTorch, without kernels, on each rank's slots; differentiable twice,
    from call to call too. What is done with a state's DTensors outside, `to_local` or `full_tensor`, is as twice differentiable
    as torch has it; in 2.10 it is not.
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
        mesh: DeviceMesh,
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
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh: got {type(mesh).__name__}, want a torch.distributed.device_mesh.DeviceMesh")
        if mesh.ndim != 1:
            raise ValueError(f"mesh: got {mesh.ndim} dimensions, want 1 (index a larger mesh by the name of one)")
        super().__init__(
            input_size, hidden_size, num_slots, slot_size, num_heads, controller,
            batch_first=batch_first, write=write, key_strength=key_strength, squash=squash, lru=lru, erase=erase,
            decay=decay, eps=eps, memory_init=memory_init, device=device, dtype=dtype,
        )  # fmt: skip
        self.mesh = mesh
        with torch.no_grad():
            for parameter in self.parameters():
                dist.broadcast(parameter, group=mesh.get_group(), group_src=0)

    def initial_state(self, batch_size: int) -> MANNState:
        """Make the state that MANN's episodes start from, without that any rank holds more than its own slots."""
        shapes = self._state_shapes(batch_size)
        kind: dict[str, Any] = {"dtype": self.bias.dtype, "device_mesh": self.mesh}
        memory = full(shapes.memory, self.memory_init, placements=[Shard(SLOTS["memory"])], **kind)
        usage = zeros(shapes.usage, placements=[Shard(SLOTS["usage"])], **kind)
        read_weights = zeros(shapes.read_weights, placements=[Shard(SLOTS["read_weights"])], **kind)
        if self.mesh.get_local_rank() == 0:
            usage.to_local()[..., 0] = 1
            read_weights.to_local()[..., 0] = 1
        whole: list[Any] = [None if shape is None else self.bias.new_zeros(shape) for shape in shapes[3:]]
        return MANNState(memory, usage, read_weights, *whole)

    def _checked_state(self, state, batch: int) -> MANNState:
        state = super()._checked_state(state, batch)
        for name, dim in SLOTS.items():
            field = getattr(state, name)
            if not isinstance(field, DTensor) or field.placements != (Shard(dim),) or field.device_mesh != self.mesh:
                got = f"a DTensor with {field.placements}" if isinstance(field, DTensor) else "a plain tensor"
                raise ValueError(
                    f"state.{name}: got {got}, want a DTensor with (Shard(dim={dim}),) over this layer's mesh"
                )
        return state

    def _episode(self, *arguments, **options):
        sequence = reference.mann_sequence if self.controller == "lstm" else reference.lrua_sequence
        step = functools.partial(_sharded_step, slots=self.num_slots, group=self.mesh.get_group())
        return sequence(*arguments, **options, one_step=step)

    def _run(self, x, state, lengths):
        local = state._replace(**{name: _Local.apply(getattr(state, name), dim) for name, dim in SLOTS.items()})
        output, after = super()._run(x, local, lengths)
        shapes = self._state_shapes(x.shape[1])
        sharded = {
            name: _sharded(getattr(after, name), self.mesh, getattr(shapes, name), dim) for name, dim in SLOTS.items()
        }
        return output, after._replace(**sharded)
