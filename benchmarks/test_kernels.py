"""Noise kernels by pytest-benchmark: `make bench`. Compare the rows with `memory`, a plain in-place pass.

Every row is about 4,194,304 entries; 1 ms is 0.24 ns an entry.
"""

import pytest
import torch

from fedmezo.zo.kernels import numba_ops, torch_ops

SIZE = 1 << 22
BLOCK = 1 << 20
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = [numba_ops, torch_ops]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_law = pytest.mark.parametrize("law", ["gaussian", "rademacher"])
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=["numba", "torch"])


@pytest.fixture
def target() -> torch.Tensor:
    torch.set_num_threads(1)
    return torch.zeros(SIZE)


@pytest.fixture
def lanes(dtype) -> list[torch.Tensor]:
    return [torch.zeros(BLOCK, dtype=dtype) for _ in range(2)]


def test_memory(benchmark, target):
    benchmark(target.mul_, 1.0)


def test_fresh_gaussian_tensors_out_of_place(benchmark, target):
    """What the widespread scheme does: draw, scale, add, all out of place."""
    benchmark(lambda: target + torch.normal(0.0, 1.0, target.shape) * 1e-3)


@every_law
@every_dtype
@every_backend
def test_step(benchmark, target, backend, dtype, law):
    target = target.to(dtype)
    benchmark(lambda: backend.step_(target, tensor=1, seed=1, coefficient=1e-3, law=law))


@every_law
@every_dtype
def test_lanes(benchmark, target, lanes, dtype, law):
    target = target.to(dtype)

    def run():
        for start in range(0, SIZE, BLOCK):
            source = target[start : start + BLOCK]
            numba_ops.lanes_(*lanes, source, tensor=1, seed=1, offset=1e-3, law=law, start=start)

    benchmark(run)


@every_law
@every_dtype
def test_visit(benchmark, target, lanes, dtype, law):
    """A step and the two lanes of the next one, row block by row block into the same memory."""
    target = target.to(dtype)

    def run():
        for start in range(0, SIZE, BLOCK):
            part, key = target[start : start + BLOCK], {"tensor": 1, "law": law, "start": start}
            numba_ops.visit_(*lanes, part, steps=[(2, 1e-3)], seed=1, offset=1e-3, **key)

    benchmark(run)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rounding(benchmark, target, dtype):
    half = torch.zeros(SIZE, dtype=dtype)
    benchmark(lambda: numba_ops.stochastic_(half, target, tensor=1, seed=1))


@every_law
@every_dtype
def test_replay_of_90_seeds(benchmark, target, dtype, law):
    """Nine clients of ten steps each; a ninetieth of the entries, so that the row is like the others."""
    some = target[: SIZE // 90].to(dtype)
    walks = {
        "seeds": [[10 * client + step for step in range(10)] for client in range(9)],
        "coefficients": [[1e-3] * 10] * 9,
        "weights": [1 / 9] * 9,
    }
    benchmark(lambda: numba_ops.walks_(some, tensor=1, law=law, **walks))
