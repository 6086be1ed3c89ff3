"""MetaNet against Algorithm 1 of the paper written out, one example after the other."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from algorithm_one import AlgorithmOne
from small_metanet import KIND, VARIANTS, WAYS, draw, small
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mann_kernels
from mann_kernels import (
    AugmentedConv2d,
    AugmentedLinear,
    AugmentedSequential,
    FastWeightGenerator,
    FastWeightMemory,
    GradientSummarizer,
    MetaNet,
    MetaNetState,
)


def gradients_of(logits, metanet):
    loss = (logits * torch.arange(logits.numel(), **KIND).reshape(logits.shape).cos()).sum()
    names, parameters = zip(*metanet.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def assert_same(metanet, logits, want):
    torch.testing.assert_close(logits, want, rtol=1e-10, atol=1e-10)
    got, want = gradients_of(logits, metanet), gradients_of(want, metanet)
    for name, grad in want.items():
        assert (grad is None) == (got[name] is None), name
        if grad is not None:
            scale = max(1.0, float(grad.abs().max()))
            torch.testing.assert_close(
                got[name], grad, rtol=0, atol=1e-10 * scale, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_algorithm_one(variant, second_order, shared):
    metanet = small(variant, second_order=second_order, shared_generators=shared)
    x, y, queries = draw()
    plain = AlgorithmOne(metanet, second_order)
    want = torch.stack([plain(*task) for task in zip(x, y, queries, strict=True)])
    assert_same(metanet, metanet(x, y, queries), want)


def test_algorithm_one_in_chunks():
    metanet = small("metanet+", summary_steps=1)
    x, y, queries = draw()
    plain = AlgorithmOne(metanet, False)
    assert_same(
        metanet, metanet(x, y, queries), torch.stack([plain(*task) for task in zip(x, y, queries, strict=True)])
    )


@pytest.mark.parametrize("options", [{"summarizer": "mean"}, {"fast_only": True}], ids=str)
@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("variant", ["metanet", "metanet+"])
def test_algorithm_one_changed(variant, second_order, options):
    metanet = small(variant, second_order=second_order, **options)
    x, y, queries = draw()
    plain = AlgorithmOne(metanet, second_order)
    want = torch.stack([plain(*task) for task in zip(x, y, queries, strict=True)])
    assert_same(metanet, metanet(x, y, queries), want)


@pytest.mark.parametrize("summarizer", ["lstm", "mean"])
def test_the_order_of_the_support_set(summarizer):
    """Matters to d, unless it takes the mean."""
    metanet, (x, y, queries) = small(summarizer=summarizer), draw()
    order = torch.tensor([2, 0, 1])
    far = (metanet(x[:, order], y[:, order], queries) - metanet(x, y, queries)).abs().max()
    assert far < 1e-12 if summarizer == "mean" else far > 1e-6


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("variant", ["metanet", "metanet+"])
def test_algorithm_one_with_more_than_one_example_of_a_class(variant, second_order, monkeypatch):
    metanet = small(variant, second_order=second_order)
    x, y, queries = draw(shots=2)
    pairs = torch.tensor([[[0, 3], [1, 2], [4, 1]], [[5, 2], [0, 1], [4, 3]]])
    monkeypatch.setattr("mann_kernels.modules.metanet.random_pairs", lambda *args: pairs)
    plain = AlgorithmOne(metanet, second_order)
    want = torch.stack([plain(*task) for task in zip(x, y, queries, pairs, strict=True)])
    assert_same(metanet, metanet(x, y, queries), want)


def test_kernels_and_reference_agree():
    metanet = small("metanet+")
    x, y, queries = draw()
    got = metanet(x, y, queries)
    with mann_kernels.backend("reference"):
        want = metanet(x, y, queries)
        want_gradients = gradients_of(want, metanet)
    torch.testing.assert_close(got, want)
    for name, grad in gradients_of(got, metanet).items():
        if grad is not None:
            torch.testing.assert_close(grad, want_gradients[name])


def test_first_order_takes_the_support_gradients_as_constants(monkeypatch):
    metanet = small("metanet+")
    x, y, queries = draw()
    want = gradients_of(metanet(x, y, queries), metanet)
    frozen = copy.deepcopy(metanet)
    for name in ("base_learner", "embedding"):  # the same gradients, from a network that has no part in the result
        loss_gradients = getattr(frozen, name).loss_gradients
        monkeypatch.setattr(getattr(metanet, name), "loss_gradients", loss_gradients)
    got = gradients_of(metanet(x, y, queries), metanet)
    for name, grad in want.items():
        if name == "embedding_head.1.weight":
            assert grad is None
        else:
            assert torch.equal(grad, got[name]), name
    monkeypatch.undo()
    metanet.second_order = True
    second = gradients_of(metanet(x, y, queries), metanet)
    assert second["embedding_head.1.weight"].abs().max() > 0
    assert not torch.allclose(second["base_learner.0.weight"], want["base_learner.0.weight"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_fast_weights_give_the_slow_network(variant):
    metanet = small(variant)
    x, y, queries = draw()
    with torch.no_grad():
        for module in (*metanet.generators.values(), *metanet.summarizers.values()):
            last = ("weight3", "bias3") if isinstance(module, FastWeightGenerator) else ("weight_out", "bias_out")
            for name in last:
                getattr(module, name).zero_()
    torch.testing.assert_close(metanet(x, y, queries), metanet.base_learner(queries))


@pytest.mark.parametrize("variant", VARIANTS)
def test_tasks_of_a_batch_are_as_if_alone(variant):
    metanet = small(variant)
    x, y, queries = draw(tasks=3)
    together = metanet(x, y, queries)
    for g in range(3):
        alone = metanet(x[g], y[g], queries[g])
        assert alone.shape == (4, WAYS)
        torch.testing.assert_close(alone, together[g], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_serves_many_queries(variant):
    metanet = small(variant)
    x, y, queries = draw()
    state = metanet.adapt(x, y)
    whole = metanet.predict(queries, state)
    torch.testing.assert_close(metanet(x, y, queries), whole)
    halves = torch.cat([metanet.predict(half, state) for half in queries.split(2, 1)], 1)
    torch.testing.assert_close(halves, whole)
    state = pickle.loads(pickle.dumps(state.detach()))
    assert not state.memory.requires_grad
    torch.testing.assert_close(metanet.predict(queries, state), whole)
    assert state.to(torch.float32).index.dtype == torch.float32
    single = metanet.adapt(x[0], y[0])
    assert single.memory.shape == (WAYS + (variant == "metanet+"), metanet.base_learner.num_coordinates)
    torch.testing.assert_close(metanet.predict(queries[0], single), whole[0])


def test_support_and_queries_are_normalised_apart():
    """Batch normalisation sees the support set and the queries by themselves, whether they are given together or not."""
    torch.manual_seed(0)
    metanet = MetaNet.mini_imagenet(2, filters=4, batch_norm=True, **KIND)
    x, queries, y = torch.rand(2, 3, 84, 84, **KIND), torch.rand(3, 3, 84, 84, **KIND), torch.arange(2)
    torch.testing.assert_close(metanet(x, y, queries), metanet.predict(queries, metanet.adapt(x, y)))


def test_layers_of_a_kind_need_not_be_together():
    torch.manual_seed(0)
    linear = AugmentedLinear(36, 36, form="hidden", **KIND)
    conv = AugmentedConv2d(1, 2, 3, padding=1, form="hidden", pool=True, **KIND)
    base = AugmentedSequential(
        nn.Flatten(), linear, nn.Unflatten(1, (1, 6, 6)), conv, nn.Flatten(), AugmentedLinear(18, WAYS, **KIND)
    )
    metanet = MetaNet(base, small().embedding, small().embedding_head, **KIND)
    x, y, _ = draw(tasks=1)
    gradients = base.loss_gradients(x[0], lambda logits: F.cross_entropy(logits, y[0], reduction="sum"), WAYS)
    kinds = ("linear", "conv", "linear")
    want = [metanet.generators[kind](grads) for kind, grads in zip(kinds, gradients, strict=True)]
    torch.testing.assert_close(metanet.adapt(x[0], y[0]).memory, torch.cat(want, -1))


class _Dispatched(TorchDispatchMode):
    """Counts operators, those that make a view too."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("tasks", "most"), [((), (238, 90)), ((3,), (248, 92))])
def test_an_update_takes_few_operators(tasks, most):
    """On a GPU the host takes microseconds for each, those that only make a view too, and an update of one task waits for it."""
    metanet = MetaNet.omniglot(5, filters=2)
    x, queries = torch.rand(*tasks, 5, 1, 28, 28), torch.rand(*tasks, 10, 1, 28, 28)
    with _Dispatched() as forward:
        logits = metanet(x, torch.arange(5).expand(*tasks, 5), queries)
    with _Dispatched() as backward:
        logits.backward(torch.ones_like(logits))
    assert forward.number <= most[0]
    assert backward.number <= most[1]


def test_the_order_of_the_memory_does_not_matter():
    x, y, queries = draw()
    order = torch.tensor([2, 0, 1])
    metanet = small()
    state = metanet.adapt(x, y)
    turned = MetaNetState(state.index[:, order], state.memory[:, order], state.task_fast)
    torch.testing.assert_close(
        metanet.predict(queries, turned), metanet.predict(queries, state), rtol=1e-12, atol=1e-12
    )
    # with Q* given or absent, the support set's order does not matter either; d sees it
    again = metanet.adapt(x[:, order], y[:, order])
    torch.testing.assert_close(again.memory, state.memory[:, order], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(again.task_fast, state.task_fast)
    without = small("metanet-")
    torch.testing.assert_close(without(x[:, order], y[:, order], queries), without(x, y, queries))


def test_coordinates_do_not_see_each_other():
    torch.manual_seed(0)
    grads = torch.randn(3, 40, **KIND) / 100
    order = torch.randperm(40)
    for module, run in ((FastWeightGenerator(**KIND), grads[0]), (GradientSummarizer(**KIND), grads)):
        for parameter in module.parameters():
            nn.init.normal_(parameter, 0, 0.5)
        torch.testing.assert_close(module(run[..., order]), module(run)[..., order])
        assert module(run).std() > 0
        assert "hidden_size=20" in repr(module)


def test_preprocessing_is_the_rule_by_cases():
    """Seen through m with weights that let one feature pass: at most 1.9e-5 from the rule, for the tiny term in the logarithm."""
    grads = torch.cat([torch.logspace(-9, 1, 201, **KIND), torch.zeros(1, **KIND)])
    grads = torch.cat([grads, -grads])
    large = grads.abs() >= math.exp(-7)
    wants = (
        torch.where(large, grads.abs().clamp(min=1e-30).log() / 7, -1.0),
        torch.where(large, grads.sign(), grads * math.exp(7)),
    )
    m = FastWeightGenerator(1, **KIND)
    for feature, want in enumerate(wants):
        with torch.no_grad():
            for parameter, value in zip(m.parameters(), (0.0, 2.0, 1.0, 0.0, 1.0, -2.0), strict=True):
                parameter.fill_(value)
            m.weight1[0, feature] = 1  # relu(feature + 2) - 2
        torch.testing.assert_close(m(grads), want, rtol=0, atol=2e-5)


def test_memory():
    memory, generator = FastWeightMemory(), torch.Generator().manual_seed(0)
    index, key = (torch.randn(2, n, 4, generator=generator, **KIND) for n in (3, 5))
    mix = memory(index, key)
    cosine = F.cosine_similarity(key[:, :, None], index[:, None], dim=-1, eps=0)
    torch.testing.assert_close(mix, torch.softmax(cosine, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ways", "linear"), [(5, 4_416), (20, 5_376)])
def test_the_omniglot_network(ways, linear):
    metanet = MetaNet.omniglot(ways)
    shapes = [layer.weight.numel() for layer in metanet.base_learner.augmented]
    assert sum(shapes[:5]) == 148_032
    assert sum(shapes[5:]) == linear
    assert metanet.ways == ways
    assert metanet.embedding.num_coordinates == 148_032 + 4_096
    assert not any("bias" in name for name, _ in metanet.base_learner.named_parameters())
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in metanet.named_modules()}
    assert sizes["generators.conv"] == sizes["generators.linear"] == 501
    assert sizes["summarizers.conv"] == sizes["summarizers.linear"] == 1_840 + 21
    x = torch.rand(1, 1, 1, 28, 28)
    assert metanet.base_learner[:5](x).shape == (1, 1, 64, 1, 1)
    with torch.no_grad():
        state = metanet.adapt(torch.rand(ways, 1, 28, 28), torch.arange(ways))
        assert state.memory.shape == (ways, 148_032 + linear)
        assert metanet.predict(torch.rand(2, 1, 28, 28), state).shape == (2, ways)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_mini_imagenet_network(batch_norm):
    metanet = MetaNet.mini_imagenet(5, batch_norm=batch_norm)
    shapes = [layer.weight.numel() for layer in metanet.base_learner.augmented]
    assert shapes == [9_216, 9_216, 82_944, 1_440]
    assert [layer.weight.numel() for layer in metanet.embedding.augmented] == [9_216, 9_216, 82_944]
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in metanet.base_learner) == 3 * batch_norm
    logits = metanet(torch.rand(1, 5, 3, 84, 84), torch.arange(5)[None], torch.rand(1, 2, 3, 84, 84))
    logits.square().sum().backward()
    assert logits.shape == (1, 2, 5)
    assert metanet.base_learner[0].weight.grad.abs().max() > 0


def test_module_manners():
    metanet = small("metanet+")
    x, y, queries = draw()
    twin = small("metanet+")
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    twin.load_state_dict(metanet.state_dict())
    assert torch.equal(twin(x, y, queries), metanet(x, y, queries))
    assert torch.equal(copy.deepcopy(metanet)(x, y, queries), metanet(x, y, queries))
    assert "variant='metanet+'" in repr(metanet)
    with torch.no_grad():
        without = metanet(x, y, queries)
    torch.testing.assert_close(without, metanet(x, y, queries))


@pytest.mark.compiles
def test_compiles():
    metanet = small("metanet+")
    x, y, queries = draw()
    want = metanet(x, y, queries)
    got = torch.compile(metanet, backend="aot_eager")(x, y, queries)
    torch.testing.assert_close(got, want)
    want = gradients_of(want, metanet)
    for name, grad in gradients_of(got, metanet).items():
        if grad is not None:
            torch.testing.assert_close(grad, want[name])


def test_pairs_are_random_different_and_repeatable():
    metanet = small()
    x, y, queries = draw(shots=3)
    first, again, other = (metanet(x, y, queries, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    from mann_kernels.modules._metanet_losses import random_pairs

    pairs = random_pairs(500, 4, 5, torch.Generator().manual_seed(0))
    assert (pairs[..., 0] != pairs[..., 1]).all()
    counts = torch.bincount((pairs[..., 0] * 4 + pairs[..., 1]).flatten(), minlength=16)
    assert (counts.view(4, 4)[~torch.eye(4, dtype=torch.bool)] > 150).all()


@pytest.mark.parametrize("make", [MetaNet.omniglot, MetaNet.mini_imagenet], ids=["omniglot", "mini_imagenet"])
def test_reset_parameters_is_a_fresh_start(make):
    """Made on the meta device, given memory, and reset part by part: every parameter has the spread of a fresh one."""
    torch.manual_seed(0)
    with torch.device("meta"):
        module = make(3, batch_norm=True) if make == MetaNet.mini_imagenet else make(3)
    module.to_empty(device="cpu")
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    fresh = make(3, batch_norm=True) if make == MetaNet.mini_imagenet else make(3)
    for (name, a), b in zip(module.named_parameters(), fresh.parameters(), strict=True):
        spread = float(b.double().square().mean().sqrt())
        wide = 1 + 4 / math.sqrt(a.numel())  # what two draws of so many numbers may differ by
        assert spread / wide <= float(a.double().square().mean().sqrt()) <= spread * wide, name
    for (name, a), b in zip(module.named_buffers(), fresh.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_a_quantized_part_is_named():
    """Where no gradient comes through it that is said; where it is not asked for one, it runs."""
    metanet, (x, y, queries) = small(), draw()
    metanet, x, queries = metanet.float(), x.float(), queries.float()
    quantized = torch.ao.quantization.quantize_dynamic(metanet, {nn.Linear})
    with pytest.raises(RuntimeError, match=r"losses: got some that have no gradient .* quantized modules are not"):
        quantized(x, y, queries)
    two = draw(shots=2)[:2]
    found = quantized(two[0].float(), two[1], queries, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found, metanet(two[0].float(), two[1], queries, generator=torch.Generator().manual_seed(0)))
