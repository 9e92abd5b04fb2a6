"""What the operators are measured against: the same formulas as people write them in PyTorch.

Each runs as it stands (eager) and through ``torch.compile``. Dtypes follow the field's code: block
ops compute in the dtype of their operands, losses upcast to float32 (as diffusers' training scripts
do). The limit is :func:`copy_call`: a copy that moves as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def _rows(operand: Tensor) -> Tensor:
    return operand[:, None] if operand.dim() == 2 else operand


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + _rows(scale)) + _rows(shift)


def modulated_rms_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=1e-6) * (1 + _rows(scale)) + _rows(shift)


def gated_residual(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    return residual + _rows(gate) * x


def gated_residual_norm(
    residual: Tensor, x: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    h = residual + _rows(gate) * x
    return h, modulated_norm(h, shift, scale)


def gelu_tanh(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


def swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def interpolate(x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    time = t.view(-1, *[1] * (x0.dim() - 1)).to(x0.dtype)
    return (1 - time) * x0 + time * noise


def draw_and_interpolate(x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    noise = torch.randn_like(x0)
    return interpolate(x0, t, noise), noise


def flow_matching(v: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    return F.mse_loss(v.float(), noise.float() - x0.float())


def straightening(v: Tensor, x_start: Tensor, x_end: Tensor, dt: Tensor) -> Tensor:
    step = dt.view(-1, *[1] * (v.dim() - 1))
    return F.mse_loss(v.float(), (x_end.float() - x_start.float()) / step)


def contrastive_flow_matching(v: Tensor, x0: Tensor, noise: Tensor, negatives: Tensor) -> Tensor:
    v, u = v.float(), noise.float() - x0.float()
    return F.mse_loss(v, u) - 0.05 * F.mse_loss(v, u[negatives])


def fgm(u: Tensor, v: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    u, v, w = u.float(), v.float(), noise.float() - x0.float()
    return (2 * (u - v) * (v - w)).flatten(1).mean(1).mean()


def fgm_sid(u: Tensor, v: Tensor, x0: Tensor, noise: Tensor, t: Tensor, u_uncond: Tensor) -> Tensor:
    """With guidance 4.5 and SiD's normaliser, which is a constant in the gradient."""
    u, v, w = u.float(), v.float(), noise.float() - x0.float()
    u = u_uncond.float() + 4.5 * (u - u_uncond.float())
    with torch.no_grad():
        omega = t / (2 * (u - w).abs().flatten(1).mean(1).clamp_min(1e-5))
    return (omega * (2 * (u - v) * (v - w)).flatten(1).mean(1)).mean()


def self_corrected(
    v: Tensor,
    t: Tensor,
    v_teacher: Tensor,
    v_post: Tensor,
    t_post: Tensor,
    v_prev: Tensor,
    t_prev: Tensor,
    x0: Tensor,
    noise: Tensor,
) -> Tensor:
    """With trunc 0.4, c 0.01 and lam_bi 0.1; of velocities alone, as ours is."""
    v, v_teacher, v_post = v.float(), v_teacher.float(), v_post.float()
    v_prev, x0, noise = v_prev.float(), x0.float(), noise.float()
    t, t_post, t_prev = (time.view(-1, *[1] * (v.dim() - 1)) for time in (t, t_post, t_prev))
    to_post = (t - t_post) * v_teacher + t_post * v_post
    d_con = torch.where(t_post < 0.4, t * (noise - x0), to_post) - t * v
    d_bi = t_prev * v_prev - (t_prev - t) * v_teacher - t * v
    consistency, bidirectional = (
        ((d.square() + 0.01**2).sqrt() - 0.01).mean() for d in (d_con, d_bi)
    )
    return consistency + 0.1 * bidirectional


def self_reflow(v_r: Tensor, v_1: Tensor, t: Tensor) -> Tensor:
    time = t.view(-1, *[1] * (v_r.dim() - 1))
    return (time * (v_r.float() - v_1.float())).square().mean()


def euler_step(x: Tensor, v: Tensor, dt: float) -> Tensor:
    return x + dt * v


def guided_euler_step(x: Tensor, v: Tensor, dt: float, v_uncond: Tensor) -> Tensor:
    return x + dt * (v_uncond + 4.5 * (v - v_uncond))


def _stage_sum(weights: Sequence[float], ks: Sequence[Tensor]) -> Tensor:
    total = weights[0] * ks[0]
    for weight, k in zip(weights[1:], ks[1:], strict=True):
        total = total + weight * k
    return total


def rk_combine(weights: Sequence[float], dt: float, y: Tensor, *ks: Tensor) -> Tensor:
    return y + dt * _stage_sum(weights, ks)


def rk_error(
    weights: Sequence[float], dt: float, tolerance: float, y0: Tensor, y1: Tensor, *ks: Tensor
) -> tuple[Tensor, Tensor]:
    error = dt * _stage_sum(weights, ks)
    ratio = error.float() / (tolerance + tolerance * torch.maximum(y0.abs(), y1.abs()).float())
    return error, ratio.square().mean().sqrt()


def compiled(
    function: Callable[..., Any], *, device: str, backend: str = "inductor"
) -> Callable[..., Any]:
    """``torch.compile`` as its users would have it: one graph, tuned on GPUs, shapes fixed.

    Every call gives a function of its own, after a reset, so that one shape never makes the next
    one dynamic or runs into the recompilation limit.
    """
    torch._dynamo.reset()
    options: dict[str, Any] = {"backend": backend}
    if backend == "inductor" and device == "cuda":
        options["mode"] = "max-autotune-no-cudagraphs"
    return torch.compile(function, fullgraph=True, dynamic=False, **options)


def copy_call(bytes_moved: int, sets: int, device: torch.device) -> Callable[[int], Any]:
    """A copy that reads half of ``bytes_moved`` and writes half, into memory that exists."""
    elements = max(1, bytes_moved // 8)
    sources = [torch.randn(elements, device=device) for _ in range(sets)]
    targets = [torch.randn(elements, device=device) for _ in range(sets)]
    return lambda index: targets[index % sets].copy_(sources[index % sets])
