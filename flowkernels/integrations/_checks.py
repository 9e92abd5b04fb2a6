"""Whether a call, a module or a tensor may take the fused path; if not, why not, in a line."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks

from flowkernels.integrations._state import State

Tensor = torch.Tensor

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
_DEVICES = frozenset(("cpu", "cuda"))


def plain(module: nn.Module | None, *types: type) -> bool:
    """Whether ``module`` is exactly one of ``types`` and nobody listens to its calls.

    Its forward may then be left out: hooks, parametrisations, offloading and quantisation all
    show as a hook, a forward of the instance's own, or another class.
    """
    return type(module) in types and not hooked(module)


def hooked(module: Any) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def plain_linear(module: nn.Module) -> bool:
    """Whether the weight may be read instead of calling the layer: no LoRA, no quantisation."""
    return (
        plain(module, nn.Linear)
        and type(module._parameters.get("weight")) is nn.Parameter
        and type(module._parameters.get("bias")) is nn.Parameter
    )


def sharded(layer: nn.Module) -> bool:
    """Whether a layer's weight lies across ranks (tensor parallelism leaves a DTensor there)."""
    base = layer._modules.get("base_layer") or layer
    return hasattr(base._parameters.get("weight"), "placements")


def refusal(state: State, *tensors: Tensor | None, temb: Tensor | None = None) -> str | None:
    """What keeps any chain from serving these tensors here and now; temb must be [B, D]."""
    if not state.active:
        return "reverted"
    if tensors[0] is not None and tensors[0].dim() != 3:
        return f"input has {tensors[0].dim()} dimensions, not [B, S, D]"
    if temb is not None and temb.dim() != 2:
        return f"temb has {temb.dim()} dimensions, not [B, D]"
    for tensor in tensors:
        if tensor is not None:
            if tensor.device != tensors[0].device:  # type: ignore[union-attr]
                return "inputs on several devices"
            if tensor.dtype not in _DTYPES:
                return f"{str(tensor.dtype).removeprefix('torch.')} is not served"
            if tensor.device.type not in _DEVICES:
                return f"device {tensor.device.type} is not served"
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return "torch.func or forward-mode differentiation"
        if module_hooks._has_any_global_hook():
            return "a global module hook is registered"
    return None
