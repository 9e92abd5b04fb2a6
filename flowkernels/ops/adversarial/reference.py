"""The adversarial losses in plain PyTorch: the specification of the kernels.

    gan_generator:      mean softplus(-logits)
    gan_discriminator:  mean softplus(-real) + mean softplus(fake)
    gradient_penalty:   gamma/2 · Σ x² / B, of x = d(Σ logits)/d(real) [B, ...]: R1

softplus(x) = ln(1 + eˣ). Arithmetic and result are at least float32, and float64 where an operand
is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from flowkernels.ops._losses import compute_dtype, flat

Tensor = torch.Tensor

# From here on softplus(x) is x: e⁻⁴⁰ is below float64's rounding of 40, and e⁴⁰ is no overflow in
# float32. PyTorch's own threshold of 20 leaves an error of 2e-9.
THRESHOLD = 40.0


def _mean_softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=THRESHOLD).mean()


def gan(real: Tensor, fake: Tensor | None) -> Tensor:
    """The discriminator's loss; the generator's, of the logits of its samples, without ``fake``."""
    dtype = compute_dtype(real, fake)
    loss = _mean_softplus(-real.to(dtype))
    return loss if fake is None else loss + _mean_softplus(fake.to(dtype))


def gradient_penalty(x: Tensor, gamma: float) -> Tensor:
    return 0.5 * gamma * flat(x.to(compute_dtype(x)).square()).sum(1).mean()
