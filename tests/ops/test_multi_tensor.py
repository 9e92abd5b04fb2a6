"""The multi-tensor operators themselves: registration, checks, the norm, and the CUDA build."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import flowkernels
from flowkernels.ops import _library, multi_tensor
from flowkernels.ops.multi_tensor._layout import is_dense, walkable

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ((3, 5), (17,), (1,), (0,), (333, 7), (2432,))
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ops = torch.ops.flowkernels


def tensors(dtype=torch.float32, scale=1.0):
    return [(torch.randn(shape) * scale).to(dtype) for shape in SHAPES]


def sweep_arguments(averages=2, first_moment=True):
    params = tensors()
    return {
        "params": params,
        "grads": tensors(),
        "exp_avgs": tensors() if first_moment else [],
        "exp_avg_sqs": [value.square() for value in tensors()],
        "emas": [value for _ in range(averages) for value in tensors()],
        "copies": tensors(torch.bfloat16),
        "steps": [torch.tensor(float(i)) for i in range(len(params))],
        "skipped": torch.zeros((), dtype=torch.int64),
        "norm": torch.tensor(2.0),
        "grad_scale": torch.tensor(2.0),
        "lr_tensor": None,
        "lr": 1e-2,
        "beta1": 0.9 if first_moment else 0.0,
        "beta2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "ema_decays": [0.9, 0.99][:averages],
        "max_grad_norm": 1.0,
        "skip_nonfinite": True,
    }


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_grad_norm_is_the_rounded_float64_norm(dtype):
    grads = tensors(dtype)
    exact = torch.cat([grad.double().flatten() for grad in grads]).norm()
    found = multi_tensor.grad_norm(grads)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=2.0**-24, atol=0.0)  # one rounding
    scaled = multi_tensor.grad_norm(grads, torch.tensor(-4.0, dtype=torch.float64))
    assert float(scaled) == float(found) / 4


def test_grad_norm_of_mixed_dtypes_and_layouts():
    grads = [*tensors(), *tensors(torch.bfloat16), torch.randn(4, 6).t(), torch.randn(9)[::2]]
    exact = torch.cat([grad.double().flatten() for grad in grads]).norm()
    torch.testing.assert_close(multi_tensor.grad_norm(grads).double(), exact, rtol=1e-7, atol=0.0)
    assert multi_tensor.grad_norm([torch.ones(4, dtype=torch.float64)]).dtype == torch.float64


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_grad_norm_sees_every_nonfinite_value(backend, dtype, bad):
    with flowkernels.backend(backend):
        for place, shape in enumerate(SHAPES):
            if 0 in shape:
                continue
            grads = tensors(dtype)
            grads[place].view(-1)[-1] = bad
            assert not multi_tensor.grad_norm(grads).isfinite()


def test_grad_norm_does_not_overflow_in_between():
    assert float(multi_tensor.grad_norm([torch.full((4,), 1e30)])) == pytest.approx(2e30)


def test_grad_norm_of_nothing_is_refused():
    with pytest.raises(ValueError, match="grads: got no tensor"):
        multi_tensor.grad_norm([])


@pytest.mark.parametrize("first_moment", [True, False])
def test_opcheck_adamw_ema(first_moment):
    arguments = sweep_arguments(first_moment=first_moment)
    torch.library.opcheck(ops.adamw_ema_.default, tuple(arguments.values()))


def test_opcheck_norm_and_ema():
    torch.library.opcheck(ops.grad_norm.default, (tensors(), torch.tensor(2.0)))
    torch.library.opcheck(ops.grad_norm.default, (tensors(torch.bfloat16), None))
    torch.library.opcheck(ops.ema_.default, (tensors(), tensors(), [0.9], torch.tensor(1.0)))


@pytest.mark.parametrize("first_moment", [True, False])
def test_native_equals_reference_from_any_state(first_moment):
    torch.manual_seed(0)
    arguments = sweep_arguments(first_moment=first_moment)
    results = []
    for backend in ("native", "reference"):
        mine = {
            key: [t.clone() for t in value]
            if isinstance(value, list) and key != "ema_decays"
            else value
            for key, value in arguments.items()
        }
        params, grads, exp_avgs, exp_avg_sqs, emas, copies, steps, *_ = mine.values()
        rest = {
            key: mine[key]
            for key in ("lr", "beta1", "beta2", "eps", "weight_decay", "ema_decays", "norm",
                        "grad_scale", "max_grad_norm")
        }  # fmt: skip
        with flowkernels.backend(backend):
            multi_tensor.adamw_ema_(
                params, grads, exp_avgs, exp_avg_sqs, emas, copies, steps, **rest
            )
        results.append([*params, *exp_avgs, *exp_avg_sqs, *emas, *copies, *steps])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * torch.finfo(a.dtype).eps, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": []}, "grads: need one tensor for each parameter"),
        ({"exp_avg_sqs": []}, "exp_avg_sqs: wrong number of tensors"),
        ({"emas": []}, "emas: wrong number of tensors"),
        ({"norm": None}, "max_grad_norm: needs norm"),
        ({"grad_scale": torch.ones(2)}, "grad_scale: need one element"),
        ({"exp_avgs": [torch.zeros(4) for _ in SHAPES]}, "exp_avgs: sizes or strides differ"),
        (
            {"exp_avg_sqs": [torch.zeros(s, dtype=torch.float64) for s in SHAPES]},
            "exp_avg_sqs: need float32",
        ),
        (
            {"params": [torch.zeros(s, dtype=torch.float64) for s in SHAPES]},
            "params: need float32, bfloat16 or float16",
        ),
    ],
)
def test_lists_that_do_not_fit_are_refused_before_anything_is_written(change, message):
    arguments = {**sweep_arguments(), **change}
    before = [t.clone() for t in (*arguments["params"], *arguments["steps"])]
    with pytest.raises(RuntimeError, match=message):
        ops.adamw_ema_.default(*arguments.values())
    after = (*arguments["params"], *arguments["steps"])
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_layouts():
    base = torch.randn(4, 6, 3, 5)
    assert is_dense(base.permute(2, 0, 3, 1))
    assert is_dense(base[:1])
    assert not is_dense(base[:, ::2])
    assert not is_dense(torch.ones(1).expand(4))
    assert walkable(base, base.clone())
    assert not walkable(base, base.to(memory_format=torch.channels_last))
    assert not walkable(base.double(), base.double())


def test_functions_are_listed_with_their_backends():
    rows = {row["op"]: row for row in _library.table()}
    for name in multi_tensor.__all__:
        row = rows[f"flowkernels.ops.multi_tensor.{name}"]
        assert row["native"] == "on"
        assert row["triton"] == "no Triton kernel: CUDA C++ serves it on GPUs"


def find_nvcc() -> str | None:
    places = [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((place for place in places if place and Path(place).is_file()), None)


if find_nvcc() is not None:  # the sources are compiled where there is a compiler for them

    def test_nvcc_compiles_the_kernels_without_spills(tmp_path):
        command = [
            find_nvcc(), "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v",
            "-Xcompiler=-fopenmp-simd", "-gencode=arch=compute_90a,code=sm_90a", "-c",
            str(ROOT / "csrc/cuda/multi_tensor.cu"), "-o", str(tmp_path / "multi_tensor.o"),
        ]  # fmt: skip
        output = subprocess.run(command, capture_output=True, text=True, check=False)
        assert output.returncode == 0, output.stderr
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", output.stderr)
        assert len(spills) >= 17  # 9 updates, 3 averages, 3 norms, and the two that join them
        assert set(spills) == {("0", "0")}
