"""The preset `MANN.tristandeleu` against that model written out by itself: one matrix per role, one slot at a time."""

import pytest
import torch

from mann_kernels import MANN

I, H, N, W, R, T, B = 3, 6, 9, 4, 2, 14, 2  # noqa: E741  (R slots a step: every slot is used again)


class Plain:
    """One episode of one example. Its weights are named as in the model: x to h, r to h, h to h, and the heads."""

    def __init__(self, draw):
        shapes = {"W_xh": (I, 4 * H), "W_rh": (R * W, 4 * H), "W_hh": (H, 4 * H), "b_h": (4 * H,)}
        shapes |= {"W_key": (R, H, W), "b_key": (R, W), "W_add": (R, H, W), "b_add": (R, W)}
        shapes |= {"W_sigma": (R, H), "b_sigma": (R,)}
        self.weights = {
            name: (0.4 * torch.randn(shape, generator=draw, dtype=torch.float64)).requires_grad_()
            for name, shape in shapes.items()
        }

    def episode(self, x):
        p = self.weights
        h = c = torch.zeros(H, dtype=torch.float64)
        r = torch.zeros(R * W, dtype=torch.float64)
        memory = [torch.full((W,), 1e-6, dtype=torch.float64) for _ in range(N)]
        usage = [1.0] + [0.0] * (N - 1)
        read = [[torch.tensor(float(i == 0), dtype=torch.float64) for i in range(N)] for _ in range(R)]
        out = []
        for x_t in x:
            z = x_t @ p["W_xh"] + r @ p["W_rh"] + h @ p["W_hh"] + p["b_h"]
            i, f, u, o = (z[k * H : (k + 1) * H] for k in range(4))
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(u)
            h = torch.sigmoid(o) * torch.tanh(c)
            least = sorted(range(N), key=lambda i: (usage[i], i))[:R]
            write = []
            for k in range(R):
                sigma = torch.sigmoid(h @ p["W_sigma"][k] + p["b_sigma"][k])
                write.append([sigma * read[k][i] + (1 - sigma) * (1.0 if i == least[k] else 0.0) for i in range(N)])
            memory[least[0]] = torch.zeros(W, dtype=torch.float64)
            for k in range(R):
                add = torch.tanh(h @ p["W_add"][k] + p["b_add"][k])
                memory = [memory[i] + write[k][i] * add for i in range(N)]
            found = []
            for k in range(R):
                key = torch.tanh(h @ p["W_key"][k] + p["b_key"][k])
                score = [torch.exp((key @ row) / torch.sqrt((key @ key) * (row @ row) + 1e-6)) for row in memory]
                read[k] = [s / sum(score) for s in score]
                found.append(sum(read[k][i] * memory[i] for i in range(N)))
            r = torch.cat(found)
            usage = [
                0.95 * usage[i] + sum(read[k][i].item() for k in range(R)) + sum(write[k][i].item() for k in range(R))
                for i in range(N)
            ]
            out.append(torch.cat([h, r]))
        return torch.stack(out), torch.stack(memory), usage

    def into(self, mann):
        """The same weights in a MANN."""
        p = {name: value.detach() for name, value in self.weights.items()}
        with torch.no_grad():
            mann.weight_ih.copy_(p["W_xh"].T)
            mann.weight_hh.copy_(torch.cat([p["W_hh"], p["W_rh"]]).T)
            mann.bias.copy_(p["b_h"])
            heads = (
                p["W_key"].transpose(0, 1).reshape(H, -1),
                p["W_sigma"].T,
                p["W_add"].transpose(0, 1).reshape(H, -1),
            )
            mann.weight_head.copy_(torch.cat(heads, dim=1).T)
            mann.bias_head.copy_(torch.cat([p["b_key"].flatten(), p["b_sigma"], p["b_add"].flatten()]))

    def grads(self):
        """Their gradients, laid out as the parameters of a MANN."""
        g = {name: value.grad for name, value in self.weights.items()}
        heads = (g["W_key"].transpose(0, 1).reshape(H, -1), g["W_sigma"].T, g["W_add"].transpose(0, 1).reshape(H, -1))
        return {
            "weight_ih": g["W_xh"].T,
            "weight_hh": torch.cat([g["W_hh"], g["W_rh"]]).T,
            "bias": g["b_h"],
            "weight_head": torch.cat(heads, dim=1).T,
            "bias_head": torch.cat([g["b_key"].flatten(), g["b_sigma"], g["b_add"].flatten()]),
        }


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_the_model_written_out(seed):
    draw = torch.Generator().manual_seed(seed)
    plain = Plain(draw)
    mann = MANN.tristandeleu(I, hidden_size=H, num_slots=N, slot_size=W, num_heads=R, dtype=torch.float64)
    plain.into(mann)
    x = torch.randn(T, B, I, generator=draw, dtype=torch.float64)
    weight = torch.randn(T, B, H + R * W, generator=draw, dtype=torch.float64)

    output, state = mann(x)
    (output * weight).sum().backward()
    wanted = [plain.episode(x[:, b]) for b in range(B)]
    want = torch.stack([episode[0] for episode in wanted], dim=1)
    (want * weight).sum().backward()

    exact = {"rtol": 1e-9, "atol": 1e-11}  # float64; the model divides by roots of 1e-6
    torch.testing.assert_close(output, want, **exact)
    torch.testing.assert_close(state.memory, torch.stack([episode[1] for episode in wanted]), **exact)
    torch.testing.assert_close(state.usage, torch.tensor([e[2] for e in wanted], dtype=torch.float64), **exact)
    for name, grad in plain.grads().items():
        torch.testing.assert_close(
            getattr(mann, name).grad, grad, **exact, msg=lambda text, name=name: f"{name}: {text}"
        )
