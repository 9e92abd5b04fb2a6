"""The links of a block's chain: each is the fused operator, or diffusers' own expression for it.

Diffusers' expressions are kept operation by operation, since every one of them rounds: exact mode
rests on it.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import nn

from flowkernels.integrations._checks import plain, plain_linear
from flowkernels.integrations._state import State
from flowkernels.ops import gated_residual, gated_residual_norm, gelu_tanh, modulated_norm

Tensor = torch.Tensor


def _rows(operand: Tensor) -> Tensor:
    """[B, D] as [B, 1, D]; [B, 1, D] and [B, S, D] as they are."""
    return operand.unsqueeze(1) if operand.dim() == 2 else operand


def modulated(state: State, norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``norm(x)·(1 + scale) + shift``."""
    if state.modulated_norm:
        return modulated_norm(x, shift, scale, weight=norm.weight, bias=norm.bias, eps=norm.eps)
    return norm(x) * (1 + _rows(scale)) + _rows(shift)


def gated(state: State, residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """``residual + gate·x``."""
    if state.gated_residual:
        return gated_residual(residual, x, gate)
    return residual + _rows(gate) * x


def gated_then_modulated(
    state: State,
    residual: Tensor,
    x: Tensor,
    gate: Tensor,
    norm: nn.LayerNorm,
    shift: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """``h = residual + gate·x`` and ``norm(h)·(1 + scale) + shift``."""
    if state.gated_residual_norm and norm.weight is None and norm.bias is None:
        return gated_residual_norm(residual, x, gate, shift, scale, eps=norm.eps)
    h = gated(state, residual, x, gate)
    return h, modulated(state, norm, h, shift, scale)


def feed_forward(state: State, ff: Any, x: Tensor) -> Tensor:
    """diffusers' FeedForward; layers are called as modules, so adapters and hooks on them hold."""
    if not state.gelu_tanh or not fusable(ff):
        return ff(x)
    inner = ff.net[0].proj
    if state.exact:
        hidden = inner(x)
        hidden = (gelu_tanh if gelu_is_exact(hidden) else _gelu)(hidden)
    elif plain_linear(inner):
        # The bias goes with the activation: its gradient is then summed in the same pass.
        hidden = F.linear(x, inner.weight)
        hidden = gelu_tanh(hidden, inner.bias.to(hidden.dtype))
    else:
        hidden = gelu_tanh(inner(x))
    for layer in islice(ff.net, 1, None):
        hidden = layer(hidden)
    return hidden


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def fusable(ff: Any) -> bool:
    """Whether a feed-forward is diffusers' own with a tanh GELU, so that its pieces may be used."""
    return plain(ff, FeedForward) and plain(ff.net[0], GELU) and ff.net[0].approximate == "tanh"


def activation(state: State, module: Any, x: Tensor) -> Tensor:
    """A module that is ``nn.GELU(approximate="tanh")``."""
    fused = state.gelu_tanh and plain(module, nn.GELU) and module.approximate == "tanh"
    if fused and (not state.exact or gelu_is_exact(x)):
        return gelu_tanh(x)
    return module(x)


def linear_then_gelu(state: State, linear: Any, module: Any, x: Tensor) -> Tensor:
    """``gelu(linear(x))``, the bias fused where the layer's parameters may be read."""
    if (
        state.gelu_tanh
        and not state.exact
        and plain(module, nn.GELU)
        and module.approximate == "tanh"
        and plain_linear(linear)
    ):
        hidden = F.linear(x, linear.weight)
        return gelu_tanh(hidden, linear.bias.to(hidden.dtype))
    return activation(state, module, linear(x))


FEED_FORWARD_SOURCES = (FeedForward.forward, GELU.forward, GELU.gelu)

_EXACT_GELU: dict[tuple[torch.device, torch.dtype], bool] = {}


def check_gelu(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether our GELU equals torch's to the bit for every value of a 16-bit dtype, by trying all.

    A property of this machine's kernels: looked up again at each call, tried once per process.
    """
    if dtype not in (torch.bfloat16, torch.float16) or device.type == "meta":
        return False
    found = _EXACT_GELU.get((device, dtype))
    if found is None:
        with torch.no_grad():
            bits = torch.arange(-(2**15), 2**15, device=device, dtype=torch.int32)
            x = bits.to(torch.int16).view(dtype).view(256, 256)
            ours, theirs = gelu_tanh(x), _gelu(x)
            same = ours.view(torch.int16) == theirs.view(torch.int16)
            found = bool((same | (ours.isnan() & theirs.isnan())).all())
        _EXACT_GELU[device, dtype] = found
    return found


def gelu_is_exact(x: Tensor) -> bool:
    """What :func:`check_gelu` found when the model was patched; unknown is no."""
    return not torch.compiler.is_compiling() and _EXACT_GELU.get((x.device, x.dtype), False)
