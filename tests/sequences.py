"""The tests that both operators over whole sequences pass, beside those of every operator."""

import importlib

import pytest
import torch
from against_reference import DEVICES, OperatorTests, check, run


def saved_bytes(function):
    """Bytes kept for the backward pass, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storages.values())


class SequenceTests(OperatorTests):
    """`inputs` takes T and lengths too. Subclasses set the names of the inputs of every step, and those of the state."""

    over_time: tuple
    state: tuple

    @pytest.mark.parametrize("device", DEVICES)
    def test_two_halves_are_one_sequence(self, device):
        inputs = self.inputs(1, 3, 20, 6, 2).on(device)
        whole = self.function(**inputs)
        first = self.function(**inputs | {name: inputs[name][:2] for name in self.over_time})
        state = dict(zip(self.state, first[1:], strict=True))
        second = self.function(**inputs | state | {name: inputs[name][2:] for name in self.over_time})
        torch.testing.assert_close(torch.cat([first[0], second[0]]), whole[0])
        for a, b in zip(second[1:], whole[1:], strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("device", DEVICES)
    def test_no_steps(self, device):
        check(self.op, self.inputs(1, 2, 5, 3, 2, T=0), torch.float32, device)

    @pytest.mark.parametrize("every", [1, 3, 10, 256])
    @pytest.mark.parametrize("device", DEVICES)
    def test_memory_copies(self, every, monkeypatch, device):
        # imported by its name: the package has a function of the same name
        monkeypatch.setattr(importlib.import_module(f"mann_kernels.ops.{self.op}"), "CHECKPOINT_EVERY", every)
        check(self.op, self.inputs(2, 3, 20, 6, 2, T=23, lengths=True), torch.float32, device)

    @pytest.mark.parametrize("seed", [1, 2])
    @pytest.mark.parametrize("device", DEVICES)
    def test_from_an_almost_empty_memory(self, seed, device):
        """Rows of 1e-6, as the layers start with: what undoing the writes leaves of them must be right too."""
        inputs = self.inputs(seed, 2, 128, 40, 4, T=50)
        inputs["memory"] = torch.full_like(inputs["memory"], 1e-6)
        check(self.op, inputs, torch.float32, device)

    @pytest.mark.parametrize("device", DEVICES)
    def test_saving_changes_nothing(self, device):
        inputs = self.inputs(5, 3, 20, 6, 2, lengths=True).on(device)
        with torch.no_grad():
            outputs = self.function(**inputs)
        saved, _ = run(self.function, inputs)
        assert all(torch.equal(a, b) for a, b in zip(outputs, saved, strict=True))
