import pytest
import torch
from against_reference import Inputs, OperatorTests, compare, replace
from coordinates import draw_gradients, draw_weights, far_from_edges
from test_generate_fast_weights import BAD_GRADIENTS
from test_lrua_sequence import saved_bytes


class TestSummarizeGradients(OperatorTests):
    """R of the drawn sizes is the number of support gradients, B and N are a gradient's, W is the number of hidden units."""

    op = "summarize_gradients"
    drawn = ("p",)
    movable = ("weight_ih", "weight_hh", "bias", "weight_out", "bias_out")
    options = ({}, {"p": 4.0})
    bad = (
        *BAD_GRADIENTS,
        (replace("grads", lambda g: g[:0]), ValueError, r"grads: got shape \[0, 2, 5\], want \[T, ...\] with at least"),
        (replace("grads", lambda g: g.sum()), ValueError, r"grads: got shape \[\], want \[T, ...\]"),
        (
            replace("weight_ih", lambda w: w[1:]),
            ValueError,
            r"weight_ih: got shape \[11, 2\], want \[4D, 2\] with 4D=12",
        ),
        (replace("weight_hh", lambda w: w.mT), ValueError, r"weight_hh: got shape \[3, 12\], want \[4D, D\]"),
        (replace("bias", lambda b: b[None]), ValueError, r"bias: got shape \[1, 12\], want \[4D\]"),
        (replace("bias", lambda b: b.float()), TypeError, "bias: got dtype torch.float32, want torch.float64"),
        (replace("weight_out", lambda w: w[0]), ValueError, r"weight_out: got shape \[3\], want \[1, D\]"),
        (replace("bias_out", lambda b: b.to("meta")), ValueError, "bias_out: got device meta, want cpu"),
    )

    def inputs(self, seed, B, N, W, R, **options):
        shapes = {"weight_ih": (4 * W, 2), "weight_hh": (4 * W, W), "bias": (4 * W,), "weight_out": (1, W)}
        weights = draw_weights(seed, **shapes, bias_out=(1,))
        return Inputs(grads=draw_gradients(seed, R, B, N), **weights, **options)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("count", [1, 7, 129, 152_448])
    def test_paper_size(self, count, dtype):
        inputs = self.inputs(3, 1, count + count // 50 + 8, 20, 5)
        inputs["grads"] = inputs["grads"].to(dtype).double()
        inputs["grads"] = far_from_edges(inputs["grads"][:, 0], inputs, count)
        compare(self.op, inputs, dtype)

    def test_many_support_gradients(self):
        compare(self.op, self.inputs(1, 1, 37, 6, 40), torch.float32)

    @pytest.mark.parametrize("shape", [(), (3,), (2, 3, 2), (0, 5)])
    def test_any_shape(self, shape):
        inputs = self.inputs(1, 4, 6, 5, 3)
        count = torch.Size(shape).numel()
        flat = inputs["grads"].flatten(1)[:, :count]
        out = self.function(**{**inputs, "grads": flat.reshape(3, *shape)})
        assert out.shape == shape
        assert torch.equal(out.view(-1), self.function(**inputs).view(-1)[:count])

    def test_coordinates_do_not_see_each_other(self):
        """A permutation of the coordinates permutes the fast weights, to the bit; one of the support examples does not."""
        inputs = self.inputs(2, 1, 517, 7, 3).to(torch.float32)
        order = torch.randperm(517, generator=torch.Generator().manual_seed(0))
        want = self.function(**inputs)
        assert torch.equal(self.function(**{**inputs, "grads": inputs["grads"][..., order]}), want[:, order])
        assert not torch.allclose(self.function(**{**inputs, "grads": inputs["grads"].flip(0)}), want, rtol=1e-3)

    def test_only_the_inputs_are_kept(self):
        inputs = self.inputs(1, 10, 1000, 20, 5).to(torch.float32).with_grad()
        own = sum(value.nbytes for value in inputs.values() if isinstance(value, torch.Tensor))
        assert saved_bytes(lambda: self.function(**inputs)) == own
