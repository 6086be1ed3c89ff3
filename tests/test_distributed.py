"""More than one process: each case is a script that torchrun starts, and that fails where a rank's numbers are wrong."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from mann_kernels.distributed import ShardedMANN, _bounds

ROOT = Path(__file__).parent.parent


def torchrun(processes, *command):
    start = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    done = subprocess.run(
        [*start, *command], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.compiles
@pytest.mark.parametrize("case", ["ddp", "fsdp"])
def test_several_processes_train_as_one(case):
    torchrun(2, "tests/parallel.py", case)


@pytest.mark.compiles
@pytest.mark.parametrize("processes", [2, 3])
def test_a_sharded_memory_is_the_whole_one(processes):
    """Outputs, state, and gradients to second order, where the ranks divide the slots and where they do not."""
    torchrun(processes, "tests/sharded.py", "equal")


@pytest.mark.compiles
def test_what_a_step_sends_does_not_grow_with_the_slots():
    torchrun(2, "tests/sharded.py", "bytes")


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
