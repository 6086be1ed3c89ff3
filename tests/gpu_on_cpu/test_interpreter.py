"""The Triton kernels on the CPU, under Triton's interpreter, against the reference: source semantics, every option and gradient.

Run with TRITON_INTERPRET=1, which Triton reads when a kernel is defined, so in a process of its own.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)

from stem import compare
from test_properties import class_of, matches, tie, zero_rows

import mann_kernels
from mann_kernels import _backend

#: (B, N, W, R): odd, more heads than 16 needs padding for, several tiles of slots, the least there is.
SIZES = ((2, 7, 5, 2), (1, 150, 20, 6), (1, 1, 1, 1))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _triton():
    with mann_kernels.backend("triton"):
        yield


def inputs_of(stem, seed, size, **options):
    tests = class_of(stem)
    if stem.endswith("sequence"):
        options.setdefault("T", 3)
    return tests.inputs(seed, *size, **(dict(tests.options[0]) | options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stem", _backend.STEMS)
def test_matches_reference(stem, dtype):
    for seed, size in enumerate(SIZES):
        for options in class_of(stem).options:
            matches(stem, inputs_of(stem, seed, size, **options), dtype)


@pytest.mark.parametrize("stem", _backend.STEMS)
def test_ties_and_zero_rows(stem):
    for change in (tie, zero_rows):
        inputs = inputs_of(stem, 2, (2, 9, 4, 3), **({"T": 1} if stem.endswith("sequence") else {}))
        change(inputs)
        matches(stem, inputs, torch.float64)


@pytest.mark.parametrize("stem", _backend.STEMS)
def test_empty_batch(stem):
    compare(stem, inputs_of(stem, 0, (0, 5, 3, 2)), torch.float32)


@pytest.mark.parametrize("stem", ["lrua_sequence", "mann_sequence"])
@pytest.mark.parametrize("every", [1, 3, 256])
def test_segments_and_restarts(stem, every, monkeypatch):
    import importlib

    monkeypatch.setattr(importlib.import_module(f"mann_kernels.ops.{stem}"), "CHECKPOINT_EVERY", every)
    compare(stem, inputs_of(stem, 2, (2, 12, 6, 2), T=10, lengths=True), torch.float32)
    compare(stem, inputs_of(stem, 2, (2, 12, 6, 2), T=0), torch.float32)


@pytest.mark.parametrize(("stem", "most"), [("generate_fast_weights", 64), ("summarize_gradients", 61)])
def test_hidden_units_of_the_generators(stem, most):
    """What is the most there is runs, and one more is a clear error; the blocks go around the programs of backward."""
    compare(stem, inputs_of(stem, 1, (1, 21, most, 2)), torch.float32)
    with pytest.raises(ValueError, match=f"at most {most} hidden units"):
        compare(stem, inputs_of(stem, 1, (1, 3, most + 1, 2)), torch.float32)


@pytest.mark.parametrize("stem", ["generate_fast_weights", "summarize_gradients"])
def test_programs_take_several_blocks(stem, monkeypatch):
    monkeypatch.setattr("mann_kernels.triton._coordinates.PROGRAMS", 3)
    matches(stem, inputs_of(stem, 1, (5, 33, 6, 3)), torch.float32)
