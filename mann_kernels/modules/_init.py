"""Checks that the constructors of the layers share."""

import math

import torch
from torch import nn

#: softplus of this is 1.
ONE_BEFORE_SOFTPLUS = math.log(math.e - 1)


class HeStart:
    """Beside nn.Linear or nn.Conv2d: where `he` is set, reset_parameters draws the weight as He et al. 2015 do, for ReLUs."""

    he = False
    weight: torch.Tensor

    def reset_parameters(self) -> None:
        if self.he:
            nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        else:
            super().reset_parameters()  # type: ignore[misc]


def flag(name: str, value: bool) -> None:
    """It is True or False: "no" would be true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, want a bool")
