import subprocess
import sys
from pathlib import Path

import pytest
import torch
from expected_skips import GPU, MUST_RUN, is_expected, must_run

from mann_kernels import _backend

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
def test_a_skip_that_nobody_expects_fails_the_run(workers, tmp_path):
    (tmp_path / "test_it.py").write_text("import pytest\ndef test_it():\n    pytest.skip('my kernel is gone')\n")
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "expected_skips.py").write_text((ROOT / "tests" / "expected_skips.py").read_text())
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *workers, tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert "test_it.py::test_it: my kernel is gone" in done.stdout
