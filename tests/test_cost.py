"""The cost model of the GPU kernels: what it counts, against other ways to count it; what it assumes, against the page that derives it."""

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
        parent = event.cpu_parent
        while parent is not None and not counts(parent.name):
            parent = parent.cpu_parent
        if parent is None and counts(event.name):
            found[event.name.removeprefix("aten::")] += 1
        elif parent is not None and not event.cpu_children:
            nested.setdefault(parent.name.removeprefix("aten::"), Counter())[event.name.removeprefix("aten::")] += 1
    return found, nested


def counts(name):
    """Whether the dispatcher has a kernel of its own for an operator, and not only other operators to call."""
    if not name.startswith("aten::"):
        return False
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"))
    return not any(
        torch._C._dispatch_has_kernel_for_dispatch_key(getattr(packet, each)._name, "CompositeImplicitAutograd")
        for each in packet.overloads()
    )


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
    assert mine == Counter({name: count for name, count in found.items() if name not in VIEWS})
    assert cost_count.total(step).launches >= sum(mine.values())


def test_kernels_of_an_operator_are_what_it_calls():
    """Those that call others on the CPU as on a GPU."""
    x = torch.randn(4, 5, requires_grad=True)
    work = SimpleNamespace(leaves=[x], train=lambda function: function().backward())
    _, nested = profiled(work, lambda: (x[1] * 2).sum() + (x[1:3] * 2).sum())
    for name in ("select_backward", "slice_backward"):
        launched = {each: count for each, count in nested[name].items() if each not in VIEWS}
        assert cost_count.KERNELS[name] == sum(launched.values()), launched
