"""Small kernels in PTX, around the instructions that a test is about."""

import numpy as np
import ptx
import torch
from ptx_machine import Machine

REGISTERS = {1: "h", 2: "h", 4: "r", 8: "d"}
DTYPES = {
    "s8": np.int8, "u8": np.uint8, "s16": np.int16, "u16": np.uint16, "b16": np.uint16, "f16": np.float16, "bf16": np.uint16,
    "s32": np.int32, "u32": np.uint32, "b32": np.uint32, "f32": np.float32, "tf32": np.uint32, "bf16x2": np.uint32,
    "f16x2": np.uint32, "s64": np.int64, "u64": np.uint64, "b64": np.uint64, "f64": np.float64,
}  # fmt: skip
HEAD = """
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 smem[];
.visible .entry one({parameters}) .reqntid {threads} {{
.reg .pred %p<9>; .reg .b16 %h<33>; .reg .b32 %r<99>; .reg .b64 %d<65>;
{body}
ret;
}}
"""


def launch(body, arrays, threads=32, shared=0, grid=1, cluster=1, worst=False):
    """Runs `body` with a pointer to each of `arrays` in %d1, %d2, ... and the thread's number in %r1."""
    parameters = ", ".join(f".param .u64 {name}" for name in arrays)
    loads = "".join(f"ld.param.b64 %d{i}, [{name}];\n" for i, name in enumerate(arrays, 1))
    text = HEAD.format(parameters=parameters, threads=threads, body=f"{loads} mov.u32 %r1, %tid.x;\n{body}")
    kernel = ptx.parse(text)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Machine(kernel, (grid, 1, 1), threads, shared, tensors, cluster=cluster, worst=worst).run()


def run_one(instruction, sources, types, to, **options):
    """`instruction` with {0}, {1}, ... for its sources (arrays of `types`) and {d} for what comes out, of type `to`."""
    sources = [np.asarray(source, DTYPES[kind]) for source, kind in zip(sources, types, strict=True)]
    threads = -(-max(len(source) for source in sources) // 32) * 32
    arrays = {f"in{i}": np.resize(source, threads) for i, source in enumerate(sources)}
    out_size = np.dtype(DTYPES[to]).itemsize
    arrays["out"] = np.zeros(threads, DTYPES[to])
    body, names = "", {}
    for i, source in enumerate(sources):
        size, name = source.itemsize, f"%{REGISTERS[source.itemsize]}{10 + i}"
        body += f"mad.wide.u32 %d{20 + i}, %r1, {size}, %d{1 + i}; ld.global.b{8 * size} {name}, [%d{20 + i}];\n"
        names[str(i)] = name
    target = f"%{REGISTERS[out_size]}20"
    body += instruction.replace("{d}", target)
    for key, name in names.items():
        body = body.replace("{" + key + "}", name)
    body += (
        f";\nmad.wide.u32 %d30, %r1, {out_size}, %d{len(sources) + 1}; st.global.b{8 * out_size} [%d30], {target};\n"
    )
    launch(body, arrays, threads, **options)
    return arrays["out"][: len(sources[0])]


def check(instruction, sources, types, to, want, **options):
    got = run_one(instruction, sources, types, to, **options)
    want = np.asarray(want).astype(DTYPES[to])
    bits = f"u{want.itemsize}"
    assert np.array_equal(got.view(bits), want.view(bits)), f"{instruction}: got {got}, want {want}"
