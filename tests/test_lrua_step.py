import torch
from against_reference import BAD_STATE, Inputs, OperatorTests, draw, memory_state, replace

from mann_kernels import reference

OPTIONS = (
    {},
    {"lru": "shared", "erase": "all", "beta": True},
    {"erase": "all", "add": True},
    {"lru": "shared", "add": True, "beta": True, "decay": 0.9, "eps": 1e-3},
)
BAD_STEP = (
    *BAD_STATE,
    (replace("usage", lambda u: u[:1]), ValueError, r"usage: got shape .* want \[B, N\] with B=2"),
    (replace("gate", lambda g: g[..., :1]), ValueError, "gate: got shape .* want .*R=2"),
    (lambda _: {"lru": "none"}, ValueError, "lru: got 'none', want one of"),
)


class TestLruaStep(OperatorTests):
    op = "lrua_step"
    drawn = ("beta", "add", "lru", "erase", "decay", "eps")
    movable = ("key", "gate", "beta", "add")
    options = OPTIONS
    bad = BAD_STEP

    def inputs(self, seed, B, N, W, R, beta=False, add=False, **options):
        drawn = draw(seed, key=(B, R, W), gate=(B, R), beta=(B, R), add=(B, R, W))
        drawn.update(beta=drawn["beta"] if beta else None, add=drawn["add"] if add else None)
        return Inputs(**memory_state(seed + 50, B, N, W, R), **drawn, **options)

    def test_backward_by_hand(self):
        """The chain rule of one step written out, for the key that is also written."""
        inputs = self.inputs(7, 2, 8, 5, 2).with_grad()
        out = self.function(**inputs)
        dr, dm, dwr = (torch.randn_like(out[i]) for i in (0, 1, 3))
        names = ("memory", "read_weights", "key", "gate")
        actual = torch.autograd.grad((out[0], out[1], out[3]), [inputs[n] for n in names], (dr, dm, dwr))
        with torch.no_grad():
            k, s = inputs["key"], inputs["gate"].sigmoid()[..., None]
            ww, slots = reference.lrua_write_weights(inputs["usage"], inputs["read_weights"], inputs["gate"])
            own = torch.nn.functional.one_hot(slots.long(), 8).double()
            m, w = out[1], out[3]
            q, n = (k * k).sum(-1)[..., None], (m * m).sum(-1)[:, None]
            d = (q * n + 1e-6).sqrt()
            similarity = k @ m.mT / d
            dw = dwr + dr @ m.mT
            dx = w * (dw - (w * dw).sum(-1, keepdim=True))
            dp = dx / d
            dm = dm + w.mT @ dr + dp.mT @ k - m * (dx * similarity * q / d**2).sum(1)[..., None]
            dk = dp @ m - k * (dx * similarity * n / d**2).sum(-1, keepdim=True) + ww @ dm
            dww = k @ dm.mT
            ds = (dww * (inputs["read_weights"] - own)).sum(-1, keepdim=True)
            dm = dm.masked_fill(own[:, :1].bool().mT, 0)
            by_hand = (dm, s * dww, dk, (ds * s * (1 - s))[..., 0])
        for a, b in zip(actual, by_hand, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    def test_usage_grows_by_what_is_read_and_written(self):
        inputs = self.inputs(8, 2, 9, 4, 3)
        _, _, usage, _ = self.function(**inputs)
        torch.testing.assert_close(usage.sum(-1), 0.99 * inputs["usage"].sum(-1) + 2 * 3)
