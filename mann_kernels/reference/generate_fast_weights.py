"""MetaNet's m: fast weights from gradients, coordinate by coordinate (Munkhdalai and Yu 2017, eq. 1 and appendix A)."""

import math

import torch
import torch.nn.functional as F


def preprocess_gradients(grads, p):
    """grads [...] -> features [..., 2]: log|g| / p and the sign for large gradients, -1 and g e^p for small ones.

    Andrychowicz et al. 2016, appendix A, in the form without a case distinction: eps, that of float32 whatever the dtype,
    keeps the logarithm finite, and the two forms differ by less than 2e-5.
    """
    eps = torch.finfo(torch.float32).eps
    magnitude = torch.clamp(torch.log(grads.abs() + eps) / p, min=-1)
    sign = torch.clamp(grads * math.exp(p), -1, 1)
    return torch.stack([magnitude, sign], dim=-1)


def generate_fast_weights(grads, weight1, bias1, weight2, bias2, weight3, bias3, *, p=7.0):
    """grads [...], weight1 [D,2], bias1 [D], weight2 [D,D], bias2 [D], weight3 [1,D], bias3 [1] -> fast weights [...]."""
    hidden = F.relu(F.linear(preprocess_gradients(grads, p), weight1, bias1))
    hidden = F.relu(F.linear(hidden, weight2, bias2))
    return F.linear(hidden, weight3, bias3).squeeze(-1)
