"""Every GPU kernel once, forward and backward, at a small size: what `make test-gpu` runs under compute-sanitizer."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch  # noqa: E402
from against_reference import class_of, run  # noqa: E402

import mann_kernels  # noqa: E402
from mann_kernels import _backend  # noqa: E402

#: (B, N, W, R).
SIZE = (3, 37, 5, 2)

for implementation in ("cuda", "triton"):
    for op in _backend.OPS:
        for dtype in (torch.float32, torch.bfloat16):
            if _backend.missing(implementation, op, "cuda", dtype) is not None:
                continue
            tests = class_of(op)
            for options in tests.options:
                with mann_kernels.backend(implementation):
                    run(getattr(mann_kernels, op), tests.inputs(1, *SIZE, **options).to(dtype).on("cuda"))
            print(implementation, op, dtype, flush=True)
torch.cuda.synchronize()
