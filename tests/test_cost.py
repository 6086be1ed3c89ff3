"""The cost model of the GPU kernels: what it counts, counted in other ways; what it assumes, against the page that derives it."""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from bench import cost, cost_count, cost_kernels, cost_tables, cost_time
from bench.harness import Work
from bench.metanet import Shape as Coordinates
from bench.metanet_augmented import LayerShape
from bench.stems import SHAPES, Shape
from bench.suites import suite_of

SMALL = Shape(3, 2, 5, 6, 7, 4, 2)
SIZES = {
    "content_address": SMALL,
    "lrua_step": SMALL,
    "lrua_sequence": SMALL,
    "mann_sequence": SMALL,
    "summarize_gradients": Coordinates(7, 3, 5),
    "augmented_conv2d": LayerShape(3, 2, 2, 5, 9),
}


def profiled(work, function):
    """How often a training step calls each operator, by torch.profiler: the outermost that do not only call others."""
    work.train(function)
    for leaf in work.leaves:
        leaf.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work.train(function)
    found, nested = Counter(), {}
    for event in profile.events():
        if not event.name.startswith("aten::"):
            continue
        outermost, parent = None, event.cpu_parent
        while parent is not None:
            outermost, parent = parent if counts(parent.name) else outermost, parent.cpu_parent
        if outermost is None and counts(event.name):
            found[event.name.removeprefix("aten::")] += 1
        elif outermost is not None and not event.cpu_children:
            nested.setdefault(outermost.name.removeprefix("aten::"), Counter())[event.name.removeprefix("aten::")] += 1
    return found, nested


def counts(name):
    return name.startswith("aten::") and name.removeprefix("aten::") not in CALLERS


#: Operators that only call others.
CALLERS = {
    "argsort", "chunk", "conv2d", "einsum", "flatten", "linear", "matmul", "max_pool2d", "narrow",
    "reshape", "softmax", "to", "unflatten",
}  # fmt: skip
#: What the profiler sees beside those that start work on a GPU.
VIEWS = {
    "as_strided", "detach", "expand", "permute", "select", "slice", "split", "squeeze", "t", "transpose", "unbind", "unsqueeze",
    "view", "_unsafe_view", "alias", "_reshape_alias", "unfold", "empty", "empty_strided", "new_empty_strided", "empty_like",
    "resolve_conj", "result_type", "is_nonzero", "split_with_sizes", "lift_fresh", "set_", "resize_",
}  # fmt: skip


@pytest.mark.parametrize("stem", SIZES)
def test_eager_launches_are_what_the_profiler_counts(stem):
    suite = suite_of(stem)
    step = cost_count.eager(suite, stem, SIZES[stem], torch.float32)
    mine = Counter()
    for op, count in sum(step.values(), Counter()).items():
        mine[op.name] += count
    work = Work(stem, suite.inputs(stem, SIZES[stem]), torch.float32)
    found, _ = profiled(work, suite.eager[stem])
    found["add"] += found.pop("add_", 0)  # autograd adds gradients up in place only while nobody watches
    assert mine == Counter({name: count for name, count in found.items() if name not in VIEWS})
    assert cost_count.total(step).launches >= sum(mine.values())


def test_kernels_of_an_operator_are_what_it_calls(monkeypatch):
    """Those that call others on the CPU as on a GPU."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # a fill for each empty tensor
    x = torch.randn(4, 5, requires_grad=True)
    work = SimpleNamespace(leaves=[x], train=lambda function: function().backward())
    _, nested = profiled(work, lambda: (x[1] * 2).sum() + (x[1:3] * 2).sum())
    for name in ("select_backward", "slice_backward"):
        launched = {each: count for each, count in nested[name].items() if each not in VIEWS}
        assert cost_count.KERNELS[name] == sum(launched.values()), launched


def test_bytes_and_flops_of_eager_by_hand():
    """The forward pass of content_address and the loss, operator by operator."""
    B, N, W, R = SMALL.B, SMALL.N, SMALL.W, SMALL.R
    found = cost_count.eager(suite_of("content_address"), "content_address", SMALL, torch.float32)["fwd"]
    numbers = (
        (B * R * W + B * N * W + B * R * N)  # key . memory
        + (2 * B * R * W) + (B * R * W + B * R)  # squares of the keys, their sums
        + (2 * B * N * W) + (B * N * W + B * N)  # squares of the slots, their sums
        + (B * R + B * N + B * R * N)  # their product
        + (2 * B * R * N) + (2 * B * R * N)  # + eps, rsqrt
        + (3 * B * R * N) + (2 * B * R * N)  # times the products, softmax
        + (3 * B * R * N) + (B * R * N + 1)  # the loss: times weights, sum
    )  # fmt: skip
    assert sum(op.moved * count for op, count in found.items()) == 4 * numbers
    assert sum(op.products * count for op, count in found.items()) == 2 * B * R * N * W
    others = 2 * B * R * W + 2 * B * N * W + 5 * B * R * N + 2 * B * R * N
    assert sum(op.others * count for op, count in found.items()) == others


def test_products_of_an_episode_by_hand():
    """Forward; backward each of them has two gradients, but x, and what the first step starts from, has none."""
    T, B, H, N, W, R = 3, 2, 6, 7, 4, 2
    K, P = H + R * W, R * W + R
    found = cost_count.eager(suite_of("mann_sequence"), "mann_sequence", SMALL, torch.float32)
    products = {which: sum(op.products * count for op, count in ops.items()) for which, ops in found.items()}
    step = 4 * H * SMALL.I + 4 * H * K + P * H + 3 * N * W * R  # of an example: input, state, heads; write, match, read
    assert products["fwd"] == 2 * T * B * step
    backward = T * (4 * H * SMALL.I + 2 * 4 * H * K + 2 * P * H + 6 * N * W * R) - 4 * H * K
    assert products["bwd"] == 2 * B * backward


@pytest.mark.compiles
def test_what_a_compiler_makes_by_hand():
    def function(a, b):
        return torch.relu(a @ b) + 1

    def inputs(stem, shape):
        return {"a": torch.randn(64, 64), "b": torch.randn(64, 64)}

    suite = SimpleNamespace(inputs=inputs, eager={"memory_update": function})
    found = cost_count.compiled(suite, "memory_update", None, torch.float32)
    kinds = {which: Counter() for which in found}
    for which, ops in found.items():
        for op, count in ops.items():
            kinds[which][op.name] += count
    assert kinds["fwd"] == {"library": 1, "fused": 1, "mul": 1, "sum": 1}
    assert kinds["bwd"] == {"ones_like": 1, "mul": 1, "fused": 1, "library": 2}
    assert sum(op.products * count for ops in found.values() for op, count in ops.items()) == 3 * 2 * 64**3
    product = next(op for op in found["fwd"] if op.name == "library")
    assert product.moved == 3 * 64 * 64 * 4


def test_what_only_makes_room_is_no_kernel():
    from torch._inductor import ir, scheduler

    def node(kind, of):
        made = object.__new__(kind)
        made.node = object.__new__(of)
        return made

    assert cost_count._is_kernel(node(scheduler.SchedulerNode, ir.ComputedBuffer))
    assert cost_count._is_kernel(node(scheduler.ExternKernelSchedulerNode, ir.ExternKernelOut))
    assert not cost_count._is_kernel(node(scheduler.NopKernelSchedulerNode, ir.ConcatKernel))
    assert not cost_count._is_kernel(node(scheduler.ExternKernelSchedulerNode, ir.MultiOutput))


#: A loss launches them in each pass.
LOSS = {"fwd": ["mul", "sum"], "bwd": ["mul", "ones_like"]}


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("backend", "dtype", "more"), [("triton", "float32", 8), ("cuda", "float32", 9), ("cuda", "bfloat16", 11)]
)
def test_launches_around_an_episode(backend, dtype, more):
    """As counted on an H200 at the paper's size, without the parts in which cuBLAS does a product."""
    why = cost_kernels.missing(backend, "mann_sequence")
    if why is not None:
        pytest.skip(why)
    suite, kind = suite_of("mann_sequence"), getattr(torch, dtype)
    step = cost_kernels.step(suite, "mann_sequence", SHAPES["paper"].at(3), kind, backend, ("sm_90",))
    for which, want in (("fwd", 2), ("bwd", more)):
        around = sum(op.kernels * count for op, count in step.around[which].items())
        assert around - len(LOSS[which]) + sum(kernel.which == which for kernel in step.kernels) == want


@pytest.mark.compiles
def test_bytes_of_our_kernels_by_hand():
    pytest.importorskip("triton")
    s = SHAPES["single"]
    step = cost_kernels.step(suite_of("lrua_step"), "lrua_step", s, torch.float32, "triton", ("sm_90",))
    forward, backward = step.kernels
    assert {which: sorted(op.name for op in ops) for which, ops in step.around.items()} == LOSS
    assert (forward.which, backward.which) == ("fwd", "bwd")
    memory, usage, weights, heads, gate = s.N * s.W, s.N, s.R * s.N, s.R * s.W, s.R
    # memory, usage, weights: in and out; key; reads; gate and slots
    assert forward.moved == 4 * (2 * memory + 2 * usage + 2 * weights + 2 * heads + 2 * gate)
    # memory, weights, key, gate and their gradients; slots; the gradient of the reads
    assert backward.moved == 4 * (2 * memory + 2 * weights + 3 * heads + 3 * gate)
    for kernel in step.kernels:
        used = kernel.resources["sm_90"]
        assert (kernel.programs, kernel.threads, used["spilled"]) == (1, 256, 0)
        assert 1 <= used["programs"] <= 65_536 // (used["registers"] * kernel.threads)


def test_steps_take_what_the_page_derives():
    page = Path(cost.__file__).parents[1] / "docs/pages/mann_sequence_on_hopper.md"
    text = page.read_text()
    rows = dict(re.findall(r"^\| \**(gates|two cluster barriers|sum)\** \| (.*)$", text, re.MULTILINE))
    low, high = (int(each.replace(",", "")) for each in re.findall(r"\d,\d{3}", rows["sum"])[:2])
    narrow = [int(each.replace(",", "")) for each in re.findall(r"\d,\d{3}", rows["sum"])[2:4]]
    wide = cost_time.cluster_clocks(SHAPES["paper"], 8, "fwd", torch.float32)
    assert wide["barriers"] == int(rows["two cluster barriers"].split(" | ")[0])
    assert wide["gates"] == pytest.approx(int(rows["gates"].split(" | ")[0].replace(",", "")), rel=0.03)
    assert low <= sum(wide.values()) <= high
    assert narrow[0] <= sum(cost_time.cluster_clocks(SHAPES["paper"], 4, "fwd", torch.bfloat16).values()) <= narrow[1]
    back = [int(each.replace(",", "")) for each in re.search(r"([\d,]+) to ([\d,]+) clocks, 6 to 8 us", text).groups()]
    assert back[0] <= sum(cost_time.cluster_clocks(SHAPES["paper"], 8, "bwd", torch.float32).values()) <= back[1]
    # Triton: 1.28 MB of weights a step, from the second-level cache
    assert cost_time.program_clocks(SHAPES["paper"], "H100", "fwd", torch.float32)["products"] == 320_800 * 4 / 64
    assert cost_time.clock("H100") == pytest.approx(1.98e9, rel=0.01)
    assert cost_time.clock("A100") == pytest.approx(1.41e9, rel=0.01)
    assert cost_time.clock("B200") == pytest.approx(1.98e9, rel=0.01)


def kernel_of(stem="content_address", programs=1000, cluster=1, moved=33_500_000):
    used = {"registers": 32, "spilled": 0, "shared": 0, "programs": 2}
    return cost_kernels.Kernel(
        stem, "cuda", stem, "fwd", programs, 256, cluster, {"memory": moved, "work_ptr": 7}, {"sm_90": used}
    )


def test_times_and_ratios_by_hand():
    one = cost_count.Operation("mul", 1, 12, 0, 1)
    step = cost_kernels.Step([kernel_of()], {"fwd": Counter({one: 2}), "bwd": Counter()})
    others = {"eager": {"fwd": Counter({one: 4}), "bwd": Counter({one: 6})}, "compiled": "did not compile"}
    flops = {"fwd": (0, 0), "bwd": (0, 0)}
    row = cost.times_of("cuda", step, flops, others, "H100", SMALL, torch.float32, launch_us=4, kernel_us=2.5)
    # 33.5 MB at 3.35 TB/s, and twice the least; three launches
    assert (row["ours_device_us"], row["ours_host_us"]) == (pytest.approx(15), 12)
    assert row["eager_us"] == 40
    assert row["eager_ratio"] == pytest.approx(40 / 15)
    assert row["graph_us"] == 25
    assert row["compiled_us"] is None


def test_waves():
    assert cost_time.waves(kernel_of(programs=264), "H100") == 1
    assert cost_time.waves(kernel_of(programs=265), "H100") == 2
    assert cost_time.waves(kernel_of(programs=32 * 8, cluster=8), "H100") == 1
    assert cost_time.waves(kernel_of(programs=33 * 8, cluster=8), "H100") == 2


@pytest.mark.compiles
def test_the_command(tmp_path):
    pytest.importorskip("triton")
    where = tmp_path / "cost.json"
    command = ["--stem", "lrua_write_weights", "--compile-seconds", "0", "--json", str(where)]
    done = CliRunner().invoke(cost_command(), command)
    assert done.exit_code == 0, done.output
    assert done.output.count("Prediction: ") == len(cost_tables.TABLES) + 1
    found = json.loads(where.read_text())
    assert found["prediction"] == cost.PREDICTION
    assert any("--launch-us 5" in line for line in found["assumptions"])
    assert {row["table"] for row in found["rows"]} == set(cost_tables.TABLES)
    assert {row["target"] for row in found["rows"] if row["table"] == "kernels"} == set(cost_kernels.TARGETS)
    assert {row["gpu"] for row in found["rows"] if row["table"] == "ratios"} == set(cost_time.GPUS)
    launches = {row["contestant"]: row for row in found["rows"] if row["table"] == "launches"}
    assert launches["eager graph"]["launches"] == 1
    assert launches["eager graph"]["kernels"] == launches["eager"]["launches"]
    assert "no CUDA kernel" in launches["cuda"]["note"]


def cost_command():
    import typer

    command = typer.Typer()
    command.command()(cost.main)
    return command


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--stem", "lrua"], "--stem: got 'lrua'"),
        (["--shape", "tiny"], "--shape: got 'tiny'"),
        (["--dtype", "float16"], "--dtype: got 'float16'"),
        (["--stem", "lrua_step", "--shape", "omniglot"], "no size of lrua_step"),
    ],
)
def test_bad_options(options, said):
    done = CliRunner().invoke(cost_command(), options)
    assert done.exit_code != 0
    assert said in done.output


def test_without_triton(monkeypatch):
    """A note in place of what the compiler would say."""
    monkeypatch.setitem(sys.modules, "triton", None)
    rows = cost.rows_of("lrua_step", "small", SMALL, "float32", 5.0, 2.5, compiling=False)
    notes = {row["contestant"]: row["note"] for row in rows}
    assert "pip install triton" in notes["triton"]
    assert notes["eager"] is None
    for kind, table in cost_tables.TABLES.items():
        assert table([row for row in rows if row["table"] == kind]).row_count == (5 if kind == "launches" else 0)
