import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import harness, peers
from bench.devices import Cpu
from bench.mann import Shape
from bench.operators import Case, operators

TINY = Shape(3, 2, 4, 5, 9, 6, 2)
MANN = operators()["mann_sequence"]


@pytest.fixture(autouse=True)
def anew():
    peers.why_no_sam.cache_clear()
    yield
    peers.why_no_sam.cache_clear()


@pytest.mark.parametrize("name", peers.ALTERNATIVES)
def test_other_ways_to_write_it_have_the_same_gradients(name):
    drawn = MANN.inputs(TINY, 0)
    functions = (peers.ALTERNATIVES[name], MANN.reference())
    found, want = (harness.Work(MANN, drawn, torch.float64).results(function) for function in functions)
    assert found.keys() == want.keys()
    for quantity in want:
        torch.testing.assert_close(found[quantity], want[quantity], msg=quantity)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.split(".")[0] in ("mm", "addmm", "bmm", "baddbmm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "products"),
    [
        ("heads_apart", 1 + 1 + 2 * TINY.R),  # gates; heads; a write and a cosine of each
        ("heads_together", 3 + 2 + 3),  # gates; keys, gates of the write; write, cosines, reads
    ],
)
def test_products_are_those_of_the_code_it_is_named_after(name, products):
    function = peers.ALTERNATIVES[name]
    work = harness.Work(MANN, MANN.inputs(TINY, 0), torch.float32)
    with Products() as found:
        function(*work.tensors.values())
    assert found.count == TINY.T * products


def test_without_the_package_a_notice_says_so(monkeypatch):
    monkeypatch.setattr(peers, "INSTALLED", False)
    assert peers.others(TINY, torch.zeros(3, 2, 4)) == {}
    assert "pip install -e .[peers]" in peers.notices()[0]
    assert MANN.notices() == peers.notices()
    assert operators()["lrua_step"].notices() == []


class Stub(torch.nn.Module):
    """Called as the package's modules are."""

    def __init__(self, input_size, hidden_size, **sizes):
        super().__init__()
        self.sizes = sizes
        self.layer = torch.nn.Linear(input_size, input_size)

    def forward(self, x, state, reset_experience):
        assert (state, reset_experience) == ((None, None, None), True)
        return self.layer(x), state


def test_a_peer_is_timed_as_other_work(monkeypatch):
    class NoIndex(Stub):
        def forward(self, *args, **kwargs):
            raise ModuleNotFoundError("No module named 'pyflann'")

    package = ModuleType("dnc")
    package.DNC, package.SAM = Stub, NoIndex
    monkeypatch.setitem(sys.modules, "dnc", package)
    monkeypatch.setattr(peers, "INSTALLED", True)
    assert peers.notices() == ["Left out: SAM of the package dnc (ModuleNotFoundError: No module named 'pyflann')"]
    assert peers.module("DNC", TINY, torch.device("cpu")).sizes["nr_cells"] == 9
    quick = replace(MANN, compiled=lambda loop: MANN.eager)
    monkeypatch.setattr(harness.limits, "peak", lambda *args: harness.limits.Peak(1e9, 1e9))
    rows = harness.time_case(quick, Case("tiny", TINY, heavy=True), Cpu(), "float32", 1, quick=True)
    kinds = {row["contestant"]: row["same_work"] for row in rows}
    assert kinds["dnc"] is kinds["lstm"] is False
    assert kinds["heads_apart"]
    assert "sam" not in kinds
    assert {row["note"] for row in rows} == {None}
    assert all((row["least_ms"] is not None) == row["same_work"] for row in rows)
    package.SAM = Stub
    peers.why_no_sam.cache_clear()
    assert set(peers.others(TINY, torch.zeros(3, 2, 4))) == {"dnc", "sam"}
    # links of every step and example, [N, N]: too many are left out
    assert set(peers.others(Shape(800, 16, 4, 5, 1024, 6, 2), torch.zeros(1))) == {"sam"}


def test_the_real_package():
    pytest.importorskip("dnc", reason="the package dnc is an extra (peers)")
    forward, train = MANN.others(TINY, {"x": torch.zeros(3, 2, 4)})["dnc"]()
    forward()
    train()
