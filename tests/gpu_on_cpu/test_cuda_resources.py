"""What NVRTC makes of the CUDA kernels, through the library's own compiler: they compile for every target, and at the paper's
sizes no register is spilled."""

import functools
import os
import subprocess
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("has nothing to do with Triton", allow_module_level=True)

import cuda_on_cpu
import machine_code
from against_reference import class_of
from compiled import TOOLS, compile_for, disassembled, nvrtc, resources
from expected_skips import NO_CUDA_KERNEL

import mann_kernels
from bench.layers import LayerShape
from bench.operators import operators
from mann_kernels import _backend, _library

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(_library.cuda_missing is not None, reason=str(_library.cuda_missing)),
    pytest.mark.skipif(cuda_on_cpu.missing() is not None, reason=str(cuda_on_cpu.missing())),
    pytest.mark.skipif(not nvrtc(), reason="needs the package nvidia-cuda-nvrtc"),
]

#: B200; the consumer's Blackwell.
NEWER = ("sm_100", "sm_120")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


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


#: Of kernels that are many in one.
MOST_WAITS = dict.fromkeys(("memory_write", "memory_backward", "mann_sequence_forward", "mann_sequence_backward"), 24)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)], ids=str)
@pytest.mark.parametrize("name", AT_PAPER)
def test_at_the_papers_sizes(name, dtype):
    """No register is spilled, but for a few numbers of d backward, which a warp keeps 255 registers of; and loads go out together:
    a warp waits for global memory a few times on its way, not once for each."""
    op, inputs = AT_PAPER[name]
    for source, macros in launches_of(op, inputs(dtype=dtype)):
        failed, said = compile_for(90, source, macros)
        assert not failed, said
        spilled = {name: used.spilled for name, used in resources(Path(said)).items()}
        assert max(spilled.values()) <= 100 * (op == "summarize_gradients"), (source, macros, spilled)
        for kernel, text in disassembled(Path(said)).items():
            waits = machine_code.counts(*machine_code.code_of(text))["memory waits"]
            assert waits <= MOST_WAITS.get(kernel, 12), (source, macros, kernel, waits)


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
def test_they_fit_older_devices(name, capability, request):
    """They compile for them, spill next to nothing at the papers' sizes, and have the shared memory that a block may have."""
    op, inputs = ON_OLDER[name]
    for dtype in (torch.float32, torch.bfloat16) if request.config.getoption("--long") else (torch.float32,):
        launches = recorded(op, inputs(dtype=dtype), capability)
        assert launches
        for source, macros in {(launch.source, launch.options) for launch in launches}:
            failed, said = compile_for(capability, source, macros)
            assert not failed, said
            kernels = resources(Path(said))
            if name in AT_PAPER:
                spilled = max(used.spilled for used in kernels.values())
                assert spilled <= (100 if op == "summarize_gradients" else 40), (source, macros, kernels)
            for launch in launches:
                if (launch.source, launch.options) == (source, macros):
                    bytes_of_block = int(launch.shared_bytes) + kernels[launch.kernel].shared
                    assert bytes_of_block <= cuda_on_cpu.DEVICES[capability][0], launch


@pytest.mark.parametrize("capability", OLDER)
def test_older_devices_get_their_own_code(capability):
    launches = launches_of("augmented_linear", inputs_of("augmented_linear", (3, 5, 4, 2), torch.float32))
    failed, made = compile_for(capability, *sorted(launches)[0])
    assert not failed, made
    said = subprocess.run([TOOLS / "nvdisasm", "--print-code", made], capture_output=True, text=True, check=True).stdout
    assert f".target\tsm_{capability}\n" in said


@pytest.mark.parametrize("op", ["generate_fast_weights", "summarize_gradients"])
def test_every_product_is_in_the_code(op):
    """A product of float32 is three on tensor cores, of bfloat16 one: there is no other difference."""
    counts = {}
    for dtype in (torch.float32, torch.bfloat16):
        ((source, macros),) = launches_of(op, inputs_of(op, (1, 300, 20, 5), dtype))
        failed, made = compile_for(90, source, macros)
        assert not failed, made
        counts[dtype] = {name: code.count("HMMA") for name, code in disassembled(Path(made)).items()}
    assert counts[torch.float32] == {name: 3 * count for name, count in counts[torch.bfloat16].items()}
    assert sum(counts[torch.bfloat16].values()) > 50


@pytest.mark.parametrize("op", sorted(set(_backend.OPS) - set(NO_CUDA_KERNEL)))
def test_they_compile_for_every_target(op, tmp_path):
    """Hopper's own code; for what is newer, what its driver is given, by the assembler for it."""
    inputs = inputs_of(op, (2, 33, 9, 3), torch.float32, **class_of(op).options[-1])
    launches = launches_of(op, inputs)
    for source, macros in launches:
        failed, said = compile_for(90, source, macros)
        assert not failed, said
        failed, made = compile_for(120, source, macros)
        assert not failed, made
        for target in NEWER:
            command = [TOOLS / "ptxas-blackwell", f"--gpu-name={target}", made, "--output-file", tmp_path / "made"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


def test_a_cubin_is_kept_and_found_again(tmp_path):
    macros = sorted(launches_of("lrua_step", inputs_of("lrua_step", (2, 9, 4, 1), torch.float32)))[0]
    failed, path = compile_for(90, *macros)
    assert not failed
    assert Path(path).parent == tmp_path / "mann_kernels"
    assert [file.name for file in Path(path).parent.iterdir()] == [Path(path).name]  # nothing half written
    Path(path).write_bytes(b"found")
    assert compile_for(90, *macros) == (0, path)
    assert Path(path).read_bytes() == b"found"


def test_a_kernel_that_does_not_compile_says_why():
    failed, said = compile_for(90, "memory_write.cu", "-DMANN_STORAGE=nothing")
    assert failed
    assert "memory_write.cu does not compile for sm_90a" in said
    assert "MANN_" in said
    assert compile_for(90, "nothing.cu", "")[1] == "mann_kernels: no source nothing.cu"


#: As nvdisasm writes it: a loop over steps that waits for a message, chooses between two ways, turns in a loop, is once divided by
#: rare values, and sends a message; out of line, lanes that have parted and a second try of the wait.
EPISODE = """
\t.section\t.text.episode_sequence_forward,"ax",@progbits
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R5+URZ], R4 ;
        /*0020*/              @!P0 BRA `(.L_x_8) ;
.L_x_1:
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   FFMA R1, R2, R3, R1 ;
        /*0060*/                   FADD.FTZ R1, R2, R3 ;
        /*0070*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0080*/                   FMUL R1, R2, R3 ;
.L_x_3:
        /*0090*/                   LDS.128 R4, [R9] ;
        /*00a0*/               @P2 BRA `(.L_x_3) ;
        /*00b0*/                   BRA.DIV UR4, `(.L_x_7) ;
        /*00c0*/                   SHFL.BFLY PT, R1, R2, 0x1, 0x1f ;
.L_x_4:
        /*00d0*/               @P3 BRA `(.L_x_5) ;
        /*00e0*/                   MOV R4, R7 ;
        /*00f0*/                   MOV R5, R8 ;
        /*0100*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_rcp_rn_f32_slowpath) ;
        /*0110*/                   BRA `(.L_x_6) ;
.L_x_5:
        /*0120*/                   MUFU.RCP R4, R7 ;
.L_x_6:
        /*0130*/                   STAS.128 [R2.64], R4, desc[UR4][R8.64] ;
        /*0140*/               @P4 BRA !P5, `(.L_x_0) ;
        /*0150*/                   UCGABAR_WAIT ;
        /*0160*/                   EXIT ;
.L_x_7:
        /*0170*/                   WARPSYNC.COLLECTIVE R6, `(.L_x_9) ;
.L_x_9:
        /*0180*/                   SHFL.BFLY PT, R1, R2, 0x1, 0x1f ;
        /*0190*/                   BRA `(.L_x_4) ;
.L_x_8:
        /*01a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R5+URZ], R4 ;
        /*01b0*/              @!P0 BRA `(.L_x_8) ;
        /*01c0*/                   BRA `(.L_x_1) ;
"""


def test_a_pass_of_the_loop_over_steps_is_counted():
    code, graph = machine_code.code_of(EPISODE)
    assert len(code) == 29
    ((part, inside),) = machine_code.passes("episode_sequence_forward", graph).items()
    found = machine_code.counts(code, inside)
    once = {"MUFU", "SHFL", "LDS", "BAR", "waits", "STAS"}
    assert part == "a step"
    assert found == dict.fromkeys(found, 0) | {"instructions": 15, "in loops": 2, "float32": 2} | dict.fromkeys(once, 1)
    assert machine_code.counts(code, graph)["cluster BAR"] == 1


def test_the_table_of_an_episode_on_clusters():
    """Messages of h, heads and reads forward; of heads, h and reads backward; the steps are recomputed without any."""
    row = machine_code.rows()["mann_sequence small"]
    forward, recompute, undo = (
        line
        for launch, times in machine_code.launches_of(*row).items()
        for line in machine_code.lines_of(launch, times)
    )
    assert [line["part"] for line in (forward, recompute, undo)] == ["a step", "recompute a step", "undo a step"]
    for line, waits in ((forward, 3), (undo, 3), (recompute, 0)):
        assert line["launches"] == 1
        assert line["spilled"] == line["cluster BAR"] == 0
        assert line["waits"] == waits
        assert line["STAS"] >= waits
        assert line["in loops"] < line["instructions"] < line["code"]
        assert line["a block"] == line["instructions"] * int(line["threads"]) // 32
    assert recompute["STAS"] == 0
    shown = machine_code.table([forward, recompute, undo]).splitlines()
    assert len(shown) == 5
    assert len({len(line) for line in shown}) == 1
