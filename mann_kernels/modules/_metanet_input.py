"""Checks of MetaNet's arguments: an error names the argument, what it got and what it wants."""

import torch

from mann_kernels.modules.state import MetaNetState


def check_support(support_x, support_y, ways: int, fewer: bool) -> None:
    """Examples [S, ...] or [G, S, ...] and their labels [S] or [G, S]; unless `fewer`, each class at least once in each task."""
    for name, value in {"support_x": support_x, "support_y": support_y}.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, want a torch.Tensor")
    if not support_x.is_floating_point():
        raise TypeError(f"support_x: got dtype {support_x.dtype}, want a floating-point dtype")
    if support_y.dtype != torch.int64:
        raise TypeError(f"support_y: got dtype {support_y.dtype}, want torch.int64")
    if support_y.dim() not in (1, 2):
        raise ValueError(f"support_y: got shape {list(support_y.shape)}, want [S] or [G, S]")
    if support_x.shape[: support_y.dim()] != support_y.shape:
        raise ValueError(
            f"support_x: got shape {list(support_x.shape)}, want {list(support_y.shape)} first, the shape of support_y"
        )
    if support_y.shape[-1] == 0:
        raise ValueError("support_x: got an empty support set, want at least one example of each class")
    if not _readable(support_y):
        return
    labels, classes = support_y.tolist(), set(range(ways))  # one wait for a GPU
    for g, task in enumerate([labels] if support_y.dim() == 1 else labels):
        found = set(task)
        if not found <= classes:
            label = next(label for label in task if label not in classes)
            raise ValueError(f"support_y: got label {label}, want each in 0..{ways - 1} (ways={ways})")
        if not fewer and found != classes:
            where = f" in task {g}" if support_y.dim() == 2 else ""
            raise ValueError(
                f"support_y: got no example of class {min(classes - found)}{where}, want at least one of each of {ways} classes"
            )


def _readable(tensor) -> bool:
    """Say whether a tensor's values are known now: not while torch.compile traces, nor while a CUDA graph is captured, nor on the
    meta device, which has none."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def check_state(state, metanet) -> bool:
    """Check a state that `adapt` returned for this network. True if it is without the dimension G."""
    if not isinstance(state, MetaNetState):
        raise TypeError(f"state: got {type(state).__name__}, want the MetaNetState that adapt returns")
    alone = state.memory.dim() == 2
    G = () if alone else state.memory.shape[:1]
    rows = state.memory.shape[-2] - (metanet.variant == "metanet+")
    want = {"memory": (*G, state.memory.shape[-2], metanet.base_learner.num_coordinates)}
    want["index"] = (*G, rows, state.index.shape[-1])
    if (state.task_fast is None) != (metanet.variant == "metanet-"):
        got = "None" if state.task_fast is None else "a tensor"
        raise ValueError(f"state.task_fast: got {got}, want the other with variant={metanet.variant!r}")
    if state.task_fast is not None:
        want["task_fast"] = (*G, metanet.embedding.num_coordinates)
    for name, shape in want.items():
        if getattr(state, name).shape != shape:
            raise ValueError(f"state.{name}: got shape {list(getattr(state, name).shape)}, want {list(shape)}")
    return alone


def examples_are_alike(support_x, support_y, query_x) -> bool:
    """Say whether support examples and queries fit into one tensor; what is wrong where they do not, the checks say."""
    if not all(isinstance(value, torch.Tensor) for value in (support_x, support_y, query_x)):
        return False
    at = support_y.dim() - 1
    kinds = [(x.dtype, x.device, x.dim(), x.shape[:at], x.shape[at + 1 :]) for x in (support_x, query_x)]
    return kinds[0] == kinds[1]


def check_queries(query_x, state, alone: bool) -> None:
    """Examples [L, ...] or [G, L, ...], as the state is."""
    if not isinstance(query_x, torch.Tensor):
        raise TypeError(f"query_x: got {type(query_x).__name__}, want a torch.Tensor")
    if query_x.dtype != state.memory.dtype:
        raise TypeError(f"query_x: got dtype {query_x.dtype}, want {state.memory.dtype}, the dtype of the state")
    if query_x.dim() < 2 - alone or query_x.shape[0 if alone else 1] == 0:
        raise ValueError(f"query_x: got shape {list(query_x.shape)}, want at least one query")
    if not alone and query_x.shape[:1] != state.memory.shape[:1]:
        G = state.memory.shape[0]
        raise ValueError(
            f"query_x: got shape {list(query_x.shape)}, want [G, L, ...] with G={G}, the tasks of the state"
        )
