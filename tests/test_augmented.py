"""The augmented layers; their operators have tests of their own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mann_kernels.modules.augmented import ACTIVATIONS, AugmentedConv2d, AugmentedLinear, AugmentedSequential


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(**options):
    """Two convolutions, a plain layer, and two linear layers, for images [2, 7, 7]."""
    torch.manual_seed(0)
    kind = {"dtype": torch.float64, **options}
    return AugmentedSequential(
        AugmentedConv2d(2, 3, 3, padding=1, form="hidden", pool=True, **kind),
        AugmentedConv2d(3, 4, 3, padding=1, form="hidden", activation="tanh", **kind),
        nn.Flatten(),
        AugmentedLinear(64, 6, form="hidden", **kind),
        AugmentedLinear(6, 5, **kind),
    )


@pytest.mark.parametrize("bias", [True, False])
def test_drop_in(bias):
    pairs = [
        (nn.Linear(6, 5, bias), AugmentedLinear(6, 5, bias), torch.randn(4, 6)),
        (nn.Conv2d(2, 3, 3, 1, 1, 1, 1, bias), AugmentedConv2d(2, 3, 3, 1, 1, 1, 1, bias), torch.randn(4, 2, 5, 5)),
    ]
    for plain, augmented, x in pairs:
        augmented.load_state_dict(plain.state_dict())
        assert isinstance(augmented, type(plain))
        assert torch.equal(augmented(x), plain(x))
        torch.testing.assert_close(augmented(x, torch.zeros_like(plain.weight)), plain(x))
        assert "form='output'" in repr(augmented)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", ["hidden", "output"])
def test_the_fast_branch_is_added(form, activation):
    act = ACTIVATIONS[activation] if form == "hidden" else lambda x: x
    linear = AugmentedLinear(6, 5, form=form, activation=activation, dtype=torch.float64)
    x, fast = normal(4, 6), normal(5, 6, seed=1)
    torch.testing.assert_close(linear(x, fast), act(F.linear(x, linear.weight, linear.bias)) + act(F.linear(x, fast)))
    conv = AugmentedConv2d(2, 3, 3, padding=1, form=form, activation=activation, pool=True, dtype=torch.float64)
    x, fast = normal(4, 2, 5, 5), normal(3, 2, 3, 3, seed=1)
    both = act(F.conv2d(x, conv.weight, conv.bias, padding=1)) + act(F.conv2d(x, fast, padding=1))
    torch.testing.assert_close(conv(x, fast), F.max_pool2d(both, 2, ceil_mode=True))


def test_a_mixture_of_kernels_is_a_mixture_of_convolutions():
    """conv(x_i, sum_j a_ij M_j) = sum_j a_ij conv(x_i, M_j)"""
    conv = AugmentedConv2d(2, 3, 3, padding=1, bias=False, dtype=torch.float64)
    x, rows, mix = normal(4, 2, 6, 6), normal(5, 3, 2, 3, 3, seed=1), torch.softmax(normal(4, 5, seed=2), -1)
    each = torch.stack([F.conv2d(x, row, padding=1) for row in rows], 1)
    torch.testing.assert_close(conv(x, rows, mix), conv(x) + torch.einsum("ls,lschw->lchw", mix, each))
    read = torch.stack([conv(x[i : i + 1], torch.tensordot(mix[i], rows, 1))[0] for i in range(4)])
    torch.testing.assert_close(conv(x, rows, mix), read)


def test_zero_fast_weights_give_the_slow_network():
    net, x = network(), normal(2, 4, 2, 7, 7)
    zero = torch.zeros(2, net.num_coordinates, dtype=torch.float64)
    torch.testing.assert_close(net(x, net.split(zero)), net(x))
    rows = torch.zeros(2, 3, net.num_coordinates, dtype=torch.float64)
    torch.testing.assert_close(net(x, net.split(rows), torch.softmax(normal(2, 4, 3), -1)), net(x))


def test_tasks_do_not_see_each_other():
    net, x = network(), normal(2, 4, 2, 7, 7)
    fast = normal(2, 3, net.num_coordinates, seed=1) / 9
    mix = torch.softmax(normal(2, 4, 3, seed=2), -1)
    together = net(x, net.split(fast), mix)
    for g in range(2):
        alone = net(x[g : g + 1], net.split(fast[g : g + 1]), mix[g : g + 1])
        torch.testing.assert_close(together[g : g + 1], alone)
        without_g = net(x[g], net.split(fast[g]), mix[g], tasks=False)
        torch.testing.assert_close(together[g], without_g)


@pytest.mark.parametrize("m", [1, 3])
def test_loss_gradients_are_those_of_each_loss_alone(m):
    net, x = network(), normal(4 * m, 2, 7, 7)
    target = normal(5, seed=3)

    def losses(y):
        return (y - target).square().sum() / m

    got = net.loss_gradients(x, losses, 4)
    weights = [layer.weight for layer in net.augmented]
    for i, own in enumerate(x.split(m)):
        loss = losses(net(own, tasks=False))
        for all_of_them, one in zip(got, torch.autograd.grad(loss, weights), strict=True):
            torch.testing.assert_close(all_of_them[i], one.flatten())
    assert not any(grads.requires_grad for grads in got)


def test_loss_gradients_can_be_differentiated_again():
    net, x = network(), normal(3, 2, 7, 7)

    def weighted(grads):
        return sum((grad * grad.detach().cos()).sum() for grad in grads)

    def losses(y):
        return y.square().sum()

    weights = [layer.weight for layer in net.augmented]
    got = torch.autograd.grad(weighted(net.loss_gradients(x, losses, 3, create_graph=True)), weights)
    plain = []
    for own in x.split(1):
        plain += torch.autograd.grad(losses(net(own, tasks=False)), weights, create_graph=True)
    for a, b in zip(got, torch.autograd.grad(weighted(plain), weights), strict=True):
        torch.testing.assert_close(a, b)


def test_loss_gradients_without_grad_mode_and_with_frozen_weights():
    net, x = network(), normal(3, 2, 7, 7)
    want = net.loss_gradients(x, lambda y: y.square().sum(), 3)
    frozen = copy.deepcopy(net).requires_grad_(False)
    with torch.no_grad():
        got = frozen.loss_gradients(x, lambda y: y.square().sum(), 3)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: AugmentedLinear(2, 3, form="both"), ValueError, "form: got 'both', want one of"),
        (lambda: AugmentedLinear(2, 3, activation="elu"), ValueError, "activation: got 'elu', want one of"),
        (lambda: AugmentedConv2d(2, 3, 3, 2), ValueError, "stride: got 2, want 1"),
        (lambda: AugmentedConv2d(2, 4, 3, groups=2), ValueError, "groups: got 2, want 1"),
        (lambda: AugmentedConv2d(2, 4, 3, padding_mode="circular"), ValueError, "padding_mode: got 'circular'"),
        (lambda: AugmentedConv2d(2, 4, (3, 1)), TypeError, r"kernel_size: got \(3, 1\), want one int"),
        (
            lambda: AugmentedLinear(2, 3)(torch.ones(4, 2), torch.ones(3, 3)),
            ValueError,
            r"fast: got shape \[3, 3\], want \[\.\.\., 3, 2\]",
        ),
        (lambda: AugmentedLinear(2, 3)(torch.ones(4, 2), mix=torch.ones(4, 1)), ValueError, "mix: got weights"),
        (
            lambda: network().split(torch.ones(2, 7)),
            ValueError,
            r"fast: got shape \[2, 7\], want \[\.\.\., P\] with P=",
        ),
        (lambda: network()(normal(1, 1, 2, 7, 7), [None]), ValueError, "fast: got 1 tensors, want 4"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
