"""Runnable trainings: a recipe is a `TrainConfig` plus what its method needs, and builds it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Literal

from flowkernels.distill import FGM, ConsistencyFM, FlowMatching
from flowkernels.nn import MMDiT, MMDiTConfig
from flowkernels.train.config import OptimConfig, TrainConfig
from flowkernels.train.data import ImageDataset, load_dataset
from flowkernels.train.errors import UsageError
from flowkernels.train.random_state import seed_everything
from flowkernels.train.starting import check_images, load_flow
from flowkernels.train.trainer import Trainer


@dataclass
class ModelConfig:
    """Size of the MM-DiT; image size, channels and classes follow from the data."""

    patch_size: int = 2
    """Side of a square patch, in pixels."""
    dim: int = 384
    """Hidden width; a multiple of heads and of 4."""
    depth: int = 6
    """Blocks."""
    heads: int = 6
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Width of the feed-forward, as a multiple of dim."""
    class_tokens: int = 1
    """Context tokens learned for each class."""
    qk_norm: bool = False
    """Normalise queries and keys (steadier in bf16)."""


@dataclass
class FlowMatchingOptions:
    """Flow matching: `‖v(x_t, t, class) - (noise - x0)‖²`."""

    contrastive: float = 0.0
    """λ of contrastive flow matching (arXiv 2506.05350; its own is 0.05): velocities are held away
    from those of other images. 0: plain flow matching."""
    drop_condition: float = 0.1
    """Probability that an image is shown without its class (needed for guidance)."""
    t_sampling: Literal["uniform", "logit-normal"] = "uniform"
    """How training times are drawn; logit-normal prefers the middle."""
    t_range: tuple[float, float] = (0.0, 1.0)
    """Training times lie between these; 0 is data, 1 is noise."""
    logit_mean: float = 0.0
    """Mean of the logit of t, for logit-normal."""
    logit_std: float = 1.0
    """Its standard deviation."""
    guidance: float = 1.0
    """Classifier-free guidance scale of the sample grids; 1 is none."""


@dataclass
class ConsistencyOptions:
    """Consistency-FM (arXiv 2407.02398): steps of a segment of time all end at one point."""

    segments: int = 2
    """K even segments of time; the model is made for K Euler steps."""
    delta: float = 1e-3
    """Δ between the two times compared. Smaller: less bias, more training."""
    alpha: float = 1e-5
    """Weight of the velocities' own difference, beside that of the endpoints."""
    target_decay: float = 0.999
    """Decay of the moving average compared with; 0: the model itself, without gradient."""


@dataclass
class FGMOptions:
    """Flow Generator Matching (arXiv 2410.19310): `ω(t) (2⟨d,e⟩ + λ⟨d,d⟩)`."""

    lam: float = 0.0
    """λ: 0 the practical form, 1 the exact objective, -0.4 SiD with alpha 1.2."""
    weighting: Literal["t2(1-t)", "sid"] | None = "sid"
    """ω(t): None for 1; t2(1-t) for t²(1-t); sid for t / (2 mean|u-w|) per sample."""
    guidance: float = 1.0
    """Classifier-free guidance scale of the teacher; 1 is none."""
    fake_steps: int = 1
    """K: updates of the fake flow per update of the generator; 5 where it is unstable."""
    t_sampling: Literal["uniform", "logit-normal"] = "uniform"
    """How training times are drawn."""
    t_range: tuple[float, float] = (0.02, 0.98)
    """Training times lie between these; 0 is data, 1 is noise."""
    logit_mean: float = 0.0
    """Mean of the logit of t, for logit-normal."""
    logit_std: float = 1.0
    """Its standard deviation."""
    t_star: float = 1.0
    """t*: the time at which the generator is asked, in (0, 1]."""
    sigma_star: float | None = None
    """σ*: the scale of the generator's noise. None: t*."""
    split_vjp: bool = False
    """Differentiate teacher and fake one after the other: less memory, one forward more."""
    reduction: Literal["mean", "sum"] = "mean"
    """mean over pixels, or sum over them; Adam's eps and clipping see the difference."""


@dataclass
class TeacherRecipe(TrainConfig):
    """Train a flow-matching teacher on images.

    The recipe file gives the defaults; options override it:

        flowkernels train --recipe recipes/digits-teacher.yaml
        flowkernels train --recipe recipes/digits-teacher.yaml --optim.lr 5e-4 --steps 2000
        flowkernels train --recipe recipes/digits-consistency-fm.yaml --consistency.segments 4

    Killed? Run the same command again: it goes on from its last checkpoint, bit for bit.

    Watch it: tensorboard --logdir OUTPUT/tensorboard
    """

    output: str = "runs/teacher"
    """Folder of the run: checkpoints, samples, TensorBoard logs, the final weights."""
    recipe: str | None = None
    """YAML file with any of these options."""
    kind: Literal["flow-matching", "consistency-fm"] = "flow-matching"
    """consistency-fm: straight within each segment of time, for few steps; see consistency."""
    start: str | None = None
    """Folder of a finished run to begin with: its weights, and its model in place of the one
    below. None: random weights."""
    grid_steps: int = 50
    """Sampling steps for the grid."""
    model: ModelConfig = field(default_factory=ModelConfig)
    method: FlowMatchingOptions = field(default_factory=FlowMatchingOptions)
    consistency: ConsistencyOptions = field(default_factory=ConsistencyOptions)

    def build(self) -> Trainer:
        """The trainer of this recipe.

        Raises:
            UsageError: settings that do not fit together, or missing data.
        """
        self.validate()
        dataset = load_dataset(self.data)
        seed_everything(self.seed)
        try:
            method = self._method(self._network(dataset))
        except ValueError as error:
            raise UsageError(str(error)) from error
        return Trainer(method, self, dataset)

    def validate(self) -> None:
        """Raise UsageError, naming the key, where a value makes no sense."""
        super().validate()
        ratio = self.model.mlp_ratio
        if not 0 < ratio < math.inf:
            raise UsageError(f"model.mlp_ratio: got {ratio}, needs a number > 0")
        if self.kind == "consistency-fm" and self.method.contrastive != 0:
            raise UsageError(
                f"method.contrastive: got {self.method.contrastive}, needs 0.0 with kind "
                "consistency-fm"
            )

    def _network(self, dataset: ImageDataset) -> MMDiT:
        if self.start is None:
            return MMDiT(self._model_config(dataset))
        model = load_flow(self.start, "start")
        check_images(model, self.start, dataset, self.data.labels)
        return model.network.requires_grad_(True).train()

    def _method(self, network: MMDiT) -> FlowMatching:
        options = asdict(self.method)
        if self.kind == "flow-matching":
            return FlowMatching(network, **options)
        del options["contrastive"]
        return ConsistencyFM(network, **options, **asdict(self.consistency))

    def _model_config(self, dataset: ImageDataset) -> MMDiTConfig:
        channels, height, width = dataset.shape
        return MMDiTConfig(
            image_size=height if height == width else (height, width),
            in_channels=channels,
            num_classes=len(dataset.classes) if self.data.labels else 0,
            **asdict(self.model),
        )


@dataclass
class FGMRecipe(TrainConfig):
    """Distil a teacher into a one-step generator by Flow Generator Matching.

    The recipe file gives the defaults; options override it:

        flowkernels distill fgm --recipe recipes/digits-fgm.yaml
        flowkernels distill fgm --recipe recipes/digits-fgm.yaml --optim.lr 1e-4 --method.lam 1

    optim is the generator's optimiser, fake-optim the fake flow's. From the data the method takes
    shapes and classes, no images. Its loss says nothing about convergence: look at the samples.
    """

    output: str = "runs/fgm"
    """Folder of the run: checkpoints, samples, TensorBoard logs, the final weights."""
    recipe: str | None = None
    """YAML file with any of these options."""
    teacher: str = "runs/teacher"
    """Folder of the finished teacher run."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-5, betas=(0.0, 0.999), ema_decays=(0.999,))
    )
    fake_optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-5, betas=(0.0, 0.999))
    )
    method: FGMOptions = field(default_factory=FGMOptions)

    def optim_for(self, phase: str) -> OptimConfig:
        """The fake flow has its own optimiser settings."""
        return self.fake_optim if phase == "fake" else self.optim

    def validate(self) -> None:
        """Raise UsageError, naming the key, where a value makes no sense."""
        super().validate()
        self.fake_optim.validate("fake_optim")
        if self.grid_steps != 1:
            raise UsageError(f"grid_steps: got {self.grid_steps}, needs 1: it samples in one step")

    def build(self) -> Trainer:
        """The trainer of this recipe.

        Raises:
            UsageError: settings that do not fit together, a missing teacher, or missing data.
        """
        self.validate()
        dataset = load_dataset(self.data)
        teacher = load_flow(self.teacher)
        check_images(teacher, self.teacher, dataset, self.data.labels, self.method.guidance)
        seed_everything(self.seed)
        try:
            method = FGM(teacher.network, **asdict(self.method))
        except ValueError as error:
            raise UsageError(str(error)) from error
        return Trainer(method, self, dataset)
