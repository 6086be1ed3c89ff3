"""More than one process: each case is a script that torchrun starts, and that fails where a rank's numbers are wrong."""

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch
from commands import invoke
from packed import write_packed
from safetensors.torch import load_file
from small_metanet import VARIANTS, draw, small
from torch.distributed.device_mesh import DeviceMesh

from mann_kernels.distributed import ShardedMANN, _bounds
from mann_kernels.train.log import read_log
from mann_kernels.train.parallel import Processes

ROOT = Path(__file__).parent.parent


def torchrun(processes, *command):
    start = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    done = subprocess.run(
        [*start, *command], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.compiles
@pytest.mark.parametrize("case", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_several_processes_train_as_one(case):
    torchrun(2, "tests/parallel.py", case)


def assert_same_training(folder, other, beginning=None, tolerance=1e-3):
    """Loss, scores and weights. The gradients of the parts of a batch add up in another order, which Adam's division by their size
    makes larger where they are tiny: weights may differ by 1e-3 of the way they came, and come far closer."""
    rows, want = (read_log(path / "log.csv") for path in (folder, other))
    assert [row["update"] for row in rows] == [row["update"] for row in want]
    for row, right in zip(rows, want, strict=True):
        for name in row.keys() - {"seconds", "cpu_seconds"}:
            assert row[name] == right[name] or float(row[name]) == pytest.approx(float(right[name]), abs=2e-4), name
    got, want = (load_file(path / "checkpoint.safetensors") for path in (folder, other))
    assert got.keys() == want.keys()
    for name, b in want.items():
        if name.startswith("model."):
            moved = b if beginning is None else b - beginning[name]
            assert (got[name] - b).norm() <= tolerance * moved.norm(), name
        elif name == "generator":
            assert torch.equal(got[name], b)


@pytest.mark.compiles
def test_the_training_command_on_two_processes(tmp_path):
    """Begun by one process and gone on with by two: the log and the weights of one process, written once."""
    data = write_packed(tmp_path / "small.npz")
    sizes = "--ways 3 --length 9 --hidden-size 16 --num-slots 12 --slot-size 6 --num-heads 2 --tasks-per-update 4"
    more = "--learning-rate 1e-2 --log-every 2 --test-every 2 --interim-tasks 4 --test-tasks 8"
    call = ["omniglot", "--data", str(data), *sizes.split(), *more.split()]
    alone, both = ([*call, "--out", str(tmp_path / name)] for name in ("alone", "both"))
    for where in (alone, both):
        assert invoke(*where, "--updates", "2").exit_code == 0
    beginning = load_file(tmp_path / "both" / "checkpoint.safetensors")
    assert invoke(*alone, "--updates", "8", "--resume").exit_code == 0
    said = torchrun(2, "-m", "mann_kernels.train", *both, "--updates", "8", "--resume")
    assert said.count("8 updates, 32 tasks") == 1
    assert_same_training(tmp_path / "both", tmp_path / "alone", beginning)


@pytest.mark.compiles
def test_every_protocol_trains_on_two_processes(tmp_path):
    """Learners that answer episodes, that adapt (MetaNet too), that are told; tasks that ask for different numbers of answers."""
    torchrun(2, "tests/runs.py", str(tmp_path / "both"))
    runs.train_all(tmp_path / "alone")
    for name in runs.SETTINGS:
        tolerance = 1e-6 if name == "metanet" else 1e-3  # float64
        assert_same_training(tmp_path / "both" / name, tmp_path / "alone" / name, tolerance=tolerance)


def test_tasks_that_the_processes_cannot_share(alone, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="tasks_per_update: got 16, want a multiple of 3, the processes"):
        Processes("cpu", 16)


@pytest.mark.compiles
@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.long)])
def test_a_sharded_memory_is_the_whole_one(processes):
    """Outputs, state, and gradients to second order, where the ranks divide the slots and where they do not; what a step sends
    does not grow with the slots."""
    torchrun(processes, "tests/sharded.py", "equal", "bytes")


def test_every_slot_is_on_one_rank():
    """As DTensor divides a dimension, which is as torch.chunk does."""
    for slots in range(1, 20):
        for world in range(1, 6):
            bounds = [_bounds(slots, rank, world) for rank in range(world)]
            sizes = [len(chunk) for chunk in torch.arange(slots).chunk(world)]
            assert [last - first for first, last in bounds] == sizes + [0] * (world - len(sizes))
            assert bounds[0][0] == 0
            assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))


def test_bad_input():
    with pytest.raises(TypeError, match=r"mesh: got str, want a .*DeviceMesh"):
        ShardedMANN(3, mesh="cpu")


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.FileStore(str(tmp_path / "f"), 1)
    )
    yield DeviceMesh("cpu", [0])
    torch.distributed.destroy_process_group()


def test_a_state_that_is_not_sharded(alone):
    layer = ShardedMANN(3, hidden_size=4, num_slots=5, slot_size=2, num_heads=1, mesh=alone)
    x, state = torch.randn(2, 1, 3), layer.initial_state(1)
    plain = state._replace(memory=state.memory.full_tensor())
    with pytest.raises(ValueError, match=r"state\.memory: got a plain tensor, want a DTensor with \(Shard\(dim=1\),\)"):
        layer(x, plain)
    with pytest.raises(ValueError, match=r"state\.usage: got None|state\.usage: got shape"):
        layer(x, state._replace(usage=state.usage[:, :4]))
    with pytest.raises(ValueError, match="mesh: got 2 dimensions, want 1"):
        ShardedMANN(3, mesh=DeviceMesh("cpu", [[0]]))
    output, after = layer(x, state)
    assert output.shape == (2, 1, 6)
    assert all(type(a) is type(b) for a, b in zip(after, state, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shots", [1, 2])
def test_metanet_in_distributed_data_parallel_with_its_defaults(variant, shots):
    """Three updates: its second complains of a parameter that took no part in the first."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for second_order in (False, True):
            metanet, (x, y, queries) = small(variant, second_order=second_order), draw(shots=shots)
            alone = copy.deepcopy(metanet)
            wrapped = torch.nn.parallel.DistributedDataParallel(metanet)
            for _ in range(3):
                for module in (wrapped, alone):
                    module.zero_grad()
                    module(x, y, queries, generator=torch.Generator().manual_seed(0)).square().sum().backward()
                    torch.optim.SGD(module.parameters(), 1e-3).step()
            for a, b in zip(metanet.parameters(), alone.parameters(), strict=True):
                assert torch.equal(a, b)
            head = alone.embedding_head[1].weight.grad
            assert (head is None) == (not second_order or variant == "metanet-" or shots == 2)
    finally:
        dist.destroy_process_group()
