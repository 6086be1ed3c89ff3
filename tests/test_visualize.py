import pytest
import torch

from mann_kernels import MANN, MANNCell
from mann_kernels.ops import memory_update
from mann_kernels.reference.mann_sequence import activate_head, split_head
from mann_kernels.visualize import draw_episode, sources, trace_episode

T, B = 7, 3


def episode(cell=MANN, **options):
    torch.manual_seed(0)
    mann = cell(4, hidden_size=6, num_slots=5, slot_size=3, num_heads=2, **options)
    return mann, torch.randn(T, B, 4)


@pytest.mark.parametrize(
    "options", [{}, {"write": "add", "key_strength": True}, {"lru": "shared"}, {"controller": "feedforward"}]
)
def test_the_trace_is_what_the_memory_did(options):
    """The last state is that of the whole episode in one call, and the write weights explain every change of the memory."""
    mann, x = episode(**options)
    trace = trace_episode(mann, x)
    output, state = mann(x)
    for name in ("read_weights", "usage", "memory"):
        torch.testing.assert_close(getattr(trace, name)[-1], getattr(state, name))
    torch.testing.assert_close(trace.read_weights @ trace.memory, output[..., 6:].unflatten(-1, (2, 3)))
    initial, names = mann.initial_state(B), ("key_strength", "write")
    head = torch.nn.functional.linear(output[..., :6], mann.weight_head, mann.bias_head)
    head = split_head(head, 2, 3, **{name: mann.head_options[name] for name in names})
    key, _, _, add = activate_head(*head, squash="tanh")
    for t in range(T):
        memory, usage = (initial.memory, initial.usage) if t == 0 else (trace.memory[t - 1], trace.usage[t - 1])
        least = usage.sort(stable=True).indices[:, :2].int()
        written = memory_update(memory, trace.write_weights[t], (key if add is None else add)[t], least)
        torch.testing.assert_close(written, trace.memory[t])


def test_cells_states_and_batch_first_give_the_same():
    mann, x = episode()
    want = trace_episode(mann, x)
    for other in (episode(MANNCell)[0], MANN(4, 6, 5, 3, 2, batch_first=True)):
        other.load_state_dict(mann.state_dict())
        for a, b in zip(trace_episode(other, x), want, strict=True):
            torch.testing.assert_close(a, b)
    _, half = mann(x[:3])
    torch.testing.assert_close(trace_episode(mann, x[3:], half).memory, want.memory[3:])


def test_sources_name_the_step_that_wrote():
    mann, x = episode()
    trace = trace_episode(mann, x)
    read = torch.zeros_like(trace.read_weights)
    write = torch.zeros_like(read)
    for t in range(T):
        write[t, :, 0, t % 4] = write[t, :, 1, 4] = 1
        read[t, :, :, t // 2] = 1
    found = sources(trace._replace(read_weights=read, write_weights=write))
    # slot 0 is written at 0 and 4, slot 1 at 1 and 5, slot 2 at 2 and 6, slot 3 at 3; steps read slots 0 0 1 1 2 2 3
    assert found.nonzero().tolist() == [[0, 0], [1, 0], [2, 1], [3, 1], [4, 2], [5, 2], [6, 3]]
    assert (found.sum(1) == 1).all()


@pytest.mark.parametrize("classes", [None, [0, 1, 2, 0, 1, 2, 0]])
def test_the_picture(classes, tmp_path):
    mann, x = episode()
    figure = draw_episode(mann, x, example=2, classes=classes, delay=1)
    titles = " ".join(axes.get_title() for axes in figure.axes)
    for word in ("read weights", "write weights", "usage", "memory, norm", "memory after", "whose memory"):
        assert word in titles
    figure.savefig(tmp_path / "picture.png", dpi=30)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mann": torch.nn.LSTM(4, 4)}, TypeError, "mann: got LSTM, want a MANN or a MANNCell"),
        ({"x": torch.zeros(T, B, 5)}, ValueError, r"x: got \[7, 3, 5\], want \[T, B, I\] .* I=4"),
        ({"example": 3}, ValueError, "example: got 3, want one of the batch of 3"),
        ({"delay": 7}, ValueError, "delay: got 7, want 0 to 6"),
        ({"classes": [0, 1]}, ValueError, "classes: got 2, want one for each of 7 steps"),
    ],
)
def test_bad_input(change, error, message):
    mann, x = episode()
    given = {"mann": mann, "x": x} | change
    with pytest.raises(error, match=message):
        draw_episode(given.pop("mann"), given.pop("x"), **given)
