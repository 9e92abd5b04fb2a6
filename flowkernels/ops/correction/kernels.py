"""Triton launchers of the correction's losses; their kernels are in _kernels.py."""

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
from flowkernels.ops.correction import _kernels as kernels

# Four elements a thread: with the eight of the other losses, six operands at unaligned addresses
# spill on sm_80 and sm_100.
WARPS = 16


def self_corrected_forward(
    v, v_teacher, v_post, v_prev, x0, noise, t, t_post, t_prev, trunc, c, lam_bi, reduction, wanted
):
    tiles = tiles_of(v)
    shape, options = geometry(tiles)
    operands = (v, v_teacher, v_post, v_prev, x0, noise, t, t_post, t_prev)
    gradients = gradients_like(wanted, v)
    losses = [empty_loss(v, tiles, reduction) for _ in range(3)]
    consistency, bidirectional = (
        v.new_empty((tiles.batch, tiles.chunks), dtype=torch.float32) for _ in range(2)
    )
    launch(
        kernels.self_corrected_forward_kernel,
        (tiles.programs,),
        *(*operands, *placed(gradients, wanted, (v,)), consistency, bidirectional),
        *(trunc, c, lam_bi, loss_scale(tiles, reduction), *shape, *strides(*operands)),
        **{**options, "num_warps": WARPS},
    )
    if tiles.programs:
        samples = tiles.batch if reduction == NONE else 1
        launch(
            kernels.self_corrected_sum_kernel,
            (samples,),
            *(consistency, bidirectional, *losses, lam_bi, tiles.batch * tiles.chunks // samples),
            BLOCK=1024,
            num_warps=4,
        )
    return [*losses, *gradients]


def _self_corrected_gradient(gradient, grad_output, operands, settings, rescale):
    tiles = tiles_of(operands[0])
    shape, options = geometry(tiles)
    *numbers, reduction = settings
    launch(
        kernels.self_corrected_backward_kernel,
        (tiles.programs,),
        *(grad_output, *operands, gradient),
        *(*numbers, loss_scale(tiles, reduction), *shape, *strides(grad_output, *operands)),
        RESCALE=rescale,
        **{**options, "num_warps": WARPS},
    )


def self_corrected_rescale_(
    gradient, grad_output, v, v_teacher, v_post, v_prev, x0, noise, t, t_post, t_prev, *settings
):
    operands = (v, v_teacher, v_post, v_prev, x0, noise, t, t_post, t_prev)
    _self_corrected_gradient(gradient, grad_output, operands, settings, rescale=True)


def self_corrected_backward(
    grad_output, v, v_teacher, v_post, v_prev, x0, noise, t, t_post, t_prev, *settings
):
    operands = (v, v_teacher, v_post, v_prev, x0, noise, t, t_post, t_prev)
    gradient = v.new_empty(v.shape)
    _self_corrected_gradient(gradient, grad_output, operands, settings, rescale=False)
    return gradient


def pair_loss_forward(x, y, t, c, reduction, wanted):
    tiles = tiles_of(x)
    shape, options = geometry(tiles)
    gradients = gradients_like(wanted, x, y)
    loss = empty_loss(x, tiles, reduction)
    partial = x.new_empty((tiles.batch, tiles.chunks), dtype=torch.float32)
    launch(
        kernels.pair_loss_forward_kernel,
        (tiles.programs,),
        *(x, y, t, *placed(gradients, wanted, (x, y)), partial),
        *(c, loss_scale(tiles, reduction), *shape, *strides(x, y, t)),
        **options,
    )
    sum_partials(partial, loss, tiles, reduction)
    return [loss, *gradients]


def _pair_gradients(gradients, grad_output, x, y, t, c, reduction, wanted, rescale):
    tiles = tiles_of(x)
    shape, options = geometry(tiles)
    launch(
        kernels.pair_loss_backward_kernel,
        (tiles.programs,),
        *(grad_output, x, y, t, *placed(gradients, wanted, (x, y))),
        *(c, loss_scale(tiles, reduction), *shape, *strides(grad_output, x, y, t)),
        RESCALE=rescale,
        **options,
    )


def pair_loss_rescale_(gradients, grad_output, x, y, t, c, reduction, wanted):
    _pair_gradients(gradients, grad_output, x, y, t, c, reduction, wanted, rescale=True)


def pair_loss_backward(grad_output, x, y, t, c, reduction, wanted):
    gradients = gradients_like(wanted, x, y)
    _pair_gradients(gradients, grad_output, x, y, t, c, reduction, wanted, rescale=False)
    return gradients
