"""What ptxas made of every CUDA kernel, on every architecture: no spills.

cuobjdump, which comes with Triton, reads it out of the library; nothing is compiled.
"""

import pytest
from compiled import cuda_resources, resources_of_cuda

from mann_kernels import _library

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
#: mann_sequence needs clusters, which sm_80 has not.
NEED_CLUSTERS = ("mann_sequence",)
pytestmark = pytest.mark.skipif(_library.cuda_missing is not None, reason=str(_library.cuda_missing))


@pytest.fixture(scope="module")
def found():
    return resources_of_cuda()


def test_every_kernel_is_there_and_spills_nothing(found):
    kernels = {name for names in found.values() for name in names}
    for name in _library.cuda_kernels:
        stem = name.removesuffix("_backward")
        of_stem = [kernel for kernel in kernels if kernel.startswith(stem)]
        assert any("float" in kernel for kernel in of_stem), name
        assert any("bfloat16" in kernel for kernel in of_stem), name
    for target in ARCHITECTURES:
        of_target = {name for name in kernels if target != "sm_80" or not name.startswith(NEED_CLUSTERS)}
        assert set(found[target]) == of_target
        assert {name: used["spilled"] for name, used in found[target].items() if used["spilled"]} == {}


def test_what_cuobjdump_says_is_understood():
    said = """
Fatbin elf code:
================
arch = sm_90a
 Function void mann::cuda::some_kernel<float, (mann::cuda::Staged)0>(mann::cuda::Args<float>):
  REG:40 STACK:8 SHARED:1024 LOCAL:4 CONSTANT[0]:664 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert cuda_resources(said) == {
        "sm_90a": {"some_kernel<float, 0>": {"registers": 40, "spilled": 12, "shared": 1024}}
    }
