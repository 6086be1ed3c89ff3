"""The operators as the CUDA kernels implement them: what opcheck checks, for tensors that would be on a GPU."""

import pytest
import torch
from cuda_on_cpu import cuda_on_cpu, missing
from stem import run
from test_cuda_extension import STEMS
from test_properties import class_of
from test_structure import _Calls
from torch._subclasses.fake_tensor import FakeTensorMode

import mann_kernels

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def layout(result):
    """Shape, strides and dtype of every output."""
    tensors = result if isinstance(result, tuple | list) else (result,)
    return [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stem", STEMS)
def test_opcheck(stem, dtype):
    """Nothing is written to but the outputs, and these are what the fake operator says of CUDA tensors."""
    tests = class_of(stem)
    for options in tests.options:
        with cuda_on_cpu(), _Calls() as calls:
            run(getattr(mann_kernels, stem), tests.inputs(1, 3, 7, 5, 2, **options).to(dtype))
        names = [f"mann_cuda_on_cpu::{stem}", f"mann_cuda_on_cpu::{stem}_backward"]
        assert [func.name() for func, _ in calls.made] == names
        for func, args in calls.made:
            torch.library.opcheck(func, args, test_utils=("test_schema",))
            with FakeTensorMode():
                fakes = [
                    torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device="cuda")
                    if isinstance(arg, torch.Tensor)
                    else arg
                    for arg in args
                ]
                wanted = layout(getattr(torch.ops.mann, func.name().split("::")[1])(*fakes))
            assert layout(func(*args)) == wanted, func.name()
