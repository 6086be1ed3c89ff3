"""The Triton kernels compiled for GPUs that are not here, at the paper's shape: they compile, and fit the chip."""

import importlib
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from mann_kernels import _backend

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from mutant import mutant  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile"),
]

#: Registers and spilled bytes of a thread, shared memory of a program, by target and kernel: none may grow unnoticed.
#: `pytest tests/gpu_on_cpu/test_compile.py --all-targets --write-budgets` measures them anew.
BUDGETS = Path(__file__).with_name("budgets.json")

#: Bytes of shared memory that one program may have (NVIDIA: the opt-in limit of the compute capability; AMD: LDS).
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376, "gfx942": 65_536}
IN_MAKE_TEST = ("sm_90", "gfx942")
#: The step's backward is that of a sequence; a layer has two, for x and for the weights.
KERNELS = {"lrua_step": 1, "augmented_linear": 3, "augmented_conv2d": 3}
SLOTS, WIDTH, HEADS, HIDDEN_OF_GENERATORS = 128, 40, 4, 20


def target_of(name):
    return GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name[3:]), 32)


def kernels_of(stem, package="mann_kernels.triton"):
    module = importlib.import_module(f"{package}.{stem}")
    return {name: value for name, value in vars(module).items() if name.endswith("_kernel")}


def sizes_of(kernel):
    """How a kernel is launched at the paper's shape."""
    from mann_kernels.triton import _augment, _coordinates
    from mann_kernels.triton._launch import RESTART_EVERY, launch
    from mann_kernels.triton.mann_sequence import TILES

    names = [parameter.name for parameter in kernel.params]
    if "BM" in names:
        return {**_augment.TILES, "KERNEL": 3, "PADDING": 1, "ACT": 0}
    if "BP" in names:
        return _coordinates.launch(HIDDEN_OF_GENERATORS, 3, 7.0)  # the same number, in both generators
    return {**launch(SLOTS, WIDTH, HEADS), **TILES, "RESTART": RESTART_EVERY}


def source_of(kernel, dtype):
    """The kernel with every option on, at the paper's shape, for storage type `dtype`."""
    sizes = {**sizes_of(kernel), "ACC": tl.float32, "S": getattr(tl, dtype)}
    working = ("x_ptr", "heads_ptr", "cells_ptr", "rows_ptr", "restarts_ptr", "gates_ptr", "head_ptr", "weights_ptr")
    if "BM" in sizes:  # a layer, whose x is its input
        working = ("slopes_ptr", "dots_ptr")
    signature, constants = {}, {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", sizes.get(name, True)
        elif name in ("eps", "decay"):
            signature[name] = "fp32"
        elif not name.endswith("_ptr"):
            signature[name] = "i32"
        elif name == "codes_ptr":
            signature[name] = "*u8"
        elif name == "slots_ptr":
            signature[name] = "*i32"
        elif name == "lengths_ptr":
            signature[name] = "*i64"
        else:
            short = {"float32": "*fp32", "bfloat16": "*bf16"}
            of_acc = name in working or name.startswith("work") or name.endswith("copies_ptr")
            signature[name] = "*fp32" if of_acc else short[dtype]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants)


def resources_of(compiled, folder):
    """What ptxas, or the AMD assembler, gave each thread of a kernel."""
    if "cubin" in compiled.asm:
        (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [tool, "--dump-resource-usage", folder / "kernel.cubin"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, spilled = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    else:
        text = compiled.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s+(\d+)", text)[1]
        spilled = 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
    return {"registers": int(registers), "spilled": int(spilled), "shared": compiled.metadata.shared}


@pytest.mark.parametrize("target", SHARED_MEMORY)
@pytest.mark.parametrize("stem", _backend.STEMS)
def test_compiles_and_fits(stem, target, request, tmp_path):
    everything = request.config.getoption("--all-targets")
    if not everything and target not in IN_MAKE_TEST:
        pytest.skip("with --all-targets")
    found = kernels_of(stem)
    assert len(found) == KERNELS.get(stem, 2)
    for name, kernel in found.items():
        for dtype in ("float32", "bfloat16") if everything else ("float32",):
            sizes = sizes_of(kernel)
            warps = {name: sizes[name] for name in ("num_warps", "num_stages") if name in sizes}
            compiled = triton.compile(source_of(kernel, dtype), target=target_of(target), options=warps)
            assert compiled.metadata.shared <= SHARED_MEMORY[target], name
            label, found = f"{name}[{dtype}]", resources_of(compiled, tmp_path)
            if request.config.getoption("--write-budgets"):
                budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
                budgets.setdefault(target, {})[label] = found
                BUDGETS.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")
            budget = json.loads(BUDGETS.read_text())[target][label]
            grown = {what: (found[what], budget[what]) for what in found if found[what] > budget[what]}
            assert not grown, f"{label} on {target}: (found, budget) {grown}"
            if dtype == "float32":  # is computed in float32, which the interpreter cannot tell from TF32
                assert "tf32" not in compiled.asm.get("ptx", ""), name


def test_tf32_would_be_seen(tmp_path, monkeypatch):
    package = mutant(tmp_path, "_step.py", 'input_precision="ieee"', 'input_precision="tf32"')
    monkeypatch.syspath_prepend(tmp_path)
    kernel = kernels_of("memory_update", package)["memory_update_fwd_kernel"]
    compiled = triton.compile(source_of(kernel, "float32"), target=target_of("sm_90"), options={"num_warps": 8})
    assert "tf32" in compiled.asm["ptx"]
