"""The CUDA kernels as a library: that it builds, loads, registers and says clearly what it cannot do, without a device."""

import importlib.util
import os
import platform
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from against_reference import class_of, outputs_of, run
from test_structure import _Calls
from torch._subclasses.fake_tensor import FakeTensorMode

import mann_kernels
from mann_kernels import _backend, _library
from mann_kernels.__main__ import as_text, report

ROOT = Path(__file__).parent.parent
#: The operators that have CUDA kernels.
OPS = tuple(op for op in _backend.OPS if (ROOT / "csrc" / "cuda" / f"{op}.cpp").exists())
built = pytest.mark.skipif(_library.cuda_missing is not None, reason=str(_library.cuda_missing))


def test_built_where_a_compiler_is():
    """Nothing of CUDA is needed to build them."""
    if platform.system() != "Linux" or os.environ.get("MANN_CUDA") == "0":
        pytest.skip("there is no CUDA here")
    assert _library.cuda_missing is None


@built
def test_every_kernel_registers_itself():
    assert len(OPS) >= 4
    kernels = {name for op in OPS for name in (op, f"{op}_backward")}
    assert _library.cuda_kernels == kernels | {"generate_fast_weights_sides"}


@built
def test_they_are_the_default_where_they_can_be():
    for op in _backend.OPS:
        for dtype in (torch.float32, torch.bfloat16):
            assert _backend.missing("cuda", op, "cuda", dtype) is None or op not in OPS
            assert _backend.default(op, "cuda", dtype)[0] == ("cuda" if op in OPS else "triton")
        assert _backend.default(op, "cuda", torch.float16)[0] == "triton"
        assert _backend.default(op, "cpu", torch.float32)[0] == "cpp"
    assert "not torch.float64" in _backend.missing("cuda", "lrua_step", "cuda", torch.float64)


@built
@pytest.mark.parametrize("op", OPS)
def test_a_device_too_old_or_without_a_compiler_takes_triton(op, monkeypatch):
    def why(capability, no_compiler=None):
        monkeypatch.setattr(_backend, "_devices", lambda: (capability, no_compiler))
        found = _backend.missing("cuda", op, "cuda", torch.float32)
        assert _backend.default(op, "cuda", torch.float32)[0] == ("cuda" if found is None else "triton")
        return found

    if op.startswith(("augmented", "generate", "summarize")):
        assert "capability 8.0 or more, a device here has 7.5" in why((7, 5))
        assert why((8, 0)) is why((8, 9)) is None
    else:
        assert "capability 9.0 or more, a device here has 8.9" in why((8, 9))
    assert why((9, 0)) is why((10, 0)) is None
    assert why((9, 0), "no NVRTC found") == "no NVRTC found"


def test_what_the_devices_are_is_a_constant_to_the_compiler():
    def marked():
        pass

    torch.compiler.assume_constant_result(marked)
    assert vars(marked) == vars(_backend._devices)


@built
def test_without_a_driver_it_says_so():
    if torch.cuda.is_available():
        assert _library.why_no_compiler() is None
    else:
        assert re.search("no CUDA driver|no NVRTC", _library.why_no_compiler())


def test_not_on_amd(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "not on AMD" in _backend.missing("cuda", "lrua_step", "cuda", torch.float32)


@built
def test_the_command_lists_them():
    facts = report()
    text = as_text(facts)
    assert facts["cuda_kernels"] == sorted(OPS)
    assert "CUDA kernels: built" in text
    for op in OPS:
        assert facts["operators"][op]["cuda"]["missing"]["cuda"] is None
        assert facts["operators"][op]["cuda"]["runs"] == "cuda"
        want = "cuda" if torch.cuda.is_available() else r"cuda \(built, no device\)"
        assert re.search(rf"^{op} +cpp +{want}$", text, re.MULTILINE)


def on_fake_gpu(value):
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_shapes_are_known_without_a_device(op, dtype):
    """Fake CUDA tensors go through the public function to the operator that has a CUDA kernel, and through its backward.

    Without gradients: a torch without CUDA aborts where autograd meets a CUDA tensor, fake or not.
    """
    tests = class_of(op)
    for options in tests.options:
        inputs = tests.inputs(1, 3, 7, 5, 2, **options).to(dtype)
        with _Calls() as real:
            run(getattr(mann_kernels, op), inputs)
        with FakeTensorMode(), torch.no_grad(), mann_kernels.backend("cuda"), _Calls() as fake:
            outputs = outputs_of(getattr(mann_kernels, op), {k: on_fake_gpu(v) for k, v in inputs.items()})
            backward, args = real.made[1]
            grads = backward(*map(on_fake_gpu, args))
        assert [func.name() for func, _ in fake.made] == [f"mann::{op}", f"mann::{op}_backward"]
        for found, want in ((outputs, outputs_of(getattr(mann_kernels, op), inputs)), (grads, backward(*args))):
            assert {tensor.device.type for tensor in found} == {"cuda"}
            layouts = [[(t.shape, t.stride(), t.dtype) for t in tensors] for tensors in (found, want)]
            assert layouts[0] == layouts[1]


@pytest.mark.compiles
@pytest.mark.parametrize("op", _backend.OPS)
def test_torch_compile_takes_the_kernels_of_a_gpu(op):
    """What it makes of a call on CUDA tensors, which are fake here: one graph, with the operator that would run without it."""
    tests = class_of(op)
    inputs = tests.inputs(1, 3, 7, 5, 2, **tests.options[0]).to(torch.float32)
    names = [name for name, value in inputs.items() if isinstance(value, torch.Tensor)]

    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return getattr(mann_kernels, op)(**{**inputs, **dict(zip(names, tensors, strict=True))})

    with FakeTensorMode(), torch.no_grad():
        fake = tuple(on_fake_gpu(inputs[name]) for name in names)
        with _Calls() as eager:
            Layer()(*fake)
        graph = torch.export.export(Layer(), fake, strict=True).graph
    called = [node.target for node in graph.nodes if str(node.target).startswith("mann")]
    assert called == [func for func, _ in eager.made]
    assert len(called) == 1


@built
@pytest.mark.parametrize("op", OPS)
def test_without_a_driver_a_call_is_a_clear_error(op):
    """No CUDA tensor can be made without a driver, so the kernel is called with others."""
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    tests = class_of(op)
    with _Calls() as calls:
        getattr(mann_kernels, op)(**tests.inputs(1, 3, 7, 5, 2, **tests.options[0]).to(torch.float32))
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for func, args in calls.made:
        with pytest.raises(RuntimeError, match=r"no CUDA driver|CUDA tensors"):
            func.redispatch(keys, *args)


def test_cuda_cannot_be_asked_for_on_the_cpu():
    with (
        mann_kernels.backend("cuda"),
        pytest.raises(RuntimeError, match="the CUDA kernels run on NVIDIA GPUs, not on cpu"),
    ):
        mann_kernels.content_address(torch.zeros(1, 2, 3), torch.zeros(1, 1, 3))


def test_a_library_that_does_not_load_is_a_reason(monkeypatch, tmp_path):
    broken = tmp_path / "_CUDA.abi3.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(broken)))
    why, origin, kernels = _library._load("_CUDA", "CUDA", "")
    assert "does not load" in why
    assert (origin, kernels) == (None, frozenset())
