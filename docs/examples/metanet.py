"""MetaNet on classes that need no data: each task has new random glyphs, one drawing of each to learn from, noisy ones to name."""

import argparse

import torch
from torch import nn

from mann_kernels import MetaNet

WAYS = 3


def task(queries: int, generator: torch.Generator):
    """support [WAYS, 1, 28, 28], its labels, queries [WAYS * queries, 1, 28, 28], theirs."""
    glyphs = (torch.rand(WAYS, 1, 7, 7, generator=generator) < 0.4).float()
    glyphs = nn.functional.interpolate(glyphs, scale_factor=4)

    def drawn(count):
        images = glyphs.repeat_interleave(count, 0)
        noise = torch.rand(images.shape, generator=generator)
        return torch.where(noise < 0.2, torch.rand(images.shape, generator=generator), images)

    labels = torch.arange(WAYS)
    return drawn(1), labels, drawn(queries), labels.repeat_interleave(queries)


def main(updates: int) -> float:
    """The accuracy over the last updates."""
    torch.manual_seed(0)
    metanet, generator = MetaNet.omniglot(WAYS, filters=16), torch.Generator().manual_seed(0)
    optimizer, accuracy = torch.optim.Adam(metanet.parameters(), 1e-3), 1 / WAYS
    for update in range(updates):
        support_x, support_y, query_x, query_y = task(5, generator)
        state = metanet.adapt(support_x, support_y)  # what one drawing of each class teaches
        logits = metanet.predict(query_x, state)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, query_y).backward()
        nn.utils.clip_grad_norm_(metanet.parameters(), 10)
        optimizer.step()
        accuracy = 0.95 * accuracy + 0.05 * (logits.argmax(-1) == query_y).float().mean().item()
        if update % 50 == 49:
            print(f"{update + 1} tasks: accuracy {accuracy:.2f}", flush=True)
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=200)
    main(parser.parse_args().updates)
