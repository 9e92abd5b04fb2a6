"""What turns images, times and conditions into tokens and vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowkernels.nn.config import MMDiTConfig
from flowkernels.nn.positions import sincos_positions_2d

TIME_SCALE = 1000.0
"""Networks of the DiT line read time on a scale of 0 to 1000; everything else here uses 0 to 1."""


def network_time(t: Tensor) -> Tensor:
    """The time that a network's sinusoids see: `1000·t`, in float32.

    This is the one place where the two scales meet.

    Example:
        >>> network_time(torch.tensor([0.0, 0.5, 1.0]))
        tensor([   0.,  500., 1000.])
    """
    return t.float() * TIME_SCALE


def timestep_embedding(t: Tensor, dim: int, *, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of time, `[cos(1000 t f_i), sin(1000 t f_i)]`.

    The frequencies are `f_i = max_period^(-i / (dim/2))`, cosines first (the layout of DiT and
    SD3). Angles reach 1000 radians, so they are formed in float32 whatever the model's dtype.

    Args:
        t: [B] times in [0, 1].
        dim: width, even.
        max_period: the longest period, in network time.

    Returns:
        [B, dim] float32.

    Raises:
        ValueError: `dim` is odd.

    Example:
        >>> timestep_embedding(torch.tensor([0.0]), 4)
        tensor([[1., 1., 0., 0.]])
    """
    if dim % 2:
        raise ValueError(f"dim is {dim}; it must be even")
    half = dim // 2
    # Formed as diffusers forms it: an angle of 1000 radians shows every rounding of its frequency.
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) * -math.log(max_period)
    angles = network_time(t)[:, None] * torch.exp(exponents / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] to [B, S, C·p·p]: one row per patch, channel first as in a convolution."""
    B, C, H, W = x.shape
    p = patch_size
    x = x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B, (H // p) * (W // p), C * p * p)


def unpatchify(tokens: Tensor, channels: int, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """[B, S, p·p·C] to [B, C, H, W]; channels last inside a patch, as SD3's last layer has it."""
    B, p, (rows, columns) = tokens.shape[0], patch_size, grid
    x = tokens.reshape(B, rows, columns, p, p, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(B, channels, rows * p, columns * p)


class PatchEmbedding(nn.Module):
    """`Linear(patchify(x)) + positions`: [B, C, H, W] to [B, S, D].

    `positions` is [S, D] over the image's own grid ("sincos"), [M², D] of which the middle is
    taken ("cropped", "learned"), or None ("rope": the tokens turn in attention instead).
    """

    positions: Tensor | None

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.projection = nn.Linear(config.patch_dim, config.dim)
        if config.positions == "rope":
            self.register_buffer("positions", None)
        elif config.positions == "sincos":
            self.table_shape = config.grid
            table = sincos_positions_2d(config.dim, *config.grid)
            self.register_buffer("positions", table, persistent=False)
        else:
            side = config.table_side
            self.table_shape = (side, side)
            # The table spans the field of view of the training grid, however many patches
            # share it: SD3's 192² patches stand at the coordinates 0 to 64 of its 64² grid.
            spacing = config.grid[0] / side
            table = sincos_positions_2d(config.dim, side, side, spacing=spacing)
            if config.positions == "learned":
                self.positions = nn.Parameter(table)
            else:
                self.register_buffer("positions", table)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.projection(
            patchify(x, self.patch_size).to(self.projection.weight.dtype)
        )
        if self.positions is None:
            return tokens
        rows, columns = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
        return tokens + self._crop(self.positions, rows, columns).to(tokens.dtype)

    def _crop(self, positions: Tensor, rows: int, columns: int) -> Tensor:
        """The middle [rows·columns, D] of the table."""
        height, width = self.table_shape
        if (rows, columns) == (height, width):
            return positions
        top, left = (height - rows) // 2, (width - columns) // 2
        table = positions.unflatten(0, (height, width))
        return table[top : top + rows, left : left + columns].flatten(0, 1)


class VectorEmbedding(nn.Module):
    """A two-layer SiLU network from a conditioning vector to the modulation vector."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.silu(self.fc1(x.to(self.fc1.weight.dtype))))
        return out


class ClassTable(nn.Embedding):
    """A row per class id, the last of them "no class"; on a CPU an id without one is named."""

    def forward(self, labels: Tensor) -> Tensor:
        try:
            return super().forward(labels)
        except IndexError:
            low, high = labels.min().item(), labels.max().item()
            raise ValueError(
                f"labels has ids from {low} to {high}; it needs 0 to {self.num_embeddings - 1}"
            ) from None


class ClassTokens(nn.Module):
    """Learned context tokens, a few per class: [B] ids to [B, tokens, D]."""

    def __init__(self, entries: int, tokens: int, dim: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.table = ClassTable(entries, tokens * dim)

    def forward(self, labels: Tensor) -> Tensor:
        tokens: Tensor = self.table(labels)
        return tokens.view(*labels.shape, self.tokens, tokens.shape[-1] // self.tokens)
