"""Noise kernels by pytest-benchmark: `make bench`. Compare the rows with `memory`, a plain in-place pass."""

import pytest
import torch

from fedmezo.zo.kernels import numba_ops, torch_ops

SIZE = 1 << 22


@pytest.fixture
def target() -> torch.Tensor:
    torch.set_num_threads(1)
    return torch.zeros(SIZE)


def test_memory(benchmark, target):
    benchmark(target.mul_, 1.0)


def test_fresh_gaussian_tensors_out_of_place(benchmark, target):
    """What the widespread scheme does: draw, scale, add, all out of place."""
    benchmark(lambda: target + torch.normal(0.0, 1.0, target.shape) * 1e-3)


@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
@pytest.mark.parametrize("backend", [numba_ops, torch_ops], ids=["numba", "torch"])
def test_step(benchmark, target, backend, law):
    benchmark(lambda: backend.step_(target, tensor=1, seed=1, coefficient=1e-3, law=law))
