import pytest
import torch
from against_reference import DEVICES, Inputs, OperatorTests, draw, memory_state, replace

import mann_kernels


class TestLruaWriteWeights(OperatorTests):
    op = "lrua_write_weights"
    drawn = ("lru",)
    movable = ("gate",)
    sizes = ((3, 7, 5, 2), (2, 129, 7, 1), (2, 33, 20, 6), (2, 300, 9, 3), (1, 1, 1, 1))
    options = ({"lru": "per_head"}, {"lru": "shared"})
    bad = (
        (replace("usage", lambda u: u[:, :4]), ValueError, r"read_weights: got shape .* want .*N=4"),
        (replace("gate", lambda g: g.int()), TypeError, "gate: got dtype torch.int32, want a floating"),
        (lambda _: {"lru": "most"}, ValueError, "lru: got 'most', want one of"),
    )

    def inputs(self, seed, B, N, W, R, lru):
        state = memory_state(seed, B, N, W, R)
        return Inputs(usage=state["usage"], read_weights=state["read_weights"], gate=draw(seed, g=(B, R))["g"], lru=lru)

    @pytest.mark.parametrize("device", DEVICES)
    def test_ties_take_the_lowest_slots(self, device):
        state = Inputs(usage=torch.ones(2, 40), read_weights=torch.rand(2, 5, 40), gate=torch.zeros(2, 5))
        _, slots = mann_kernels.lrua_write_weights(**state.on(device))
        assert slots.tolist() == [[0, 1, 2, 3, 4]] * 2

    @pytest.mark.parametrize("device", DEVICES)
    def test_order_and_nan(self, device):
        nan, inf = float("nan"), float("inf")
        usage = torch.tensor([[nan, 3.0, -0.0, 0.0, inf, nan, 1.0]])
        state = Inputs(usage=usage, read_weights=torch.rand(1, 7, 7), gate=torch.zeros(1, 7))
        _, slots = mann_kernels.lrua_write_weights(**state.on(device))
        assert slots.tolist() == [[2, 3, 6, 1, 4, 0, 5]]

    def test_too_many_heads(self):
        with pytest.raises(ValueError, match=r"num_heads: got 3 heads \(R\) for 2 slots"):
            mann_kernels.lrua_write_weights(torch.ones(1, 2), torch.ones(1, 3, 2), torch.ones(1, 3))

    def test_weights_sum_to_one_or_more(self):
        usage, weights, gate = torch.rand(2, 9), torch.softmax(torch.randn(2, 3, 9), -1), torch.randn(2, 3)
        own, _ = mann_kernels.lrua_write_weights(usage, weights, gate)
        shared, _ = mann_kernels.lrua_write_weights(usage, weights, gate, lru="shared")
        sigma = gate.sigmoid()
        torch.testing.assert_close(own.sum(-1), torch.ones(2, 3))
        torch.testing.assert_close(shared.sum(-1), sigma + 3 * (1 - sigma))
