import pytest
import torch
from against_reference import Inputs, OperatorTests, draw, replace

import mann_kernels


class TestMemoryUpdate(OperatorTests):
    op = "memory_update"
    drawn = ("erase",)
    options = ({"erase": "least"}, {"erase": "all"})
    bad = (
        (replace("add", lambda a: a[..., :2]), ValueError, "add: got shape .* want .*W=3"),
        (replace("least_used", lambda s: s.float()), TypeError, "least_used: got torch.float32, want an int32"),
        (lambda _: {"erase": "most"}, ValueError, "erase: got 'most', want one of"),
    )

    def inputs(self, seed, B, N, W, R, erase):
        inputs = draw(seed, memory=(B, N, W), write_weights=(B, R, N), add=(B, R, W))
        slots = draw(seed, order=(B, N))["order"].argsort(-1)[:, :R]
        return Inputs(**inputs, least_used=slots.int(), erase=erase)

    def test_slots_outside_raise(self):
        for slot in (-1, 4):
            with pytest.raises(RuntimeError, match="least_used: got slot"):
                mann_kernels.memory_update(
                    torch.ones(1, 4, 2), torch.ones(1, 1, 4), torch.ones(1, 1, 2), torch.tensor([[slot]])
                )

    def test_argument_is_left_alone(self):
        memory = torch.ones(1, 4, 2)
        mann_kernels.memory_update(memory, torch.ones(1, 1, 4), torch.ones(1, 1, 2), torch.tensor([[2]]))
        assert torch.equal(memory, torch.ones(1, 4, 2))
