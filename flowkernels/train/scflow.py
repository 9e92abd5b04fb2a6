"""The recipe of Self-Corrected Flow distillation: one student for one step and for several."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from flowkernels.distill import SCFlow
from flowkernels.nn import FeatureDiscriminator, LatentDiscriminator, LatentDiscriminatorConfig
from flowkernels.train.config import OptimConfig, TrainConfig
from flowkernels.train.data import load_dataset
from flowkernels.train.errors import UsageError
from flowkernels.train.export import TrainedModel
from flowkernels.train.random_state import seed_everything
from flowkernels.train.starting import check_images, load_flow
from flowkernels.train.trainer import Trainer


@dataclass
class SCFlowOptions:
    """Self-Corrected Flow distillation (arXiv 2412.16906). A weight of 0 leaves its term out."""

    guidance: float = 1.0
    """Classifier-free guidance scale of the teacher, trained into the student; 1 is none."""
    delta: float = 0.1
    """Δ: the longest step between the times that are compared."""
    trunc: float = 0.4
    """τ: below it the target is the data. 0.1 for text-to-image."""
    huber: float = 0.01
    """c of the pseudo-Huber distance √(d²+c²)-c."""
    bidirectional: float = 0.1
    """Weight of the term that looks back towards noise; the consistency's is 1."""
    gan: float = 0.1
    """Weight of the GAN on the one-step images; 0 trains no discriminator."""
    reflow: float = 0.1
    """Weight of the self-correction: every time on the line from noise to the one-step image is
    to return that image."""
    bidirectional_warmup: int = 1000
    """Steps before that term begins."""
    gan_warmup: int = 0
    """Steps before the student sees the discriminator, which learns meanwhile."""
    reflow_warmup: int = 1000
    """Steps before that term begins."""
    target_decay: float = 0.9
    """Decay, per step, of the averaged student that gives the targets."""
    t_sampling: Literal["uniform", "logit-normal"] = "uniform"
    """How training times are drawn."""
    t_range: tuple[float, float] = (0.0, 1.0)
    """Training times lie between these; 0 is data, 1 is noise."""
    logit_mean: float = 0.0
    """Mean of the logit of t, for logit-normal."""
    logit_std: float = 1.0
    """Its standard deviation."""
    t_grid: int | None = None
    """Times are rounded up to multiples of one over this; 1000 for text-to-image. None: not."""
    discriminator_input: Literal["clean", "noised"] = "clean"
    """clean images, or noised to the earlier time, real and fake with the same noise."""
    r1: float | None = None
    """Weight γ of the penalty on the discriminator's gradient. None: 1 on clean images, else 0."""
    r1_every: int = 1
    """Apply it every so many steps, times as many: cheaper."""


@dataclass
class DiscriminatorOptions:
    """The network that tells data from one-step images."""

    kind: Literal["latent", "feature"] = "latent"
    """latent: a convolutional residual network of its own. feature: heads on the teacher's
    blocks, which see noised images best (method.discriminator_input)."""
    width: int = 64
    """latent: channels of the first block, doubled by each. feature: channels of each head."""
    depth: int = 2
    """latent: blocks, each of which halves the image's side; bring it to 2 or 4."""
    max_width: int = 512
    """latent: where the doubling ends."""
    conditional: bool = True
    """latent: look at classes, where the data has them."""
    group_size: int = 4
    """latent: images that share a minibatch standard deviation; 1 for none."""
    layers: tuple[int, ...] | None = None
    """feature: the blocks to look at, by index. None: the ends of the first three quarters."""

    def build(self, teacher: TrainedModel) -> nn.Module:
        """The network, for the teacher's images.

        Raises:
            UsageError: a value that no discriminator can have.
        """
        try:
            if self.kind == "feature":
                return FeatureDiscriminator(teacher.network, self.layers, width=self.width)
            sizes = LatentDiscriminatorConfig(
                in_channels=teacher.shape[0],
                width=self.width,
                depth=self.depth,
                max_width=self.max_width,
                num_classes=teacher.num_classes if self.conditional else 0,
                group_size=self.group_size,
            )
            return LatentDiscriminator(sizes)
        except ValueError as error:
            raise UsageError(f"discriminator: {error}") from error


@dataclass
class SCFlowRecipe(TrainConfig):
    """Distil a teacher into one student of few steps by Self-Corrected Flow distillation.

    The recipe file gives the defaults; options override it:

        flowkernels distill scflow --recipe recipes/digits-scflow.yaml
        flowkernels distill scflow --recipe recipes/digits-scflow.yaml --method.gan 0

    optim is the student's optimiser, discriminator-optim the discriminator's. Unlike FGM and BOSS
    it learns from the images themselves. The student samples in any number of steps:

        flowkernels sample --run OUTPUT --steps 2

    Killed? Run the same command again: it goes on from its last checkpoint, bit for bit.
    """

    output: str = "runs/scflow"
    """Folder of the run: checkpoints, samples, TensorBoard logs, the final weights."""
    recipe: str | None = None
    """YAML file with any of these options."""
    teacher: str = "runs/teacher"
    """Folder of the finished teacher run."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=2e-5, max_grad_norm=1.0, ema_decays=(0.9999,))
    )
    discriminator_optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4))
    method: SCFlowOptions = field(default_factory=SCFlowOptions)
    discriminator: DiscriminatorOptions = field(default_factory=DiscriminatorOptions)

    def optim_for(self, phase: str) -> OptimConfig:
        """The discriminator has its own optimiser settings."""
        return self.discriminator_optim if phase == "discriminator" else self.optim

    def validate(self) -> None:
        """Raise UsageError, naming the key, where a value makes no sense."""
        super().validate()
        self.discriminator_optim.validate("discriminator_optim")
        penalty = self.method.r1 if self.method.r1 is not None else self._clean
        if self.compile and self.method.gan and self.discriminator.kind == "feature" and penalty:
            raise UsageError(
                "compile: got True, needs False or method.r1 0: the penalty differentiates the "
                "teacher's blocks twice, which compiled code does not offer"
            )

    @property
    def _clean(self) -> bool:
        return self.method.discriminator_input == "clean"

    def build(self) -> Trainer:
        """The trainer of this recipe.

        Raises:
            UsageError: settings that do not fit together, a missing teacher, or missing data.
        """
        self.validate()
        teacher = load_flow(self.teacher)
        dataset = load_dataset(self.data)
        check_images(teacher, self.teacher, dataset, self.data.labels, self.method.guidance)
        seed_everything(self.seed)
        discriminator = self.discriminator.build(teacher) if self.method.gan else None
        try:
            method = SCFlow(teacher.network, discriminator, **dataclasses.asdict(self.method))
        except ValueError as error:
            raise UsageError(str(error)) from error
        return Trainer(method, self, dataset)
