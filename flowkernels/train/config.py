"""What a run is made of: dataclasses that are recipe file, command line and documentation at once.

The docstring under each field is the help text of its command-line option.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from flowkernels.train.errors import UsageError


def _require(condition: bool, name: str, got: object, needs: str) -> None:
    if not condition:
        raise UsageError(f"{name}: got {got!r}, needs {needs}")


def check_seed(seed: int) -> None:
    """Raise UsageError for what no generator takes."""
    _require(0 <= seed < 2**63, "seed", seed, "a whole number >= 0, of 63 bits")


def check_guidance(guidance: float, name: str = "guidance") -> None:
    """Raise UsageError for what is no scale."""
    _require(math.isfinite(guidance), name, guidance, "a finite number")


@dataclass
class OptimConfig:
    """AdamW with exponential moving averages (EMA), and the learning rate's schedule."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment. A first value of 0 keeps no first moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay, per unit of learning rate."""
    max_grad_norm: float | None = None
    """Clip the gradient's global norm to this. None: no clipping."""
    ema_decays: tuple[float, ...] = ()
    """EMA decays per update; the first one is deployed. Empty: the raw weights are deployed."""
    schedule: Literal["constant", "cosine"] = "constant"
    """How the learning rate goes on after the warm-up."""
    warmup: int = 0
    """Steps of linear warm-up from 0."""
    final_lr: float = 0.0
    """Cosine only: the last learning rate, as a fraction of the peak."""

    def validate(self, name: str = "optim") -> None:
        """Raise UsageError, naming the key, where a value makes no sense."""
        _require(self.lr >= 0 and math.isfinite(self.lr), f"{name}.lr", self.lr, "a number >= 0")
        for beta in self.betas:
            _require(0 <= beta < 1, f"{name}.betas", self.betas, "two numbers in [0, 1)")
        eps, decay = self.eps, self.weight_decay
        _require(0 < eps < math.inf, f"{name}.eps", eps, "a number > 0")
        _require(0 <= decay < math.inf, f"{name}.weight_decay", decay, "a number >= 0")
        for decay in self.ema_decays:
            _require(0 <= decay < 1, f"{name}.ema_decays", self.ema_decays, "numbers in [0, 1)")
        clip = self.max_grad_norm
        _require(clip is None or clip > 0, f"{name}.max_grad_norm", clip, "a number > 0 or None")
        _require(self.warmup >= 0, f"{name}.warmup", self.warmup, "a number of steps >= 0")
        _require(0 <= self.final_lr <= 1, f"{name}.final_lr", self.final_lr, "a fraction in [0, 1]")


@dataclass
class DataConfig:
    """Real images, always from a local path, scaled to [-1, 1]."""

    kind: Literal["digits", "folder", "cifar10"] = "digits"
    """digits: scikit-learn's 1,797 bundled 8x8 greys. folder: one sub-folder per class.
    cifar10: the python archive, packed (tar.gz) or extracted."""
    path: str | None = None
    """The folder or archive. Not used by digits."""
    split: Literal["all", "train", "test"] = "all"
    """digits: train is 4 of 5 images, test the fifth. cifar10: its own split. folder: all only."""
    image_size: int | None = None
    """folder only: side of the square images, in pixels (centre crop, then resize)."""
    channels: Literal[1, 3] = 3
    """folder only: 3 for RGB, 1 for grey."""
    flip: bool = False
    """Mirror half of the images, drawn anew in each epoch."""
    labels: bool = True
    """Give the networks each image's class. False: an unconditional model."""

    def validate(self) -> None:
        """Raise UsageError, naming the key, where values do not fit together."""
        if self.kind == "digits":
            _require(self.path is None, "data.path", self.path, "no value: the digits are bundled")
        else:
            _require(bool(self.path), "data.path", self.path, f"the local path of the {self.kind}")
        if self.kind == "folder":
            size = self.image_size
            _require(size is not None and size > 0, "data.image_size", size, "a side in pixels")
            _require(self.split == "all", "data.split", self.split, "'all': a folder has no split")
        else:
            size = self.image_size
            _require(size is None, "data.image_size", size, f"no value: {self.kind} has its own")


@dataclass
class TrainConfig:
    """One run of one method: how long, on what, with what, and what is written where."""

    output: str = "runs/train"
    """Folder of the run: checkpoints, samples, TensorBoard logs, the final weights."""
    steps: int = 1000
    """Training steps in all, those before a resume included."""
    batch_size: int = 64
    """Images per forward pass."""
    accumulate: int = 1
    """Forward passes whose gradients are averaged into one update."""
    seed: int = 0
    """Seed of every generator and of the order of the data."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """bf16: autocast for the networks; weights, moments and EMA stay float32. auto: bf16 where the
    device has matrix products of it, else fp32."""
    compile: bool = False
    """torch.compile each block of the networks."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass where a network offers it: less memory, slower."""
    deterministic: bool = True
    """Ask torch for deterministic kernels: a resume on CUDA is bitwise only with them."""
    fresh: bool = False
    """Remove the output folder's checkpoints and begin at step 0. Otherwise a run goes on from the
    newest complete checkpoint, if there is one."""
    log_every: int = 10
    """Steps between two log points, at which the host waits for the device and looks at losses."""
    save_every: int = 500
    """Steps between two checkpoints; one more at the end and on SIGTERM. 0: only those."""
    keep_last: int = 2
    """Complete checkpoints to keep."""
    max_nonfinite: int = 10
    """Updates that may be skipped for non-finite gradients before the run stops."""
    grid_every: int = 0
    """Steps between two grids of samples from fixed noise; 0: only at the end."""
    grid_rows: int = 8
    """Rows of the grid; its columns are the classes (10 at most)."""
    grid_steps: int = 1
    """Sampling steps for the grid."""
    tensorboard: bool = True
    """Write TensorBoard logs to <output>/tensorboard."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def optim_for(self, phase: str) -> OptimConfig:
        """The optimiser's settings for the phase of that name; a recipe may tell them apart."""
        return self.optim

    def validate(self) -> None:
        """Raise UsageError, naming the key, where a value makes no sense."""
        for name in ("steps", "batch_size", "accumulate", "log_every", "keep_last", "grid_rows"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number >= 1")
        check_seed(self.seed)
        for name in ("save_every", "grid_every"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "a whole number >= 0")
        for name in ("max_nonfinite", "grid_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number >= 1")
        self.data.validate()
        self.optim.validate()
