"""Run with -I by the Python of an environment that has torch and the wheel: the installed package works, away from its sources."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import torch

import mann_kernels
from mann_kernels import MANN, MetaNet, _library
from mann_kernels.testing import assert_accurate


def episode(mann, x):
    """The output and every gradient."""
    output, _ = mann(x)
    return [output, *torch.autograd.grad(output.square().sum(), list(mann.parameters()))]


def train(parameters, loss_of):
    optimizer = torch.optim.Adam(parameters, 1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses


def main():
    package = Path(mann_kernels.__file__).parent
    assert package.is_relative_to(sys.prefix), f"{package} is not what was installed in {sys.prefix}"
    assert (package / "py.typed").exists()
    assert "abi3" in importlib.metadata.distribution("mann_kernels").read_text("WHEEL")
    torch.manual_seed(0)
    mann, x = MANN(6, hidden_size=19, num_slots=21, slot_size=17, num_heads=2), torch.randn(5, 3, 6)
    with mann_kernels.backend("reference"):
        same, exact = episode(mann, x), episode(mann.double(), x.double())
    mann.float()
    ran = []
    for isa in _library.ISAS:
        ran.append(_library.cpu_isa(isa))
        with mann_kernels.backend("cpp"):
            for tensors in zip(episode(mann, x), same, exact, strict=True):
                assert_accurate(*tensors)
    metanet, images, labels = MetaNet.omniglot(3, filters=4), torch.rand(3, 1, 28, 28), torch.arange(3)
    with mann_kernels.backend("cpp"):
        train(mann.parameters(), lambda: mann(x)[0].square().mean())
        train(metanet.parameters(), lambda: torch.nn.functional.cross_entropy(metanet(images, labels, images), labels))
    said = subprocess.run(
        [sys.executable, "-I", "-m", "mann_kernels"], capture_output=True, text=True, check=True
    ).stdout
    assert "mann_sequence" in said
    print(f"mann_kernels {mann_kernels.__version__}, Python {platform.python_version()}, torch {torch.__version__}: "
          f"works, on {', '.join(dict.fromkeys(ran))}")  # fmt: skip


if __name__ == "__main__":
    main()
