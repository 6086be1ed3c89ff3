"""Validation shared by the public functions: an error names the argument, what it got and what it wants."""

import functools
import math
from collections.abc import Callable

import torch

#: The values of every option that is a string, of operators and layers. The place of an activation is its number in a kernel.
OPTIONS = {
    "lru": ("per_head", "shared"),
    "erase": ("least", "all"),
    "write": ("key", "add"),
    "squash": ("tanh", "identity"),
    "form": ("hidden", "output"),
    "activation": ("relu", "gelu", "tanh", "identity"),
    "controller": ("lstm", "feedforward"),
    "variant": ("metanet-", "metanet", "metanet+"),
    "summarizer": ("lstm", "mean"),
}


#: Signatures that `once` remembers of a function; then it begins anew.
MOST_REMEMBERED = 1000


def once(check: Callable[..., None]) -> Callable[..., None]:
    """Make `check(*tensors and options)` remember what passed: it depends on shapes, dtypes and devices alone, and most calls
    are like one before."""
    passed: set[tuple] = set()

    @functools.wraps(check)
    def checked(*given) -> None:
        if torch.compiler.is_compiling():
            return check(*given)
        try:
            signature = tuple([(t.shape, t.dtype, t.device) if isinstance(t, torch.Tensor) else t for t in given])
            if signature in passed:
                return None
        except TypeError:  # a symbolic size, or what is no tensor
            return check(*given)
        check(*given)
        if len(passed) >= MOST_REMEMBERED:
            passed.clear()
        passed.add(signature)
        return None

    return checked


def same_kind(**tensors: torch.Tensor | None) -> None:
    """All are tensors of one floating dtype on one device (None is skipped)."""
    first_name = dtype = device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, want a torch.Tensor")
        if dtype is not tensor.dtype and not tensor.is_floating_point():
            raise TypeError(f"{name}: got dtype {tensor.dtype}, want a floating-point dtype")
        if first_name is None:
            first_name, dtype, device = name, tensor.dtype, tensor.device
        elif tensor.dtype is not dtype:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, want {dtype}, the dtype of {first_name}")
        elif tensor.device != device:
            raise ValueError(f"{name}: got device {tensor.device}, want {device}, the device of {first_name}")


def shape(sizes: dict[str, int], name: str, tensor: torch.Tensor | None, *want: str) -> None:
    """The tensor has the shape spelt by `want`, e.g. ("B", "N", "W"); sizes seen first are remembered in `sizes`.

    A letter that is not yet known is taken from this tensor. An entry may be a name of a size computed before ("4H").
    """
    if tensor is None:
        return
    got = tensor.shape
    if len(got) != len(want):
        raise ValueError(f"{name}: got shape {list(got)}, want [{', '.join(want)}]")
    for size, letter in zip(got, want, strict=True):
        if size != sizes.setdefault(letter, size):
            known = ", ".join(f"{letter}={sizes[letter]}" for letter in dict.fromkeys(want) if letter in sizes)
            raise ValueError(f"{name}: got shape {list(got)}, want [{', '.join(want)}] with {known}")


def not_empty(sizes: dict[str, int], *letters: str) -> None:
    """Sizes that must be at least 1 (an empty batch or an episode of no steps is fine; no slots is not)."""
    words = {"N": "slots", "W": "columns", "R": "heads", "H": "hidden units", "D": "hidden units"}
    for letter in letters:
        if sizes[letter] < 1:
            raise ValueError(f"the operators need at least one of each: got {sizes[letter]} {words[letter]} ({letter})")


def heads_fit(sizes: dict[str, int]) -> None:
    """Each of the R heads takes a least-used slot of its own."""
    if sizes["R"] > sizes["N"]:
        raise ValueError(
            f"num_heads: got {sizes['R']} heads (R) for {sizes['N']} slots (N), want num_heads <= num_slots: "
            "exactly R least-used slots are chosen at every step"
        )


def number(name: str, value: float, least: float = -math.inf, most: float = math.inf) -> None:
    """A finite number in a range that has its ends."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, want a number")
    if least <= value <= most and -math.inf < value < math.inf:  # torch.compile traces no isfinite
        return
    want = "a finite number"
    want += (
        f" in [{least:g}, {most:g}]"
        if math.isfinite(most)
        else f" of at least {least:g}"
        if math.isfinite(least)
        else ""
    )
    raise ValueError(f"{name}: got {value}, want {want}")


def eps_of_cosine(eps: float) -> None:
    """What stands inside the root of a cosine's denominator."""
    number("eps", eps, 0)


def preprocessing(p: float) -> None:
    """Gradients count as small below e^-p; e^p itself must be a float32."""
    if not isinstance(p, (int, float)) or isinstance(p, bool):
        raise TypeError(f"p: got {type(p).__name__}, want a number")
    if not 0 < p <= 80:
        raise ValueError(f"p: got {p}, want a number in (0, 80]")


def known_options(**chosen: str) -> None:
    """Refuse a value that its option does not have."""
    for name, value in chosen.items():
        if value not in OPTIONS[name]:
            raise ValueError(f"{name}: got {value!r}, want one of {', '.join(map(repr, OPTIONS[name]))}")


def at_least_one(**sizes: int) -> None:
    """Refuse a size that is no integer, or below 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name}: got {type(size).__name__}, want an int")
        if size < 1:
            raise ValueError(f"{name}: got {size}, want at least 1")


def step_lengths(lengths: torch.Tensor | None, batch: int, device: torch.device) -> None:
    """lengths [B] counts the real steps of each example. Its values are not read here (that would synchronise a GPU):
    below 0 means no step at all and above T means all steps, in every implementation."""
    if lengths is None:
        return
    if not isinstance(lengths, torch.Tensor) or lengths.dtype != torch.int64:
        got = lengths.dtype if isinstance(lengths, torch.Tensor) else type(lengths).__name__
        raise TypeError(f"lengths: got {got}, want an int64 tensor [B]")
    if lengths.device != device:
        raise ValueError(f"lengths: got device {lengths.device}, want {device}")
    shape({"B": batch}, "lengths", lengths, "B")
