"""One operator of the CUDA kernels on the CPU against the reference, in a process that a sanitizer watches:

python run_cuda_on_cpu.py LIBRARY OP SEED B,N,W,R [name=value ...]
"""

import ast
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402
from against_reference import class_of, matches  # noqa: E402
from cuda_on_cpu import CSRC, cuda_on_cpu  # noqa: E402


def main(library, op, seeds, size, *options):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    given = dict(option.split("=") for option in options)
    given = {name: ast.literal_eval(value) for name, value in given.items()}
    call = class_of(op).inputs(1, *map(int, size.split(",")), **given)
    own = Path(library).parents[1] / "csrc"  # of a library with a fault
    for seed in range(int(seeds)):
        with cuda_on_cpu(seed, Path(library), own if own.exists() else CSRC):
            matches(op, call, torch.float32)


if __name__ == "__main__":
    main(*sys.argv[1:])
