import math

import pytest
import torch
from against_reference import Inputs, OperatorTests, compare, replace
from coordinates import case_form, draw_gradients, draw_weights, far_from_edges
from test_lrua_sequence import saved_bytes

from mann_kernels.reference.generate_fast_weights import preprocess_gradients

BAD_GRADIENTS = (
    (replace("grads", lambda g: g.long()), TypeError, "grads: got dtype torch.int64, want a floating"),
    (replace("grads", lambda g: g.numpy()), TypeError, "grads: got ndarray, want a torch.Tensor"),
    (lambda _: {"p": 0}, ValueError, r"p: got 0, want a number in \(0, 80\]"),
    (lambda _: {"p": math.nan}, ValueError, r"p: got nan, want"),
    (lambda _: {"p": "7"}, TypeError, "p: got str, want a number"),
)


class TestGenerateFastWeights(OperatorTests):
    """B and N of the drawn sizes are the gradient's, W is the number of hidden units."""

    op = "generate_fast_weights"
    drawn = ("p",)
    movable = ("weight3", "bias3")
    options = ({}, {"p": 4.0})
    bad = (
        *BAD_GRADIENTS,
        (replace("grads", lambda g: g.to("meta")), ValueError, "weight1: got device cpu, want meta"),
        (replace("weight1", lambda w: w.mT), ValueError, r"weight1: got shape \[2, 3\], want \[D, 2\]"),
        (replace("bias1", lambda b: b.float()), TypeError, "bias1: got dtype torch.float32, want torch.float64"),
        (replace("bias1", lambda b: b[1:]), ValueError, r"bias1: got shape \[2\], want \[D\] with D=3"),
        (replace("weight2", lambda w: w[1:]), ValueError, r"weight2: got shape \[2, 3\], want \[D, D\] with D=3"),
        (replace("bias2", lambda b: b[None]), ValueError, r"bias2: got shape \[1, 3\], want \[D\]"),
        (replace("weight3", lambda w: w[0]), ValueError, r"weight3: got shape \[3\], want \[1, D\]"),
        (replace("bias3", lambda b: b.repeat(2)), ValueError, r"bias3: got shape \[2\], want \[1\]"),
    )

    def inputs(self, seed, B, N, W, R, **options):
        shapes = {"weight1": (W, 2), "bias1": (W,), "weight2": (W, W), "bias2": (W,), "weight3": (1, W), "bias3": (1,)}
        return Inputs(grads=draw_gradients(seed, B, N), **draw_weights(seed, **shapes), **options)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("count", [1, 7, 129, 152_448])
    def test_paper_size(self, count, dtype):
        inputs = self.inputs(3, 1, count + count // 50 + 8, 20, 1)
        inputs["grads"] = inputs["grads"].to(dtype).double()
        inputs["grads"] = far_from_edges(inputs["grads"][0], inputs, count)
        compare(self.op, inputs, dtype)

    @pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 5)])
    def test_any_shape(self, shape):
        inputs = self.inputs(1, 4, 6, 5, 1)
        flat = inputs["grads"].view(-1)[: math.prod(shape)]
        out = self.function(**{**inputs, "grads": flat.view(shape)})
        assert out.shape == shape
        assert torch.equal(out.view(-1), self.function(**inputs).view(-1)[: math.prod(shape)])

    def test_coordinates_do_not_see_each_other(self):
        """A permutation of the coordinates permutes the fast weights, to the bit."""
        inputs = self.inputs(2, 1, 517, 7, 1).to(torch.float32)
        order = torch.randperm(517, generator=torch.Generator().manual_seed(0))
        want = self.function(**inputs)[:, order]
        assert torch.equal(self.function(**{**inputs, "grads": inputs["grads"][:, order]}), want)

    @pytest.mark.parametrize("p", [7.0, 4.0])
    def test_preprocessing_is_the_case_form(self, p):
        grads = draw_gradients(1, 10_000)
        grads = torch.cat([grads, grads.sign() * math.exp(-p) * torch.linspace(0.9, 1.1, 10_000)])
        error = (preprocess_gradients(grads, p) - case_form(grads, p)).abs().max()
        assert 1e-7 * math.exp(p) / p < error < 1.2e-7 * math.exp(p) / p  # log(1 + eps e^p) / p: 1.9e-5 at p = 7

    def test_only_the_inputs_are_kept(self):
        inputs = self.inputs(1, 10, 1000, 20, 1).to(torch.float32).with_grad()
        own = sum(value.nbytes for value in inputs.values() if isinstance(value, torch.Tensor))
        assert saved_bytes(lambda: self.function(**inputs)) == own
