"""Tests that MetaNet refuses bad input, a bad state and bad construction with an error that names the argument."""

import pytest
from small_metanet import draw, small
from torch import nn

from mann_kernels import (
    AugmentedSequential,
    FastWeightGenerator,
    MetaNet,
)


def change(**changes):
    return lambda call: call | {name: make(call[name]) for name, make in changes.items()}


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (change(y=lambda y: y + 1), ValueError, r"support_y: got label 3, want each in 0\.\.2 \(ways=3\)"),
        (change(y=lambda y: y - 1), ValueError, r"support_y: got label -1, want each in 0\.\.2"),
        (change(y=lambda y: y * 0), ValueError, r"support_y: got no example of class 1 in task 0, want at least one"),
        (change(y=lambda y: y.int()), TypeError, r"support_y: got dtype torch.int32, want torch.int64"),
        (change(y=lambda y: y[:, :2]), ValueError, r"support_x: got shape \[2, 3, 1, 6, 6\], want \[2, 2\] first"),
        (change(y=lambda y: y[..., None]), ValueError, r"support_y: got shape \[2, 3, 1\], want \[S\] or \[G, S\]"),
        (change(x=lambda x: x[:, :0], y=lambda y: y[:, :0]), ValueError, "support_x: got an empty support set"),
        (change(x=lambda x: x.long()), TypeError, "support_x: got dtype torch.int64, want a floating-point dtype"),
        (change(x=lambda x: None), TypeError, "support_x: got NoneType, want a torch.Tensor"),
        (change(x=lambda x: x[:, [0, 1, 2, 0]], y=lambda y: y[:, [0, 1, 2, 0]]), ValueError, "got 4 examples"),
        (change(queries=lambda q: q[:1]), ValueError, r"query_x: got shape .* want \[G, L, \.\.\.\] with G=2"),
        (change(queries=lambda q: q.float()), TypeError, "query_x: got dtype torch.float32, want torch.float64"),
        (
            change(queries=lambda q: q[:, :0]),
            ValueError,
            r"query_x: got shape \[2, 0, 1, 6, 6\], want at least one query",
        ),
        (change(queries=lambda q: None), TypeError, "query_x: got NoneType, want a torch.Tensor"),
    ],
)
def test_bad_input(bad, error, message):
    x, y, queries = draw()
    call = bad({"x": x, "y": y, "queries": queries})
    with pytest.raises(error, match=message):
        small("metanet+")(call["x"], call["y"], call["queries"])


def test_bad_state_and_bad_construction():
    metanet = small()
    x, y, queries = draw()
    state = metanet.adapt(x, y)
    P, Q = metanet.base_learner.num_coordinates, metanet.embedding.num_coordinates
    for wrong, error, message in (
        (tuple(state), TypeError, "state: got tuple, want the MetaNetState"),
        (state._replace(memory=state.memory[..., 1:]), ValueError, rf"state.memory: got shape \[2, 3, {P - 1}\], want"),
        (
            state._replace(memory=state.memory[:, 1:]),
            ValueError,
            r"state.index: got shape \[2, 3, 4\], want \[2, 2, 4\]",
        ),
        (state._replace(task_fast=state.task_fast[:1]), ValueError, rf"state.task_fast: got .* want \[2, {Q}\]"),
        (state._replace(task_fast=None), ValueError, "state.task_fast: got None"),
    ):
        with pytest.raises(error, match=message):
            metanet.predict(queries, wrong)
    for make, error, message in (
        (lambda: small("meta"), ValueError, "variant: got 'meta', want one of"),
        (lambda: small(summarizer="max"), ValueError, "summarizer: got 'max', want one of"),
        (lambda: MetaNet(nn.Linear(1, 1), metanet.embedding, nn.ReLU()), TypeError, "base_learner: got Linear"),
        (
            lambda: MetaNet(metanet.base_learner, AugmentedSequential(nn.ReLU()), nn.ReLU()),
            ValueError,
            "embedding: got no augmented layer",
        ),
        (lambda: FastWeightGenerator(0), ValueError, "hidden_size: got 0, want at least 1"),
    ):
        with pytest.raises(error, match=message):
            make()
