"""Triton launchers of the losses; their kernels are in _kernels.py.

Every loss is two stages without atomics: tiles that leave a partial sum each (and write the
gradients), then one program that adds the partial sums in a fixed order.
"""

from __future__ import annotations

import torch

from flowkernels.ops._sample_tiles import WARPS, stride_of, tiles_of
from flowkernels.ops._triton import launch
from flowkernels.ops.losses import _kernels as kernels
from flowkernels.ops.losses._operators import NONE, SUM, gradients_like, loss_like


def _loss_scale(tiles, reduction):
    """The factor of a sample's sum in the loss; no program runs where it would divide by 0."""
    if reduction == SUM:
        return 1.0
    mean = 1.0 / max(tiles.elements, 1)
    return mean if reduction == NONE else mean / max(tiles.batch, 1)


def _empty_loss(x, tiles, reduction):
    """The loss to be written; of no elements at all it is the mean of nothing, or a sum of 0."""
    loss = loss_like(x, reduction)
    if tiles.programs == 0:
        loss.fill_(0.0 if reduction == SUM else float("nan"))
    return loss


def _placed(gradients, wanted, operands):
    """The gradients in the places of their operands, None for those whose bit is not set."""
    remaining = iter(gradients)
    return [
        next(remaining) if operand is not None and wanted >> bit & 1 else None
        for bit, operand in enumerate(operands)
    ]


def _geometry(tiles):
    """(run-time arguments, options) of a launch over tiles."""
    options = {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "num_warps": WARPS}
    return (tiles.batch, tiles.elements, tiles.chunks), options


def _strides(*operands):
    return tuple(stride_of(operand) for operand in operands)


def flow_matching_forward(v, x0, noise, dt, weight, reduction, wanted):
    tiles = tiles_of(v)
    shape, options = _geometry(tiles)
    gradients = gradients_like(wanted, v, x0, noise)
    loss = _empty_loss(v, tiles, reduction)
    partial = v.new_empty((tiles.batch, tiles.chunks), dtype=torch.float32)
    launch(
        kernels.flow_matching_forward_kernel,
        (tiles.programs,),
        *(v, x0, noise, *_placed(gradients, wanted, (v, x0, noise))),
        *(dt, weight, partial),
        *(_loss_scale(tiles, reduction), *shape, *_strides(v, x0, noise, dt, weight)),
        **options,
    )
    if tiles.programs:
        samples = tiles.batch if reduction == NONE else 1
        launch(
            kernels.sum_partials_kernel,
            (samples,),
            *(partial, loss, tiles.batch * tiles.chunks // samples),
            BLOCK=1024,
            num_warps=4,
        )
    return [loss, *gradients]


def _flow_matching_gradients(
    gradients, grad_output, v, x0, noise, dt, weight, reduction, wanted, rescale
):
    tiles = tiles_of(v)
    shape, options = _geometry(tiles)
    launch(
        kernels.flow_matching_backward_kernel,
        (tiles.programs,),
        *(grad_output, v, x0, noise, *_placed(gradients, wanted, (v, x0, noise)), dt, weight),
        *(_loss_scale(tiles, reduction), *shape),
        *_strides(grad_output, v, x0, noise, dt, weight),
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
    shape, options = _geometry(tiles)
    operands = (u, v, x0, noise, u_uncond)
    gradients = gradients_like(wanted, *operands)
    loss = _empty_loss(u, tiles, reduction)
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
            *(*shape, *_strides(u, x0, noise, u_uncond)),
            **options,
        )
    inverse, scale = 1.0 / tiles.elements, _loss_scale(tiles, reduction)
    placed = _placed(gradients, wanted, operands)
    launch(
        kernels.fgm_forward_kernel,
        (tiles.programs,),
        *(*operands, *placed, t, weight, size, partial, omega),
        *(lam, guidance, inverse, scale, *shape, *_strides(*operands, t, weight)),
        SID=sid,
        **options,
    )
    launch(
        kernels.fgm_sum_partials_kernel,
        (1 + tiles.batch,),
        *(partial, loss, skipped, omega, t, *placed),
        *(scale * tiles.elements, *shape, *_strides(t)),
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
    shape, options = _geometry(tiles)
    launch(
        kernels.fgm_backward_kernel,
        (tiles.programs,),
        *(grad_output, *operands, *_placed(gradients, wanted, operands), omega),
        *(lam, guidance, _loss_scale(tiles, reduction), *shape),
        *_strides(grad_output, *operands),
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
