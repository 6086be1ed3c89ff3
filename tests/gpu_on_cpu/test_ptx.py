"""The compiled Triton kernels, run by the PTX machine on CPU tensors, against the reference; and mistakes that it must see.

`--all-targets` runs every option, size and dtype, on two targets.
"""

import importlib
import os
import re
import sys

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

pytest.importorskip("triton")

from emulated import emulated
from mutant import mutant_of
from ptx import PTXError
from stem import Inputs, compare, matches, quantities, reference_errors
from test_properties import class_of, tie, zero_rows

import mann_kernels
from bench.stems import SHAPES, inputs
from mann_kernels import _backend, reference
from mann_kernels.testing import accuracy

pytestmark = pytest.mark.compiles

#: (B, N, W, R): two programs and more slots than a tile has; more heads than four; a tile wider than deep.
SIZES = ((2, 37, 5, 2), (1, 150, 20, 6), (2, 3, 33, 1))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def _triton():
    with mann_kernels.backend("triton"):
        yield


def inputs_of(stem, seed, size, **options):
    if stem.endswith("sequence"):
        options.setdefault("T", 3)
    return class_of(stem).inputs(seed, *size, **options)


def cases_of(stem, target, dtype, everything):
    """(size, options) of the calls: with `everything` all options and sizes once, else two that differ in all of them."""
    options = class_of(stem).options
    two = [(SIZES[0], options[-1]), (SIZES[2], options[0])]
    if everything and (target, dtype) == ("sm_90", torch.float32):
        return [*two, (SIZES[1], options[-1]), *((SIZES[0], each) for each in options[:-1])]
    return two if everything else two[:1] if dtype == torch.float32 else two[1:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
@pytest.mark.parametrize("stem", _backend.STEMS)
def test_matches_reference(stem, target, dtype, request):
    if (stem, "cuda", dtype) in _backend.TRITON_CANNOT:
        pytest.skip(_backend.missing("triton", stem, "cuda", dtype))
    everything = request.config.getoption("--all-targets")
    if not everything and (target != "sm_90" or dtype not in DTYPES[:2]):
        pytest.skip("with --all-targets")
    cases = cases_of(stem, target, dtype, everything)
    with emulated(target) as launches:
        for seed, (size, options) in enumerate(cases):
            matches(stem, inputs_of(stem, seed, size, **options), dtype)
    assert len(launches) >= 2 * len(cases)


@pytest.mark.parametrize("change", [tie, zero_rows])
@pytest.mark.parametrize("stem", _backend.STEMS)
def test_ties_and_zero_rows(stem, change, request):
    if not request.config.getoption("--all-targets") and stem.endswith("sequence"):
        pytest.skip("with --all-targets")
    call = inputs_of(stem, 2, SIZES[0], **class_of(stem).options[-1], **({"T": 1} if stem.endswith("sequence") else {}))
    change(call)
    with emulated("sm_90"):
        matches(stem, call, torch.float32)


def test_the_least_there_is():
    """One slot of width one: gradients that are zero in the reference."""
    with emulated("sm_90"):
        for stem in ("content_address", "memory_update", "lrua_step"):
            compare(stem, inputs_of(stem, 0, (1, 1, 1, 1), **class_of(stem).options[0]), torch.float32)


@pytest.mark.parametrize("stem", _backend.STEMS)
def test_the_worst_of_approximate_instructions(stem, request):
    """exp, sqrt and division with the largest errors that NVIDIA allows, each time: at most four times beyond the rule."""
    if not request.config.getoption("--all-targets") and stem.endswith("sequence"):
        pytest.skip("with --all-targets")
    call = inputs_of(stem, 0, SIZES[0], **class_of(stem).options[-1])
    own, call = reference_errors(stem, call, torch.float32), call.to(torch.float32)
    with emulated("sm_90", worst=True):
        actual = quantities(getattr(mann_kernels, stem), call)
    same, exact = (quantities(getattr(reference, stem), each) for each in (call, call.to(torch.float64)))
    for name, value in actual.items():
        if value.is_floating_point():
            found = accuracy(value, same[name], exact[name])
            assert found.error <= 4 * (found.budget + 2 * own[name]), f"{name}: {found}"


def test_a_step_reads_and_writes_memory_once():
    """At the paper's shape, counted in what the warps ask for."""
    call = Inputs(inputs("lrua_step", SHAPES["single"])).to(torch.float32)
    with emulated("sm_90") as launches, torch.no_grad():
        mann_kernels.lrua_step(**call)
    (stats,) = launches
    memory = call["memory"].numel() * 4
    assert stats.loaded["memory_ptr"] == stats.stored["new_memory_ptr"] == memory
    assert stats.sectors["memory_ptr"] * 32 <= 1.2 * memory


def without_barriers(name, source):
    return re.sub(r"^( *)tl\.debug_barrier\(\)$", r"\1pass", source, flags=re.M)


def store_without_mask(name, source):
    return re.sub(r"^( *tl\.store\(.*), mask=[^=]*\)$", r"\1)", source, flags=re.M)


def programs_two_by_two(name, source):
    return source.replace("tl.program_id(0)", "(tl.program_id(0) // 2)") if name == "lrua_step.py" else source


def one_program_further(name, source):
    return source.replace("tl.program_id(0)", "(tl.program_id(0) + 1)") if name == "lrua_step.py" else source


def without_the_last_store(name, source):
    """Of the kernel of a step."""
    if name != "lrua_step.py":
        return source
    lines = source.splitlines()
    last = max(i for i, line in enumerate(lines) if re.match(r" +(tl\.store|store_rows)\(.*\)$", line))
    lines[last] = lines[last][: len(lines[last]) - len(lines[last].lstrip())] + "pass"
    return "\n".join(lines) + "\n"


def with_tf32(name, source):
    return source.replace('"ieee"', '"tf32"')


#: What is planted, in the kernels of which stem, and what is said of it.
MUTATIONS = {
    "missing barrier": ("mann_sequence", without_barriers, PTXError, "race: global (load|store) .* by another warp"),
    "wrong mask": ("lrua_step", store_without_mask, PTXError, "out of bounds: global store|race: global store"),
    "race between programs": (
        "lrua_step",
        programs_two_by_two,
        PTXError,
        "race: global store .* another warp or program",
    ),
    "out-of-bounds row": ("lrua_step", one_program_further, PTXError, "out of bounds: global load"),
    "missing store": ("lrua_step", without_the_last_store, AssertionError, "output .: error inf"),
    "TF32": ("summarize_gradients", with_tf32, AssertionError, "error .* against float64, budget"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_mistake_is_seen(name, tmp_path, monkeypatch):
    stem, change, error, message = MUTATIONS[name]
    changed = []

    def noted(name, source):
        changed.append(change(name, source) != source)
        return change(name, source)

    package = mutant_of(tmp_path, noted)
    assert any(changed)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(f"{package}.{stem}")
    monkeypatch.setitem(sys.modules, f"mann_kernels.triton.{stem}", module)
    with emulated("sm_90"), pytest.raises(error, match=message) as caught:
        compare(stem, inputs_of(stem, 1, SIZES[0]), torch.float32)
    if error is PTXError:
        assert re.search(r"\(\w+\.py:\d+\)$", str(caught.value))  # names the line
