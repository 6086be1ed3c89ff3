import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import devices, limits
from bench.counts import INDEX_BYTES, Work
from bench.harness import PASSES
from bench.harness import Work as Run
from bench.layers import LayerShape
from bench.mann import Shape
from bench.operators import operators
from mann_kernels import _backend

TINY = Shape(3, 2, 4, 5, 9, 6, 2)
LAYERS = {
    "augmented_linear": [LayerShape(5, 3, 1, 4, 0)],
    "augmented_conv2d": [LayerShape(6, 2, 3, 4, 1), LayerShape(6, 3, 3, 4, 1)],
}


def shapes(op):
    """Beside what verification has: an input without a gradient, images that are smaller than the memory is deep. What is
    one by one by one is no matrix product to torch."""
    known = [shape for shape in operators()[op].verified[:2] if shape != LayerShape(1, 1, 1, 1, 1)]
    return [*known, *LAYERS.get(op, ())]


def counted(run, function):
    with FlopCounterMode(display=False) as counter:
        run(function)
    return counter.get_total_flops()


@pytest.mark.parametrize("op", _backend.OPS)
def test_products_are_those_of_the_cheapest_contestant(op):
    bench = operators()[op]
    # Others of mann_sequence multiply by broadcasting, which torch does not count.
    functions = [bench.eager, *(bench.alternatives.values() if op in LAYERS else ())]
    for shape in shapes(op):
        run = Run(bench, bench.inputs(shape, 0), torch.float32)
        want = bench.work(shape, 4)
        found = [(counted(run.forward, function), counted(run.train, function)) for function in functions]
        forward, train = (want[name].flops for name in PASSES)
        assert min(first for first, _ in found) == forward
        # Of a grouped convolution torch counts the gradient of the weight once too often for every group, and of none it counts
        # that the gradient is zero where the pooling took another place.
        if op != "augmented_conv2d" or shape.side == 1:
            assert min(second for _, second in found) == train


@pytest.mark.parametrize("op", _backend.OPS)
def test_bytes_are_those_of_the_tensors(op):
    bench = operators()[op]
    for shape in shapes(op):
        run = Run(bench, bench.inputs(shape, 0), torch.float32)
        results = bench.reference()(*run.tensors.values())
        results = results if isinstance(results, tuple) else (results,)
        known = bench.sizes(shape)
        assert list(known.inputs) == [name for name, t in run.tensors.items() if t.is_floating_point()]
        moved = sum(t.nbytes for t in (*run.tensors.values(), *results))
        trained = moved + results[0].nbytes + sum(leaf.nbytes for leaf in run.leaves if leaf.is_floating_point())
        found = bench.work(shape, 4)
        assert (found["fwd"].bytes, found["fwd+bwd"].bytes) == (moved, trained)


def test_a_hand_count():
    # 2 x 2 x 9 x 6 multiply-adds match all heads with all slots
    found = operators()["content_address"].work(TINY, 4)
    assert found["fwd"] == Work(2 * 216, 4 * (108 + 24 + 36))
    assert found["fwd+bwd"] == Work(3 * 2 * 216, 4 * (108 + 24 + 36) + 4 * (36 + 108 + 24))
    found = operators()["lrua_write_weights"].work(TINY, 2)
    assert found["fwd"] == Work(0, 2 * (18 + 36 + 4 + 36) + 4 * INDEX_BYTES)
    assert operators()["metanet_update"].work(64, 4) is None


def test_a_hand_count_of_a_pooled_layer():
    """One channel in (data: no gradient), one out, 4 x 4 places pooled to 2 x 2, one row that two examples take as it is."""
    found = operators()["augmented_conv2d"].work(LayerShape(2, 1, 1, 1, 4), 4)
    # the slow product, the row's product, the mixing; then the gradients of both weights, of the rows and of the mixture
    forward, backward = 2 * (288 + 288 + 32), 2 * (72 + 72 + 2 * 8)
    assert (found["fwd"].flops, found["fwd+bwd"].flops) == (forward, forward + backward)


def test_the_longer_of_computing_and_moving():
    peak = limits.Peak(flops=2e9, bandwidth=1e9)
    assert limits.least_ms(Work(4_000_000, 1), peak) == pytest.approx(2)
    assert limits.least_ms(Work(4_000_000, 3_000_000), peak) == pytest.approx(3)


def test_peaks_are_measured_once(monkeypatch):
    monkeypatch.setitem(limits.SIDE, "cpu", 64)
    monkeypatch.setitem(limits.COPIED, "cpu", 2**12)
    cpu, calls = devices.Cpu(), []
    monkeypatch.setattr(cpu, "measure", lambda function: calls.append(function()) or 2.0)
    found = limits.peak(cpu, torch.float64, 1)
    assert found == limits.Peak(2 * 64**3 / 2e-3, 2 * 2**12 / 2e-3)
    assert limits.peak(cpu, torch.float64, 1) is found
    assert len(calls) == 2 * (1 + limits.TIMES)
    assert limits.facts(cpu, ["float64"], 1) == {
        "float64": {"product_gflop_s": found.flops / 1e9, "copy_gb_s": found.bandwidth / 1e9}
    }
