import pytest
import torch
from against_reference import DEVICES, Inputs, check, draw, memory_state, replace, saturate
from sequences import SequenceTests, saved_bytes


class TestMannSequence(SequenceTests):
    op = "mann_sequence"
    drawn = ("lengths", "lru", "erase", "decay", "eps", "write", "key_strength", "squash")
    movable = ("x", "h", "c", "reads", "weight_ih", "weight_hh", "bias", "weight_head", "bias_head")
    over_time = ("x",)
    state = ("h", "c", "reads", "memory", "usage", "read_weights")
    options = (
        {},
        {"lru": "shared", "erase": "all", "key_strength": True},
        {"write": "add", "squash": "identity"},
        {"write": "add", "key_strength": True, "erase": "all", "lengths": True, "decay": 0.95},
    )
    bad = (
        (replace("x", lambda x: x[0]), ValueError, r"x: got shape .* want \[T, B, I\]"),
        (replace("weight_hh", lambda w: w[:, 1:]), ValueError, r"weight_hh: got shape .*want \[4H, H\+R\*W\]"),
        (replace("weight_head", lambda w: w[1:]), ValueError, r"weight_head: got shape .*want \[P, H\] with P="),
        (replace("c", lambda c: c.float()), TypeError, "c: got dtype torch.float32, want torch.float64"),
        (replace("reads", lambda r: r[:, :1]), ValueError, "reads: got shape .*R=2"),
        (replace("lengths", lambda n: n[:1]), ValueError, r"lengths: got shape \[1\], want \[B\] with B=2"),
        (lambda _: {"write": "both"}, ValueError, "write: got 'both', want one of"),
        (lambda _: {"squash": "relu"}, ValueError, "squash: got 'relu', want one of"),
    )

    def inputs(self, seed, B, N, W, R, T=4, H=None, lengths=False, **options):
        I, H = 3, H or 5 + 4 * seed  # noqa: E741
        P = R * W + R + R * options.get("key_strength", False) + R * W * (options.get("write") == "add")
        inputs = draw(seed, x=(T, B, I), h=(B, H), c=(B, H), reads=(B, R, W))
        inputs.update(memory_state(seed + 50, B, N, W, R))
        shapes = {"weight_ih": (4 * H, I), "weight_hh": (4 * H, H + R * W), "bias": (4 * H,)}
        shapes |= {"weight_head": (P, H), "bias_head": (P,)}
        inputs.update({name: value * 0.3 for name, value in draw(seed + 99, **shapes).items()})
        inputs["lengths"] = (torch.arange(B) * 2 + 3) % (T + 1) if lengths else None
        return Inputs(**inputs, **options)

    @property
    def small(self):
        return self.inputs(0, 2, 5, 3, 2, T=2, H=2, **self.options[-1])

    @pytest.mark.parametrize("device", DEVICES)
    def test_paper_size(self, device):
        inputs = self.inputs(49, 3, 128, 40, 4, T=6)
        assert inputs["h"].shape[1] == 201
        for dtype in (torch.float32, torch.bfloat16):
            check(self.op, inputs, dtype, device)

    @pytest.mark.parametrize("device", DEVICES)
    def test_saturated_gates(self, device):
        inputs = self.inputs(2, 2, 9, 4, 3)
        saturate(inputs)
        for dtype in (torch.float32, torch.float64):
            check(self.op, inputs, dtype, device)

    @pytest.mark.parametrize("device", DEVICES)
    def test_long_episode(self, device):
        check(self.op, self.inputs(3, 2, 32, 8, 2, T=2000), torch.float32, device)

    @pytest.mark.parametrize("device", DEVICES)
    def test_no_memory_per_step_is_kept(self, device):
        inputs = self.inputs(4, 2, 1024, 64, 4, T=64).to(torch.float32).on(device).with_grad()
        one_memory = 2 * 1024 * 64 * 4
        assert saved_bytes(lambda: self.function(**inputs)) < 64 * one_memory / 8
