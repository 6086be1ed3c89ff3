"""What NVRTC makes of the CUDA kernels, through the library's own compiler: they compile for every target, and at the paper's
sizes no register is spilled."""

import ctypes
import functools
import importlib.util
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("has nothing to do with Triton", allow_module_level=True)

import cuda_on_cpu
from against_reference import class_of
from compiled import TOOLS, dumped
from expected_skips import NO_CUDA_KERNEL

import mann_kernels
from bench.layers import LayerShape
from bench.operators import operators
from mann_kernels import _backend, _library


def nvrtc() -> list[Path]:
    """The libraries of NVRTC, from the package nvidia-cuda-nvrtc."""
    package = importlib.util.find_spec("nvidia")
    folders = package.submodule_search_locations or () if package else ()
    found = (sorted(Path(folder).glob("*/lib/libnvrtc*.so.1*")) for folder in folders)
    return [library for libraries in found for library in libraries if ".alt." not in library.name]


pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(_library.cuda_missing is not None, reason=str(_library.cuda_missing)),
    pytest.mark.skipif(cuda_on_cpu.missing() is not None, reason=str(cuda_on_cpu.missing())),
    pytest.mark.skipif(not nvrtc(), reason="needs the package nvidia-cuda-nvrtc"),
]

#: B200; the consumer's Blackwell.
NEWER = ("sm_100", "sm_120")


@pytest.fixture(scope="module")
def compiler():
    for library in sorted(nvrtc(), key=lambda path: "builtins" not in path.name):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(importlib.util.find_spec("mann_kernels._CUDA").origin)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def compile_for(compiler, capability, source, options):
    """The path of the cubin, or what the compiler says."""
    said = ctypes.create_string_buffer(100_000)
    failed = compiler.mann_cuda_compile(source.encode(), options.encode(), capability, said, ctypes.c_int64(len(said)))
    return failed, said.value.decode()


class Used(NamedTuple):
    """Bytes of memory of a kernel of a cubin: local to a thread, which is what was spilled, and static shared memory."""

    local: int
    shared: int


def used(cubin):
    """What each kernel of a cubin uses, by name."""
    said = dumped(Path(cubin))
    found = re.findall(r"Function (\w+):\n.* STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", said)
    assert found, said
    return {name: Used(int(stack) + int(local), int(shared)) for name, stack, shared, local in found}


def spilled(cubin):
    return max(kernel.local for kernel in used(cubin).values())


def recorded(op, inputs, capability):
    """The launches of a forward and a backward pass on such a device, none of which is run."""
    with cuda_on_cpu.cuda_on_cpu(capability=capability) as library, cuda_on_cpu.recorded(library) as launches:
        leaves = [value for value in inputs.values() if isinstance(value, torch.Tensor) and value.requires_grad]
        outputs = getattr(mann_kernels, op)(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(out.float().sum() for out in outputs if out.requires_grad).backward(inputs=leaves)
    return launches


def launches_of(op, inputs):
    """What they are compiled from, for an H100."""
    return {(launch.source, launch.options) for launch in recorded(op, inputs, 90)}


def layer_inputs(op, shape, dtype):
    bench = operators()[op]
    inputs = {name.replace("hidden", "x"): value.to(dtype) for name, value in bench.inputs(shape, 0).items()}
    for name, value in inputs.items():
        value.requires_grad_(shape.C > 1 or name != "x")
    return inputs | dict(bench.options)


def inputs_of(op, sizes, /, dtype, **options):
    inputs = class_of(op).inputs(1, *sizes, **options).to(dtype)
    for value in inputs.values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.requires_grad_()
    return inputs


#: (B, N, W, R) of the paper, then of many slots for a few examples.
PAPER, MANY = (16, 128, 40, 4), (1, 32768, 32, 4)
LAYERS = [(op, case) for op in ("augmented_linear", "augmented_conv2d") for case in operators()[op].cases(False)]
AT_PAPER = (
    {
        f"{op} {size}": (
            op,
            functools.partial(inputs_of, op, size, **({"T": 2} if op.endswith("sequence") else {}), **units),
        )
        for op, units in {
            "content_address": {},
            "lrua_step": {},
            "lrua_sequence": {},
            "mann_sequence": {"H": 200},
        }.items()
        for size in (PAPER, MANY)
    }
    | {
        op: (op, functools.partial(inputs_of, op, (1, 300, 20, 5)))
        for op in ("generate_fast_weights", "summarize_gradients")
    }
    | {case.name: (op, functools.partial(layer_inputs, op, case.shape)) for op, case in LAYERS}
)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)], ids=str)
@pytest.mark.parametrize("name", AT_PAPER)
def test_no_spills_at_the_papers_sizes(name, dtype, compiler):
    """But for a few numbers of d backward, which a warp keeps 255 registers of."""
    op, inputs = AT_PAPER[name]
    for source, macros in launches_of(op, inputs(dtype=dtype)):
        failed, said = compile_for(compiler, 90, source, macros)
        assert not failed, said
        assert spilled(said) <= 100 * (op == "summarize_gradients"), (source, macros, used(said))


#: What compute capability 8.0 is enough for: the sizes of the paper and others, odd, large and the largest.
OLDER = (80, 86, 89)
NO_CLUSTERS = [op for op, least in _backend.CUDA_CAPABILITY.items() if least == (8, 0)]
CONVOLUTIONS = {
    "one by one": ((3, 64, 64, 5), {"size": (32, 16), "kernel": 1, "padding": 0}),
    "five": ((2, 40, 36, 5), {"size": (16, 16), "kernel": 5, "padding": 2}),
    "eleven, per task": ((2, 9, 12, 1), {"size": (32, 32), "kernel": 11, "kind": "per task"}),
    "odd, gelu": ((9, 3, 5, 2), {"size": (7, 5), "kernel": 2, "activation": "gelu"}),
}
ON_OLDER = (
    {name: AT_PAPER[name] for name in AT_PAPER if AT_PAPER[name][0] in NO_CLUSTERS}
    | {
        f"{op} D={hidden}": (op, functools.partial(inputs_of, op, (1, 40, hidden, steps)))
        for op in ("generate_fast_weights", "summarize_gradients")
        for hidden, steps in ((1, 1), (32, 30), (33, 2), (48, 9), (64, 3))
    }
    | {
        f"linear {sizes}": ("augmented_linear", functools.partial(inputs_of, "augmented_linear", sizes, **options))
        for sizes, options in (((140, 7, 5, 2), {"kind": "per example"}), ((300, 300, 333, 7), {"activation": "gelu"}))
    }
    | {
        f"conv {name}": ("augmented_conv2d", functools.partial(inputs_of, "augmented_conv2d", sizes, **options))
        for name, (sizes, options) in CONVOLUTIONS.items()
    }
    | {
        "conv wide": (
            "augmented_conv2d",
            functools.partial(layer_inputs, "augmented_conv2d", LayerShape(2, 3, 130, 140, 16)),
        )
    }
)
ON_OLDER |= {f"{name}, TF32": ON_OLDER[name] for name in ON_OLDER if ON_OLDER[name][0] == "augmented_conv2d"}
SHORT = ("conv wide, TF32", "summarize_gradients D=64", "linear (140, 7, 5, 2)", "generate_fast_weights")


@pytest.fixture
def tf32(request):
    """TF32 is allowed to the cases that say so."""
    torch.backends.cuda.matmul.allow_tf32 = "TF32" in request.node.name
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("capability", OLDER)
@pytest.mark.parametrize("name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.long) for n in ON_OLDER])
@pytest.mark.usefixtures("tf32")
def test_they_fit_older_devices(name, capability, compiler, request):
    """They compile for them, spill next to nothing at the papers' sizes, and have the shared memory that a block may have."""
    op, inputs = ON_OLDER[name]
    for dtype in (torch.float32, torch.bfloat16) if request.config.getoption("--long") else (torch.float32,):
        launches = recorded(op, inputs(dtype=dtype), capability)
        assert launches
        for source, macros in {(launch.source, launch.options) for launch in launches}:
            failed, said = compile_for(compiler, capability, source, macros)
            assert not failed, said
            kernels = used(said)
            if name in AT_PAPER:
                assert spilled(said) <= (100 if op == "summarize_gradients" else 8), (source, macros, kernels)
            for launch in launches:
                if (launch.source, launch.options) == (source, macros):
                    bytes_of_block = int(launch.shared_bytes) + kernels[launch.kernel].shared
                    assert bytes_of_block <= cuda_on_cpu.DEVICES[capability][0], launch


@pytest.mark.parametrize("capability", OLDER)
def test_older_devices_get_their_own_code(capability, compiler):
    launches = launches_of("augmented_linear", inputs_of("augmented_linear", (3, 5, 4, 2), torch.float32))
    failed, made = compile_for(compiler, capability, *sorted(launches)[0])
    assert not failed, made
    assert f".target\tsm_{capability}\n" in disassembled(made)


def disassembled(cubin):
    command = [TOOLS / "nvdisasm", "--print-code", cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def products(cubin):
    """Instructions of the tensor cores in each kernel of a cubin."""
    code = disassembled(cubin)
    return {part.split(",")[0]: part.count("HMMA") for part in code.split(".section\t.text.")[1:]}


@pytest.mark.parametrize("op", ["generate_fast_weights", "summarize_gradients"])
def test_every_product_is_in_the_code(op, compiler):
    """A product of float32 is three on tensor cores, of bfloat16 one: there is no other difference."""
    counts = {}
    for dtype in (torch.float32, torch.bfloat16):
        ((source, macros),) = launches_of(op, inputs_of(op, (1, 300, 20, 5), dtype))
        failed, made = compile_for(compiler, 90, source, macros)
        assert not failed, made
        counts[dtype] = products(made)
    assert counts[torch.float32] == {name: 3 * count for name, count in counts[torch.bfloat16].items()}
    assert sum(counts[torch.bfloat16].values()) > 50


@pytest.mark.parametrize("op", sorted(set(_backend.OPS) - set(NO_CUDA_KERNEL)))
def test_they_compile_for_every_target(op, compiler, tmp_path):
    """Hopper's own code; for what is newer, what its driver is given, by the assembler for it."""
    inputs = inputs_of(op, (2, 33, 9, 3), torch.float32, **class_of(op).options[-1])
    launches = launches_of(op, inputs)
    for source, macros in launches:
        failed, said = compile_for(compiler, 90, source, macros)
        assert not failed, said
        failed, made = compile_for(compiler, 120, source, macros)
        assert not failed, made
        for target in NEWER:
            command = [TOOLS / "ptxas-blackwell", f"--gpu-name={target}", made, "--output-file", tmp_path / "made"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


def test_a_cubin_is_kept_and_found_again(compiler, tmp_path):
    macros = sorted(launches_of("lrua_step", inputs_of("lrua_step", (2, 9, 4, 1), torch.float32)))[0]
    failed, path = compile_for(compiler, 90, *macros)
    assert not failed
    assert Path(path).parent == tmp_path / "mann_kernels"
    assert [file.name for file in Path(path).parent.iterdir()] == [Path(path).name]  # nothing half written
    Path(path).write_bytes(b"found")
    assert compile_for(compiler, 90, *macros) == (0, path)
    assert Path(path).read_bytes() == b"found"


def test_a_kernel_that_does_not_compile_says_why(compiler):
    failed, said = compile_for(compiler, 90, "memory_write.cu", "-DMANN_STORAGE=nothing")
    assert failed
    assert "memory_write.cu does not compile for sm_90a" in said
    assert "MANN_" in said
    assert compile_for(compiler, 90, "nothing.cu", "")[1] == "mann_kernels: no source nothing.cu"
