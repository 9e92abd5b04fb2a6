"""How the adversarial losses meet autograd: see ``flowkernels.ops._stored``."""

from __future__ import annotations

from flowkernels.ops._stored import StoredLoss
from flowkernels.ops.adversarial import _operators as operators
from flowkernels.ops.adversarial import reference

# (real, fake), the discriminator's loss; without fake the generator's.
GAN = StoredLoss(
    "GAN",
    operators.gan_forward,
    operators.gan_rescale_,
    operators.gan_backward,
    reference.gan,
    differentiable=2,
    tensors=2,
)
# (x, gamma). The input gradient is inside the graph of the discriminator's weights: so is its
# gradient.
GRADIENT_PENALTY = StoredLoss(
    "GradientPenalty",
    operators.gradient_penalty_forward,
    operators.gradient_penalty_rescale_,
    operators.gradient_penalty_backward,
    reference.gradient_penalty,
    differentiable=1,
    tensors=1,
    single=True,
)
