"""The tests that every operator passes, in one order; a test file names the operator and says how to draw its inputs."""

import importlib
import math

import pytest
import torch

import mann_kernels
from mann_kernels import reference
from mann_kernels.testing import accuracy, assert_accurate

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def on_gpu(*values):
    """Values of a parameter that need a CUDA device."""
    return pytest.param(*values, marks=pytest.mark.gpu)


class Asked(str):
    """The name of a device, where a test asks for an implementation that is not the default there: see conftest.py."""

    backend: str

    def __new__(cls, device, backend):
        made = super().__new__(cls, device)
        made.backend = backend
        return made


ASKED = tuple(Asked("cuda", name) for name in ("cuda", "triton"))
#: One body for the C++, CUDA and Triton kernels.
DEVICES = (
    "cpu",
    on_gpu("cuda"),
    *(pytest.param(asked, marks=pytest.mark.gpu, id=f"cuda-{asked.backend}") for asked in ASKED),
)
PLACES = (
    *(("cpu", dtype) for dtype in DTYPES),
    *(on_gpu("cuda", dtype) for dtype in (*DTYPES, torch.float16)),
    *(
        pytest.param(asked, dtype, marks=pytest.mark.gpu, id=f"cuda-{asked.backend}-{dtype}")
        for asked in ASKED
        for dtype in DTYPES[::2]
    ),
)


class Inputs(dict):
    """Named tensors (or None) and keyword options of one call."""

    def to(self, dtype):
        floats = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in self.items()
        }
        return Inputs(floats)

    def on(self, device):
        return Inputs({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.items()})

    def with_grad(self):
        def leaf(name, value):
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                return value
            return value.detach().clone().requires_grad_(name != "usage")

        return Inputs({name: leaf(name, value) for name, value in self.items()})


def draw(seed, **shapes):
    """Standard normal float64 tensors of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return Inputs(
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    )


def memory_state(seed, B, N, W, R):
    """memory, usage and read weights of an episode under way."""
    state = draw(seed, memory=(B, N, W), usage=(B, N), read_weights=(B, R, N))
    state["usage"] = state["usage"].abs()
    state["read_weights"] = torch.softmax(state["read_weights"], -1)
    return state


def outputs_of(function, inputs):
    out = function(**inputs)
    return out if isinstance(out, tuple) else (out,)


def loss_of(outputs):
    generator = torch.Generator().manual_seed(99)
    loss = 0.0
    for output in outputs:
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        if output.requires_grad:
            loss = loss + (output.double() * weight.to(output.device)).sum()
    return loss


def run(function, inputs):
    """Outputs, and the gradient of every differentiable input."""
    inputs = inputs.with_grad()
    outputs = outputs_of(function, inputs)
    names = [name for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.requires_grad]
    grads = torch.autograd.grad(loss_of(outputs), [inputs[name] for name in names], allow_unused=True)
    # what takes no part (the weights, when there are no steps) has gradient zero
    grads = [torch.zeros_like(inputs[n]) if grad is None else grad for n, grad in zip(names, grads, strict=True)]
    return outputs, dict(zip(names, grads, strict=True))


def compare(op, inputs, dtype, kernel=None):
    """Outputs and all gradients of the kernel against the reference, by the tolerance rule."""
    inputs = inputs.to(dtype)
    actual, grads = run(kernel or getattr(mann_kernels, op), inputs)
    same, same_grads = run(getattr(reference, op), inputs)
    exact, exact_grads = run(getattr(reference, op), inputs.to(torch.float64))
    for i, tensors in enumerate(zip(actual, same, exact, strict=True)):
        if not tensors[0].is_floating_point():
            assert torch.equal(tensors[0], tensors[2]), f"output {i}: the chosen slots differ"
        else:
            assert_accurate(*tensors, name=f"output {i}")
    for name in grads:
        assert_accurate(grads[name], same_grads[name], exact_grads[name], name=f"gradient of {name}")


def quantities(function, inputs):
    """Every output and gradient, by name."""
    outputs, grads = run(function, inputs)
    named = {f"output {i}": output for i, output in enumerate(outputs)}
    return named | {f"gradient of {name}": grad for name, grad in grads.items()}


def reference_errors(op, inputs, dtype):
    """The largest error that the reference makes in `dtype`, over inputs that differ from these by about 0.1 %."""
    if dtype == torch.float64:  # no yardstick: 10,000 eps of 1, the order of the drawn inputs
        return {name: 1e4 * torch.finfo(dtype).eps for name in quantities(getattr(reference, op), inputs)}
    # With one slot terms of order 1 cancel, in the reference's order of sums to the bit: another order may be off by a rounding.
    errors = dict.fromkeys(quantities(getattr(reference, op), inputs), torch.finfo(torch.float32).eps)
    for seed in range(16):
        generator = torch.Generator().manual_seed(seed)
        near = Inputs(inputs)
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
                near[name] = value * (1 + 1e-3 * noise.to(value.device))
        near = near.to(dtype)
        exact = quantities(getattr(reference, op), near.to(torch.float64))
        for name, same in quantities(getattr(reference, op), near).items():
            if same.is_floating_point():
                errors[name] = max(errors[name], accuracy(same, same, exact[name]).error)
    return errors


def matches(op, inputs, dtype, kernel=None):
    """The tolerance rule; where it says no, once more with the reference's error taken over several inputs.

    The drawn sizes are so small that the one error of the reference can be small by luck: a gradient of a single number,
    or one that is zero because its terms cancel (a key against rows that are all alike, or of width 1).
    """
    try:
        return compare(op, inputs, dtype, kernel)
    except AssertionError:
        own = reference_errors(op, inputs, dtype)
    inputs = inputs.to(dtype)
    actual = quantities(kernel or getattr(mann_kernels, op), inputs)
    same = quantities(getattr(reference, op), inputs)
    exact = quantities(getattr(reference, op), inputs.to(torch.float64))
    for name, value in actual.items():
        if not value.is_floating_point():
            assert torch.equal(value, exact[name]), f"{name}: the chosen slots differ"
            continue
        found = accuracy(value, same[name], exact[name])
        assert found.error <= found.budget + 2 * own[name], f"{name}: {found}, the reference near here {own[name]:.3e}"


def check(op, inputs, dtype, device, kernel=None):
    """On the CPU the tolerance rule to the letter; on a GPU, where other sums are drawn, with the reference's error nearby."""
    (compare if device == "cpu" else matches)(op, inputs.on(device), dtype, kernel)


class OnePercentOff(torch.autograd.Function):
    """The identity with a gradient that is 1 % too large."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01


def lay_out_backwards(inputs):
    """No tensor of several dimensions is contiguous."""
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.dim() > 1:
            inputs[name] = value.transpose(0, -1).contiguous().transpose(0, -1)


def saturate(inputs):
    """Biases, and with them activations, from all over the range of their type and beyond the ends of its exponentials."""
    sizes = torch.tensor([0.3, 12.0, 43.0, 45.0, 47.0, 51.0, 95.0, 120.0, 356.0, 365.0, 800.0], dtype=torch.float64)
    for name, value in inputs.items():
        if name.startswith("bias"):
            inputs[name] = torch.cat([sizes, -sizes]).repeat(value.numel())[: value.numel()].view_as(value)


def class_of(op):
    """The test class of an operator, which knows how to draw its inputs (by module: a name here would be collected again)."""
    name = "Test" + "".join(word.capitalize() for word in op.split("_"))
    return getattr(importlib.import_module(f"test_{op}"), name)()


def tie(inputs):
    """Constant memory and usage: every slot is as good as any other."""
    for name in ("memory", "usage"):
        if name in inputs:
            inputs[name] = torch.full_like(inputs[name], 0.5)


def zero_rows(inputs):
    for name in ("memory", "key", "x", "h", "grads"):
        if name in inputs:
            inputs[name][..., ::2, :] = 0


def some_of(options, sizes, dtype, request):
    """Every size with the last options, in float32 every option with one of the sizes; each with each where there is time."""
    for seed, size in enumerate(sizes):
        for number, each in enumerate(options):
            one = number % len(sizes) == seed and dtype == torch.float32
            if request.config.getoption("--long") or number == len(options) - 1 or one:
                yield seed, size, each


class OperatorTests:
    """Subclasses set `op`, `inputs(seed, size)` (float64 Inputs with options, for the sizes in `sizes`) and `bad`."""

    op: str
    #: (B, N, W, R): odd, beyond one tile of slots, more heads than one group, the paper's, the least there is, whole vectors.
    sizes = (
        (3, 7, 5, 2),
        (2, 129, 7, 1),
        (2, 33, 20, 6),
        (2, 300, 9, 3),
        (4, 128, 40, 4),
        (1, 1, 1, 1),
        (2, 40, 32, 3),
    )
    options: tuple = ({},)
    #: The options that test_properties draws, as far as an operator has them.
    drawn: tuple = ()
    #: Of an operator that chooses slots or sides: the inputs that may move without moving a tie, see test_choices.
    movable: tuple = ()
    bad: tuple = ()

    def inputs(self, seed, B, N, W, R, **options):
        raise NotImplementedError

    @property
    def function(self):
        return getattr(mann_kernels, self.op)

    @property
    def small(self):
        return self.inputs(0, 2, 5, 3, 2, **self.options[-1])

    @pytest.mark.parametrize(("device", "dtype"), PLACES, ids=str)
    def test_matches_reference(self, device, dtype):
        # a GPU compiles for every size: there float32 takes them all, the others the first and the paper's
        few = device == "cuda" and dtype != torch.float32
        for seed, size in enumerate(self.sizes[::4] if few else self.sizes, start=1):
            for options in self.options:
                check(self.op, self.inputs(seed, *size, **options), dtype, device)

    def _scalar(self, device, inputs=None):
        inputs = (inputs or self.small).on(device).with_grad()
        names = [name for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.requires_grad]

        def function(*tensors):
            outputs = outputs_of(self.function, {**inputs, **dict(zip(names, tensors, strict=True))})
            return tuple(output for output in outputs if output.requires_grad)

        return function, tuple(inputs[name] for name in names)

    @pytest.mark.parametrize("device", DEVICES)
    def test_gradcheck(self, device):
        assert torch.autograd.gradcheck(*self._scalar(device), atol=1e-6)

    @pytest.mark.parametrize("device", DEVICES)
    def test_gradgradcheck(self, device):
        assert torch.autograd.gradgradcheck(*self._scalar(device), atol=1e-5)

    @pytest.mark.parametrize("device", DEVICES)
    def test_constant_gradient_has_a_graph(self, device):
        """With a constant upstream gradient a first-order-only backward would return constants, silently."""
        function, tensors = self._scalar(device)
        grads = torch.autograd.grad(
            [out.sum() for out in function(*tensors)], tensors, create_graph=True, allow_unused=True
        )
        assert any(grad is not None and grad.requires_grad for grad in grads)

    @pytest.mark.compiles
    def test_compiles_in_one_graph(self):
        compiled = torch.compile(self.function, fullgraph=True, backend="aot_eager")
        inputs = self.small.to(torch.float32)
        eager, eager_grads = run(self.function, inputs)
        actual, grads = run(compiled, inputs)
        for a, b in zip(eager, actual, strict=True):
            assert torch.equal(a, b)
        assert all(torch.equal(grads[name], eager_grads[name]) for name in eager_grads)

    @pytest.mark.compiles
    @pytest.mark.gpu
    def test_compiles_in_one_graph_on_gpu(self):
        """With Inductor, which may round what surrounds the kernels in another way."""
        compiled = torch.compile(self.function, fullgraph=True)
        check(self.op, self.small, torch.float32, "cuda", compiled)

    @pytest.mark.parametrize("device", DEVICES)
    def test_non_contiguous_inputs(self, device):
        inputs = self.inputs(1, 3, 7, 5, 2, **self.options[-1])
        lay_out_backwards(inputs)
        check(self.op, inputs, torch.float64, device)

    @pytest.mark.parametrize("device", DEVICES)
    def test_zero_rows_and_ties(self, device):
        inputs = self.inputs(2, 2, 9, 4, 3, **self.options[0])
        for name in ("memory", "usage", "key", "reads", "h", "c", "grads"):
            if name in inputs:
                inputs[name] = torch.zeros_like(inputs[name])
        _, grads = run(self.function, inputs.on(device))
        assert all(grad.isfinite().all() for grad in grads.values())
        check(self.op, inputs, torch.float64, device)

    @pytest.mark.parametrize("device", DEVICES)
    def test_empty_batch(self, device):
        check(self.op, self.inputs(0, 0, 5, 3, 2, **self.options[-1]), torch.float32, device)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_nan_and_infinity(self, value, device):
        for name in self.small:
            inputs = self.small.on(device)
            if isinstance(inputs[name], torch.Tensor) and inputs[name].is_floating_point():
                inputs[name].view(-1)[0] = value
                outputs, _ = run(self.function, inputs)
                for output, want in zip(outputs, run(getattr(reference, self.op), inputs)[0], strict=True):
                    if output.is_floating_point():
                        assert not output[~want.isfinite()].isfinite().any(), f"{name}: {value} was lost"
                    else:
                        assert ((output >= 0) & (output < 5)).all()

    def test_bad_input(self):
        self.function(**self.small)  # after what is right: checks that passed are remembered
        for change, error, message in self.bad:
            inputs = self.small
            with pytest.raises(error, match=message):
                self.function(**{**inputs, **change(inputs)})

    def test_every_tensor_of_another_kind(self):
        self.function(**self.small)
        floats = {k: v for k, v in self.small.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
        for name, value in floats.items():
            others = ((value.float(), "dtype"), (value.to("meta"), "device"))[: 2 * (len(floats) > 1)]
            for other, message in (*others, (value.tolist(), name)):
                with pytest.raises((TypeError, ValueError), match=message):
                    self.function(**{**self.small, name: other})

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_what_an_earlier_call_left_is_not_read(self, dtype):
        """Scratch memory is kept from call to call: calls that were all NaN, of this size and of others, leave no trace."""
        for options in self.options:
            inputs = self.inputs(1, 2, 8, 5, 2, **options).to(dtype)
            want = run(self.function, inputs)
            for size in ((2, 8, 5, 2), (3, 37, 7, 3), (1, 70, 33, 1)):
                lost = self.inputs(2, *size, **options)
                lost |= {
                    k: v * math.nan for k, v in lost.items() if isinstance(v, torch.Tensor) and v.is_floating_point()
                }
                run(self.function, Inputs(lost).to(dtype))
                got = run(self.function, inputs)
                torch.testing.assert_close(got, want, rtol=0, atol=0)

    @pytest.mark.parametrize(("device", "threads"), [("cpu", 1), ("cpu", 2), on_gpu("cuda", 1)])
    def test_repeatable(self, device, threads):
        """Bits from run to run; for the memory operators also for any number of threads."""
        inputs = self.inputs(3, 5, 128, 40, 4, **self.options[0]).to(torch.float32).on(device)
        outputs, grads = run(self.function, inputs)
        before = torch.get_num_threads()
        try:
            if self.op != "mann_sequence":
                torch.set_num_threads(threads)
            again, again_grads = run(self.function, inputs)
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
        assert all(torch.equal(grads[name], again_grads[name]) for name in grads)

    @pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
    def test_instruction_sets(self, isa):
        from mann_kernels import _library

        best = _library.cpu_isa()
        try:
            if _library.cpu_isa(isa) != isa:
                pytest.skip(f"this machine has no {isa}")
            for seed, size in enumerate(self.sizes[:4]):
                for dtype in DTYPES:
                    compare(self.op, self.inputs(seed, *size, **self.options[-1]), dtype)
        finally:
            _library.cpu_isa(best)

    @pytest.mark.parametrize(
        ("device", "name", "dtype"),
        [
            ("cpu", "cpp", torch.float32),
            on_gpu("cuda", "cuda", torch.float32),
            on_gpu("cuda", "triton", torch.float64),  # which the CUDA kernels leave to the others
        ],
    )
    def test_the_kernel_is_what_runs(self, device, name, dtype):
        from mann_kernels import _backend, _library

        assert _library.cpp_missing is None
        if name == "cuda" and self.op not in _library.cuda_kernels:
            pytest.skip("no CUDA kernel")
        if name == "triton" and (self.op, device, dtype) in _backend.TRITON_CANNOT:
            pytest.skip("no Triton kernel of this type")
        assert _backend.select(self.op, torch.zeros(1, device=device, dtype=dtype)) == name
        with mann_kernels.backend(name):
            self.function(**self.small.to(dtype).on(device))


def replace(name, make):
    """A change to one argument, for `bad`."""
    return lambda inputs: {name: make(inputs[name])}


#: Mistakes every operator that takes a memory names: (change, error, message).
BAD_STATE = (
    (replace("memory", lambda m: m[0]), ValueError, r"memory: got shape \[5, 3\], want \[B, N, W\]"),
    (replace("key", lambda k: k[..., :2]), ValueError, r"key: got shape .* want .*W=3"),
    (replace("key", lambda k: k.float()), TypeError, "key: got dtype torch.float32, want torch.float64"),
    (replace("key", lambda k: k.long()), TypeError, "key: got dtype torch.int64, want a floating"),
    (replace("memory", lambda m: m.numpy()), TypeError, "memory: got ndarray, want a torch.Tensor"),
    (replace("memory", lambda m: m.to("meta")), ValueError, "device"),
)
