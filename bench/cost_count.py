"""What a training step launches, moves and computes, counted as it is dispatched, operator by operator; nothing is timed.

A step runs on CPU tensors, and each operator that would start work on a GPU is noted with the bytes of its tensors.
"""

import contextlib
import copy
import logging
import math
import os
import tempfile
from collections import Counter
from typing import NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench import contestants
from bench.harness import Work

#: Kernels that an operator launches on CUDA, where that is not one: what PyTorch's CUDA sources do for it.
KERNELS = {
    "select_backward": 2,  # zeros, then a copy into the part
    "slice_backward": 2,
    "scatter": 2,  # a copy, then the scatter
    "scatter_add": 2,
    "baddbmm": 2,  # a copy, then the product
    "sort": 3,  # indices, a copy, the sort of both; for up to 4,096 numbers in a row
    "max_pool2d_with_indices_backward": 2,  # zeros, then the sum
}
#: Move numbers and compute none.
MOVES = {
    "_to_copy", "cat", "clone", "copy_", "fill_", "gather", "ones_like", "scalar_tensor", "scatter", "select_backward",
    "slice_backward", "stack", "zero_", "zeros", "zeros_like",
}  # fmt: skip
#: Neither launch anything nor move anything: they make room, or see what is there in another shape.
ALLOCATES = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
#: By namespace, where the launcher of a kernel of ours is registered: what else it calls is seen too.
LAUNCHERS = {
    "mann_triton": torch._C.DispatchKey.CompositeExplicitAutograd,
    "mann_cuda_on_cpu": torch._C.DispatchKey.CPU,
}


class Operation(NamedTuple):
    """One call of an operator, or one kernel that a compiler makes."""

    name: str
    kernels: int
    moved: int  # bytes of its tensors, each once, in and out
    products: int  # floating-point operations of matrix products and convolutions, a multiply-add counted as two
    others: int  # of the rest: one for each number of its largest tensor


def packet_name(operator) -> str:
    return operator._schema.name.split("::")[1]


def launches(operator) -> bool:
    """Whether it starts work on a GPU: no view, no allocation, none of a namespace of ours."""
    return operator.namespace == "aten" and not operator.is_view and packet_name(operator) not in ALLOCATES


def kernels_of(operator, args) -> int:
    name = packet_name(operator)
    if name == "convolution_backward":  # one for each gradient that is asked for
        return sum(args[-1])
    return KERNELS.get(name, 1)


def nbytes(tensor: torch.Tensor) -> int:
    """Of the numbers that are there: an expanded tensor has fewer than its shape says."""
    distinct = math.prod(
        size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0
    )
    return distinct * tensor.element_size()


def operation_of(operator, args, kwargs, out) -> Operation:
    name = packet_name(operator)
    given, made = (
        [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in ((args, kwargs), out)
    )
    # an operand that is given twice, as in x * x, is read once; what is written in place is read and written
    tensors = [*{(each.data_ptr(), each.shape): each for each in given}.values(), *made]
    products = others = 0
    if operator.overloadpacket in flop_registry:
        products = flop_registry[operator.overloadpacket](*args, **kwargs, out_val=out)
    elif name not in MOVES:
        others = max((tensor.numel() for tensor in tensors), default=0)
    return Operation(name, kernels_of(operator, args), sum(map(nbytes, tensors)), products, others)


class Tally(TorchDispatchMode):
    """Within the block, what every operator does, by pass."""

    def __init__(self):
        super().__init__()
        self.found = {"fwd": Counter(), "bwd": Counter()}
        self.now = self.found["fwd"]

    @classmethod
    def ignore_compile_internals(cls):
        """torch.compile would otherwise run everything eagerly while a mode is on."""
        return True

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator.namespace in LAUNCHERS:
            with self:
                return operator._op_dk(LAUNCHERS[operator.namespace], *args, **kwargs)
        if operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):  # called from C++
            with self:
                return operator.decompose(*args, **kwargs)
        out = operator(*args, **kwargs)
        if launches(operator):
            self.now[operation_of(operator, args, kwargs, out)] += 1
        return out

    def training_step(self, work: Work, function, between=lambda: None) -> dict[str, Counter]:
        """A forward pass, `between`, and a backward pass."""
        work.train(function)  # what the loss is weighted with is drawn once, and a compiler compiles at the first call
        for leaf in work.leaves:
            leaf.grad = None
        self.now = self.found["fwd"]
        for found in self.found.values():
            found.clear()
        with self:
            loss, _ = work.loss(function)
            between()
            self.now = self.found["bwd"]
            loss.backward()
        return self.found


def eager(suite, stem: str, shape, dtype) -> dict[str, Counter]:
    """Operations of the eager contestant, by pass."""
    return Tally().training_step(Work(stem, suite.inputs(stem, shape), dtype), suite.eager[stem])


class _Scheduled(Exception):
    """Where the compiler stops: its kernels are known, and none is made."""


def compiled(suite, stem: str, shape, dtype) -> dict[str, Counter]:
    """The same of the eager contestant under torch.compile, of a sequence its step: the kernels that inductor schedules for Triton,
    after fusion. It stops there; the graphs then run as they are."""
    from functorch.compile import make_boxed_func
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    scheduled: list[list[Operation]] = []
    tally = Tally()

    def note(nodes):
        scheduled.append([_kernel_of(each) for each in nodes if _is_kernel(each)])
        raise _Scheduled

    def count(graph, inputs, **options):
        plain, before = copy.deepcopy(graph), len(scheduled)
        products = _products(graph)
        try:
            compile_fx_inner(graph, inputs, **options)
        except Exception:  # torch wraps what the note raises
            if len(scheduled) == before:
                raise
        # a graph of views alone is not scheduled
        kernels = _with_products(scheduled[-1], products) if len(scheduled) > before else Counter()

        def run(*arguments):
            tally.now.update(kernels)
            with _disable_current_modes():
                return plain(*arguments)

        return make_boxed_func(run)

    torch._dynamo.reset()
    one = torch.compile(
        _step_of(suite, stem),
        backend=lambda graph, inputs: compile_fx(graph, inputs, inner_compile=count),
        dynamic=False,
    )
    function = contestants.over_time(stem, one) if stem.endswith("_sequence") else one
    patches = {"_post_fusion_custom_pass": note, "cpu_backend": "triton", "fx_graph_cache": False}
    try:
        with config.patch(patches), _nothing_left():
            return tally.training_step(Work(stem, suite.inputs(stem, shape), dtype), function)
    finally:
        torch._dynamo.reset()


@contextlib.contextmanager
def _nothing_left():
    """The compiler keeps, and says that it keeps, the folder of what it did not finish: in one that goes away."""
    log = logging.getLogger("torch._inductor.utils")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
            yield
    finally:
        log.setLevel(level)


def _step_of(suite, stem):
    steps = {"mann_sequence": contestants.mann_step, "lrua_sequence": contestants.step}
    return steps.get(stem) or suite.eager[stem]


def _is_kernel(node) -> bool:
    """Of what inductor schedules, that which does not only make room or name a part of another's result."""
    return type(node).__name__ != "NopKernelSchedulerNode" and type(node.node).__name__ != "MultiOutput"


def _products(graph) -> int:
    """Floating-point operations of the matrix products and convolutions of a graph."""
    found = 0
    for node in graph.graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if packet in flop_registry:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
            found += flop_registry[packet](*args, **kwargs, out_val=node.meta["val"])
    return found


def _kernel_of(node) -> Operation:
    library = type(node).__name__ == "ExternKernelSchedulerNode"
    return Operation("library" if library else "fused", 1, int(node.get_read_write_buffers_sizes()), 0, 0)


def _with_products(kernels: list[Operation], products: int) -> Counter:
    """Products in equal parts to the kernels that a library has; the compiler has made all of them its own where there is none."""
    takes = [op for op in kernels if op.name == "library"] or kernels
    share = products // max(1, len(takes))
    return Counter(op._replace(products=share) if op in takes else op for op in kernels)


class Total(NamedTuple):
    launches: int
    moved: int
    flops: int


def total(found: dict[str, Counter]) -> Total:
    """Of both passes."""
    every = sum(found.values(), Counter())
    return Total(
        sum(op.kernels * count for op, count in every.items()),
        sum(op.moved * count for op, count in every.items()),
        sum((op.products + op.others) * count for op, count in every.items()),
    )
