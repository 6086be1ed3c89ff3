from pathlib import Path

import pytest
import torch
from expected_skips import GPU, MUST_RUN, is_expected, must_run

from mann_kernels import _backend

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parent.parent
CANNOT = {(op, device, str(dtype).removeprefix("torch.")) for op, device, dtype in _backend.TRITON_CANNOT}


@pytest.mark.parametrize("implementation", MUST_RUN)
def test_what_must_run_here_can(implementation):
    device, operators, dtypes = MUST_RUN[implementation]
    if device == "cuda" and not GPU:
        assert not is_expected("cuda was asked for, but cannot run lrua_step: no CUDA kernel")
        return
    for op in operators:
        for dtype in dtypes:
            why = _backend.missing(implementation, op, device, getattr(torch, dtype))
            assert why is None or (op, device, dtype) in CANNOT, (op, dtype, why)


def test_a_kernel_that_must_be_there_is_not_skipped():
    lost = "backend 'cuda' was asked for, but cannot run lrua_step: this version has no CUDA kernel for lrua_step"
    assert must_run("cuda", lost)
    assert not must_run("cuda", lost.replace("lrua_step", "memory_update"))
    assert not must_run(
        "cuda", "backend 'cuda' was asked for, but cannot run lrua_step: they take float32, not torch.float64"
    )


@pytest.mark.parametrize("workers", [pytest.param((), marks=pytest.mark.long), ("-n", "1")])
def test_a_skip_that_nobody_expects_fails_the_run(workers, pytester):
    pytester.makepyfile(test_it="import pytest\ndef test_it():\n    pytest.skip('my kernel is gone')\n")
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makepyfile(expected_skips=(ROOT / "tests" / "expected_skips.py").read_text())
    done = pytester.runpytest_inprocess("-p", "no:cacheprovider", *workers)
    assert done.ret == 1
    done.stdout.fnmatch_lines(["test_it.py::test_it: my kernel is gone"])
