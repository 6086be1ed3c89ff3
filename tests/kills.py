"""`python tests/kills.py [--kills N] [TASK and options of mann_kernels.train]`: kill a run without warning at random moments.

Each time it goes on with --resume; in the end its weights, optimiser and generator are those of a run that was left alone.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from mann_kernels.train.checkpoint import read_facts

ROOT = Path(__file__).parent.parent
EXAMPLE = "copy --length 8 --hidden-size 32 --num-slots 32 --slot-size 8 --num-heads 2 --write add --key-strength"
EXAMPLE += " --updates 30000 --log-every 10 --test-every 1000 --interim-tasks 10 --test-tasks 10 --schedule cosine"


class Found(NamedTuple):
    """updates: the checkpoint's at each kill in the middle of the run, 0 before there is one; same: all that is in the last one,
    bit for bit."""

    updates: list[int]
    same: bool


def survive(args: list[str], folder: Path, kills: int, seed: int, longest: float) -> Found:
    """Run the command whole, and again with `kills` kills, each up to `longest` seconds after its part's first checkpoint, or
    a quarter of them earlier, while it starts."""
    moments, updates = random.Random(seed), []
    call = [sys.executable, "-m", "mann_kernels.train", *args, "--out"]
    checkpoint = folder / "parts" / "checkpoint.safetensors"
    for n in range(kills):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = subprocess.Popen([*call, str(folder / "parts"), "--resume"], cwd=ROOT, stdout=subprocess.DEVNULL)
        early = n % 4 == 3
        if not early:
            while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before):
                time.sleep(0.005)
        try:
            process.wait(moments.uniform(0, longest))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            updates.append(read_facts(checkpoint)["update"] if checkpoint.exists() else 0)
    for name, more in (("parts", ["--resume"]), ("whole", [])):
        done = subprocess.run([*call, str(folder / name), *more], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
    parts, whole = (load_file(folder / name / "checkpoint.safetensors") for name in ("parts", "whole"))
    same = parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)
    return Found(updates, same)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=3.0, help="seconds")
    given, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        found = survive(rest or EXAMPLE.split(), Path(folder), given.kills, given.seed, given.longest)
    print(f"killed at updates {found.updates}; the same bits in the end: {'yes' if found.same else 'NO'}")
    if len(found.updates) < given.kills:
        print(
            f"only {len(found.updates)} of {given.kills} kills came before the end: want more --updates, or a smaller --longest"
        )
    raise SystemExit(not found.same or len(found.updates) < given.kills)
