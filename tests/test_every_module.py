"""What users do to modules, done to every module of the package: hooks, masks, shards, replicas, inference mode, ..."""

import copy

import pytest
import torch
import torch.distributed as dist
from every_module import MODULES, call, classes, loss_of, make, metanet, owners, randn
from torch import nn
from torch.nn.utils import parametrize, prune

import mann_kernels
from mann_kernels import AugmentedConv2d, AugmentedLinear, AugmentedSequential

every_module = pytest.mark.parametrize("name", MODULES)
WITH_WEIGHTS = [name for name in MODULES if name != "FastWeightMemory"]
every_weight = pytest.mark.parametrize("name", WITH_WEIGHTS)


def test_every_module_is_here():
    tried = {type(make(name)[0]) for name in MODULES}
    assert {kind.__name__ for kind in classes()} == {kind.__name__ for kind in tried}


# --- weights that are not where they were: they are read as attributes, when the module runs ---


class _Same(nn.Module):
    def forward(self, weight):
        return weight * 1.0


def mask(part, name):
    prune.identity(part, name)


def reparametrize(part, name):
    parametrize.register_parametrization(part, name, _Same())


def as_replica(module):
    """As nn.DataParallel makes them: parameters are plain attributes, and there are no parameters."""
    found = module._replicate_for_data_parallel()
    found._former_parameters = {}
    for name, child in module._modules.items():
        found._modules[name] = None if child is None else as_replica(child)
    for name, parameter in module._parameters.items():
        found._parameters.pop(name, None)
        setattr(found, name, None if parameter is None else parameter.clone())
    return found


def changed(module, change):
    for part, name, _ in owners(module):
        change(part, name)
    return module


@every_weight
@pytest.mark.parametrize("change", [mask, reparametrize])
def test_sgd_on_weights_that_a_hook_renews(name, change):
    """Three steps: a weight that is a step old would be seen in the second, one of a graph that is gone as well."""
    plain, x = make(name)
    hooked = changed(copy.deepcopy(plain), change)
    for _ in range(3):
        losses = []
        for module in (plain, hooked):
            parameters = list(module.parameters())
            module.zero_grad()
            loss = loss_of(call(name, module, x))
            loss.backward()
            torch.optim.SGD(parameters, 1e-2).step()
            losses.append(loss.detach())
        assert torch.equal(*losses)
    for a, b in zip(call(name, plain, x), call(name, hooked, x), strict=True):
        assert torch.equal(a, b)


@every_module
def test_replicas(name):
    module, x = make(name)
    replica = as_replica(module)
    assert not list(replica.parameters())
    for a, b in zip(call(name, module, x), call(name, replica, x), strict=True):
        assert torch.equal(a, b)


@every_weight
def test_pruned_weights(name):
    """A real mask: as a plain module whose weights are zero there."""
    pruned, x = make(name)
    for part, weight, _ in owners(pruned):
        prune.l1_unstructured(part, weight, 0.4)
    plain = copy.deepcopy(make(name)[0])
    masked = {(id(a), n): None for a, n, _ in owners(pruned)}
    assert masked
    with torch.no_grad():
        for (part, weight, parameter), (other, _, _) in zip(owners(plain), owners(make(name)[0]), strict=True):
            twin = copy.deepcopy(other)
            prune.l1_unstructured(twin, weight, 0.4)
            parameter.copy_(getattr(twin, weight))
            assert getattr(part, weight) is parameter
    for a, b in zip(call(name, plain, x), call(name, pruned, x), strict=True):
        assert torch.equal(a, b)


@every_weight
def test_every_hook_runs(name):
    """Each part that has weights is called as a module whenever its weights take part."""
    module, x = make(name)
    seen = set()
    for part, _, _ in owners(module):
        part.register_forward_pre_hook(lambda part, args: seen.add(part))
    call(name, module, x)
    unused = {"embedding_head"} if name == "MetaNet of variant -" else set()
    want = {
        part
        for path, part in module.named_modules()
        if list(part.parameters(False)) and path.split(".")[0] not in unused
    }
    assert seen == want


@pytest.fixture
def alone():
    """torch.distributed with one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@every_weight
def test_sharded_parts(name, alone):
    """torch's fully_shard on each part that has weights, and on the whole, in turn: the numbers and gradients of a plain one."""
    from torch.distributed.fsdp import fully_shard

    def whole(grad):
        return grad.full_tensor() if hasattr(grad, "full_tensor") else grad

    for path in (path for path, part in make(name)[0].named_modules() if list(part.parameters())):
        plain, x = make(name)
        sharded = copy.deepcopy(plain)
        part = sharded.get_submodule(path)
        if type(part).forward is nn.Module.forward:  # a container that is never called: torch does not shard it
            continue
        fully_shard(part, mesh=alone)
        if name == "MetaNet of second order":
            with pytest.raises(RuntimeError, match="second_order: got parts under fully_shard"):
                call(name, sharded, x)
            continue
        for a, b in zip(call(name, plain, x), call(name, sharded, x), strict=True):
            assert torch.equal(a, b), path
        for module in (plain, sharded):
            loss_of(call(name, module, x)).backward()
        for (which, a), b in zip(plain.named_parameters(), sharded.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), f"{path}: {which}"
            assert a.grad is None or torch.equal(a.grad, whole(b.grad)), f"{path}: {which}"


# --- inference mode ---


@every_module
@pytest.mark.parametrize("made_in_it", [False, True], ids=["made outside", "made inside"])
def test_inference_mode(name, made_in_it):
    """The numbers of no_grad, whichever of the module and its input was made inside."""
    module, x = make(name)
    with torch.no_grad():
        want = call(name, module, x)
    with torch.inference_mode():
        if made_in_it:
            module, x = copy.deepcopy(module), x.clone()
            assert x.is_inference()
        got = call(name, module, x)
    # a copy may lie elsewhere in memory, and torch's products then round in another way
    for a, b in zip(want, got, strict=True):
        assert torch.allclose(a, b, atol=1e-6 * made_in_it, rtol=1e-5 * made_in_it)
    with torch.no_grad():  # and afterwards, of what was made inside
        for a, b in zip(got, call(name, module, x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("variant", ["metanet-", "metanet", "metanet+"])
@pytest.mark.parametrize("shots", [1, 2])
def test_what_metanet_learned_in_inference_mode_can_be_trained_with(variant, shots):
    torch.manual_seed(0)
    module, x, y = metanet(variant), randn(3 * shots, 1, 6, 6), torch.arange(3).repeat(shots)
    with torch.inference_mode():
        state = module.adapt(x, y, generator=torch.Generator().manual_seed(0))
        inside, labels = x.clone(), y.clone()
    with torch.no_grad():
        want = module(x, y, x, generator=torch.Generator().manual_seed(0))
    logits = module.predict(x, state)
    assert torch.equal(logits, want)
    logits.sum().backward()
    assert torch.equal(module(inside, labels, x, generator=torch.Generator().manual_seed(0)), want)


def test_a_state_of_a_mann_made_in_inference_mode():
    module, x = make("MANN")
    with torch.inference_mode():
        state = module(x)[1]
    with torch.no_grad():
        module(x, state)
    module(x, state.clone())[0].sum().backward()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        module(x, state)


def test_statistics_of_a_batch_normalisation_made_in_inference_mode():
    with torch.inference_mode():
        torch.manual_seed(0)
        module = mann_kernels.MetaNet.mini_imagenet(3, filters=2, batch_norm=True)
        before = {name: value.clone() for name, value in module.named_buffers()}
        module(randn(3, 3, 84, 84), torch.arange(3), randn(1, 3, 84, 84))
    assert all(not torch.equal(before[name], value) for name, value in module.named_buffers())


# --- a module of the user's, that writes into what it gets ---


class _InPlace(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        return x.mul_(2) if self.inplace else x * 2


OTHERS = {"relu": nn.ReLU, "own": _InPlace}


def with_others(make_other, inplace, form, activation, pool):
    def body():
        yield make_other(inplace=inplace)
        yield AugmentedConv2d(1, 3, 3, padding=1, form=form, activation=activation, pool=pool)
        yield make_other(inplace=inplace)
        yield nn.Flatten()
        yield AugmentedLinear(27 if pool else 108, 4, form=form, activation=activation)
        yield make_other(inplace=inplace)

    torch.manual_seed(0)
    base, embedding = AugmentedSequential(*body(), AugmentedLinear(4, 3)), AugmentedSequential(*body())
    head = nn.Sequential(make_other(inplace=inplace), nn.Linear(4, 3))
    return base, embedding, head


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("form", ["hidden", "output"])
@pytest.mark.parametrize("activation", ["relu", "tanh", "identity"])
@pytest.mark.parametrize("pool", [False, True])
def test_in_place_modules(other, form, activation, pool):
    x, y = randn(3, 1, 6, 6), torch.arange(3)
    for variant in ("metanet-", "metanet", "metanet+"):
        for second_order in (False, True):
            found = []
            for inplace in (False, True):
                networks = with_others(OTHERS[other], inplace, form, activation, pool)
                module = mann_kernels.MetaNet(
                    *networks, hidden_size=4, summary_steps=3, variant=variant, second_order=second_order
                )
                given = x.clone()
                logits = module(given, y, given)
                logits.square().sum().backward()
                assert torch.equal(given, x), "the caller's tensor was written to"
                found.append((logits, [p.grad for p in module.parameters() if p.grad is not None]))
            (a, grads), (b, others) = found
            assert torch.equal(a, b)
            assert all(torch.equal(*pair) for pair in zip(grads, others, strict=True))
