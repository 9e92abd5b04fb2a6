"""Gram matrices of velocity increments, and the costs of jumps that follow from them.

On a grid t_0..t_N with velocities v_l of a teacher's states, let a_l = v_l - v_{l-1} and, where
the teacher's step is not Euler's, e_m = x_{m+1} - x_m - (t_{m+1} - t_m) v_m. The error of one Euler
jump from the teacher's own state is

    x_k - x_j - (t_k - t_j) v_j = Σ_{l=j+1}^{k-1} (t_k - t_l) a_l + Σ_{m=j}^{k-1} e_m,

so its squared norm is a quadratic form in the inner products of these *rows*, and no state is
needed. Rows stand in the order a_1, a_2, ... or, with residuals, e_0, a_1, e_1, a_2, e_2, ...: what
a jump j → k sums is then one run of rows, from its first to the last before k. (docs/bellman.md)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Bytes of increments that are held at a time where velocities are given whole: in the cache of a
# CPU core, so that the product reads them there; on a GPU enough for few, large launches.
SCRATCH = {"cpu": 1 << 20, "other": 256 << 20}
# Columns whose products are summed in the rows' own dtype; beyond them sums are float64.
MOST_COLUMNS = 16384
# Bytes of float64 that `jump_costs` works on at a time.
POST_PASS = 64 << 20


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, float32 products are float32: no TF32, bfloat16 or autocast, whatever is set."""
    backends: tuple[Any, ...] = (
        torch.backends.cuda.matmul,
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    )
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def rows_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What rows are held in: float32, or float64 where a velocity is."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def gram(rows_BRD: Tensor) -> Tensor:
    """The inner products of each sample's rows, float64 [B, R, R]; rows are read in place."""
    B, R, _ = rows_BRD.shape
    total = torch.zeros(B, R, R, dtype=torch.float64, device=rows_BRD.device)
    with full_precision():
        for part in rows_BRD.split(MOST_COLUMNS, dim=2):
            _add_products(total, part)
    return _symmetric(total)


def gram_of_velocities(velocities: Tensor, residuals: Tensor | None) -> Tensor:
    """As `gram`, for velocities [N, B, D] and residuals of that shape or None.

    Rows are made a block of samples and columns at a time, in scratch memory of at most SCRATCH
    bytes (of one sample's 64 columns, if that is more).
    """
    N, B, D = velocities.shape
    R = row_count(N, residuals is not None)
    dtype, device = rows_dtype(velocities, residuals), velocities.device
    total = torch.zeros(B, R, R, dtype=torch.float64, device=device)
    limit = SCRATCH["cpu" if device.type == "cpu" else "other"] // dtype.itemsize // max(R, 1)
    # On a CPU a sample at a time, in wide pieces; on a GPU all samples at once, one product each.
    samples = 1 if device.type == "cpu" else max(1, min(B, limit // 64))
    columns = max(64, min(D, limit // samples, MOST_COLUMNS))
    scratch = torch.empty(samples * R * columns, dtype=dtype, device=device)
    with full_precision():
        for b in range(0, B, samples):
            for d in range(0, D, columns):
                piece = (slice(None), slice(b, b + samples), slice(d, d + columns))
                v = velocities[piece]
                rows = scratch[: v.shape[1] * R * v.shape[2]].view(v.shape[1], R, v.shape[2])
                write_rows(rows, v, None if residuals is None else residuals[piece])
                _add_products(total[b : b + samples], rows)
    return _symmetric(total)


def row_count(steps: int, residuals: bool) -> int:
    """How many rows a grid of so many steps has."""
    return 2 * steps - 1 if residuals else steps - 1


def write_rows(rows_BRD: Tensor, velocities_NBD: Tensor, residuals_NBD: Tensor | None) -> None:
    """Increments (and residuals) of velocities [N, B, D] into their places."""
    increments = rows_BRD if residuals_NBD is None else rows_BRD[:, 1::2]
    v = velocities_NBD
    if v.dtype == rows_BRD.dtype:
        torch.sub(v[1:], v[:-1], out=increments.transpose(0, 1))
    else:  # widened first: the difference of rounded differences would be of no use
        increments.transpose(0, 1).copy_(v[1:].to(rows_BRD.dtype)).sub_(v[:-1])
    if residuals_NBD is not None:
        rows_BRD[:, 0::2].transpose(0, 1).copy_(residuals_NBD)


def _add_products(total_BRR: Tensor, rows_BRD: Tensor) -> None:
    """Adds the products of rows; of the blocks of the symmetric result, those on and above the
    diagonal alone are computed.
    """
    R = rows_BRD.shape[1]
    cut = R // 2
    if rows_BRD.device.type != "cpu" or cut < 16:
        total_BRR += _product(rows_BRD, rows_BRD)
        return
    first, second = rows_BRD[:, :cut], rows_BRD[:, cut:]
    total_BRR[:, :cut, :cut] += _product(first, first)
    total_BRR[:, :cut, cut:] += _product(first, second)
    total_BRR[:, cut:, cut:] += _product(second, second)


def _product(a_BRD: Tensor, b_BRD: Tensor) -> Tensor:
    if len(a_BRD) == 1:  # two-dimensional products have the faster path on CPU
        return torch.mm(a_BRD[0], b_BRD[0].T)[None]
    return torch.bmm(a_BRD, b_BRD.transpose(1, 2))


def _symmetric(total_BRR: Tensor) -> Tensor:
    """Both triangles from the upper one."""
    upper = total_BRR.triu()
    return upper + upper.triu(1).transpose(1, 2)


def jump_costs(gram_BRR: Tensor, times: Tensor, residuals: bool) -> Tensor:
    """Squared errors of all jumps, float64 [B, N+1, N+1] on the CPU, zero for k ≤ j.

    With weights w_r(k) = t_k - t_l of row a_l, 1 of row e_m, 0 of rows at or beyond k,

        c_jk = Σ_{r, s ≥ first(j)} w_r w_s A_rs = Σ_{r ≥ first(j)} w_r Σ_{s ≥ r} T_rs w_s,

    T the upper triangle of A with its off-diagonal doubled: one product for all k, and sums from
    the end. Where rounding of A makes a cost negative it is zero.

    Args:
        gram_BRR: as `gram` gives it, or its mean over samples as [1, R, R].
        times: float64 [N+1].
        residuals: whether rows are [a; e] or a alone.
    """
    gram_BRR = gram_BRR.double().cpu()
    B, R, N = len(gram_BRR), gram_BRR.shape[1], len(times) - 1
    weights_RK = _weights(times, residuals)
    costs = torch.zeros(B, N + 1, N + 1, dtype=torch.float64, device="cpu")
    first = torch.arange(0, R, 2 if residuals else 1, device="cpu")
    for b in _blocks(B, POST_PASS // (8 * max(1, R * max(R, N + 1)))):
        triangle = gram_BRR[b].triu() + gram_BRR[b].triu(1)
        terms_BRK = weights_RK * (triangle @ weights_RK)
        sums_BRK = terms_BRK.flip(1).cumsum(1).flip(1)
        costs[b, : len(first)] = sums_BRK[:, first].clamp_min(0)  # NaN stays NaN
    return costs


def _weights(times: Tensor, residuals: bool) -> Tensor:
    """w_r(k), float64 [R, N+1]."""
    N = len(times) - 1
    k = torch.arange(N + 1, device="cpu")
    inner = torch.arange(1, N, device="cpu")  # the l of a_l
    increments = torch.where(inner[:, None] < k, times - times[1:N, None], 0.0)
    if not residuals:
        return increments
    weights = torch.empty(2 * N - 1, N + 1, dtype=torch.float64, device="cpu")
    weights[0::2] = (torch.arange(N, device="cpu")[:, None] < k).double()
    weights[1::2] = increments
    return weights


def _blocks(total: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    for start in range(0, total, size):
        yield slice(start, start + size)
