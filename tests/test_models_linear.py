"""Products with a weight matrix: the same numbers from either library, whatever the number of rows."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from fedmezo.models.linear import adapter_type, add_adapters_, fast_forward, linear, onednn_pays, rounded


@pytest.fixture(params=["onednn", "mkl"])
def library(request, monkeypatch):
    monkeypatch.setenv("FEDMEZO_LINEAR", request.param)
    onednn_pays.cache_clear()
    yield request.param
    onednn_pays.cache_clear()


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("rows", [1, 7, 8, 15, 16, 17, 255, 300, 530])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_equal_torchs(library, rows, dtype):
    x, weight, bias = draw(1, rows, 192, dtype=dtype), draw(256, 192, dtype=dtype), draw(256, dtype=dtype)
    got, wanted = linear(x, weight, bias), functional.linear(x.double(), weight.double(), bias.double())
    assert got.shape == (1, rows, 256) and got.dtype == dtype
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert (got.double() - wanted).abs().max() <= limit * wanted.abs().max()


def test_the_library_is_the_one_asked_for(library):
    x, weight = draw(64, 512), draw(512, 512)
    assert onednn_pays() is (library == "onednn")
    assert torch.equal(linear(x, weight), functional.linear(x, weight)) is (library == "mkl")


@given(rows=st.integers(8, 700))
def test_few_sizes_reach_the_library(rows):
    sizes = {rounded(n) for n in range(8, rows + 1)}
    assert rounded(rows) >= rows and rounded(rows) % 8 == 0
    assert len(sizes) <= 8 + 12 + 8 + 3 and rounded(rows) - rows <= max(15, rows // 8)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_of_a_frozen_product_is_autograds(library, transposed):
    weight = draw(192, 256).T if transposed else draw(256, 192)
    grads = []
    for product in (linear, functional.linear):
        x = draw(3, 20, 192).requires_grad_()
        product(x, weight).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-2)


def test_a_trained_weight_gets_its_gradient(library):
    weight = draw(256, 192).requires_grad_()
    linear(draw(20, 192), weight).sum().backward()
    torch.testing.assert_close(weight.grad, draw(20, 192).sum(0).expand(256, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("lanes", "rows", "rank"), [(1, 20, 4), (2, 63, 128), (4, 5, 8), (16, 24, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_act_on_their_own_lane(library, lanes, rows, rank, dtype):
    x, total = draw(lanes * rows, 96, dtype=dtype), draw(lanes * rows, 80, dtype=dtype)
    a, b = draw(lanes, rank, 96, dtype=dtype) / 10, draw(lanes, 80, rank, dtype=dtype)
    wanted = total.double().view(lanes, rows, -1).clone()
    for lane in range(lanes):
        part = x.double().view(lanes, rows, -1)[lane]
        wanted[lane] += 0.5 * part @ a[lane].double().T @ b[lane].double().T
    add_adapters_(total, x, a, b, scale=0.5)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert (total.view(lanes, rows, -1).double() - wanted).abs().max() <= limit * wanted.abs().max()


def test_only_plain_linear_modules_are_replaced():
    from transformers.pytorch_utils import Conv1D

    conv, x = Conv1D(300, 200), draw(1, 20, 200)
    torch.testing.assert_close(fast_forward(conv)(x), conv(x), rtol=1e-5, atol=1e-5)
    assert fast_forward(torch.nn.Linear(3, 4)) is not None
    assert fast_forward(torch.nn.LayerNorm(3)) is None and fast_forward(torch.nn.Embedding(3, 4)) is None

    class Special(torch.nn.Linear):
        pass

    assert fast_forward(Special(3, 4)) is None


def test_inputs_of_every_length_do_not_fill_the_memory():
    """Without the rounding of rows oneDNN keeps a compiled kernel per length: 0.5 MB each."""
    script = """
import sys, torch
from fedmezo.models.linear import linear
torch.set_num_threads(1)
def resident():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024
x, weight = torch.randn(520, 256, dtype=torch.bfloat16), torch.randn(512, 256, dtype=torch.bfloat16)
product = linear if sys.argv[1] == "ours" else torch.nn.functional.linear
product(x, weight)
start = resident()
for rows in range(8, 520):
    product(x[:rows], weight)
print(resident() - start)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("resident memory is read from /proc")
    ours, plain = (
        float(subprocess.run([sys.executable, "-c", script, who], capture_output=True, check=True, text=True).stdout)
        for who in ("ours", "plain")
    )
    assert ours < 40 and ours < max(plain / 3, 40)


def test_thin_adapters_keep_float32_products_on_16_bit_inputs(library):
    x, total = draw(2 * 24, 96, dtype=torch.bfloat16), draw(2 * 24, 80, dtype=torch.bfloat16)
    a, b = draw(2, 4, 96), draw(2, 80, 4)
    assert adapter_type(x, 4) == torch.float32 and adapter_type(x, 128) == torch.bfloat16
    wanted = total.float().view(2, 24, -1).baddbmm(torch.bmm(x.float().view(2, 24, -1), a.mT), b.mT, alpha=0.5)
    add_adapters_(total, x, a, b, scale=0.5)
    assert torch.equal(total.view(2, 24, -1), wanted.bfloat16())
