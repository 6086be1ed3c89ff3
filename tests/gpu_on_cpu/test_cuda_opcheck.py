"""The operators as the CUDA kernels implement them: what opcheck checks, for tensors that would be on a GPU."""

import pytest
import torch
from against_reference import class_of, run
from cuda_on_cpu import cuda_on_cpu, missing
from test_cuda_extension import OPS, on_fake_gpu
from test_structure import _Calls
from torch._subclasses.fake_tensor import FakeTensorMode

import mann_kernels

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def layout(result):
    """Shape, strides and dtype of every output."""
    tensors = result if isinstance(result, tuple | list) else (result,)
    return [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, dtype):
    """Nothing is written to but the outputs, and these are what the fake operator says of CUDA tensors."""
    tests = class_of(op)
    for options in tests.options:
        with cuda_on_cpu(), _Calls() as calls:
            run(getattr(mann_kernels, op), tests.inputs(1, 3, 7, 5, 2, **options).to(dtype))
        names = [f"mann_cuda_on_cpu::{op}", f"mann_cuda_on_cpu::{op}_backward"]
        assert [func.name() for func, _ in calls.made] == names
        for func, args in calls.made:
            torch.library.opcheck(func, args, test_utils=("test_schema",))
            with FakeTensorMode():
                fake = getattr(torch.ops.mann, func.name().split("::")[1])
                wanted = layout(fake(*map(on_fake_gpu, args)))
            assert layout(func(*args)) == wanted, func.name()
