"""The Triton kernels write the bits of the plain torch ones: in Triton's interpreter, and on a GPU where there is one.

The interpreter is chosen when Triton is imported, so its checks run in a process of their own: this file as a script.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from fedmezo.zo.kernels import torch_ops
from fedmezo.zo.noise import round_coefficient, table

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
FUNCTIONS = ("lookup", "entries", "step_", "lane_", "lanes_", "visit_", "walks_", "stochastic_")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 0), (2048, 2048), (4100, 0), (777, 513), (2500, 2**33 + 2047))  # (size, start)
SEED, TENSOR = 0xF123456789ABCDEF, 0x89ABCDEF
SPECIAL = (
    0.0,
    -0.0,
    1.0,
    -65503.9,
    65504.0,
    65519.9,
    -65520.0,
    3e38,
    2**-14,
    -(2**-14) * 0.999,
    2**-24,
    -(2**-26),
    1e-44,
)


def values(size, dtype):
    """Numbers of every size a dtype has, special ones first."""
    scale = torch.logspace(-9, 2, size)
    made = torch.randn(size, generator=torch.Generator().manual_seed(size)) * scale.flip(0)
    odd = torch.tensor([0x7F800001, -1], dtype=torch.int32).view(torch.float32)  # a signalling nan; all ones
    special = torch.cat([torch.tensor([*SPECIAL, float("inf"), float("-inf"), float("nan")]), odd])
    made[: min(size, special.numel())] = special[:size]
    return made.to(dtype)


def same(ours, theirs):
    """Equal bits; any nan is as good as another."""
    kind = torch.int16 if ours.itemsize == 2 else torch.int32
    bits = ours.cpu().view(kind) == theirs.cpu().view(kind)
    return bool((bits | (ours.isnan() & theirs.isnan()).cpu()).all())


def calls(law, start):
    """Every function with its keywords, and which of the tensors (target, plus, minus, float32 source) it takes."""
    key = {"tensor": TENSOR, "law": law, "start": start}
    lane = {"seed": SEED, "offset": round_coefficient(1e-3), **key}
    steps = [(5, 2.0**-9), (SEED, round_coefficient(-0.3)), (2**63, 0.125)]
    walk = {"seeds": [[1, 2, SEED], [], [7]], "coefficients": [[0.5, -0.25, 2**-12], [], [1e-3]], "rounding": 2**64 - 1}
    yield "step_", {"seed": SEED, "coefficient": round_coefficient(0.1), **key}, (0,)
    yield "step_", {"seed": SEED, "coefficient": -0.0, **key}, (0,)
    yield "lane_", lane, (1, 0)
    yield "lanes_", lane, (1, 2, 0)
    yield "visit_", {"steps": steps[:1], **lane}, (1, 2, 0)
    yield "visit_", {"steps": steps, **lane}, (1, 2, 0)
    yield "visit_", {"steps": [], **lane}, (1, 2, 0)
    if start == 0:
        yield "walks_", {"tensor": TENSOR, "law": law, "weights": [1 / 3, 0.2, 0.7], **walk}, (0,)
        yield "walks_", {"tensor": TENSOR, "law": law, "weights": [], "seeds": [], "coefficients": []}, (0,)
    yield "stochastic_", {"seed": SEED, "tensor": TENSOR, "start": start}, (0, 3)


def compare(device):
    """Returns how many cases of each function agree, and those that do not."""
    from fedmezo.zo.kernels import triton_ops

    right, wrong = Counter(), []

    def note(function, good, *case):
        right[function] += good
        if not good:
            wrong.append(" ".join(map(str, (function, *case))))

    note("lookup", np.array_equal(triton_ops.lookup(device) * 1024, table()))
    for law in ("gaussian", "rademacher"):
        key = {"size": 4100, "start": 3000, "law": law, "device": torch.device(device)}
        note("entries", same(triton_ops.entries(SEED, TENSOR, **key), torch_ops.entries(SEED, TENSOR, **key)), law)
        for size, start in SHAPES:
            for dtype in DTYPES:
                tensors = [values(size, dtype), *torch.zeros(2, size, dtype=dtype), values(size, torch.float32)]
                for function, keywords, wanted in calls(law, start):
                    ours, theirs = [t.to(device, copy=True) for t in tensors], [t.clone() for t in tensors]
                    getattr(triton_ops, function)(*[ours[i] for i in wanted], **keywords)
                    getattr(torch_ops, function)(*[theirs[i] for i in wanted], **keywords)
                    note(function, all(map(same, ours, theirs)), law, size, start, dtype)
    return {"right": right, "wrong": wrong}


class AbsentGpu:
    """What Triton's compiler asks of a driver, for a GPU that nobody has to own."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_all():
    """Returns [key of the code, its text] for every launch of some calls; nothing runs."""
    import triton
    from triton.runtime.driver import driver

    from fedmezo.zo.kernels import triton_ops

    made, run = [], triton.JITFunction.run

    def compile_only(self, *args, **kwargs):
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        made.append((kernel.hash, kernel.asm["ptx"]))

    driver.set_active(AbsentGpu())
    triton.JITFunction.run = compile_only
    for dtype in DTYPES:
        target = torch.zeros(4096, dtype=dtype)
        for tensor, start in ((1, 2048), (2**32 - 1, 2**40), (16, 0)):
            key = {"tensor": tensor, "law": "gaussian"}
            steps = [(2**64 - 1, 0.5)] * (16 if start else 1)
            triton_ops.visit_(target, target, target, steps=steps, seed=3, offset=0.5, start=start, **key)
            triton_ops.walks_(target, seeds=[[1]], coefficients=[[0.1]], weights=[1.0], **key)
    return made


def in_a_process(task, **environment):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [sys.executable, __file__, task]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def compared(request):
    if request.param == "interpreter":
        return in_a_process("compare", TRITON_INTERPRET="1")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return compare("cuda")


@needs_triton
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_kernel_writes_the_bits_of_torch(compared, function):
    assert [case for case in compared["wrong"] if case.startswith(f"{function} ")] == []
    assert compared["right"][function] > 0


@needs_triton
def test_kernels_compile_once_a_dtype_without_fused_multiply_add_and_with_wide_access(tmp_path):
    made = in_a_process("compile", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert len(made) == 2 * 3 * len(DTYPES)
    assert len({key for key, _ in made}) == 2 * len(DTYPES)
    for _, text in made:
        assert "fma." not in text
        assert "ld.global.v4.b32" in text
        assert "st.global.v4.b32" in text


if __name__ == "__main__":
    json.dump(compare("cpu") if sys.argv[1] == "compare" else compile_all(), sys.stdout)
