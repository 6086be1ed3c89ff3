import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from against_reference import DTYPES, Inputs, OperatorTests, compare, draw, loss_of, replace, run

from mann_kernels.ops._augment import ACTIVATION

#: How fast weights may come: one for everything, one per example, one per task, a mixture, one row; of one task or of several.
FORMS = ("mixture", "task mixture", "row", "task row", "shared", "task shared", "per example", "per task")


def draw_layer(seed, kind, lead, rows, layer, example, bias=True):
    """Inputs of an augmented layer; the weight has sizes `layer`, an example has sizes `example`, and lead is (G, L)."""
    lead = lead if kind.startswith("task") or kind == "per task" else lead[1:]
    fast = lead[:1] if kind in ("per example", "per task") else ()
    fast = (*lead[:-1], rows if kind.endswith("mixture") else 1) if kind.endswith(("mixture", "row")) else fast
    fan_in = torch.Size(layer[1:]).numel()
    drawn = draw(seed, x=(*lead, *example), weight=layer, fast=(*fast, *layer), mix=(*lead, rows), bias=layer[:1])
    drawn["weight"], drawn["fast"] = (drawn[name] * fan_in**-0.5 for name in ("weight", "fast"))
    drawn["mix"] = torch.softmax(drawn["mix"], -1) if kind.endswith("mixture") else None
    drawn["bias"] = drawn["bias"] if bias else None
    return drawn


class LayerTests(OperatorTests):
    """What the two augmented layers have in common. Subclasses say how a large one is made."""

    large: str

    def test_zero_fast_weights_give_the_slow_layer(self):
        for options in self.options:
            inputs = self.inputs(4, 3, 7, 5, 2, **{**options, "activation": "relu"})
            inputs["fast"] = torch.zeros_like(inputs["fast"])
            torch.testing.assert_close(self.function(**inputs), self.slow(inputs))

    def test_nothing_flows_through_a_relu_at_zero(self):
        inputs = self.inputs(4, 3, 7, 5, 2, bias=False)
        x = torch.zeros_like(inputs["x"]).requires_grad_()
        (grad,) = torch.autograd.grad(self.function(**{**inputs, "x": x}).sum(), x)
        assert torch.equal(grad, torch.zeros_like(x))

    def test_rows_of_a_larger_memory(self):
        """Slices of a memory [G, S, P] give the same bits."""
        for options in self.options:
            inputs = self.inputs(5, 6, 7, 5, 3, **options).to(torch.float32)
            want, want_grads = run(self.function, inputs)
            layer_dims = inputs["weight"].dim()
            rows = inputs["fast"].flatten(-layer_dims)
            memory = torch.randn(*rows.shape[:-1], rows.shape[-1] + 5)
            memory[..., 2:-3] = rows
            memory.requires_grad_()
            got = self.function(**{**inputs, "fast": memory[..., 2:-3].unflatten(-1, inputs["weight"].shape)})
            assert torch.equal(got, want[0])
            (grad,) = torch.autograd.grad(loss_of((got,)), memory)
            assert torch.equal(grad[..., 2:-3], want_grads["fast"].flatten(-layer_dims))

    def test_rows_of_a_larger_memory_are_not_copied(self):
        """Nothing that the forward pass allocates is as large as they are."""
        inputs = self.inputs(5, 3, 30, 20, 40).to(torch.float32)
        rows = inputs["fast"].flatten(1)
        memory = torch.cat([torch.zeros(len(rows), 1), rows], 1)
        inputs["fast"] = memory[:, 1:].unflatten(1, inputs["weight"].shape)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.function(**inputs)
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        assert 0 < max(event.nbytes() for event in events) < rows.numel() * 4

    @pytest.mark.compiles
    def test_no_weight_of_an_example_is_built(self):
        """The resident memory of a process of its own rises, at its highest in a training step, by much less than the weights
        of the examples would take."""
        done = subprocess.run(
            [sys.executable, "-c", MEMORY_SCRIPT.format(large=self.large)],
            cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
        grown, weights = map(int, done.stdout.split())
        assert 0 < 4 * grown < weights


MEMORY_SCRIPT = """
import torch, mann_kernels
torch.set_num_threads(1)

def resident(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024

def step(x, rows):
    weight = torch.randn(layer).requires_grad_()
    fast = torch.randn(rows, *layer).requires_grad_()
    mix = torch.rand(len(x), rows).requires_grad_()
    function(x, weight, fast, mix).sum().backward()
    return len(x) * weight.numel() * 4

{large}
step(x[:8], 2)  # what is allocated once
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the highest so far is forgotten
before = resident("VmRSS")
weights = step(x, 4)
print(resident("VmHWM") - before, weights)
"""


BAD_LAYER = (
    (replace("x", lambda x: x.float()), TypeError, "weight: got dtype torch.float64, want torch.float32"),
    (replace("x", lambda x: x.numpy()), TypeError, "x: got ndarray, want a torch.Tensor"),
    (replace("fast", lambda f: f.long()), TypeError, "fast: got dtype torch.int64, want a floating"),
    (replace("weight", lambda w: w.to("meta")), ValueError, "weight: got device meta"),
    (replace("x", lambda x: x[0, 0]), ValueError, r"x: got shape .* want \["),
    (replace("weight", lambda w: w[0]), ValueError, r"weight: got shape .* want \[O, "),
    (replace("bias", lambda _: torch.zeros(4).double()), ValueError, r"bias: got shape \[4\], want \[O\] with O=3"),
    (replace("mix", lambda m: m[..., :1]), ValueError, "fast: got shape .* want .* with .*S=1"),
    (replace("mix", lambda m: m[:1]), ValueError, r"mix: got shape .* want \[.*L, S\] with"),
    (replace("mix", lambda _: None), ValueError, "fast: got shape .* want"),
    (lambda _: {"form": "sum"}, ValueError, "form: got 'sum', want one of 'hidden', 'output'"),
    (lambda _: {"activation": "elu"}, ValueError, "activation: got 'elu', want one of"),
)


class TestAugmentedLinear(LayerTests):
    """B, N, W and R of the drawn sizes are L, I, O and S."""

    op = "augmented_linear"
    drawn = ("kind", "bias", "form", "activation")
    movable = ("weight", "bias", "fast", "mix")
    options = (
        {},
        {"kind": "task mixture", "form": "output"},
        {"kind": "shared", "activation": "tanh", "bias": False},
        {"kind": "task shared", "activation": "identity"},
        {"kind": "per example"},
        {"kind": "per task", "activation": "gelu"},
        {"kind": "task mixture", "activation": "gelu"},
    )
    bad = (
        *BAD_LAYER,
        (replace("x", lambda x: x[..., :-1]), ValueError, r"x: got shape \[2, 2, 4\], want \[G, L, I\] with .*I=5"),
        (
            lambda i: {"x": i["x"][..., :0], "weight": i["weight"][:, :0], "fast": i["fast"][..., :0]},
            ValueError,
            "at least one of each size: got I=0",
        ),
    )

    large = "x, layer, function = torch.randn(2000, 256), (256, 256), mann_kernels.augmented_linear"

    @staticmethod
    def slow(inputs):
        z = F.linear(inputs["x"], inputs["weight"], inputs["bias"])
        return z if inputs.get("form") == "output" else z.relu()

    def inputs(self, seed, B, N, W, R, kind="mixture", bias=True, **options):
        return Inputs(draw_layer(seed, kind, (2, B), R, (W, N), (N,), bias), **options)

    @pytest.mark.parametrize("kind", FORMS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_forms(self, kind, dtype):
        """Every form, hidden and output, with every activation; many examples, few, and one."""
        for examples in (1, 3, 70):
            for activation in ACTIVATION:
                compare(self.op, self.inputs(examples, examples, 19, 18, 3, kind, activation=activation), dtype)
            compare(self.op, self.inputs(examples, examples, 19, 18, 3, kind, form="output"), dtype)
