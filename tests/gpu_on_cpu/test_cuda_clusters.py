"""The sequences on clusters, on the CPU: every form of a cluster, the messages between its blocks, and which form is chosen."""

import ctypes
import importlib
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("has nothing to do with Triton", allow_module_level=True)

import cuda_on_cpu
from against_reference import class_of, matches, quantities, tie, zero_rows
from mutant import cuda_mutant

import mann_kernels
from mann_kernels import reference

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(cuda_on_cpu.missing() is not None, reason=str(cuda_on_cpu.missing())),
]

#: Blocks, examples and parts of a cluster of mann_sequence, and whether weights are held in registers, forward and backward.
FORMS = (
    (2, 1, 1, 0, 0),
    (2, 1, 2, 1, 0),
    (2, 2, 1, 0, 0),  # several units to a warp, for several examples
    (4, 4, 1, 0, 1),
    (4, 2, 2, 1, 1),
    (8, 8, 1, 1, 0),
    (8, 2, 1, 0, 0),  # blocks without a memory
    (16, 4, 4, 1, 1),
)
PARTS = (1, 2, 4)
OPTIONS = (
    {"lengths": True},
    {"lru": "shared", "erase": "all", "lengths": True, "squash": "identity"},
    {"write": "add", "key_strength": True, "lengths": True},
)


@pytest.fixture(autouse=True)
def cuda():
    with cuda_on_cpu.cuda_on_cpu() as library:
        yield library
        library.mann_cuda_plan(0, 0, 0, 0, 0)


def mann(seed, size, **options):
    return class_of("mann_sequence").inputs(seed, *size, **options)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form(form, cuda, request):
    """More examples than a cluster takes, units that no block has, slots that the last part has not. Every form with one of the
    options, each with each where there is time."""
    cuda.mann_cuda_plan(*form)
    for number, (options, dtype) in enumerate(zip(OPTIONS, cuda_on_cpu.DTYPES, strict=True)):
        if request.config.getoption("--long") or number == FORMS.index(form) % len(OPTIONS):
            matches("mann_sequence", mann(1, (form[1] + 1, 21, 9, 2), T=5, H=37, **options), dtype)


@pytest.mark.parametrize("parts", PARTS)
def test_every_number_of_parts(parts, cuda, request):
    """Every number with a third of the options, each with each where there is time."""
    cuda.mann_cuda_plan(parts, 1, parts, 0, 0)
    for op, steps in {"lrua_sequence": {"T": 5}, "lrua_step": {}, "content_address": {}}.items():
        for number, options in enumerate(class_of(op).options):
            if request.config.getoption("--long") or number % len(PARTS) == PARTS.index(parts):
                dtype = cuda_on_cpu.DTYPES[number % len(cuda_on_cpu.DTYPES)]
                matches(op, class_of(op).inputs(1, 3, 21, 9, 2, **steps, **options), dtype)


@pytest.mark.parametrize("size", [(2, 130, 40, 4), (1, 600, 17, 3), (2, 40, 5, 12), (1, 33, 70, 1)], ids=str)
@pytest.mark.parametrize("op", ["mann_sequence", "lrua_sequence", "lrua_step", "content_address"])
def test_rows_and_columns(op, size, cuda):
    """Lanes to a row, rows and columns to a thread, groups of heads."""
    cuda.mann_cuda_plan(2, 1, 2, 0, 0)
    matches(op, class_of(op).inputs(1, *size, **({"T": 3} if op.endswith("sequence") else {})), torch.float32)


@pytest.mark.parametrize("seed", range(20))
def test_any_schedule(seed, cuda):
    """Whichever thread comes first and whenever a message arrives: the same bits."""
    cuda.mann_cuda_plan(4, 2, 2, 1, 1)
    call = mann(1, (3, 21, 9, 2), T=4, H=9, **OPTIONS[2]).to(torch.float32)
    first = quantities(mann_kernels.mann_sequence, call)
    cuda.mann_cuda_on_cpu_seed(seed)
    again = quantities(mann_kernels.mann_sequence, call)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("form", [(2, 1, 2, 1, 0), (2, 2, 1, 0, 1)], ids=str)
def test_gradcheck(form, cuda):
    cuda.mann_cuda_plan(*form)
    few = mann(0, (1, 4, 2, 1), T=2, write="add", key_strength=True)
    assert torch.autograd.gradcheck(*class_of("mann_sequence")._scalar("cpu", few), atol=1e-6)


@pytest.mark.parametrize("op", ["lrua_sequence", "lrua_step", "content_address"])
def test_gradcheck_in_parts(op, cuda):
    cuda.mann_cuda_plan(2, 1, 2, 0, 0)
    assert torch.autograd.gradcheck(*class_of(op)._scalar("cpu", None), atol=1e-6)


@pytest.mark.parametrize("change", [tie, zero_rows])
def test_ties_across_parts(change, cuda):
    """The lowest slot first, whichever block has it."""
    cuda.mann_cuda_plan(4, 1, 4, 0, 0)
    for op in ("mann_sequence", "lrua_sequence", "lrua_step", "content_address"):
        call = class_of(op).inputs(2, 2, 18, 4, 3, **({"T": 1} if op.endswith("sequence") else {}))
        change(call)
        matches(op, call, torch.float64)


@pytest.mark.parametrize("every", [1, 3, 10])
def test_segments_and_restarts(every, cuda, monkeypatch):
    cuda.mann_cuda_plan(4, 2, 2, 0, 0)
    for op in ("mann_sequence", "lrua_sequence"):
        monkeypatch.setattr(importlib.import_module(f"mann_kernels.ops.{op}"), "CHECKPOINT_EVERY", every)
        call = class_of(op).inputs(2, 3, 20, 6, 2, T=23, lengths=True)
        matches(op, call, torch.float32)


def test_large_key_strengths(cuda):
    """The softmax of every part is relative to its own largest, and none overflows."""
    cuda.mann_cuda_plan(4, 1, 4, 0, 0)
    call = class_of("lrua_sequence").inputs(2, 2, 300, 6, 2, T=3, beta=True)
    call["beta"] = call["beta"] * 300
    matches("lrua_sequence", call, torch.float32)


@pytest.fixture
def tf32():
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.usefixtures("tf32")
def test_tf32_where_it_is_allowed(form, cuda):
    """Products with weight_hh alone, which show it: rounded to TF32, and no more."""
    cuda.mann_cuda_plan(*form[:3], 0, 0)
    call = mann(1, (form[1] + 1, 21, 9, 2), T=5, H=37, lengths=True).to(torch.float32)
    exact = quantities(reference.mann_sequence, call.to(torch.float64))
    found = quantities(mann_kernels.mann_sequence, call)
    errors = [((found[name] - exact[name]).norm() / exact[name].norm()).item() for name in found if name in exact]
    assert 1e-5 < max(errors) < 2e-3


def test_units_that_no_fragment_takes(cuda):
    """More than 32 units of a block stay with plain arithmetic, in bfloat16 too."""
    cuda.mann_cuda_plan(2, 2, 1, 0, 0)
    matches("mann_sequence", mann(1, (3, 21, 5, 2), T=3, H=70), torch.bfloat16)


#: File, right, wrong, and what is said: by the numbers, or by what runs the kernels.
FAULTS = {
    "does not wait for a message": (
        "mann_sequence_forward.cu",
        "        mailbox_wait(&s.head_box, t);\n",
        "",
        "mailbox: expects a message twice|error",
    ),
    "expects too many bytes": (
        "mann_sequence_forward.cu",
        "kHeadBytes = kBlocks * kHeadPadded * sizeof(T)",
        "kHeadBytes = kBlocks * kHeadPadded * sizeof(T) + 16",
        "deadlock: .* waits at .*mann_sequence_forward.cu",
    ),
    "expects too few bytes": (
        "mann_sequence_backward.cu",
        "kDheadBytes = kOwners * kSent * sizeof(T)",
        "kDheadBytes = (kOwners * kSent - 4) * sizeof(T)",
        "mailbox: waits for message|error|deadlock",
    ),
    "one buffer for what may still be read": (
        "mann_sequence_backward.cu",
        "(&s.dh_parts[undone & 1]",
        "(&s.dh_parts[0]",
        "error",
    ),
    "expects a message that never comes": (
        "mann_sequence_forward.cu",
        "t + 1 < a.steps) mailbox_expect(&s.reads_box, kReadsBytes)",
        "t + 1 <= a.steps) mailbox_expect(&s.reads_box, t + 1 < a.steps ? kReadsBytes : 0)",
        "mailbox: waits for message",
    ),
    "no barrier after the reads came": (
        "mann_sequence_forward.cu",
        "copy_state(t / a.checkpoint_every - 1);\n            __syncthreads();\n",
        "copy_state(t / a.checkpoint_every - 1);\n",
        "error",
    ),
    "reads that are overwritten before they are stored": (
        "mann_sequence_forward.cu",
        "                if (t > 0) store_reads(t - 1);\n                remember(t);\n",
        "                remember(t);\n                if (t > 0) store_reads(t - 1);\n",
        "error",
    ),
    "a slot that comes before itself": ("rows.h", "others.at[j] < below", "others.at[j] <= below", "error|deadlock"),
    "a row that is not restored": (
        "rows_backward.h",
        "m[i][j] = overwritten[h * W + column(j)]",
        "m[i][j] = T(0)",
        "error",
    ),
    "the mean of the wrong step": (
        "rows_backward.h",
        "sums[3 * R + h] += weights[i][h]",
        "sums[3 * R + h] += read[i][h]",
        "error",
    ),
    "room after the numbers of an example that is not cleared": (
        "mann_sequence_forward.cu",
        ", s.reads.clear();",
        ";",
        "error",
    ),
    "rows of a fragment that are others": ("tensor.h", "lane / 4 + i % 2 * 8", "lane / 4 + i / 2 % 2 * 8", "error"),
}
#: Those in what runs on tensor cores alone.
OF_BFLOAT16 = tuple(FAULTS)[-2:]


def matches_under_schedules(cuda, call, dtype):
    for seed in range(10):
        cuda.mann_cuda_on_cpu_seed(seed)
        matches("mann_sequence", call, dtype)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(fault, cuda, tmp_path):
    file, right, wrong, said = FAULTS[fault]
    csrc = cuda_mutant(tmp_path, file, right, wrong)
    folder = tmp_path / "kernels"
    folder.mkdir()
    cuda.mann_cuda_plan(4, 2, 2, 0, 0)
    # sizes that no other test has: nothing compiled before is taken for it
    call = mann(1, (4, 22, 10 + list(FAULTS).index(fault), 2), T=9, H=10)
    cuda.mann_cuda_on_cpu_compiler(cuda_on_cpu.kernel_command("plain", csrc).encode(), str(folder).encode())

    try:
        with pytest.raises((AssertionError, RuntimeError), match=said):
            matches_under_schedules(cuda, call, torch.bfloat16 if fault in OF_BFLOAT16 else torch.float32)
    finally:
        right_folder = cuda_on_cpu.kernel_folder(cuda_on_cpu.BUILD / "plain", cuda_on_cpu.CSRC)
        cuda.mann_cuda_on_cpu_compiler(cuda_on_cpu.kernel_command("plain").encode(), str(right_folder).encode())


# Which form is chosen

PAPER = {"T": 50, "B": 16, "N": 128, "W": 40, "R": 4, "H": 200}
LIMIT = 232_448


def planned(cuda, limit=LIMIT, multiprocessors=132, write_add=0, key_strength=0, **sizes):
    given = PAPER | sizes
    numbers = (ctypes.c_int64 * 8)(*(given[name] for name in "TBNWRH"), write_add, key_strength)
    plan = (ctypes.c_int64 * 7)()
    cuda.mann_cuda_planned(numbers, ctypes.c_int64(limit), multiprocessors, plan)
    return dict(zip(("blocks", "examples", "parts", "held", "held back", "forward", "backward"), plan, strict=True))


@pytest.mark.parametrize("B", [1, 16, 300])
def test_blocks_that_send_messages_are_not_alone(B, cuda):
    for H in (1, 16, 64, 200):
        for N in (1, 4, 128, 1024):
            assert planned(cuda, B=B, H=H, N=N, R=1, W=20)["blocks"] != 1


def test_the_papers_size_uses_the_device(cuda):
    """A batch of 16 has more than 16 of the multiprocessors, and no more clusters than run at once."""
    plan = planned(cuda)
    assert 16 // plan["examples"] * plan["blocks"] >= 48
    assert 16 // plan["examples"] <= {4: 32, 8: 15, 16: 7}[plan["blocks"]]
    assert planned(cuda, write_add=1, key_strength=1)["blocks"] > 0
    assert planned(cuda, N=1024, W=64, H=200)["blocks"] > 0


@pytest.mark.parametrize("B", [1, 3, 16, 256])
@pytest.mark.parametrize("N", [7, 128, 1000, 5000, 1 << 20])
@pytest.mark.parametrize("H", [1, 64, 200, 1024])
def test_what_is_chosen_fits(B, N, H, cuda):
    for W, R in ((40, 4), (5, 1), (64, 7)):
        plan = planned(cuda, B=B, N=N, H=H, W=W, R=R)
        if plan["blocks"]:
            assert max(plan["forward"], plan["backward"]) <= LIMIT
            assert plan["examples"] * plan["parts"] <= plan["blocks"] <= 16
            assert (plan["parts"] - 1) * -(-N // plan["parts"]) < N  # every part has a slot
        else:
            assert N > 1000 or H > 200 or W * R > 400
        assert planned(cuda, B=B, N=N, H=H, W=W, R=R, limit=0)["blocks"] == 0
