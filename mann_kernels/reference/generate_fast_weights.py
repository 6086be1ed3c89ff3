"""MetaNet's m: fast weights from gradients, coordinate by coordinate (Munkhdalai and Yu 2017, eq. 1 and appendix A)."""

import math

import torch
import torch.nn.functional as F


def raw_features(grads, p):
    """grads [...] -> both features [...] before they are cut off at -1, and at -1 and 1."""
    eps = torch.finfo(torch.float32).eps  # whatever the dtype; keeps the logarithm finite
    return torch.log(grads.abs() + eps) / p, grads * math.exp(p)


def preprocess_gradients(grads, p, sides=None):
    """grads [...] -> features [..., 2]: log|g| / p and the sign for large gradients, -1 and g e^p for small ones.

    Andrychowicz et al. 2016, appendix A, in the form without a case distinction; the two differ by less than 2e-5.
    sides: bool [2, ...], where an earlier run cut neither off.
    """
    magnitude, sign = raw_features(grads, p)
    if sides is None:
        magnitude, sign = torch.clamp(magnitude, min=-1), torch.clamp(sign, -1, 1)
    else:
        magnitude = torch.where(sides[0], magnitude, torch.full_like(magnitude, -1))
        sign = torch.where(sides[1], sign, grads.detach().sign())
    return torch.stack([magnitude, sign], dim=-1)


def hidden_units(grads, weight1, bias1, weight2, bias2, *, p=7.0, sides=None):
    """-> both layers of hidden units [..., D]; arguments as of generate_fast_weights."""
    hidden, layers = preprocess_gradients(grads, p, None if sides is None else sides[:2]), []
    for n, (weight, bias) in enumerate(((weight1, bias1), (weight2, bias2))):
        hidden, size = F.linear(hidden, weight, bias), len(bias)
        if sides is None:
            hidden = F.relu(hidden)
        else:
            passes = sides[2 + n * size : 2 + (n + 1) * size].movedim(0, -1)
            hidden = torch.where(passes, hidden, torch.zeros_like(hidden))
        layers.append(hidden)
    return layers


def generate_fast_weights(grads, weight1, bias1, weight2, bias2, weight3, bias3, *, p=7.0, sides=None):
    """grads [...], weight1 [D,2], bias1 [D], weight2 [D,D], bias2 [D], weight3 [1,D], bias3 [1] -> fast weights [...].

    sides: bool [2 + 2*D, ...], where an earlier run let a gradient pass: at the two features, the first hidden layer, the second.
    """
    hidden = hidden_units(grads, weight1, bias1, weight2, bias2, p=p, sides=sides)[-1]
    return F.linear(hidden, weight3, bias3).squeeze(-1)
