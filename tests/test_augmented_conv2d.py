import pytest
import torch
import torch.nn.functional as F
from against_reference import DTYPES, Inputs, compare, replace
from test_augmented_linear import BAD_LAYER, FORMS, LayerTests, draw_layer

import mann_kernels
from mann_kernels.ops._augment import ACTIVATION


class TestAugmentedConv2d(LayerTests):
    """B, W and R of the drawn sizes are L, O and S, and N is C, but at most 40: two vectors and a part of one."""

    op = "augmented_conv2d"
    drawn = ("kind", "bias", "form", "activation", "size", "kernel", "padding", "pool")
    movable = ("weight", "bias", "fast", "mix")
    options = (
        {"pool": True},
        {"kind": "task mixture", "form": "output", "pool": True, "padding": 0},
        {"kind": "shared", "activation": "tanh", "bias": False, "kernel": 1},
        {"kind": "task shared", "activation": "identity", "kernel": 5, "padding": 2, "pool": True},
        {"kind": "per example"},
        {"kind": "per task", "activation": "gelu", "kernel": 2},
        {"kind": "task mixture", "activation": "gelu", "pool": True},
    )
    bad = (
        *BAD_LAYER,
        (replace("x", lambda x: x[:, :, 1:]), ValueError, r"x: got shape .*, want \[G, L, C, H, W\] with .*C=5"),
        (replace("weight", lambda w: w[..., :1]), ValueError, r"weight: got shape .* want \[O, C, k, k\] with .*k=2"),
        (lambda _: {"padding": -1}, ValueError, "padding: got -1, want at least 0"),
        (lambda i: {"padding": 0, "x": i["x"][..., :1]}, ValueError, r"padding: got 0, .* as the kernel, 2"),
        (lambda _: {"padding": "same"}, TypeError, "padding: got str, want an int"),
    )

    large = (
        "x, layer = torch.randn(1500, 48, 2, 2).requires_grad_(), (64, 48, 3, 3);"
        "function = lambda *tensors: mann_kernels.augmented_conv2d(*tensors, pool=True)"
    )

    @property
    def small(self):
        return self.inputs(0, 2, 5, 3, 2, **self.options[-1], size=(2, 2), kernel=2)

    @staticmethod
    def slow(inputs):
        x = inputs["x"]
        images = x.reshape(-1, *x.shape[-3:])
        z = F.conv2d(images, inputs["weight"], inputs["bias"], padding=inputs["padding"])
        y = z if inputs.get("form") == "output" else z.relu()
        y = F.max_pool2d(y, 2, ceil_mode=True) if inputs.get("pool") else y
        return y.reshape(*x.shape[:-3], *y.shape[1:])

    def inputs(self, seed, B, N, W, R, kind="mixture", bias=True, size=(5, 4), kernel=3, padding=1, **options):
        C = min(N, 40)
        drawn = draw_layer(seed, kind, (2, B), R, (W, C, kernel, kernel), (C, *size), bias)
        return Inputs(drawn, padding=padding, **options)

    @pytest.mark.parametrize("kind", FORMS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_forms(self, kind, dtype):
        """Every form, hidden and output, with every activation."""
        for activation in ACTIVATION:
            for pool in (False, True):
                compare(self.op, self.inputs(1, 5, 3, 18, 3, kind, activation=activation, pool=pool), dtype)
                compare(self.op, self.inputs(2, 5, 20, 7, 3, kind, form="output", pool=pool), dtype)

    @pytest.mark.parametrize("size", [1, 2, 7, 28])
    def test_pooling_is_in_ceil_mode(self, size):
        for channels in (1, 17):
            inputs = self.inputs(size, 2, channels, 5, 2, size=(size, size), pool=True)
            assert self.function(**inputs).shape[-2:] == ((size + 1) // 2, (size + 1) // 2)
            compare(self.op, inputs, torch.float32)

    @pytest.mark.parametrize("kernel", [1, 2, 3, 5])
    @pytest.mark.parametrize("padding", [0, 1, 3])
    def test_kernels_and_padding(self, kernel, padding):
        for channels in (2, 40):
            for size in ((6, 9), (14, 13)):
                inputs = self.inputs(1, 5, channels, 20, 2, size=size, kernel=kernel, padding=padding, pool=padding > 0)
                compare(self.op, inputs, torch.float32)

    def test_a_convolution_is_linear_in_its_weight(self):
        """conv(x, sum_s a_s M_s) = sum_s a_s conv(x, M_s)."""
        inputs = self.inputs(3, 4, 6, 5, 3, form="output", bias=False)
        each = torch.stack([F.conv2d(inputs["x"], row, padding=1) for row in inputs["fast"]], dim=1)
        slow = F.conv2d(inputs["x"], inputs["weight"], padding=1)
        want = slow + torch.einsum("ls,lsohw->lohw", inputs["mix"], each)
        torch.testing.assert_close(self.function(**inputs), want)

    def test_of_equal_pixels_the_first_gets_the_gradient(self):
        x = torch.ones(1, 1, 4, 4, requires_grad=True)
        weight = torch.ones(1, 1, 1, 1)
        mann_kernels.augmented_conv2d(x, weight, weight, padding=0, pool=True).sum().backward()
        want = torch.zeros(4, 4)
        want[::2, ::2] = 2
        assert torch.equal(x.grad[0, 0], want)

    def test_images_without_gradient(self):
        inputs = self.inputs(2, 3, 4, 5, 2, pool=True)
        weight = inputs["weight"].requires_grad_()
        with_x = self.function(**{**inputs, "x": inputs["x"].clone().requires_grad_()}).sum()
        want = torch.autograd.grad(with_x, weight)[0]
        assert torch.equal(torch.autograd.grad(self.function(**inputs).sum(), weight)[0], want)
