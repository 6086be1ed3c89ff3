"""Whether what the CUDA kernels are launched with fits a GPU: blocks on a multiprocessor, clusters on the chip."""

import pytest
import torch

pytest.importorskip("triton")

import cuda_on_cpu
import emulated_cuda
from compiled import used_by_cuda
from occupancy import DEVICES, clusters, occupancy
from report import call_of
from stem import run
from test_cuda_kernels import STEMS
from test_cuda_resources import found, pytestmark  # noqa: F401  (a fixture, and when there is nothing to read it from)

import mann_kernels


@pytest.mark.skipif(cuda_on_cpu.missing() is not None, reason=str(cuda_on_cpu.missing()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stem", STEMS)
def test_paper_size_fits(stem, dtype, found):  # noqa: F811
    with emulated_cuda.planned() as launches:
        run(getattr(mann_kernels, stem), call_of(stem, 16, 2).to(dtype))
    assert len(launches) >= 2
    for launch in launches:
        registers = used_by_cuda(launch.name, found["sm_90a"])["registers"]
        fits = occupancy("sm_90", launch.threads, registers, launch.shared)
        assert fits.programs >= 1, (launch, registers)
        assert launch.shared <= DEVICES["sm_90"][2]
        if stem == "mann_sequence":
            assert launch.cluster == {torch.float32: 8, torch.bfloat16: 4}[dtype]
            assert clusters("sm_90", launch.cluster, fits.programs) >= 2  # the batch of the paper in one go
        else:
            assert launch.cluster == 1
