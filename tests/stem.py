"""The tests that every operator passes, in one order; a test file names the operator and says how to draw its inputs."""

import pytest
import torch

import mann_kernels
from mann_kernels import reference
from mann_kernels.testing import assert_accurate

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class Inputs(dict):
    """Named tensors (or None) and keyword options of one call."""

    def to(self, dtype):
        floats = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in self.items()
        }
        return Inputs(floats)

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
            loss = loss + (output.double() * weight).sum()
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


def compare(stem, inputs, dtype, kernel=None):
    """Outputs and all gradients of the kernel against the reference, by the tolerance rule."""
    inputs = inputs.to(dtype)
    actual, grads = run(kernel or getattr(mann_kernels, stem), inputs)
    same, same_grads = run(getattr(reference, stem), inputs)
    exact, exact_grads = run(getattr(reference, stem), inputs.to(torch.float64))
    for i, tensors in enumerate(zip(actual, same, exact, strict=True)):
        if not tensors[0].is_floating_point():
            assert torch.equal(tensors[0], tensors[2]), f"output {i}: the chosen slots differ"
        else:
            assert_accurate(*tensors, name=f"output {i}")
    for name in grads:
        assert_accurate(grads[name], same_grads[name], exact_grads[name], name=f"gradient of {name}")


class StemTests:
    """Subclasses set `stem`, `inputs(seed, size)` (float64 Inputs with options, for the sizes in `sizes`) and `bad`."""

    stem: str
    #: (B, N, W, R): odd, beyond one tile of slots, more heads than one group, the paper's, and the least there is.
    sizes = ((3, 7, 5, 2), (2, 129, 7, 1), (2, 33, 20, 6), (2, 300, 9, 3), (4, 128, 40, 4), (1, 1, 1, 1))
    options: tuple = ({},)
    bad: tuple = ()

    def inputs(self, seed, B, N, W, R, **options):
        raise NotImplementedError

    @property
    def function(self):
        return getattr(mann_kernels, self.stem)

    @property
    def small(self):
        return self.inputs(0, 2, 5, 3, 2, **self.options[-1])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_matches_reference(self, dtype):
        for seed, size in enumerate(self.sizes, start=1):
            for options in self.options:
                compare(self.stem, self.inputs(seed, *size, **options), dtype)

    @pytest.mark.gpu
    def test_matches_reference_on_gpu(self):
        inputs = Inputs({k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in self.small.items()})
        compare(self.stem, inputs, torch.float32)

    def _scalar(self):
        inputs = self.small.with_grad()
        names = [name for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.requires_grad]

        def function(*tensors):
            outputs = outputs_of(self.function, {**inputs, **dict(zip(names, tensors, strict=True))})
            return tuple(output for output in outputs if output.requires_grad)

        return function, tuple(inputs[name] for name in names)

    def test_gradcheck(self):
        assert torch.autograd.gradcheck(*self._scalar(), atol=1e-6)

    def test_gradgradcheck(self):
        assert torch.autograd.gradgradcheck(*self._scalar(), atol=1e-5)

    def test_constant_gradient_has_a_graph(self):
        """With a constant upstream gradient a first-order-only backward would return constants, silently."""
        function, tensors = self._scalar()
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

    def test_non_contiguous_inputs(self):
        inputs = self.inputs(1, 3, 7, 5, 2, **self.options[-1])
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.dim() > 1:
                inputs[name] = value.transpose(0, -1).contiguous().transpose(0, -1)
        compare(self.stem, inputs, torch.float64)

    def test_zero_rows_and_ties(self):
        inputs = self.inputs(2, 2, 9, 4, 3, **self.options[0])
        for name in ("memory", "usage", "key", "reads", "h", "c", "grads"):
            if name in inputs:
                inputs[name] = torch.zeros_like(inputs[name])
        _, grads = run(self.function, inputs)
        assert all(grad.isfinite().all() for grad in grads.values())
        compare(self.stem, inputs, torch.float64)

    def test_empty_batch(self):
        compare(self.stem, self.inputs(0, 0, 5, 3, 2, **self.options[-1]), torch.float32)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_nan_and_infinity(self, value):
        for name in self.small:
            inputs = self.small
            if isinstance(inputs[name], torch.Tensor) and inputs[name].is_floating_point():
                inputs[name].view(-1)[0] = value
                outputs, _ = run(self.function, inputs)
                for output, want in zip(outputs, run(getattr(reference, self.stem), inputs)[0], strict=True):
                    if output.is_floating_point():
                        assert not output[~want.isfinite()].isfinite().any(), f"{name}: {value} was lost"
                    else:
                        assert ((output >= 0) & (output < 5)).all()

    def test_bad_input(self):
        for change, error, message in self.bad:
            inputs = self.small
            with pytest.raises(error, match=message):
                self.function(**{**inputs, **change(inputs)})

    @pytest.mark.parametrize("threads", [1, 2])
    def test_repeatable(self, threads):
        """Bits from run to run; for the memory operators also for any number of threads."""
        inputs = self.inputs(3, 5, 128, 40, 4, **self.options[0]).to(torch.float32)
        outputs, grads = run(self.function, inputs)
        before = torch.get_num_threads()
        try:
            if self.stem != "mann_sequence":
                torch.set_num_threads(threads)
            again, again_grads = run(self.function, inputs)
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
        assert all(torch.equal(grads[name], again_grads[name]) for name in grads)

    @pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
    def test_instruction_sets(self, isa):
        from mann_kernels import _library

        best = _library.cpu_isa()
        try:
            if _library.cpu_isa(isa) != isa:
                pytest.skip(f"this machine has no {isa}")
            for seed, size in enumerate(self.sizes[:4]):
                for dtype in DTYPES:
                    compare(self.stem, self.inputs(seed, *size, **self.options[-1]), dtype)
        finally:
            _library.cpu_isa(best)

    def test_the_kernel_is_what_runs(self):
        from mann_kernels import _backend, _library

        assert _library.cpp_missing is None
        assert _backend.select(self.stem, torch.zeros(1)) == "cpp"
        with mann_kernels.backend("cpp"):
            self.function(**self.small)


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
