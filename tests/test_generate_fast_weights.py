import math

import pytest
import torch
from stem import Inputs, StemTests, draw, replace, run
from test_lrua_sequence import saved_bytes

import mann_kernels
from mann_kernels import reference
from mann_kernels.reference.generate_fast_weights import preprocess_gradients


def draw_gradients(seed, *shape):
    """About a third of them small (below e^-7), none so large that the logarithm hardly changes."""
    return draw(seed, grads=shape)["grads"] ** 3 * 0.01


class TestGenerateFastWeights(StemTests):
    """B and N of the drawn sizes are the gradient's, W is the number of hidden units."""

    stem = "generate_fast_weights"
    options = ({}, {"p": 4.0})
    bad = (
        (replace("grads", lambda g: g.long()), TypeError, "grads: got dtype torch.int64, want a floating"),
        (replace("grads", lambda g: g.numpy()), TypeError, "grads: got ndarray, want a torch.Tensor"),
        (replace("grads", lambda g: g.to("meta")), ValueError, "weight1: got device cpu, want meta"),
        (replace("weight1", lambda w: w.mT), ValueError, r"weight1: got shape \[2, 3\], want \[D, 2\]"),
        (replace("bias1", lambda b: b.float()), TypeError, "bias1: got dtype torch.float32, want torch.float64"),
        (replace("bias1", lambda b: b[1:]), ValueError, r"bias1: got shape \[2\], want \[D\] with D=3"),
        (replace("weight2", lambda w: w[1:]), ValueError, r"weight2: got shape \[2, 3\], want \[D, D\] with D=3"),
        (replace("bias2", lambda b: b[None]), ValueError, r"bias2: got shape \[1, 3\], want \[D\]"),
        (replace("weight3", lambda w: w[0]), ValueError, r"weight3: got shape \[3\], want \[1, D\]"),
        (replace("bias3", lambda b: b.repeat(2)), ValueError, r"bias3: got shape \[2\], want \[1\]"),
        (lambda _: {"p": 0}, ValueError, r"p: got 0, want a number in \(0, 80\]"),
        (lambda _: {"p": math.nan}, ValueError, r"p: got nan, want"),
        (lambda _: {"p": "7"}, TypeError, "p: got str, want a number"),
    )

    def inputs(self, seed, B, N, W, R, **options):
        D = W
        shapes = {"weight1": (D, 2), "bias1": (D,), "weight2": (D, D), "bias2": (D,), "weight3": (1, D), "bias3": (1,)}
        weights = {name: value * 0.5 for name, value in draw(seed + 99, **shapes).items()}
        return Inputs(grads=draw_gradients(seed, B, N), **weights, **options)
