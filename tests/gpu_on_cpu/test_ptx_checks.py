"""What the PTX machine must refuse, and what it must not; that no opcode is without a test."""

import re
from pathlib import Path

import numpy as np
import ptx
import pytest
import torch
from one_kernel import HEAD, launch
from ptx import PTXError
from ptx_machine import Machine
from ptx_ops import OPERATIONS

HERE = "mad.wide.u32 %d10, %r1, 4, %d1; mad.wide.u32 %d11, %r1, 4, %d2; shl.b32 %r2, %r1, 2;"
REFUSED = {
    "unknown opcode": ("frobnicate.s32 %r2, %r1", "unknown opcode 'frobnicate'"),
    "unknown modifier": ("add.warp.s32 %r2, %r1, %r1", "unknown modifier .warp"),
    "unknown type": ("add.b32 %r2, %r1, %r1", "unknown modifier .b32"),
    "too few operands": ("add.s32 %r2, %r1", "got 2 operands, want 3"),
    "too many operands": ("fma.rn.f32 %r2, %r1, %r1, %r1, %r1", "got 5 operands, want 4"),
    "unknown register": ("add.s32 %r2, %nothing, 1", "%nothing read as s32"),
    "narrow register": ("add.s64 %r2, %d1, %d2", "%r2 written as s64"),
    "unknown cache hint": ("ld.global.L3::keep.b32 %r2, [%d10]", "unknown modifier .L3::keep"),
    "out of bounds": ("ld.global.b32 %r2, [%d10+4]", r"out of bounds.*\+256 bytes from the start of x, which has 256"),
    "before the start": ("st.global.b32 [%d10+-4], %r1", "out of bounds.*-4 bytes from the start of x"),
    "misaligned": ("ld.global.b64 %d20, [%d10+2]", "misaligned"),
    "vector misaligned": ("ld.global.v2.b32 {%r20, %r21}, [%d1+4]", "misaligned"),
    "shared out of bounds": ("st.shared.b32 [%r2+4], %r1", "out of bounds: shared store at byte 256 of 256"),
    "shared misaligned": ("st.shared.b32 [%r2+1], %r1", "misaligned"),
    "shared uninitialised": ("ld.shared.b32 %r3, [%r2]", "uninitialised"),
    "local out of bounds": ("st.local.b32 [%d1], %r1", "out of bounds: local"),
    "two values in one place": ("st.global.b32 [%d1], %r1", r"race: global store at x\[0\]|store different values"),
    "two values in shared memory": ("st.shared.b32 [0], %r1", "store different values"),
    "store and load of two warps": ("st.global.b32 [%d10], %r1; xor.b32 %r3, %r1, 32; mad.wide.u32 %d12, %r3, 4, %d1;"
                                    "ld.global.b32 %r4, [%d12]", r"race: global load at x\[.*stored"),
    "load and store of two warps": ("xor.b32 %r3, %r1, 32; mad.wide.u32 %d12, %r3, 4, %d1; ld.global.b32 %r4, [%d12];"
                                    "st.global.b32 [%d10], %r1", r"race: global store at x\[.*loaded"),
    "all load and one stores": ("ld.global.b32 %r4, [%d1]; setp.eq.s32 %p1, %r1, 0; @%p1 st.global.b32 [%d1], %r1",
                                "race: global store at x.*loaded"),
    "all load and another stores": ("ld.global.b32 %r4, [%d1]; setp.eq.s32 %p1, %r1, 32; @%p1 st.global.b32 [%d1], %r1",
                                    "race: global store at x.*loaded"),
    "two values from one warp": ("setp.lt.u32 %p1, %r1, 32; @%p1 st.global.b32 [%d1], %r1", "store different values to one"),
    "two values one after the other": ("setp.lt.u32 %p1, %r1, 32; @%p1 st.shared.b32 [0], 5; @!%p1 st.shared.b32 [0], 6",
                                       "store different values to shared byte 0"),
    "one value in one place": ("st.global.b32 [%d1], 7", r"race: global store at x\[0\], stored"),
    "update and load": ("atom.global.add.u32 %r3, [%d1], 1; ld.global.b32 %r4, [%d1]", "race: global load at x.*updated"),
    "shared without a barrier": ("st.shared.b32 [%r2], %r1; xor.b32 %r3, %r2, 128; ld.shared.b32 %r4, [%r3]",
                                 "race: shared load of byte .*stored"),
    "shared overwritten too early": ("st.shared.b32 [%r2], %r1; bar.sync 0; xor.b32 %r3, %r2, 128; ld.shared.b32 %r4, [%r3];"
                                     "st.shared.b32 [%r2], %r4", "race: shared store of byte .*loaded"),
    "divergent barrier": ("setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync 0; bra.uni B; A: bar.sync 0; B: nop",
                          "divergent barrier"),
    "barrier after an exit": ("setp.lt.u32 %p1, %r1, 32; @%p1 exit; bar.sync 0", "divergent barrier"),
    "barrier of some": ("bar.sync 1, 32", "a barrier of other than all threads"),
    "shuffle with missing lanes": ("setp.lt.u32 %p1, %r1, 7; @%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1", "missing lanes"),
    "shuffle from a missing lane": ("setp.lt.u32 %p1, %r1, 7; @%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, 127", "missing lanes"),
    "vote with missing lanes": ("setp.lt.u32 %p1, %r1, 7; @%p1 vote.sync.any.pred %p2, %p1, -1", "missing lanes"),
    "reduction with missing lanes": ("setp.lt.u32 %p1, %r1, 7; @%p1 redux.sync.add.s32 %r3, %r1, -1", "missing lanes"),
    "product with missing lanes": ("setp.lt.u32 %p1, %r1, 7; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r2]",
                                   "missing lanes"),
    "warp group": ("wgmma.fence.sync.aligned", "warp group products"),
    "no end": ("L: bra.uni L", "does not end"),
    "branch to nowhere": ("bra NOWHERE", "no label"),
    "function call": ("call.uni printf", "unknown opcode 'call'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name, monkeypatch):
    monkeypatch.setattr("ptx_machine.ENDLESS", 100)
    instruction, message = REFUSED[name]
    x, y = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    with pytest.raises(PTXError, match=message):
        launch(f".loc 1 12 3\n{HERE}\n{instruction};", {"x": x, "y": y}, threads=64, shared=256)


@pytest.mark.parametrize("body", [
    "st.global.b32 [%d10], %r1; bar.sync 0; xor.b32 %r3, %r1, 32; mad.wide.u32 %d12, %r3, 4, %d1; ld.global.b32 %r4, [%d12]",
    "ld.global.b32 %r4, [%d1]; bar.sync 0; setp.eq.s32 %p1, %r1, 0; @%p1 st.global.b32 [%d1], %r1",
    "st.shared.b32 [%r2], %r1; bar.sync 0; xor.b32 %r3, %r2, 128; ld.shared.b32 %r4, [%r3]",
    "st.shared.b32 [%r2], %r1; xor.b32 %r3, %r2, 64; ld.shared.b32 %r4, [%r3]",  # within a warp
    "st.shared.b32 [0], 7; bar.sync 0; ld.shared.b32 %r4, [0]",  # all store the same
    "atom.global.add.u32 %r3, [%d1], 1; atom.global.add.u32 %r3, [%d1], 1",
])  # fmt: skip
def test_what_is_sound_passes(body):
    x, y = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    launch(f"{HERE}\n{body};", {"x": x, "y": y}, threads=64, shared=256)


@pytest.mark.parametrize(("body", "message"), [
    ("st.global.b32 [%d10], %r1", "race: global store at x.*stored"),
    ("ld.global.b32 %r3, [%d10]; bar.sync 0; setp.eq.s32 %p1, %r5, 1; @%p1 st.global.b32 [%d10], %r1",
     "race: global store.*loaded"),
    ("setp.eq.s32 %p1, %r5, 1; @%p1 st.global.b32 [%d10], %r1; bar.sync 0; ld.global.b32 %r3, [%d10]",
     "race: global (load.*stored|store.*loaded)"),
    ("atom.global.add.u32 %r3, [%d10], 1; bar.sync 0; setp.eq.s32 %p1, %r5, 1; @%p1 st.global.b32 [%d10], %r1",
     "race: global store.*updated"),
])  # fmt: skip
def test_programs_race_whatever_the_barriers(body, message, monkeypatch):
    for at_once in (4096, 64):  # in one wave, or one after the other
        monkeypatch.setattr("ptx_machine.THREADS_AT_ONCE", at_once)
        x, y = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
        with pytest.raises(PTXError, match=message):
            launch(f"{HERE} mov.u32 %r5, %ctaid.x;\n{body};", {"x": x, "y": y}, threads=64, grid=2)


def test_errors_name_the_line_of_the_kernel():
    text = HEAD.format(
        parameters=".param .u64 x", threads=32, body="ld.param.b64 %d1, [x];\n.loc 7 41 3\nld.global.b32 %r2, [%d1+4];"
    )
    text += '.file 7 "/somewhere/kernels.py"\n'
    with pytest.raises(PTXError, match=r"`ld.global.b32 %r2, \[%d1\+4\]` \(kernels.py:41\)"):
        Machine(ptx.parse(text), (1, 1, 1), 32, 0, {"x": torch.zeros(1)}).run()


def test_every_opcode_has_a_test():
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_ptx_*.py"))

    without = {name for name in OPERATIONS if not re.search(rf"[\"; {{}}]{name}\.", text)}
    assert without - {"nop", "membar", "createpolicy", "prefetch", "griddepcontrol", "discard"} == set()  # hints
