"""mann_sequence: sizes, inputs, contestants, work, and the sizes that a sweep lets grow."""

from pathlib import Path

import torch
import torch.nn.functional as F

from bench import peers
from bench.bench_lrua_step import sizes_of_state, state, step
from bench.counts import Product, Sizes
from bench.mann import ON_GPU, SHAPES, VERIFIED, Shape, devices_of, over_slots
from bench.operators import Axis, Bench, Case, compiled_anew, normals
from mann_kernels.tasks import OmniglotEpisodes, load_omniglot

#: Steps of the loop that torch.compile unrolls: at 50 steps it compiles for minutes, at 12 for most of one; --quick has fewer.
LOOP_STEPS, QUICK_LOOP_STEPS = 12, 6
WAYS, SIDE = 5, 20  # of the paper's episodes: classes, pixels of an image's side


def cases(quick: bool) -> list[Case]:
    found = []
    ranks = {
        "paper": 0,
        "single": 2,
        "small": 2,
        "wide": 1,
        "long": 4,
        "batch": 1,
        "many slots": 1,
        "a million slots": 2,
    }
    for name, rank in ranks.items():
        place = {"rank": rank, "devices": devices_of(name)}
        place["quick"] = name not in ("single", "small", "long")
        # the other structures take twice as long as everybody else together: --quick has them at the paper's size alone
        both = not quick or name == "paper"
        found.append(Case(name, SHAPES[name], **place, heavy=name == "long", alternatives=both))
        if both and name not in ("long", *ON_GPU):
            steps = QUICK_LOOP_STEPS if quick else LOOP_STEPS
            found.append(Case(f"{name}@T={steps}", SHAPES[name].at(steps), **(place | {"rank": rank + 1}), loop=True))
    return found


def inputs(s: Shape, seed: int = 0) -> dict[str, torch.Tensor]:
    normal = normals(seed)
    words, k = s.R * s.W, s.H**-0.5
    return {
        "x": normal(s.T, s.B, s.I),
        "h": torch.zeros(s.B, s.H, dtype=torch.float64),
        "c": torch.zeros(s.B, s.H, dtype=torch.float64),
        "reads": torch.zeros(s.B, s.R, s.W, dtype=torch.float64),
        **state(s, normal),
        "weight_ih": normal(4 * s.H, s.I) * k / 2,
        "weight_hh": normal(4 * s.H, s.H + words) * k / 2,
        "bias": normal(4 * s.H) * k,
        "weight_head": normal(words + s.R, s.H) * k,
        "bias_head": normal(words + s.R) * k,
    }


def omniglot(path: Path, s: Shape) -> dict[str, torch.Tensor]:
    """Episodes of real images where the input has the size of the paper's: 20 x 20 pixels and the label of the step before."""
    if s.I != SIDE * SIDE + WAYS:
        return {}
    try:
        images = load_omniglot(path, "background", SIDE)
        episodes = OmniglotEpisodes(images, WAYS, min(s.T, WAYS * images.shape[1]))
    except (OSError, ValueError) as error:
        raise SystemExit(f"--data: {error}") from None
    x = episodes.sample(s.B, torch.Generator().manual_seed(0)).x
    return {"x": x.repeat(-(-s.T // len(x)), 1, 1)[: s.T]}


# What a user would run otherwise


def mann_step(x, h, c, reads, memory, usage, read_weights, weight_ih, weight_hh, bias, weight_head, bias_head):
    gates = F.linear(x, weight_ih, bias) + F.linear(torch.cat([h, reads.flatten(1)], 1), weight_hh)
    gate_in, gate_forget, cell, gate_out = gates.chunk(4, 1)
    c = torch.sigmoid(gate_forget) * c + torch.sigmoid(gate_in) * torch.tanh(cell)
    h = torch.sigmoid(gate_out) * torch.tanh(c)
    heads, width = reads.shape[1:]
    head = F.linear(h, weight_head, bias_head)
    key = torch.tanh(head[:, : heads * width]).unflatten(1, (heads, width))
    reads, memory, usage, read_weights = step(memory, usage, read_weights, key, head[:, heads * width :])
    return torch.cat([h, reads.flatten(1)], 1), h, c, reads, memory, usage, read_weights


def over_time(one_step):
    """The loop over time that everybody writes."""

    def run(x, h, c, reads, memory, usage, read_weights, *weights):
        carried, outputs = (h, c, reads, memory, usage, read_weights), []
        for t in range(x.shape[0]):
            output, *carried = one_step(x[t], *carried, *weights)
            outputs.append(output)
        return torch.stack(outputs), *carried

    return run


def compiled(loop: bool):
    """The eager contestant under torch.compile: its step, called in a loop, or the loop itself, unrolled."""
    return compiled_anew(over_time(mann_step)) if loop else over_time(compiled_anew(mann_step))


def others(s: Shape, tensors) -> dict:
    """Make the contestants that compute something else, for scale."""
    x = tensors["x"].detach()
    return {"lstm": lambda: lstm(s, x), "gemm_floor": lambda: gemm_floor(s, x)} | peers.others(s, x)


def lstm(s: Shape, x: torch.Tensor):
    """nn.LSTM (on CUDA: cuDNN's) of the same input and width: the price of having no memory."""
    module = torch.nn.LSTM(s.I, s.H, device=x.device, dtype=x.dtype)
    gradient = torch.randn(s.T, s.B, s.H, device=x.device, dtype=x.dtype)

    def forward():
        with torch.no_grad():
            module(x)

    def train():
        module.zero_grad(set_to_none=True)
        module(x)[0].backward(gradient)

    return forward, train


def gemm_floor(s: Shape, like: torch.Tensor):
    """Only the controller's and heads' matrix products, each as large as the order of time allows, into buffers made beforehand."""
    K, P = s.H + s.R * s.W, s.R * s.W + s.R

    def normal(*shape):
        return torch.randn(shape, device=like.device, dtype=like.dtype)

    x, rows, h = normal(s.T * s.B, s.I), normal(s.T * s.B, K), normal(s.B, s.H)
    gates, head = normal(s.T * s.B, 4 * s.H), normal(s.T * s.B, P)
    weight_ih, weight_hh, weight_head = normal(4 * s.H, s.I), normal(4 * s.H, K), normal(P, s.H)
    shapes = ((s.T * s.B, 4 * s.H), (s.B, 4 * s.H), (s.B, P), (s.B, K), (s.B, s.H))
    out = {shape: like.new_empty(shape) for shape in shapes}
    grads = [torch.empty_like(weight) for weight in (weight_ih, weight_hh, weight_head)]

    def forward():
        torch.mm(x, weight_ih.t(), out=out[s.T * s.B, 4 * s.H])
        for _ in range(s.T):
            torch.mm(rows[: s.B], weight_hh.t(), out=out[s.B, 4 * s.H])
            torch.mm(h, weight_head.t(), out=out[s.B, P])

    def train():
        forward()
        for _ in range(s.T):
            torch.mm(head[: s.B], weight_head, out=out[s.B, s.H])
            torch.mm(gates[: s.B], weight_hh, out=out[s.B, K])
        torch.mm(gates.t(), x, out=grads[0])
        torch.mm(gates.t(), rows, out=grads[1])
        torch.mm(head.t(), rows[:, : s.H], out=grads[2])

    return forward, train


def products(s: Shape) -> list[Product]:
    recurrent, head = 4 * s.H * (s.H + s.R * s.W), s.H * (s.R * s.W + s.R)
    return [
        over_slots(s, 3 * s.T),
        Product(s.T, s.B * 4 * s.H * s.I, gradients=1),  # the input is data
        Product(1, s.B * recurrent, gradients=1),  # so is the state that an episode starts from
        Product(s.T - 1, s.B * recurrent),
        Product(s.T, s.B * head),
    ]


def sizes(s: Shape) -> Sizes:
    hidden, reads, words = s.B * s.H, s.B * s.R * s.W, s.R * s.W
    weight = {"weight_ih": 4 * s.H * s.I, "weight_hh": 4 * s.H * (s.H + words), "bias": 4 * s.H}
    weight |= {"weight_head": (words + s.R) * s.H, "bias_head": words + s.R}
    of_state = sizes_of_state(s)
    given = {"x": s.T * s.B * s.I, "h": hidden, "c": hidden, "reads": reads, **of_state, **weight}
    return Sizes(given, (s.T * (hidden + reads), hidden, hidden, reads, *of_state.values()))


SMALL = Shape(20, 4, 64, 64, 128, 40, 4)
AXES = {
    "T": Axis(SMALL, (20, 40, 80, 160, 320, 640, 1280, 3200), 160, compiled_once=True),
    "N": Axis(
        Shape(8, 1, 20, 64, 32, 20, 4), (32, 128, 512, 2048, 8192, 16384, 32768, 65536), 8192, on_gpu=(1 << 18, 1 << 20)
    ),
    "B": Axis(SMALL, (1, 4, 16, 64, 128, 256), 16, on_gpu=(512, 1024)),
    "H": Axis(SMALL, (16, 32, 64, 128, 256, 512, 1024), 256),
    "R": Axis(SMALL, (1, 2, 4, 8, 16), 4),
}

BENCH = Bench(
    op="mann_sequence",
    suite="mann",
    inputs=inputs,
    constant=("x", "h", "c", "reads", "memory", "usage", "read_weights"),
    verified=VERIFIED,
    cases=cases,
    eager=over_time(mann_step),
    alternatives=peers.ALTERNATIVES,
    products=products,
    sizes=sizes,
    compiled=compiled,
    others=others,
    real=omniglot,
    notices=peers.notices,
    axes=AXES,
)
