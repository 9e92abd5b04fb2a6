"""The deployable result of a run: weights as safetensors, the rest as JSON; written and read."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flowkernels.nn import MMDiT, MMDiTConfig
from flowkernels.ode import Schedule, sample, uniform
from flowkernels.train.checkpoint import save_weights
from flowkernels.train.config import DataConfig, TrainConfig
from flowkernels.train.errors import UsageError
from flowkernels.train.files import write_json
from flowkernels.train.recipe_file import from_mapping

if TYPE_CHECKING:
    from flowkernels.distill import Method

WEIGHTS, MODEL = "weights.safetensors", "model.json"
_FORMAT = 1


def export_network(
    folder: Path,
    method: Method,
    network: nn.Module,
    weights: dict[str, Tensor],
    config: TrainConfig,
    step: int,
) -> None:
    """Write `model.json`, then `weights.safetensors`, each atomically.

    Args:
        folder: the run's folder.
        method: what trained it; the time t* and scale σ* of a one-step generator are noted, and
            the schedules of a student of few steps, with the guidance that is in its weights.
        network: whose `config.to_dict()` rebuilds it, where it has one.
        weights: its state dict, averaged or raw.
        config: the run's configuration.
        step: completed steps.
    """
    network_config = getattr(network, "config", None)
    one_step = {name: getattr(method, name, None) for name in ("t_star", "sigma_star")}
    schedules = getattr(method, "schedules", None)
    info = {
        "format": _FORMAT,
        "network": type(network).__name__,
        "config": None if network_config is None else network_config.to_dict(),
        "method": type(method).__name__,
        "one_step": one_step if None not in one_step.values() else None,
        "schedules": None if schedules is None else _walked(method, schedules),
        "data": asdict(config.data),
        "step": step,
    }
    write_json(folder / MODEL, info)
    save_weights(folder / WEIGHTS, weights)


def _walked(method: Method, schedules: dict[int, Schedule]) -> dict[str, Any]:
    times = {str(steps): schedule.times.tolist() for steps, schedule in schedules.items()}
    return {"times": times, "path": method.path, "guidance": method.guidance}


class TrainedModel:
    """A deployed network and how to draw images from it.

    Args:
        network: frozen, in eval mode.
        info: the content of `model.json`.
    """

    def __init__(self, network: MMDiT, info: dict[str, Any]) -> None:
        self.network = network
        self.info = info

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of its images."""
        config = self.network.config
        return (config.in_channels, *config.image_shape)

    @property
    def num_classes(self) -> int:
        """0 for an unconditional model."""
        return self.network.config.num_classes

    @property
    def data(self) -> DataConfig:
        """The images it was trained on."""
        return from_mapping(DataConfig, self.info["data"], "data.")

    @property
    def one_step(self) -> bool:
        """Whether it is a one-step generator rather than a velocity field."""
        return self.info.get("one_step") is not None

    @property
    def schedules(self) -> dict[int, Schedule]:
        """K → the schedule of a student that walks in K steps; empty for others."""
        walked = self.info.get("schedules") or {"times": {}}
        return {int(steps): Schedule(times) for steps, times in walked["times"].items()}

    @property
    def is_flow(self) -> bool:
        """Whether it is a velocity at every t, and not a student that knows a few."""
        return not self.one_step and not self.schedules

    @torch.no_grad()
    def generate(
        self,
        noise: Tensor,
        steps: int = 1,
        labels: Tensor | None = None,
        guidance: float = 1.0,
        schedule: Schedule | None = None,
    ) -> Tensor:
        """Images [B, C, H, W] from noises of that shape.

        Args:
            noise: standard normal.
            steps: Euler steps from t = 1 to 0. A one-step generator takes 1:
                `σ* z - σ* v(σ* z, t*)`. A student of few steps takes a number it was trained for,
                and walks its own schedule.
            labels: [B] int64 classes of a conditional model.
            guidance: classifier-free guidance scale; 1 is none. Not for students, whose weights
                hold the guidance of their teacher.
            schedule: of a flow, the steps in place of `steps` even ones.

        Raises:
            UsageError: labels, steps or guidance that this model cannot serve.
        """
        if (labels is None) != (self.num_classes == 0):
            needs = "no labels" if labels is not None else "labels"
            raise UsageError(f"labels: this model needs {needs} (num_classes {self.num_classes})")
        conditions = {} if labels is None else {"labels": labels}
        if self.one_step:
            return self._one_step(noise, steps, guidance, conditions)
        uncond = None
        if guidance != 1.0:
            if labels is None:
                raise UsageError(f"guidance: got {guidance}, needs 1.0 for a model without classes")
            uncond = self.network.null_conditions(conditions)
        return sample(
            self.network,
            noise,
            self._schedule(steps, guidance) if schedule is None else schedule,
            conditions=conditions,
            uncond=uncond,
            guidance=None if uncond is None else guidance,
        )

    def _schedule(self, steps: int, guidance: float) -> Schedule:
        known = self.schedules
        if not known:
            return uniform(steps)
        if steps not in known or guidance != 1.0:
            raise UsageError(
                f"steps, guidance: got {steps}, {guidance}; this student walks in "
                f"{', '.join(map(str, known))} steps, with guidance 1.0 (its own is trained in)"
            )
        return known[steps]

    def _one_step(
        self, noise: Tensor, steps: int, guidance: float, conditions: dict[str, Tensor]
    ) -> Tensor:
        if steps != 1 or guidance != 1.0:
            raise UsageError(
                f"steps, guidance: got {steps}, {guidance}; a one-step generator needs 1, 1.0"
            )
        t_star = float(self.info["one_step"]["t_star"])
        sigma_star = float(self.info["one_step"]["sigma_star"])
        x = sigma_star * noise
        t = torch.full((len(x),), t_star, device=x.device, dtype=torch.float32)
        velocity: Tensor = self.network(x, t, **conditions)
        return x - sigma_star * velocity


def load_model(folder: str | Path, device: torch.device | str = "cpu") -> TrainedModel:
    """Read what `export_network` wrote.

    Raises:
        UsageError: a file is missing, damaged, or of another network; one line that names it.
    """
    folder = Path(folder)
    path = folder / MODEL
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        if info["format"] != _FORMAT or info["network"] != "MMDiT" or info["config"] is None:
            raise UsageError(f"{path}: not a model that this version can rebuild")
        config = MMDiTConfig.from_dict(info["config"])
        from_mapping(DataConfig, info["data"], "data.")
        str(info["method"])
        # How it was trained is no property of the model: the next run says for itself.
        network = MMDiT(replace(config, gradient_checkpointing=False))
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read ({error.strerror}); is {folder} the folder of a finished run?"
        ) from error
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: damaged: {' '.join(str(error).split())}") from error
    path = folder / WEIGHTS
    try:
        network.load_state_dict(load_file(path))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: missing; has the run in {folder} finished?") from error
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UsageError(f"{path}: damaged: {' '.join(str(error).split())[:200]}") from error
    return TrainedModel(network.to(device).eval().requires_grad_(False), info)
