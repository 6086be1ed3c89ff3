"""A run that leaves the finite numbers ends before anything of it is saved."""

import pytest
import torch
from commands import TINY, invoke
from test_train import SETTINGS, data, drain, make  # noqa: F401

from mann_kernels.train.loop import Diverged
from mann_kernels.train.settings import OPTIMIZERS


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("what", ["loss", "gradient", "weight", "statistic"])
def test_it_ends_at_that_update(data, tmp_path, what):  # noqa: F811
    run = make(data, tmp_path)
    drain(run, 4)
    before = bytes_of(tmp_path)
    layer = run.learner.embed[1]
    if what == "loss":
        run.train_tasks.loss = lambda output, batch: output.sum() * torch.inf
    elif what == "gradient":
        layer.weight.register_hook(lambda grad: grad * torch.nan)
    elif what == "weight":  # out of a finite gradient
        layer.weight.data[0, 0] = torch.finfo(torch.float32).max
        run.optimizer.step = lambda: layer.weight.data.mul_(4)
        run.train_tasks.loss = lambda output, batch: output.nan_to_num(0, 0, 0).sum() * 0
    else:
        run.learner.register_buffer("mean", torch.tensor(torch.nan))
    with pytest.raises(Diverged, match=r"update [56]: .*checkpoint.safetensors is as it was"):
        drain(run, 20)
    assert bytes_of(tmp_path) == before


def test_the_command_says_so(tmp_path, monkeypatch):
    class Growing(torch.optim.SGD):
        def step(self, *args):
            with torch.no_grad():
                for group in self.param_groups:
                    torch._foreach_mul_(group["params"], 1e30)

    monkeypatch.setitem(OPTIMIZERS, "rmsprop", Growing)
    call = ["copy", "--out", str(tmp_path), *TINY.split(), "--length", "3", "--updates", "50", "--log-every", "1"]
    result = invoke(*call, "--test-every", "50", "--optimizer", "rmsprop", "--clip", "inf")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "update " in result.output
