"""Checkpoints that are whole or not there, from which a run goes on bit for bit."""

import json
import os
import secrets
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from mann_kernels._paths import PART, about


def write_atomically(path: Path, content: bytes) -> None:
    """The file holds all of this or what it held before, whenever the process or the machine stops, whoever else writes it.

    Raises:
        PathError: it cannot be written.
    """
    # a name of its own: the same for all, and two processes would write into one file
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PART}")
    with about(path, "cannot be written"):
        try:
            with part.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def save_checkpoint(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator, facts: dict
) -> None:
    """Everything the next update depends on: weights, optimiser, the tasks' generator and torch's own, and `facts` as JSON.

    One safetensors file: `model.<name>`, `optimizer.<number of the parameter>.<name>`, `generator`, `torch_generator`.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state = optimizer.state_dict()
    for number, values in state["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in values.items()}
    tensors |= {"generator": generator.get_state(), "torch_generator": torch.get_rng_state()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    facts = {**facts, "param_groups": state["param_groups"]}
    write_atomically(path, save(tensors, metadata={"facts": json.dumps(facts)}))


#: What a checkpoint's reader says first where it is not one.
UNREADABLE = "cannot be read as the checkpoint of a run"


def read_facts(path: Path) -> dict:
    """The `facts` of a checkpoint.

    Raises:
        PathError: it is not a whole checkpoint.
    """
    with about(path, UNREADABLE), safe_open(path, "pt") as file:
        facts = json.loads((file.metadata() or {})["facts"])
        if not isinstance(facts, dict) or not isinstance(facts["settings"], dict):
            raise ValueError("its facts have no settings")
        if not isinstance(facts["update"], int) or facts["update"] < 0:
            raise ValueError(f"its update is {facts['update']!r}")
        return facts


def load_weights(path: Path, model: torch.nn.Module) -> None:
    """The model's weights alone.

    Raises:
        PathError: it is not a whole checkpoint of such a model.
    """
    with about(path, UNREADABLE), safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith("model.")]  # noqa: SIM118
        model.load_state_dict({name.removeprefix("model."): file.get_tensor(name) for name in names})


def load_checkpoint(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> dict:
    """Put all of it back in place; returns the `facts`.

    Raises:
        PathError: it is not a whole checkpoint of such a run.
    """
    facts = read_facts(path)
    with about(path, UNREADABLE):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts["seconds"], facts["cpu_seconds"] = float(facts["seconds"]), float(facts["cpu_seconds"])
        weights = {name.removeprefix("model."): tensors[name] for name in tensors if name.startswith("model.")}
        model.load_state_dict(weights)
        state: dict[int, dict] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, field = name.split(".", 2)
                state.setdefault(int(number), {})[field] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": facts.pop("param_groups")})
        generator.set_state(tensors["generator"])
        torch.set_rng_state(tensors["torch_generator"])
    return facts
