"""Inputs of the operators on gradient coordinates, and inputs that no rounding pushes over an edge."""

import math

import torch
from against_reference import draw

from mann_kernels.reference.generate_fast_weights import preprocess_gradients


def draw_gradients(seed, *shape):
    """About a third of them small (below e^-7), which the preprocessing treats in another way."""
    return draw(seed, grads=shape)["grads"] ** 3 * 0.01


def draw_weights(seed, **shapes):
    return {name: value * 0.5 for name, value in draw(seed + 99, **shapes).items()}


def case_form(grads, p):
    """The preprocessing as Andrychowicz et al. 2016 write it, case by case."""
    large = grads.abs() >= math.exp(-p)
    magnitude = torch.where(large, grads.abs().log() / p, torch.full_like(grads, -1))
    return torch.stack([magnitude, torch.where(large, grads.sign(), grads * math.exp(p))], -1)


def far_from_edges(grads, weights, count):
    """The first `count` of these coordinates [..., P] where the preprocessing's edges and (with the weights of
    generate_fast_weights) every ReLU are so far that float32 stands on the same side as float64: among millions of units
    some are always nearer, and their gradient is that of one side or the other."""
    near = (grads.abs() * math.exp(7) - 1).abs() < 1e-5
    if "weight1" in weights:
        before = preprocess_gradients(grads, 7.0) @ weights["weight1"].mT + weights["bias1"]
        near |= (before.abs() < 1e-5).any(-1)
        before = before.relu() @ weights["weight2"].mT + weights["bias2"]
        near |= (before.abs() < 1e-5).any(-1)
    kept = grads[..., ~near.reshape(-1, grads.shape[-1]).any(0)][..., :count]
    assert kept.shape[-1] == count
    return kept
