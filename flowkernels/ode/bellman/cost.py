"""The cost of every Euler jump on a grid, from velocities given whole or step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowkernels.ode.bellman.gram import (
    gram,
    gram_of_velocities,
    jump_costs,
    row_count,
    rows_dtype,
)
from flowkernels.ode.schedule import Schedule
from flowkernels.ops._samples import check_like, check_samples
from flowkernels.ops._validate import as_number, check_shape, check_tensor
from flowkernels.ops.bellman import bellman_step

Times = Schedule | Tensor | Sequence[float]


class BellmanAccumulator:
    """Takes a teacher's velocities step by step, and keeps what their Bellman cost needs.

    Feed it N velocities for each batch of noises, in the order of sampling; then the next batch, if
    there is one; then ask `bellman_cost(accumulator, times)`. `step` combines guidance, takes the
    Euler step and stores the increment of the velocity in one pass over memory.

    Memory: the increments of one batch, (N-1)·B·D float32 numbers (2N-1 with residuals), three
    more states, and R² float64 numbers for each sample fed. A grid of N = 100 and B = 100
    trajectories of 3×256×256 take 7.3 GiB in one batch, 0.73 GiB in batches of 10. Increments are
    dropped when the cost is asked for.

    Args:
        times: [N+1], the grid: a Schedule or strictly monotonic numbers.
        residuals: whether the teacher's step is not Euler's on this grid, so that `add` gets what
            its states have beyond an Euler step.

    Attributes:
        times: float64 [N+1], on the CPU.
        samples: trajectories finished so far.

    Raises:
        ValueError: times are not a grid.

    Example:
        >>> from flowkernels.ode import BellmanAccumulator, bellman_cost, uniform
        >>> grid = uniform(3)
        >>> accumulator, x = BellmanAccumulator(grid), torch.zeros(1, 1)
        >>> for v in (1.0, 0.0, 2.0):
        ...     x = accumulator.step(x, torch.full((1, 1), v))
        >>> x
        tensor([[-1.]])
        >>> float(bellman_cost(accumulator, grid)[0, 2])  # (x_2 - x_0 - 2/3·v_0)²
        0.1111111111111111
    """

    times: Tensor
    samples: int

    def __init__(self, times: Times, *, residuals: bool = False) -> None:
        self.times = grid_times(times)
        self.samples = 0
        self._residuals = bool(residuals)
        self._steps = len(self.times) - 1
        self._seen = 0
        self._rows: Tensor | None = None  # [B, R, D]
        self._velocity: Tensor | None = None  # [B, ...], of the step before
        self._grams: list[Tensor] = []

    def __repr__(self) -> str:
        state = f"{self._seen} of {self._steps} velocities"
        return f"BellmanAccumulator({self._steps} steps, {self.samples} samples, {state})"

    @torch.no_grad()
    def step(
        self, x: Tensor, v: Tensor, *, v_uncond: Tensor | None = None, guidance: float = 1.0
    ) -> Tensor:
        """Takes the velocity at the state x, and the teacher's Euler step.

        Args:
            x: [B, ...], the state at this time.
            v: [B, ...], its velocity (under guidance, the conditional one).
            v_uncond: [B, ...], the velocity without conditions.
            guidance: scale of the guidance; used with `v_uncond` only.

        Returns:
            [B, ...], the state at the next time.

        Raises:
            TypeError: an operand is no floating-point tensor.
            ValueError: shapes that do not agree with each other or with the batch begun, or an
                accumulator of residuals, which an Euler step does not have.
        """
        if self._residuals:
            raise ValueError(
                "step: this accumulator takes residuals, and an Euler step has none; need add()"
            )
        check_samples(x, "x")
        check_like(v, "v", x)
        dt = float(self.times[self._seen + 1] - self.times[self._seen])
        dtype = rows_dtype(v, v_uncond)
        velocity, increment = self._places(v, dtype)
        state = torch.promote_types(x.dtype, v.dtype)
        if v_uncond is not None:
            state = torch.promote_types(state, v_uncond.dtype)
        x_next = torch.empty(x.shape, dtype=state, device=x.device)
        bellman_step(
            x, v, dt, None if increment is None else velocity,
            v_uncond=v_uncond, guidance=guidance, out=(x_next, velocity, increment),
        )  # fmt: skip
        self._advance()
        return x_next

    @torch.no_grad()
    def add(self, velocity: Tensor, residual: Tensor | None = None) -> None:
        """Takes the velocity at the teacher's state, where the caller takes the step.

        Args:
            velocity: [B, ...], guidance combined already.
            residual: [B, ...], `x_next - x - dt·velocity` of the teacher's step; given exactly
                where the accumulator takes residuals.

        Raises:
            TypeError: an operand is no floating-point tensor.
            ValueError: shapes that do not agree, a residual that is missing or not taken.
        """
        check_samples(velocity, "velocity")
        if (residual is not None) is not self._residuals:
            raise ValueError(
                "residual: is missing, this accumulator takes residuals"
                if self._residuals
                else "residual: is given, need BellmanAccumulator(times, residuals=True)"
            )
        if residual is not None:
            check_like(residual, "residual", velocity)
        last, increment = self._places(velocity, rows_dtype(velocity, residual))
        if increment is not None:
            torch.sub(velocity.to(last.dtype), last, out=increment)
        last.copy_(velocity)
        if residual is not None:
            self._row(2 * self._seen, velocity.shape).copy_(residual)
        self._advance()

    def gram(self) -> Tensor:
        """The inner products of all samples' rows, float64 [samples, R, R] on the CPU.

        Raises:
            ValueError: no trajectory is finished, or one is begun and not finished.
        """
        if self._seen or not self.samples:
            raise ValueError(
                f"velocities: the accumulator has {self._seen} of {self._steps} velocities of a "
                f"batch and {self.samples} samples finished, need whole trajectories"
            )
        self._rows = self._velocity = None
        return torch.cat(self._grams)

    @property
    def has_residuals(self) -> bool:
        """Whether rows are increments and residuals."""
        return self._residuals

    def _places(self, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Where this step's velocity (now still the one before) and its increment go."""
        if self._seen == 0:
            self._begin(v, dtype)
        assert self._velocity is not None
        if v.shape != self._velocity.shape:
            check_shape(v, "v", tuple(self._velocity.shape))
        if dtype != self._velocity.dtype or v.device != self._velocity.device:
            raise ValueError(
                f"v: came as {dtype} on {v.device} after {self._velocity.dtype} on "
                f"{self._velocity.device}, need one dtype and device for a trajectory"
            )
        if self._seen == 0:
            return self._velocity, None
        index = 2 * self._seen - 1 if self._residuals else self._seen - 1
        return self._velocity, self._row(index, v.shape)

    def _begin(self, v: Tensor, dtype: torch.dtype) -> None:
        """Memory for a batch; that of the batch before where it fits."""
        if v.numel() == 0:
            raise ValueError(f"v: got shape {tuple(v.shape)}, need at least one element")
        size = (len(v), row_count(self._steps, self._residuals), v[0].numel())
        old = self._rows
        if old is None or (old.shape, old.dtype, old.device) != (size, dtype, v.device):
            self._rows = self._velocity = old = None  # before there is more
            self._rows = torch.empty(size, dtype=dtype, device=v.device)
        self._velocity = torch.empty(v.shape, dtype=dtype, device=v.device)

    def _row(self, index: int, shape: torch.Size) -> Tensor:
        assert self._rows is not None
        return self._rows[:, index].view(shape)

    def _advance(self) -> None:
        self._seen += 1
        if self._seen == self._steps:
            assert self._rows is not None
            self._grams.append(gram(self._rows).cpu())
            self.samples += len(self._rows)
            self._seen = 0


@torch.no_grad()
def bellman_cost(
    velocities: Tensor | BellmanAccumulator,
    times: Times,
    residuals: Tensor | None = None,
    *,
    power: float = 2,
    per_sample: bool = False,
) -> Tensor:
    """The error of one Euler jump between any two times of a teacher's trajectories.

    ``c_jk = mean_i ‖x_k - x_j - (t_k - t_j) v_j‖^power`` for j < k, the norm over all elements of a
    sample. Computed from the inner products of the velocities' increments: one symmetric matrix
    product, whatever the number of pairs, and no states (docs/bellman.md).

    Memory: beside its arguments at most 256 MiB of scratch on a GPU (1 MiB on a CPU) and
    8·B·R² bytes for B samples, R = N-1 rows (2N-1 with residuals), some copies of that. For
    N = 100 and 100 trajectories of 3×256×256 the velocities themselves are 7.4 GiB.

    Args:
        velocities: [N, B, ...], at the teacher's states in the order of sampling, guidance
            combined; or a `BellmanAccumulator` fed with them. float32 or float64: float32
            products are summed in float64 beyond 16384 elements; lower dtypes are widened first,
            and then their rounding is part of the trajectory.
        times: [N+1], strictly monotonic; a Schedule or numbers. Need not be uniform.
        residuals: [N, B, ...], `x_{m+1} - x_m - (t_{m+1} - t_m) v_m`, for a teacher that does not
            take Euler's steps on this grid (Heun's, say, or several steps between two times).
        power: of the norm; 2 as in BOSS, 1 as in GITS.
        per_sample: one matrix a sample, not their mean.

    Returns:
        float64 [N+1, N+1] on the CPU, zero where k ≤ j; [B, N+1, N+1] with `per_sample`.

    Raises:
        TypeError: an operand is no floating-point tensor.
        ValueError: shapes that do not agree, no sample, times that are not strictly monotonic, a
            power that is not positive, an accumulator of other times or not fed to the end.

    Example:
        >>> from flowkernels.ode import bellman_cost, uniform
        >>> velocities = torch.tensor([1.0, 0.0, 2.0]).view(3, 1, 1)
        >>> bellman_cost(velocities, uniform(3)).mul(9).round()
        tensor([[0., 0., 1., 0.],
                [0., 0., 0., 4.],
                [0., 0., 0., 0.],
                [0., 0., 0., 0.]], dtype=torch.float64)

    Source: arXiv 2312.16414; power 1: arXiv 2405.11326.
    """
    times = grid_times(times)
    power = as_number(power, "power")
    if not 0 < power < float("inf"):
        raise ValueError(f"power: got {power!r}, need a positive number")
    if isinstance(velocities, BellmanAccumulator):
        if residuals is not None:
            raise ValueError("residuals: is given, need None: the accumulator has its own")
        if not torch.equal(times, velocities.times):
            raise ValueError("times: are not those of the accumulator")
        products, has_residuals = velocities.gram(), velocities.has_residuals
    else:
        _check_velocities(velocities, residuals, len(times) - 1)
        flat = [None if x is None else x.flatten(2) if x.dim() > 2 else x[..., None]
                for x in (velocities, residuals)]  # fmt: skip
        assert flat[0] is not None
        products, has_residuals = gram_of_velocities(flat[0], flat[1]), residuals is not None
    if power == 2 and not per_sample:  # linear in the products
        return jump_costs(products.mean(0, keepdim=True), times, has_residuals)[0]
    costs = jump_costs(products, times, has_residuals)
    if power != 2:
        costs.pow_(power / 2)
    return costs if per_sample else costs.mean(0)


def grid_times(times: Any) -> Tensor:
    """The times of a grid, float64 [N+1] on the CPU.

    Raises:
        ValueError: no numbers, fewer than two, or not strictly monotonic.
    """
    if isinstance(times, Schedule):
        return times.times
    try:
        values = torch.as_tensor(times, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"times: got {type(times).__name__}, need numbers [N+1]") from None
    if values.dim() != 1 or len(values) < 2:
        raise ValueError(f"times: got shape {tuple(values.shape)}, need [N+1] with N at least 1")
    steps = values.diff()
    if not (bool((steps < 0).all()) or bool((steps > 0).all())) or not values.isfinite().all():
        raise ValueError(f"times: got {values.tolist()}, need strictly monotonic numbers")
    return values


def _check_velocities(velocities: Any, residuals: Tensor | None, steps: int) -> None:
    check_tensor(velocities, "velocities")
    shape = tuple(velocities.shape)
    if len(shape) < 2 or shape[0] != steps:
        raise ValueError(f"velocities: got shape {shape}, need [N, B, ...] with N = {steps}")
    if shape[1] == 0:
        raise ValueError(f"velocities: got shape {shape}, need at least one sample")
    if residuals is not None:
        check_like(residuals, "residuals", velocities)
