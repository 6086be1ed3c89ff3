import pytest
import torch

import mann_kernels
from mann_kernels import reference
from mann_kernels.testing import audit


def cell(
    memory,
    usage,
    read_weights,
    key,
    gate,
    *,
    inverted=False,
    most=False,
    tied=False,
    leak=False,
    dead=False,
    detach=False,
):
    """A plain cell into which the classic faults can be planted."""
    if detach:
        memory, read_weights = memory.detach(), read_weights.detach()
    rows = range(memory.shape[0])
    weights, slots = reference.lrua_write_weights(-usage if most else usage, read_weights, gate)
    if tied:  # the threshold of the paper taken literally
        threshold = usage.gather(1, slots[:, -1:].long())
        own = (usage <= threshold).float()[:, None]
        weights = gate.sigmoid()[..., None] * read_weights + (1 - gate.sigmoid()[..., None]) * own
    erase = torch.zeros(memory.shape[:2], dtype=torch.bool)
    erase[rows, slots[:, 0].long()] = True
    kept = memory.masked_fill((~erase if inverted else erase)[..., None], 0)
    written = torch.cat([key[:, :1].detach(), key[:, 1:]], 1) if dead else key
    if dead:
        weights = torch.cat([weights[:, :1].detach(), weights[:, 1:]], 1)
    memory = kept + weights.mT @ written
    if leak:
        memory = memory + 0.1 * memory.mean(0, keepdim=True)
    read_weights = reference.content_address(memory, torch.cat([key[:, :1].detach(), key[:, 1:]], 1) if dead else key)
    if dead:
        read_weights = torch.cat([read_weights[:, :1].detach(), read_weights[:, 1:]], 1)
    return read_weights @ memory, memory, 0.99 * usage + read_weights.sum(1) + weights.sum(1), read_weights


FAULTS = {
    "inverted": "inverted erase",
    "most": "most used instead of least used",
    "tied": "all slots tied",
    "leak": "batch leak",
    "dead": "heads with zero gradient",
    "detach": "memory detached between steps",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_and_no_other(fault):
    found = audit(lambda *args: cell(*args, **{fault: True}))
    assert found.faults == (FAULTS[fault],), str(found)


@pytest.mark.parametrize("options", [{}, {"lru": "shared"}, {"erase": "all"}])
def test_our_cells_pass(options):
    found = audit(lambda *args: mann_kernels.lrua_step(*args, **options), controller=lambda r, w: r, **options)
    assert found.ok, str(found)
    assert audit(cell).ok


def test_feedback_of_read_weights_is_named():
    found = audit(cell, controller=lambda reads, weights: weights)
    assert found.faults == ("read weights fed back instead of reads",)


def test_a_cell_that_raises_is_reported():
    found = audit(lambda *args: 1 / 0)
    assert len(found.faults) == 6
    assert "ZeroDivisionError" in str(found)


def in_place(memory, usage, read_weights, key, gate):
    """A right cell that writes into the tensors it was given, and gives the same ones every time."""
    reads, *after = reference.lrua_step(memory, usage, read_weights, key, gate)
    for given, new in zip((memory, usage), after, strict=False):
        given.copy_(new)
    return reads, memory, usage, after[2]


def test_a_right_cell_that_writes_in_place_passes():
    state = [torch.zeros(3, 12, 6), torch.zeros(3, 12), torch.zeros(3, 2, 12), torch.zeros(3, 2, 6)]

    def with_buffers(*tensors):
        reads, *after = reference.lrua_step(*tensors)
        for n, (buffer, new) in enumerate(zip(state, (*after, reads), strict=True)):
            state[n] = buffer.detach().copy_(new)
        return state[3], *state[:3]

    def controller(reads, read_weights):
        read_weights.zero_()
        return reads

    for step in (in_place, with_buffers):
        found = audit(step, controller=controller)
        assert found.ok, str(found)


def test_default_devices_and_dtypes():
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        assert audit(mann_kernels.lrua_step).ok
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
