"""Characters named one by one, each name shown a step late: what a MANN remembers of them, as a picture of its memory.

With --data, Omniglot (see mann_kernels.tasks.load_omniglot); without it, made-up characters. Before the learner has found its
memory, which takes thousands of updates, its answers are at chance and the picture shows what an untrained memory does.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from mann_kernels import MANN
from mann_kernels.tasks import OmniglotEpisodes, load_omniglot
from mann_kernels.visualize import draw_episode


class Model(nn.Module):
    def __init__(self, input_size: int, ways: int):
        super().__init__()
        self.mann = MANN(
            input_size, hidden_size=100, num_slots=40, slot_size=20, num_heads=2, write="add", key_strength=True
        )
        self.classify = nn.Linear(100 + 2 * 20, ways)

    def forward(self, x):
        output, _ = self.mann(x)
        return self.classify(output)


def made_up(classes: int, seed: int, drawers: int = 20, side: int = 20) -> torch.Tensor:
    """uint8 [classes, drawers, 1, side, side]: a coarse random pattern for each class, noise in each drawing."""
    generator = torch.Generator().manual_seed(seed)
    pattern = (torch.rand(classes, 1, side // 5, side // 5, generator=generator) < 0.4).float()
    images = nn.functional.interpolate(pattern, scale_factor=5)[:, None].expand(-1, drawers, -1, -1, -1)
    noise = torch.rand(images.shape, generator=generator)
    return (255 * torch.where(noise < 0.1, 1 - images, images)).byte()


def main(updates: int, data: Path | None = None, picture: Path | None = None, ways: int = 3, length: int = 15) -> float:
    """The accuracy on classes that were never trained on, where one is shown for the second time or later."""
    torch.manual_seed(0)
    if data is None:
        train, test = made_up(800, seed=1), made_up(100, seed=2)
    else:
        train, test = load_omniglot(data, "background"), load_omniglot(data, "test")
    train, test = (OmniglotEpisodes(examples, ways, length) for examples in (train, test))
    model, generator = Model(train.input_size, ways), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for update in range(updates):
        batch = train.sample(16, generator)
        loss = train.loss(model(batch.x), batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        if update % 100 == 99:
            print(f"{update + 1} updates: loss {loss.item():.3f}", flush=True)
    batch = test.sample(100, torch.Generator().manual_seed(1))
    with torch.no_grad():
        right = model(batch.x).argmax(-1) == batch.y
    if picture is not None:
        # The name of an example comes one step after it, so that is when it is written.
        draw_episode(model.mann, batch.x, classes=batch.y[:, 0], delay=1).savefig(picture)
    return right[batch.presentation > 1].float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=5000)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--picture", type=Path, default=Path("memory.png"))
    given = parser.parse_args()
    print(f"right from the second time on: {main(given.updates, given.data, given.picture):.2f}; see {given.picture}")
