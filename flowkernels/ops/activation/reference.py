"""Feed-forward activations in plain PyTorch: the specification of the kernels.

    gelu_tanh(x, bias) = ½ u (1 + tanh(√(2/π)(u + 0.044715 u³))),  u = x + bias
    swiglu(x)          = silu(a) · b,  (a, b) the halves of the last dimension

Arithmetic is at least float32; results are rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = x.dtype if bias is None else torch.promote_types(x.dtype, bias.dtype)
    compute = torch.promote_types(dtype, torch.float32)
    u = x.to(compute) if bias is None else x.to(compute) + bias.to(compute)
    return F.gelu(u, approximate="tanh").to(dtype)


def swiglu(x: Tensor) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    gate, value = x.to(compute).chunk(2, dim=-1)
    return (F.silu(gate) * value).to(x.dtype)
