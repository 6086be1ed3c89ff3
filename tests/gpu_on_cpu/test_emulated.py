"""What Triton can say, compiled and run by the PTX machine, against torch: products, reductions, scans, atomics, functions."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from emulated import emulated  # noqa: E402

pytestmark = [pytest.mark.compiles, pytest.mark.parametrize("target", ["sm_80", "sm_90"])]


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@triton.jit
def product_kernel(
    a_ptr, b_ptr, c_ptr, ACC: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], ACC)
    for k in range(0, 4):  # in a loop, which is pipelined: asynchronous copies
        a = tl.load(a_ptr + o_m[:, None] * 4 * K + k * K + o_k[None, :])
        b = tl.load(b_ptr + (k * K + o_k[:, None]) * N + o_n[None, :])
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACC)
    tl.store(c_ptr + o_m[:, None] * N + o_n[None, :], total)


@pytest.mark.parametrize(
    ("dtype", "precision", "least", "most"),
    [
        (torch.float32, "ieee", 0, 5e-5),
        (torch.float32, "tf32", 1e-3, 0.2),  # less exact than promised, and seen to be
        (torch.float32, "tf32x3", 0, 5e-5),
        (torch.bfloat16, "ieee", 0, 5e-5),
        (torch.float16, "ieee", 0, 5e-5),
        (torch.float64, "ieee", 0, 1e-12),
    ],
)
def test_products(dtype, precision, least, most, target):
    a, b = normal(32, 128, dtype=dtype), normal(128, 64, dtype=dtype, seed=1)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    c = torch.empty(32, 64, dtype=acc)
    with emulated(target) as launches:
        product_kernel[(1,)](a, b, c, tl.float64 if acc == torch.float64 else tl.float32, precision, 32, 64, 32)
    assert least <= (c.double() - a.double() @ b.double()).abs().max() <= most
    assert launches[0].distinct_loaded["a_ptr"] == a.nbytes


@triton.jit
def collective_kernel(x_ptr, sums_ptr, tops_ptr, places_ptr, sorted_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    o = i * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o, mask=o < N, other=0.0)
    tl.atomic_add(sums_ptr + o % 4, x, mask=o < N)
    tl.atomic_max(tops_ptr + o % 4, x, mask=o < N)
    tl.store(places_ptr + 2 * i, tl.argmax(x, 0))
    tl.store(places_ptr + 2 * i + 1, tl.argmin(x, 0))
    tl.store(sorted_ptr + o, tl.cumsum(tl.sort(x), 0) + tl.sum(x), mask=o < N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reductions_scans_and_atomics(dtype, target):
    x, sums, tops = normal(256, dtype=dtype), torch.zeros(4, dtype=dtype), torch.full((4,), -9.0, dtype=dtype)
    places, ordered = torch.zeros(4, dtype=torch.int32), torch.zeros(256, dtype=dtype)
    with emulated(target):
        collective_kernel[(2,)](x, sums, tops, places, ordered, 200, 128)
    seen = torch.where(torch.arange(256) < 200, x, 0)
    torch.testing.assert_close(sums, seen.view(-1, 4).sum(0))
    assert torch.equal(tops, x[:200].view(-1, 4).amax(0))
    assert places.tolist() == [int(f(half)) for half in (seen[:128], seen[128:]) for f in (torch.argmax, torch.argmin)]
    torch.testing.assert_close(ordered[:128], seen[:128].sort()[0].cumsum(0) + seen[:128].sum())


@triton.jit
def function_kernel(x_ptr, k_ptr, out_ptr, N, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o, mask=o < N, other=1.0)
    k = tl.load(k_ptr + o, mask=o < N, other=1)
    y = tl.exp(x) + tl.log(tl.abs(x) + 1) + tl.sqrt(tl.abs(x)) + tl.rsqrt(tl.abs(x) + 1) + tl.erf(x)
    y += tl.exp2(x) + tl.log2(x * x + 1) + tl.floor(x) + tl.ceil(x) + tl.clamp(x, -0.5, 0.5) + x / (x * x + 1)
    z = k // 3 + k % 7 + (k << 2) + (k >> 1) + (k & 3) + (~k) + k * k + k.to(tl.int8) + k.to(tl.int16) + x.to(tl.int32)
    tl.store(out_ptr + o, y + z.to(tl.float32) + x.to(tl.bfloat16) + x.to(tl.float16), mask=o < N)


def test_functions(target):
    x, out = normal(200), torch.zeros(200)
    k = torch.randint(-1000, 1000, (200,), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    with emulated(target):
        function_kernel[(1,)](x, k, out, 200, 256)
    e = x.double()
    want = e.exp() + (e.abs() + 1).log() + e.abs().sqrt() + (e.abs() + 1).rsqrt() + torch.erf(e)
    want += e.exp2() + (e * e + 1).log2() + e.floor() + e.ceil() + e.clamp(-0.5, 0.5) + e / (e * e + 1)
    z = torch.div(k, 3, rounding_mode="trunc") + torch.fmod(k, 7) + (k << 2) + (k >> 1) + (k & 3) + (~k) + k * k
    want += z + k.to(torch.int8) + k.to(torch.int16) + x.to(torch.int32) + x.bfloat16().double() + x.half().double()
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-5)


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def layout_kernel(x_ptr, out_ptr, N: tl.constexpr, W: tl.constexpr):
    o_n, o_w = tl.arange(0, N), tl.arange(0, W)
    x = tl.load(x_ptr + o_n[:, None] * W + o_w[None, :])
    even, odd = tl.split(tl.reshape(tl.trans(x), [W * N // 2, 2]))
    swapped = tl.reshape(tl.join(odd, even), [W, N])
    picked = tl.gather(swapped, tl.broadcast_to((o_n * 7 % N)[None, :], [W, N]), 1)
    out = tl.associative_scan(picked, 0, add) + tl.max(x, 1)[None, :]
    tl.store(out_ptr + o_w[:, None] * N + o_n[None, :], out)


def test_changes_of_layout(target):
    x, out = normal(64, 16), torch.zeros(16, 64)
    with emulated(target):
        layout_kernel[(1,)](x, out, 64, 16)
    swapped = x.T.reshape(-1, 2).flip(1).reshape(16, 64)
    torch.testing.assert_close(out, swapped[:, torch.arange(64) * 7 % 64].cumsum(0) + x.amax(1)[None])
