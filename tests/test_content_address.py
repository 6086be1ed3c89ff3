import torch
from against_reference import BAD_STATE, OperatorTests, draw

import mann_kernels


class TestContentAddress(OperatorTests):
    op = "content_address"
    drawn = ("beta",)
    options = ({}, {"beta": True})
    bad = BAD_STATE

    def inputs(self, seed, B, N, W, R, beta=False):
        inputs = draw(seed, memory=(B, N, W), key=(B, R, W), beta=(B, R))
        return inputs if beta else type(inputs)({**inputs, "beta": None})

    def test_more_heads_than_slots_are_fine(self):
        assert mann_kernels.content_address(torch.randn(1, 2, 3), torch.randn(1, 5, 3)).shape == (1, 5, 2)

    def test_no_eps(self):
        weights = mann_kernels.content_address(torch.randn(1, 5, 3), torch.randn(1, 2, 3), eps=0.0)
        assert weights.isfinite().all()
