"""The CUDA kernels between two adaptive steps, run on the CPU: compiled by g++ with their threads
and blocks emulated, they give what the C++ operators give, in one launch each.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from flowkernels.ops.step import _operators as operators
from flowkernels.ops.step.reference import Limits, plan_step
from tests.native.test_cuda_compile import ROOT, nvcc

HERE = Path(__file__).parent / "emulation"
SOURCES = ("runge_kutta.cu", "step_control.cu")
LAUNCH = re.compile(r"(\w+<[\w<>, ]+>)<<<(\w+), (\w+), 0, stream>>>\(")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Tensor = torch.Tensor


def _headers() -> Path | None:
    """The toolkit's headers, beside nvcc where it is a link."""
    places = [Path(nvcc() or "/").resolve().parents[1] / "include", Path("/usr/local/cuda/include")]
    return next((each for each in places if (each / "cuda_runtime_api.h").is_file()), None)


pytestmark = pytest.mark.skipif(
    nvcc() is None or shutil.which("g++") is None or _headers() is None,
    reason="needs g++ and the headers of the CUDA toolkit",
)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("emulation")
    parts = ['#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n#include "cuda_on_cpu.h"\n']
    for name in SOURCES:
        text, count = LAUNCH.subn(
            r"LAUNCH(&\1, \2, \3)(", (ROOT / "csrc" / "cuda" / name).read_text()
        )
        assert count, f"{name} launches nothing that is known here"
        assert "<<<" not in text
        parts.append(text)
    (folder / "all.cpp").write_text("".join(parts) + (HERE / "step_control.cpp").read_text())
    built = folder / "emulated.so"
    command = [
        "g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", "-ffp-contract=off",
        "-isystem", str(_headers()), "-I", str(HERE), "-I", str(ROOT / "csrc" / "cuda"),
        str(folder / "all.cpp"), "-o", str(built),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    library = ctypes.CDLL(str(built))
    library.chunks_of_call.restype = ctypes.c_int64
    return library


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _doubles(values: Any) -> Any:
    return (ctypes.c_double * len(values))(*values)


def _problem(shape: tuple[int, int], dtype: torch.dtype, per_sample: bool, sign: float) -> Any:
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    y0, y1, *ks = (torch.randn(shape, generator=generator).to(dtype) for _ in range(9))
    limits = Limits(5.0, 0.9, 10.0, 0.2, 1e-3, 1.0, 1.0, sign)
    # Samples on their way, one that is done and one whose step is too small to be refused.
    columns = shape[0] if per_sample else 1
    t = torch.linspace(0.1, 1.2, columns, dtype=torch.float64)
    size = torch.logspace(-4, 0, columns, dtype=torch.float64) * 0.3
    if not per_sample:
        t, size = t[0], size[0]
    nodes = [1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    plan, _ = plan_step(t, size, nodes, limits, wide)
    weights = [0.1, 0.0, 0.2, -0.3, 0.4, -0.2, 0.05]
    return y0, y1, ks, weights, plan, nodes, limits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 64), (2, 2049), (3, 4100)], ids=str)
def test_control_is_the_operators(
    emulated: ctypes.CDLL, shape: tuple[int, int], per_sample: bool, dtype: torch.dtype
) -> None:
    """Whichever block comes last: one launch, and the tickets are 0 after it."""
    kind = DTYPES.index(dtype)
    for rtol, sign in ((0.3, 1.0), (1e-3, -1.0)):
        y0, y1, ks, weights, plan, nodes, limits = _problem(shape, dtype, per_sample, sign)
        tickets = torch.zeros(plan.shape[1:], dtype=torch.int32)
        arguments = (y0, y1, rtol, 1e-3, nodes, list(limits), tickets)
        expected = operators.rk_control.default(ks, weights, plan[2], plan, *arguments)
        used = [k for k, w in zip(ks, weights, strict=True) if w != 0]
        count = emulated.chunks_of_call(ctypes.c_int64(shape[0]), ctypes.c_int64(shape[1]))
        for last_first in (False, True):
            emulated.order_blocks(ctypes.c_bool(last_first))
            found = [torch.full_like(each, 1) for each in expected]
            partial = torch.full((count,), float("nan"), dtype=torch.float64)
            record, following, accepted, times = found
            launches = emulated.emulated_control(
                kind, ctypes.c_int64(shape[0]), ctypes.c_int64(shape[1]),
                ctypes.c_int64(len(used)), (ctypes.c_void_p * len(used))(*map(_pointer, used)),
                _doubles([w for w in weights if w]), int(per_sample), _pointer(plan),
                _pointer(y0), _pointer(y1), ctypes.c_double(rtol), ctypes.c_double(1e-3),
                _doubles(nodes), len(nodes), _doubles(limits), _pointer(tickets),
                _pointer(partial), *map(_pointer, (record, following, accepted, times)),
            )  # fmt: skip
            assert launches == 1
            assert not tickets.any()
            assert torch.equal(accepted, expected[2])
            # The norm's sums run in another order than the CPU's; sizes and times follow it.
            limit = 1e-12 if dtype == torch.float64 else 1e-6
            torch.testing.assert_close(record, expected[0], rtol=limit, atol=0)
            torch.testing.assert_close(following, expected[1], rtol=limit, atol=1e-12)
            torch.testing.assert_close(times, expected[3], rtol=limit, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 64), (3, 2049)], ids=str)
def test_begin_is_the_operators(
    emulated: ctypes.CDLL, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    operands = [torch.randn(shape).to(dtype) for _ in range(4)]
    for accepted in (torch.arange(shape[0]) % 2 == 0, torch.tensor(True), torch.tensor(False)):
        dt = torch.linspace(-0.5, 0.5, shape[0], dtype=torch.float64)
        dt = dt.contiguous() if accepted.dim() else dt[0].clone()
        expected = operators.rk_begin.default(*operands, accepted, dt, 0.2)
        found = [torch.full_like(each, float("nan")) for each in expected]
        batch = accepted.numel()
        launches = emulated.emulated_begin(
            DTYPES.index(dtype), ctypes.c_int64(batch),
            ctypes.c_int64(shape[0] * shape[1] // batch),
            *map(_pointer, operands), _pointer(accepted), _pointer(dt), ctypes.c_double(0.2),
            *map(_pointer, found),
        )  # fmt: skip
        assert launches == 1
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        limit = {torch.float64: 1e-15, torch.float32: 1e-6}.get(dtype, 1e-2)  # an FMA's rounding
        torch.testing.assert_close(found[2], expected[2], rtol=limit, atol=limit)
