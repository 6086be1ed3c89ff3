"""The one tolerance rule by which every kernel is judged."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Accuracy:
    """How far a result is from the float64 reference, `error`, and how far it may be, `budget`. Raises nothing; see `ok`."""

    error: float
    budget: float

    @property
    def ok(self) -> bool:
        return self.error <= self.budget


def accuracy(actual: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor) -> Accuracy:
    """Largest absolute error of `actual` against `exact`, and its budget.

    Args:
        actual: what a kernel computed.
        same_dtype: what the reference computes in the kernel's dtype.
        exact: what the reference computes in float64 from the same (rounded) inputs.

    The budget is twice the sum of the reference's own error in that dtype and 4 eps of the largest magnitude, so that it
    follows the conditioning of the problem. In float64 the reference is its own yardstick and shows no error: 10,000 eps of
    the largest magnitude stand for it there, far below what any mistake in a formula makes. NaN and infinity must
    stand where they stand in `exact`: if they do not, the error is infinite.

    Raises:
        ValueError: shapes that differ.
    """
    if actual.shape != exact.shape:
        raise ValueError(f"actual: got shape {list(actual.shape)}, want {list(exact.shape)}")
    eps, is_float64 = torch.finfo(actual.dtype).eps, actual.dtype == torch.float64
    actual, same_dtype, exact = (tensor.detach().double() for tensor in (actual, same_dtype, exact))
    if exact.numel() == 0:
        return Accuracy(0.0, 0.0)
    finite = exact.isfinite()
    if (
        not torch.equal(actual[~finite].nan_to_num(), exact[~finite].nan_to_num())
        or not actual[finite].isfinite().all()
    ):
        return Accuracy(float("inf"), 0.0)
    if not finite.any():
        return Accuracy(0.0, 0.0)
    actual, same_dtype, exact = actual[finite], same_dtype[finite], exact[finite]
    largest = exact.abs().max().item()
    own = 1e4 * eps * largest if is_float64 else (same_dtype - exact).abs().nan_to_num(posinf=0.0).max().item()
    return Accuracy((actual - exact).abs().max().item(), 2 * (own + 4 * eps * largest))


def assert_accurate(actual: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor, name: str = "result") -> None:
    """Holds a result to the one tolerance rule.

    Args:
        actual: the result, as in `accuracy`.
        same_dtype: the reference's in the same dtype.
        exact: the reference's in float64.
        name: what the message calls it.

    Raises:
        AssertionError: with the error and its budget, unless `accuracy(actual, same_dtype, exact)` is within its budget.
        ValueError: shapes that differ.
    """
    found = accuracy(actual, same_dtype, exact)
    if not found.ok:
        raise AssertionError(
            f"{name}: error {found.error:.3e} against float64, budget {found.budget:.3e} ({actual.dtype})"
        )
