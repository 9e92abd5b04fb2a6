"""Triton launchers of the losses; their kernels are in _kernels.py."""

from __future__ import annotations

import torch

from flowkernels.ops._loss_kernels import (
    empty_loss,
    geometry,
    loss_scale,
    placed,
    strides,
    sum_partials,
)
from flowkernels.ops._losses import NONE, gradients_like
from flowkernels.ops._sample_tiles import tiles_of
from flowkernels.ops._triton import launch
from flowkernels.ops.losses import _kernels as kernels


def flow_matching_forward(v, x0, noise, dt, weight, reduction, wanted):
    tiles = tiles_of(v)
    shape, options = geometry(tiles)
    gradients = gradients_like(wanted, v, x0, noise)
    loss = empty_loss(v, tiles, reduction)
    partial = v.new_empty((tiles.batch, tiles.chunks), dtype=torch.float32)
    launch(
        kernels.flow_matching_forward_kernel,
        (tiles.programs,),
        *(v, x0, noise, *placed(gradients, wanted, (v, x0, noise))),
        *(dt, weight, partial),
        *(loss_scale(tiles, reduction), *shape, *strides(v, x0, noise, dt, weight)),
        **options,
    )
    sum_partials(partial, loss, tiles, reduction)
    return [loss, *gradients]


def _flow_matching_gradients(
    gradients, grad_output, v, x0, noise, dt, weight, reduction, wanted, rescale
):
    tiles = tiles_of(v)
    shape, options = geometry(tiles)
    launch(
        kernels.flow_matching_backward_kernel,
        (tiles.programs,),
        *(grad_output, v, x0, noise, *placed(gradients, wanted, (v, x0, noise)), dt, weight),
        *(loss_scale(tiles, reduction), *shape),
        *strides(grad_output, v, x0, noise, dt, weight),
        RESCALE=rescale,
        **options,
    )


def flow_matching_rescale_(gradients, grad_output, v, x0, noise, dt, weight, reduction, wanted):
    _flow_matching_gradients(
        gradients, grad_output, v, x0, noise, dt, weight, reduction, wanted, rescale=True
    )


def flow_matching_backward(grad_output, v, x0, noise, dt, weight, reduction, wanted):
    gradients = gradients_like(wanted, v, x0, noise)
    _flow_matching_gradients(
        gradients, grad_output, v, x0, noise, dt, weight, reduction, wanted, rescale=False
    )
    return gradients


def fgm_forward(u, v, x0, noise, u_uncond, t, weight, lam, guidance, sid, reduction, wanted):
    tiles = tiles_of(u)
    shape, options = geometry(tiles)
    operands = (u, v, x0, noise, u_uncond)
    gradients = gradients_like(wanted, *operands)
    loss = empty_loss(u, tiles, reduction)
    skipped = u.new_empty((), dtype=torch.int32)
    omega = u.new_empty((tiles.batch,), dtype=torch.float32)
    if tiles.programs == 0:
        return [loss, skipped.fill_(tiles.batch), omega.fill_(float("nan")), *gradients]
    partial = u.new_empty((tiles.batch, tiles.chunks), dtype=torch.float32)
    size = None
    if sid and tiles.chunks > 1:  # else a tile holds whole samples, and their normalisers
        size = torch.empty_like(partial)
        launch(
            kernels.fgm_size_kernel,
            (tiles.programs,),
            *(u, x0, noise, u_uncond, size, guidance),
            *(*shape, *strides(u, x0, noise, u_uncond)),
            **options,
        )
    inverse, scale = 1.0 / tiles.elements, loss_scale(tiles, reduction)
    outputs = placed(gradients, wanted, operands)
    launch(
        kernels.fgm_forward_kernel,
        (tiles.programs,),
        *(*operands, *outputs, t, weight, size, partial, omega),
        *(lam, guidance, inverse, scale, *shape, *strides(*operands, t, weight)),
        SID=sid,
        **options,
    )
    launch(
        kernels.fgm_sum_partials_kernel,
        (1 + tiles.batch,),
        *(partial, loss, skipped, omega, t, *outputs),
        *(scale * tiles.elements, *shape, *strides(t)),
        NONE=reduction == NONE,
        SAMPLES=32,
        BLOCK=32,
        COLUMNS=1024,
        num_warps=4,
    )
    return [loss, skipped, omega, *gradients]


def _fgm_gradients(
    gradients, grad_output, operands, omega, lam, guidance, reduction, wanted, rescale
):
    tiles = tiles_of(operands[0])
    shape, options = geometry(tiles)
    launch(
        kernels.fgm_backward_kernel,
        (tiles.programs,),
        *(grad_output, *operands, *placed(gradients, wanted, operands), omega),
        *(lam, guidance, loss_scale(tiles, reduction), *shape),
        *strides(grad_output, *operands),
        RESCALE=rescale,
        **options,
    )


def fgm_rescale_(
    gradients, grad_output, u, v, x0, noise, u_uncond, omega, lam, guidance, reduction, wanted
):
    operands = (u, v, x0, noise, u_uncond)
    _fgm_gradients(
        gradients, grad_output, operands, omega, lam, guidance, reduction, wanted, rescale=True
    )


def fgm_backward(grad_output, u, v, x0, noise, u_uncond, omega, lam, guidance, reduction, wanted):
    operands = (u, v, x0, noise, u_uncond)
    gradients = gradients_like(wanted, *operands)
    _fgm_gradients(
        gradients, grad_output, operands, omega, lam, guidance, reduction, wanted, rescale=False
    )
    return gradients
