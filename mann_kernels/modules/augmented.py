"""Layers whose output is the slow layer's plus that of fast weights ("layer augmentation", Munkhdalai & Yu 2017, section 3.3)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mann_kernels.modules._autograd import autograd_takes, called_with_autograd, with_autograd
from mann_kernels.modules._init import HeStart, flag
from mann_kernels.ops._check import at_least_one, known_options
from mann_kernels.ops.augmented_conv2d import augmented_conv2d
from mann_kernels.ops.augmented_linear import augmented_linear
from mann_kernels.reference.augmented_linear import ACTIVATIONS as OF_REFERENCE

#: The ReLU is torch's threshold, which keeps its input for the backward pass, as the tape does: no tensor more.
ACTIVATIONS = {**OF_REFERENCE, "relu": lambda z: F.threshold(z, 0.0, 0.0)}


class Tape:
    """Where a pass without fast weights leaves what the gradients of its slow weights are made of.

    Attributes:
        inputs, outputs: of the slow branch of each augmented layer, in order.
    """

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []

    def note(self, x: torch.Tensor, z: torch.Tensor) -> None:
        """One layer's slow branch, z = slow(x)."""
        self.inputs.append(x)
        self.outputs.append(z if z.requires_grad else z.requires_grad_())


class _Augmented(HeStart):
    """Methods that the augmented layers have beside those of nn.Linear and nn.Conv2d, which they extend.

    A layer's weights are read when it is called, and once: hooks, parametrizations and shards put them there then.
    """

    def _set_form(self, form: str, activation: str) -> None:
        known_options(form=form, activation=activation)
        self.form, self.activation = form, activation

    @property
    def fast_shape(self) -> torch.Size:
        """The shape of weight, and so of a fast weight, by the sizes of the layer: weight itself may be a shard."""
        raise NotImplementedError

    def _checked(self, fast, mix) -> None:
        if fast is None and mix is not None:
            raise ValueError("mix: got weights for a mixture without fast weights, want fast as well")
        if isinstance(fast, torch.Tensor) and fast.shape[-len(self.fast_shape) :] != self.fast_shape:
            raise ValueError(
                f"fast: got shape {list(fast.shape)}, want [..., {', '.join(map(str, self.fast_shape))}], "
                "ending in the shape of weight"
            )

    def _slow_only(self, x: torch.Tensor, tape: Tape | None) -> torch.Tensor:
        """The layer without fast weights."""
        z = self.slow(x)
        if tape is not None:
            tape.note(x, z)
        return self.activate(z)

    def slow(self, x: torch.Tensor) -> torch.Tensor:
        """The slow branch alone, before its activation."""
        raise NotImplementedError

    def activate(self, z: torch.Tensor) -> torch.Tensor:
        """From the slow branch alone, before its activation, to the layer's output: what zero fast weights give."""
        return ACTIVATIONS[self.activation](z) if self.form == "hidden" else z


class AugmentedLinear(_Augmented, nn.Linear):
    """nn.Linear that takes fast weights beside its own (slow) ones (Munkhdalai & Yu 2017, section 3.3).

    The arguments in_features, out_features, bias, device and dtype are nn.Linear's, and so are the parameters.

    Args:
        form: "output": `x W^T + b + x F^T`, no activation, so that without fast weights it is nn.Linear;
            "hidden": `act(x W^T + b) + act(x F^T)`, and `act(x W^T + b)` without fast weights.
        activation: "relu", "gelu", "tanh" or "identity", of the hidden form.

    Shapes: x, fast and mix as in mann_kernels.augmented_linear; without fast x is [..., in_features]. With `slow=False` fast
    weights stand alone, without W and b.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it wants.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *,
        form: str = "output", activation: str = "relu",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        at_least_one(in_features=in_features, out_features=out_features)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._set_form(form, activation)

    def forward(
        self,
        x: torch.Tensor,
        fast: torch.Tensor | None = None,
        mix: torch.Tensor | None = None,
        *,
        slow: bool = True,
        tape: Tape | None = None,
    ) -> torch.Tensor:
        self._checked(fast, mix)
        if fast is None:
            return self._slow_only(x, tape)
        weight, bias = (self.weight, self.bias) if slow else (torch.zeros_like(self.weight), None)
        return augmented_linear(x, weight, fast, mix, bias, form=self.form, activation=self.activation)

    @property
    def fast_shape(self) -> torch.Size:
        return torch.Size([self.out_features, self.in_features])

    def slow(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the slow layer's `x W^T + b`."""
        return F.linear(x, self.weight, self.bias)

    def weight_gradients(self, x: torch.Tensor, dz: torch.Tensor, n: int) -> torch.Tensor:
        """Gradients of n losses: x [n*m, I], dz [n*m, O], the gradients at `slow(x)` -> [n, O*I], each over its m rows."""
        x, dz = (tensor.view(n, -1, tensor.shape[1]) for tensor in (x, dz))
        return torch.bmm(dz.mT, x).flatten(1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.form!r}, activation={self.activation!r}"


class AugmentedConv2d(_Augmented, nn.Conv2d):
    """nn.Conv2d that takes fast weights beside its own (slow) ones (Munkhdalai & Yu 2017, section 3.3).

    The arguments in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device and dtype
    are nn.Conv2d's, and so are the parameters, for what mann_kernels.augmented_conv2d covers: square kernels, stride 1, equal
    zero padding on all sides, no dilation, no groups.

    Args:
        form: "output" or "hidden", as in AugmentedLinear.
        activation: as in AugmentedLinear.
        pool: a 2 x 2 max-pool in steps of 2 follows, of the sum; it keeps the odd last row and column (ceil mode).

    Shapes: x, fast and mix as in mann_kernels.augmented_conv2d; without fast x is [..., C, height, width].

    Raises:
        TypeError, ValueError: naming the argument, what it got and what it wants.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0, dilation: int = 1,
        groups: int = 1, bias: bool = True, padding_mode: str = "zeros", *,
        form: str = "output", activation: str = "relu", pool: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        wanted = {"stride": (stride, 1), "dilation": (dilation, 1), "groups": (groups, 1)}
        for name, (got, want) in (wanted | {"padding_mode": (padding_mode, "zeros")}).items():
            if got != want and got != (want, want):
                raise ValueError(f"{name}: got {got!r}, want {want!r}, the only one that augmented_conv2d has")
        for name, size in {"kernel_size": kernel_size, "padding": padding}.items():
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{name}: got {size!r}, want one int, the same in both directions")
        at_least_one(in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size)
        if padding < 0:
            raise ValueError(f"padding: got {padding}, want at least 0")
        flag("pool", pool)
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, kernel_size, padding=padding, bias=bias, **kind)
        self._set_form(form, activation)
        self.pool = pool

    def forward(
        self,
        x: torch.Tensor,
        fast: torch.Tensor | None = None,
        mix: torch.Tensor | None = None,
        *,
        slow: bool = True,
        tape: Tape | None = None,
    ) -> torch.Tensor:
        self._checked(fast, mix)
        if fast is None:
            return self._slow_only(x, tape)
        weight, bias = (self.weight, self.bias) if slow else (torch.zeros_like(self.weight), None)
        options: dict[str, Any] = {
            "padding": self.padding[0],
            "form": self.form,
            "activation": self.activation,
            "pool": self.pool,
        }
        return augmented_conv2d(x, weight, fast, mix, bias, **options)

    @property
    def fast_shape(self) -> torch.Size:
        return torch.Size([self.out_channels, self.in_channels, *self.kernel_size])

    def _slow_only(self, x: torch.Tensor, tape: Tape | None) -> torch.Tensor:
        if x.dim() <= 4:
            return super()._slow_only(x, tape)
        return super()._slow_only(x.flatten(0, -4), tape).unflatten(0, x.shape[:-3])

    def slow(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution with the slow weights and the bias, of images [n, C, height, width]."""
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)

    def activate(self, z: torch.Tensor) -> torch.Tensor:
        y = super().activate(z)
        return F.max_pool2d(y, 2, ceil_mode=True) if self.pool else y

    def weight_gradients(self, x: torch.Tensor, dz: torch.Tensor, n: int) -> torch.Tensor:
        """Gradients of n losses: x [n*m, C, ...], dz [n*m, O, ...], at `slow(x)` -> [n, O*C*k*k], each over its m images."""
        # unfold takes one image after the other, but all channels of one at once: so the images as one image
        patches = F.unfold(x.flatten(0, 1), self.kernel_size, padding=self.padding)  # type: ignore[arg-type]  # no string here
        # a product for each image, then the sum over the m of a loss: the patches stay where unfold put them
        each = torch.bmm(dz.flatten(2), patches.view(len(x), -1, patches.shape[1]).mT).flatten(1)
        return each if len(each) == n else each.view(n, -1, each.shape[1]).sum(1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.form!r}, activation={self.activation!r}, pool={self.pool}"


class AugmentedSequential(nn.Sequential):
    """nn.Sequential for G tasks of L examples each, whose augmented layers take fast weights.

    `forward(x, fast, mix)`: x [G, L, ...]; fast is None or a sequence with one tensor for each augmented layer, in order:
    [G, *weight.shape], one for each task, or with mix [G, L, S] the rows [G, S, *weight.shape] of a memory. The other
    layers see [G*L, ...]. With `slow=False` the augmented layers have fast weights alone, with `tasks=False` there is one task and
    all tensors lack G.
    """

    def __init__(self, *layers: nn.Module):
        super().__init__(*layers)

    @property
    def augmented(self) -> list[AugmentedLinear | AugmentedConv2d]:
        """The layers that take fast weights, in order."""
        return [layer for layer in self if isinstance(layer, (AugmentedLinear, AugmentedConv2d))]

    @property
    def num_coordinates(self) -> int:
        """P: how many fast weights there are."""
        return sum(layer.fast_shape.numel() for layer in self.augmented)

    def split(self, fast: torch.Tensor) -> list[torch.Tensor]:
        """[..., P] -> a view [..., *weight.shape] for each augmented layer."""
        shapes = [layer.fast_shape for layer in self.augmented]
        sizes = [shape.numel() for shape in shapes]
        if fast.shape[-1] != sum(sizes):
            raise ValueError(f"fast: got shape {list(fast.shape)}, want [..., P] with P={sum(sizes)}")
        parts = fast.split(sizes, -1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]

    def forward(
        self,
        x: torch.Tensor,
        fast: Sequence[torch.Tensor] | None = None,
        mix: torch.Tensor | None = None,
        *,
        slow: bool = True,
        tasks: bool = True,
        tape: Tape | None = None,
    ) -> torch.Tensor:
        rest = None if fast is None else list(fast)
        if rest is not None and len(rest) != len(self.augmented):
            raise ValueError(f"fast: got {len(rest)} tensors, want {len(self.augmented)}, one for each augmented layer")
        lead = x.shape[:2]
        flat = not tasks  # whether x is [G*L, ...], as all layers but those with fast weights take it
        ours = True  # whether the next layer would get a tensor that is the caller's, or that autograd has kept
        for layer in self:
            augmented = isinstance(layer, _Augmented)
            if tasks and flat == (augmented and rest is not None):
                x, flat = x.unflatten(0, lead) if flat else x.flatten(0, 1), not flat
            if not augmented:
                x, ours = layer(x.clone() if ours else x), False  # it may write into what it gets
            elif rest is None:
                x, ours = layer(x, tape=tape), not getattr(layer, "pool", False)
            else:
                x, ours = layer(x, rest.pop(0), mix, slow=slow), False
        return x.unflatten(0, lead) if tasks and flat else x

    @torch.compiler.disable  # a gradient taken within the forward pass: torch.compile runs this part as it is
    def loss_gradients(
        self, x: torch.Tensor, losses: Callable[[torch.Tensor], torch.Tensor], n: int, *, create_graph: bool = False
    ) -> list[torch.Tensor]:
        """The gradients of many losses with respect to the slow weights of the augmented layers, from one pass.

        Args:
            x: [n*m, ...]: m examples of each loss, one loss after the other.
            losses: from outputs [n*m, ...] of the slow network to the sum of the losses; each must depend on its own
                examples alone, so no layer may mix examples (batch normalisation before the first augmented layer may).
            n: how many losses there are.
            create_graph: the result can be differentiated again; else it is a constant.

        Returns:
            [n, P_i] for each augmented layer, P_i the number of its weights.

        A layer's gradient for one loss is closed in the layer's inputs and the gradients at its outputs, and those of all
        losses are the gradients of their sum. Within torch.inference_mode too.
        """
        tape = Tape()
        with with_autograd():
            output = called_with_autograd(self, autograd_takes(x), tasks=False, tape=tape)
            gradients = _differentiated(losses(output), tape.outputs, create_graph)
        with torch.set_grad_enabled(create_graph):
            triples = zip(self.augmented, tape.inputs, gradients, strict=True)
            return [layer.weight_gradients(h, dz, n) for layer, h, dz in triples]


def _differentiated(total: torch.Tensor, outputs: list[torch.Tensor], create_graph: bool) -> Sequence[torch.Tensor]:
    """The gradients of the losses' sum at the layers' outputs."""
    found: Sequence[torch.Tensor | None] = [None]
    if total.requires_grad:
        found = torch.autograd.grad(total, outputs, create_graph=create_graph, allow_unused=True)
    if any(grad is None for grad in found):
        raise RuntimeError(
            "losses: got some that have no gradient with respect to a layer's output, want all parts between them"
            " differentiable; quantized modules are not"
        )
    return found  # type: ignore[return-value]
