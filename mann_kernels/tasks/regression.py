"""Functions to be learned from a few points: from a Gaussian process, and sinusoids."""

import math
from typing import Any

import torch
import torch.nn.functional as F

from mann_kernels.tasks._kind import check_sizes, numbers, on_cpu, uniform
from mann_kernels.tasks.episodes import Episodes, before
from mann_kernels.tasks.few_shot import Tasks

#: Which points of an episode the scores tell apart.
POINTS = (1, 2, 5, 10, 20, 50, 100)
HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)


class GPRegression:
    """Functions drawn from a Gaussian process, point by point (Santoro et al. 2016, section 4.3): input (x_t, y_{t-1}), answer y_t.

    The kernel is exp(-|x - x'|^2 / (2 scale^2)), the points are uniform in [-2, 2]^dimensions, y has normal noise.

    Args:
        dimensions: of x.
        length: points of a function.
        scale: over which the function changes.
        noise: standard deviation; with none the exact likelihood would grow without bound.

    The output is (mean, raw) [T, B, 2] of a normal distribution, its standard deviation softplus(raw) + 1e-3.
    """

    output_size = 2

    def __init__(self, dimensions: int = 1, length: int = 50, *, scale: float = 1.0, noise: float = 0.1):
        if dimensions not in (1, 2, 3):
            raise ValueError(f"dimensions: got {dimensions}, want 1, 2 or 3")
        check_sizes(length=length)
        for name, value in {"scale": scale, "noise": noise}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: got {value}, want more than 0, and finite")
        self.dimensions, self.length, self.scale, self.noise = dimensions, length, scale, noise
        self.input_size = dimensions + 1

    @on_cpu
    def sample(self, B: int, generator: torch.Generator) -> Episodes:
        """B functions; `exact` is the negative log-likelihood [T, B] of each point under the true process given those before."""
        kind: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
        x = torch.rand(B, self.length, self.dimensions, **kind) * 4 - 2
        covariance = torch.exp(torch.cdist(x, x).square() / (-2 * self.scale**2))
        covariance.diagonal(dim1=-2, dim2=-1).add_(self.noise**2)
        # y = L z: given the points before, y_t is normal with standard deviation L_tt, and z_t is how many of those it is off.
        factor, z = torch.linalg.cholesky(covariance), torch.randn(B, self.length, 1, **kind)
        exact = factor.diagonal(dim1=-2, dim2=-1).log() + 0.5 * z[..., 0].square() + HALF_LOG_2_PI
        x, y = numbers(x.transpose(0, 1)), numbers((factor @ z).transpose(0, 1))
        return Episodes(torch.cat([x, before(y)], 2), y[..., 0], exact=numbers(exact.t()))

    def nll(self, output: torch.Tensor, episodes: Episodes) -> torch.Tensor:
        """The negative log-likelihood [T, B] of each point."""
        deviation = F.softplus(output[..., 1]) + 1e-3
        return ((episodes.y - output[..., 0]) / deviation).square() / 2 + deviation.log() + HALF_LOG_2_PI

    def loss(self, output: torch.Tensor, episodes: Episodes) -> torch.Tensor:
        """The mean negative log-likelihood of a point."""
        return self.nll(output, episodes).mean()

    def scores(self, output: torch.Tensor, episodes: Episodes) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Sum for each function [B] the negative log-likelihood over its points, and at single points; `exact` is the
        true process's."""
        assert episodes.exact is not None
        found = {}
        for name, nll in (("nll", self.nll(output, episodes)), ("exact", episodes.exact)):
            points = torch.full((nll.shape[1],), self.length, device=nll.device)
            found[name] = nll.sum(0), points
            found |= {f"{name}_{k}": (nll[k - 1], torch.ones_like(nll[k - 1])) for k in POINTS if k <= self.length}
        return found


class Sinusoids:
    """y = amplitude * sin(x + phase) from a few points (Finn et al. 2017, section 5.1), with the amplitude and phase as descriptor.

    Amplitudes are uniform in 0.1..5, phases in 0..pi, x in -5..5.

    Args:
        shots: support points of a task.
        queries: query points of a task.
    """

    input_size = output_size = 1
    descriptor_size = 2

    def __init__(self, shots: int = 10, queries: int = 10):
        check_sizes(shots=shots, queries=queries)
        self.shots, self.queries = shots, queries

    @on_cpu
    def sample(self, G: int, generator: torch.Generator) -> Tasks:
        """G tasks: x and y [G, points, 1], descriptor [G, 2]."""
        amplitude = uniform(G, 1, 1, generator=generator) * 4.9 + 0.1
        phase = uniform(G, 1, 1, generator=generator) * math.pi
        x = uniform(G, self.shots + self.queries, 1, generator=generator) * 10 - 5
        y, cut = amplitude * torch.sin(x + phase), self.shots
        x, y, amplitude, phase = (numbers(tensor) for tensor in (x, y, amplitude, phase))
        return Tasks(x[:, :cut], y[:, :cut], x[:, cut:], y[:, cut:], torch.cat([amplitude, phase], 2)[:, 0])

    def loss(self, output: torch.Tensor, tasks: Tasks) -> torch.Tensor:
        """The mean squared error of the queries."""
        return F.mse_loss(output, tasks.query_y)

    def scores(self, output: torch.Tensor, tasks: Tasks) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Squared error and queries of each task [G]."""
        error = (output - tasks.query_y).square().sum((1, 2))
        return {"squared_error": (error, torch.full_like(error, self.queries))}
