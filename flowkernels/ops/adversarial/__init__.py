"""Adversarial losses: logits to losses and gradients, and the R1 penalty."""

from __future__ import annotations

import torch

from flowkernels.ops import _library
from flowkernels.ops._samples import check_samples, kernels_read_samples, tracked
from flowkernels.ops._validate import as_finite, check_tensor
from flowkernels.ops.adversarial import _operators as operators
from flowkernels.ops.adversarial import reference
from flowkernels.ops.adversarial._autograd import GAN, GRADIENT_PENALTY

__all__ = ["gan_discriminator", "gan_generator", "r1_penalty"]

Tensor = torch.Tensor


def gan_generator(logits: Tensor) -> Tensor:
    """The non-saturating loss of a generator, ``mean softplus(-logits)``.

    ``softplus(x) = ln(1 + eˣ)``, finite and exact to rounding for logits of any size. The logits
    are taken as the discriminator's last layer gives them: a sigmoid before it would squash them
    twice. Gradient: ``-1/(1 + e^logit)/N``, of N logits.

    Args:
        logits: [B, ...], the discriminator's logits of generated samples; one for each sample, or
            one for each patch. Samples that are not contiguous take the reference path.

    Returns:
        0-d, the mean over all logits (NaN of none); at least float32.

    Raises:
        TypeError: ``logits`` is no floating-point tensor.
        ValueError: ``logits`` has no dimension.

    Example:
        >>> import torch
        >>> from flowkernels.losses import gan_generator
        >>> gan_generator(torch.tensor([0.0, 1e4]))
        tensor(0.3466)

    Source: arXiv 1406.2661; in this form arXiv 2412.16906.
    """
    check_samples(logits, "logits")
    return _gan("gan_generator", logits, None)


def gan_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """A discriminator's loss, ``mean softplus(-real_logits) + mean softplus(fake_logits)``.

    Gradients, of N logits each: ``-1/(1 + e^real)/N`` and ``1/(1 + e^-fake)/N``. As in
    :func:`gan_generator` the logits are taken as they are, of any size.

    Args:
        real_logits: [B, ...], logits of data. Samples that are not contiguous take the reference
            path.
        fake_logits: [B', ...], logits of generated samples, which were detached before they went
            into the discriminator. Each mean is over its own logits: shapes need not be equal.

    Returns:
        0-d (NaN where one of them has no logits); at least float32.

    Raises:
        TypeError: An operand is no floating-point tensor.
        ValueError: An operand has no dimension, or is on another device; names the argument.

    Example:
        >>> import torch
        >>> from flowkernels.losses import gan_discriminator
        >>> gan_discriminator(torch.tensor([1e4]), torch.tensor([-1e4]))
        tensor(0.)

    Source: arXiv 1406.2661; in this form arXiv 2412.16906.
    """
    check_samples(real_logits, "real_logits")
    check_tensor(fake_logits, "fake_logits", real_logits)
    check_samples(fake_logits, "fake_logits")
    return _gan("gan_discriminator", real_logits, fake_logits)


def _gan(name: str, real: Tensor, fake: Tensor | None) -> Tensor:
    """The generator's loss is the first term of the discriminator's."""
    backend = _library.choose(name, real.device, kernels_read_samples(real, fake))
    if backend == "reference":
        return reference.gan(real, fake)
    if tracked(real, fake):
        return GAN(backend, real, fake)
    return operators.gan_forward(backend, real, fake, 0)[0]


def r1_penalty(logits: Tensor, real: Tensor, gamma: float) -> Tensor:
    """R1, ``γ/2 · mean_b Σ_elements (∂Σlogits/∂real)²`` (arXiv 1801.04406).

    The input gradient is taken here, with a graph of its own, so that the penalty's backward pass
    reaches the discriminator's weights through it (and ``real``, where that is asked for). So the
    discriminator must be twice differentiable, and must run outside torch.compile, whose graphs
    are differentiable once.

    A row of the gradient of the sum is the gradient of that sample's own logit, as R1 means it, as
    long as the discriminator keeps samples apart. One that mixes them (batch statistics,
    minibatch-std) puts into row b what sample b does to the logits of all.

    Args:
        logits: The discriminator's logits of ``real``, as many for each sample, of any shape (or
            0-d, their sum): their sum is differentiated.
        real: [B, ...], what the discriminator was given: it must have required grad by then, and
            the logits must depend on it.
        gamma: γ, at least 0.

    Returns:
        0-d (NaN of an empty batch); at least float32.

    Raises:
        TypeError: ``logits`` or ``real`` is no floating-point tensor, or ``gamma`` no number.
        ValueError: ``real`` does not require grad, the logits do not depend on it, or ``gamma`` is
            negative or not finite; names the argument.
        RuntimeError: It is called where no graph is recorded (``torch.no_grad``).

    Example:
        >>> import torch
        >>> from flowkernels.losses import r1_penalty
        >>> weight = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> real = torch.randn(8, 2, requires_grad=True)
        >>> penalty = r1_penalty(real @ weight, real, gamma=2.0)
        >>> penalty.item()
        25.0
        >>> torch.autograd.grad(penalty, weight)[0]
        tensor([6., 8.])
    """
    check_samples(real, "real")
    check_tensor(logits, "logits", real)
    if logits.dim() and len(real) and logits.numel() % len(real):
        raise ValueError(
            f"logits: got {logits.numel()} for {len(real)} samples, need as many for each"
        )
    gamma = as_finite(gamma, "gamma")
    if gamma < 0:
        raise ValueError(f"gamma: got {gamma}, need a number of at least 0")
    if not torch.is_grad_enabled():
        raise RuntimeError("r1_penalty: no graph is recorded here, need torch.enable_grad()")
    if not real.requires_grad:
        raise ValueError(
            "real: does not require grad, need real.requires_grad_() before the discriminator"
        )
    gradient = _input_gradient(logits, real) if logits.requires_grad else None
    if gradient is None:
        raise ValueError("logits: do not depend on real, need the discriminator's logits of it")
    return gradient_penalty(gradient, gamma)


def _input_gradient(logits: Tensor, real: Tensor) -> Tensor | None:
    """∂Σlogits/∂real, differentiable; None where the logits do not depend on it."""
    # A backward pass is not to be autocast: its operands have the dtypes of the forward pass.
    with torch.autocast(real.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(
            logits, real, torch.ones_like(logits), create_graph=True, allow_unused=True
        )
    return gradient


def gradient_penalty(gradient: Tensor, gamma: float) -> Tensor:
    """``γ/2 · mean_b Σ_elements gradient²``: :func:`r1_penalty` of an input gradient at hand.

    Args:
        gradient: [B, ...]. Samples that are not contiguous take the reference path.
        gamma: γ.

    Returns:
        0-d (NaN of an empty batch); at least float32.

    Raises:
        TypeError: ``gradient`` is no floating-point tensor, or ``gamma`` no number.
        ValueError: ``gradient`` has no dimension.

    Example:
        >>> import torch
        >>> gradient_penalty(torch.tensor([[3.0, 4.0]]), 2.0)
        tensor(25.)
    """
    check_samples(gradient, "gradient")
    gamma = as_finite(gamma, "gamma")
    backend = _library.choose("r1_penalty", gradient.device, kernels_read_samples(gradient))
    if backend == "reference":
        return reference.gradient_penalty(gradient, gamma)
    if tracked(gradient):
        return GRADIENT_PENALTY(backend, gradient, gamma)
    return operators.gradient_penalty_forward(backend, gradient, gamma, 0)[0]


for _name in __all__:
    _library.register_function(_name, "flowkernels.losses")
