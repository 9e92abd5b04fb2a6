"""Where a token stands: sine-cosine tables and rotations."""

from __future__ import annotations

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]
"""(cos, sin), each [S, E] float32: the rotation of one head's channels at each position."""


def sincos_positions_2d(dim: int, rows: int, columns: int, *, spacing: float = 1.0) -> Tensor:
    """Fixed 2-D sine-cosine positions, one vector per patch, row by row.

    The first half encodes the column and the second the row; each is
    `[sin(p ω_i), cos(p ω_i)]` with `ω_i = 10000^(-i / (dim/4))` (the layout of MAE, DiT, SD3).

    Args:
        dim: width, a multiple of 4.
        rows: rows of patches.
        columns: columns of patches.
        spacing: distance of neighbouring patches; SD3's table of M² patches for a training grid
            of N² has N/M.

    Returns:
        [rows·columns, dim] float32, computed in float64.

    Raises:
        ValueError: `dim` is not a multiple of 4.

    Example:
        >>> sincos_positions_2d(4, 1, 2)[0]
        tensor([0., 1., 0., 1.])
    """
    if dim % 4:
        raise ValueError(f"dim is {dim}; it must be a multiple of 4")
    quarter = dim // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def encode(positions: Tensor) -> Tensor:
        angles = (positions.double() * spacing).flatten()[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([encode(column), encode(row)], dim=-1).float()


def rotary_positions_2d(
    axes: tuple[int, int, int],
    rows: int,
    columns: int,
    *,
    context: int = 0,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
) -> Rope:
    """FLUX's rotations of a grid of patches, row by row, followed by tokens that do not turn.

    A patch at (row, column) has the coordinates (0, row, column); the context stands at
    (0, 0, 0). Axis a turns its pairs of neighbouring channels by `p_a ω_i`,
    `ω_i = theta^(-2i / axes[a])`; a pair shares its cosine and its sine (interleaved).

    Args:
        axes: channels of each axis, even.
        rows: rows of patches.
        columns: columns of patches.
        context: tokens after the patches.
        theta: base of the frequencies.
        device: of the result.

    Returns:
        (cos, sin), each [rows·columns + context, sum(axes)] float32, computed in float64.

    Example:
        >>> cos, sin = rotary_positions_2d((0, 2, 2), 1, 2, context=1)
        >>> sin
        tensor([[0.0000, 0.0000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.8415, 0.8415],
                [0.0000, 0.0000, 0.0000, 0.0000]])

    Source: arXiv 2104.09864 (RoPE).
    """
    still, row_dim, column_dim = axes

    def angles(count: int, dim: int) -> Tensor:
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / max(dim, 1)
        places = torch.arange(count, dtype=torch.float64, device=device)
        return torch.outer(places, theta**-exponents)

    row_angles, column_angles = angles(rows, row_dim), angles(columns, column_dim)

    def table(cosine: bool) -> Tensor:
        # Each axis alone is small; only the result has a row per patch.
        def along(angle: Tensor) -> Tensor:
            value = angle.cos() if cosine else angle.sin()
            return value.float().repeat_interleave(2, dim=-1)

        unmoved = torch.full((1,), float(cosine), device=device)
        grid = [
            unmoved.expand(rows, columns, still),
            along(row_angles)[:, None].expand(rows, columns, row_dim),
            along(column_angles)[None].expand(rows, columns, column_dim),
        ]
        patches = torch.cat(grid, dim=-1).flatten(0, 1)
        return torch.cat([patches, unmoved.expand(context, sum(axes))])

    return table(True), table(False)
