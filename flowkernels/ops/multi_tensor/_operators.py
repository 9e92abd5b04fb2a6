"""Schemas and fakes of the multi-tensor family's operators.

Lists have one tensor a parameter; ``emas`` holds one average after the other. Empty lists: no first
moment (β1 = 0), no low-precision copies.
"""

from __future__ import annotations

import torch

from flowkernels.ops._library import define
from flowkernels.ops.multi_tensor.reference import norm_dtype

Tensor = torch.Tensor


def _grad_norm_fake(grads, grad_scale):  # type: ignore[no-untyped-def]
    return grads[0].new_empty((), dtype=norm_dtype(grads))


def _nothing(*args):  # type: ignore[no-untyped-def]
    return None


grad_norm = define(
    "grad_norm",
    "(Tensor[] grads, Tensor? grad_scale) -> Tensor",
    _grad_norm_fake,
    native_cuda=True,
)
adamw_ema_ = define(
    "adamw_ema_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] emas, Tensor(e!)[] copies, Tensor(f!)[] steps, Tensor(g!)? skipped,"
    " Tensor? norm, Tensor? grad_scale, Tensor? lr_tensor, float lr, float beta1, float beta2,"
    " float eps, float weight_decay, float[] ema_decays, float? max_grad_norm,"
    " bool skip_nonfinite) -> ()",
    _nothing,
    native_cuda=True,
)
ema_ = define(
    "ema_",
    "(Tensor[] params, Tensor(a!)[] emas, float[] ema_decays, Tensor? norm) -> ()",
    _nothing,
    native_cuda=True,
)
