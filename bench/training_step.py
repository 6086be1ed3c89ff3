"""`python -m bench.training_step [--data FILE]`: a whole training step of the paper's MANN, with kernels and without.

Two runs from the same seed, one on each implementation, take turns; the losses of both are compared, and the times.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import mann_kernels
from mann_kernels.tasks import OmniglotEpisodes, load_omniglot
from mann_kernels.train import build
from mann_kernels.train.loop import Run
from mann_kernels.train.settings import Settings

SETTINGS = Settings("omniglot", "mann", write="add", key_strength=True)


def episodes(data: Path | None) -> OmniglotEpisodes:
    """The paper's training episodes; without data, of random images: the times do not depend on what is drawn."""
    if data is not None:
        images = load_omniglot(data, "background", 20)
    else:
        images = torch.randint(
            256, (1200, 20, 1, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
    return OmniglotEpisodes(images, augment=True, turns=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.training_step", description=__doc__)
    parser.add_argument("--data", type=Path, help="Omniglot; random images without it")
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    source, runs = episodes(given.data), {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cpp", "reference"):
            torch.manual_seed(0)
            settings = replace(SETTINGS, threads=given.threads)
            runs[name] = Run(build.learner(settings, source), source, source, settings, Path(folder) / name)
    seconds, losses = {name: [] for name in (*runs, "data")}, {name: [] for name in runs}
    generator = torch.Generator().manual_seed(0)
    for _ in range(given.updates):
        for name, run in runs.items():
            with mann_kernels.backend(name):
                began = time.perf_counter()
                losses[name].append(run._one_update()["loss"])
                seconds[name].append(time.perf_counter() - began)
        began = time.perf_counter()
        source.sample(SETTINGS.tasks_per_update, generator)
        seconds["data"].append(time.perf_counter() - began)
    ours, plain, data = (1e3 * statistics.median(seconds[name]) for name in ("cpp", "reference", "data"))
    far = max(abs(a - b) / b for a, b in zip(*losses.values(), strict=True))
    print(
        f"{given.updates} updates, {given.threads} thread(s), torch {torch.__version__}; median milliseconds of a training step"
    )
    print(f"kernels {ours:.1f}   reference {plain:.1f} ({plain / ours:.2f} times)   the data alone {data:.1f}")
    print(f"losses of the two runs differ by at most {far:.1e} of their size, after {given.updates} updates by "
          f"{abs(losses['cpp'][-1] - losses['reference'][-1]) / losses['reference'][-1]:.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
