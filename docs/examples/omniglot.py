"""Characters named one by one, each name shown a step late: what a MANN remembers of them, as a picture of its memory.

--data is Omniglot (see mann_kernels.tasks.load_omniglot). Before the learner has found its memory, which takes one to two thousand
updates, its answers are at chance and the picture shows what an untrained memory does.
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
        self.mann = MANN(input_size, write="add", key_strength=True)
        self.classify = nn.Linear(200 + 4 * 40, ways)  # (h, reads)

    def forward(self, x):
        output, _ = self.mann(x)
        return self.classify(output)


def main(updates: int, data: Path, picture: Path | None = None, ways: int = 5, length: int = 40) -> float:
    """The accuracy on classes that were never trained on, where one is shown for the second time or later."""
    torch.manual_seed(0)
    train, test = (OmniglotEpisodes(load_omniglot(data, part, 20), ways, length) for part in ("background", "test"))
    model, generator = Model(train.input_size, ways), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
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
    parser.add_argument("--updates", type=int, default=2500)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--picture", type=Path, default=Path("memory.png"))
    given = parser.parse_args()
    print(f"right from the second time on: {main(given.updates, given.data, given.picture):.2f}; see {given.picture}")
