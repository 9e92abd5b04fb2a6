"""The one loop in which every method is trained."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowkernels.optim import AdamWEMA
from flowkernels.train.checkpoint import (
    DamagedCheckpoint,
    list_checkpoints,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
    set_aside,
)
from flowkernels.train.compiling import compile_blocks
from flowkernels.train.config import TrainConfig
from flowkernels.train.data import ImageDataset, Loader, load_dataset
from flowkernels.train.errors import RunFailed, UsageError
from flowkernels.train.export import WEIGHTS, export_network
from flowkernels.train.learning_rate import learning_rate
from flowkernels.train.meter import LossMeter
from flowkernels.train.pictures import save_grid
from flowkernels.train.process import (
    StopRequest,
    deterministic_algorithms,
    exclusive,
    frozen_objects,
    refuse_several_processes,
    resolve_device,
    uses_bfloat16,
)
from flowkernels.train.random_state import random_state, seed_everything, set_random_state
from flowkernels.train.reporting import Reporter
from flowkernels.train.resuming import (
    changed_settings,
    changed_sources,
    check_finished,
    check_output,
    load_optimizer,
    sources,
)

if TYPE_CHECKING:
    from flowkernels.distill import Method, Phase


class Trainer:
    """Trains a method's networks; saves so that a killed run goes on bit for bit.

    One step runs each phase of `method.phases()` in order, `phase.repeats` times: a fresh batch
    (or the last one again, where the phase says so), `method.losses(batch, phase.name)`, one
    backward pass of their sum (`accumulate` of them), one step of that phase's `AdamWEMA`. Then
    `method.after_step()`. Nothing in a step waits for the device.

    Files in `config.output`: `checkpoint-XXXXXXXX/` (complete state), `weights.safetensors` and
    `model.json` (the deployed network: the first EMA, or the raw weights without one), `samples/`
    (grids from the same noises every time), `tensorboard/`.

    Args:
        method: built from modules; the trainer moves it to the device.
        config: a `TrainConfig` or a recipe derived from it.
        dataset: real images; by default what `config.data` names.

    Raises:
        UsageError: settings that make no sense, or several processes.
        DataError: a data file is missing or damaged.

    Example:
        >>> from flowkernels.distill import FlowMatching
        >>> from flowkernels.nn import MMDiT, MMDiTConfig
        >>> from flowkernels.train import TrainConfig, Trainer
        >>> size = MMDiTConfig(8, in_channels=1, dim=16, depth=1, heads=1, num_classes=10)
        >>> config = TrainConfig(output="runs/example", steps=2, batch_size=4, tensorboard=False)
        >>> trainer = Trainer(FlowMatching(MMDiT(size)), config)
        >>> trainer.run()  # doctest: +SKIP
        'finished'
    """

    def __init__(
        self, method: Method, config: TrainConfig, dataset: ImageDataset | None = None
    ) -> None:
        config.validate()
        refuse_several_processes()
        check_output(config)
        self.config = config
        self.output = Path(config.output)
        self.device = resolve_device(config.device)
        self.bfloat16 = uses_bfloat16(config.precision, self.device)
        self.dataset = load_dataset(config.data) if dataset is None else dataset
        self.method = method.to(self.device)
        self.phases: tuple[Phase, ...] = method.phases()
        self.step = 0
        self.meter = LossMeter()
        self._batches: list[dict[str, Tensor]] = []  # of the update at hand, or the one before
        self.loader = Loader(
            self.dataset,
            config.batch_size,
            config.seed,
            self.device,
            config.data.flip,
            config.data.labels,
        )
        self.optimizers = {phase.name: self._optimizer(phase) for phase in self.phases}
        self._saved_step: int | None = None
        self._skipped = 0  # of which people have been told
        self._sources: dict[str, Any] = {}
        self._prepare_networks()

    # ---- the run -------------------------------------------------------------------------------

    def run(self) -> str:
        """Train to `config.steps`, from the newest complete checkpoint if there is one.

        Returns:
            "finished", or "interrupted" after SIGTERM or SIGINT (a checkpoint has been written).

        Raises:
            RunFailed: too many updates were skipped for non-finite gradients. No checkpoint is
                written then; the last one stays.
        """
        config = self.config
        with (
            exclusive(self.output),
            StopRequest() as stop,
            deterministic_algorithms(config.deterministic),
            frozen_objects(),
            contextlib.closing(self.loader),
        ):
            remove_leftovers(self.output)
            notices = self._begin()
            logs = self.output / "tensorboard" if config.tensorboard else None
            title = type(self.method).__name__
            with Reporter(title, config.steps, self.step, logs) as reporter:
                for notice in notices:
                    reporter.say(notice)
                while self.step < config.steps and not stop.requested:
                    self._train_step()
                    self._after_step(reporter)
                self.save()
                if self.step < config.steps:
                    reporter.say(f"stopped at step {self.step}; run again to go on")
                    return "interrupted"
                self._finish(reporter)
        return "finished"

    def _begin(self) -> list[str]:
        """Load the newest checkpoint that is whole, or seed a new run; what people should know."""
        self._sources = sources(self.config)
        found = list_checkpoints(self.output)
        if self.config.fresh:
            for _, path in found:
                shutil.rmtree(path)
            found = []
        notices = []
        for _, path in reversed(found):
            try:
                step, state = load_checkpoint(path)
            except DamagedCheckpoint as error:
                aside = set_aside(path)
                notices.append(f"warning: {path} is damaged and passed over ({error}): see {aside}")
                continue
            notices += self._load(step, state, path)
            notices.append(f"resuming from {path}")
            return notices
        seed_everything(self.config.seed)
        return notices

    def _after_step(self, reporter: Reporter) -> None:
        config = self.config
        reporter.advance(self.step)
        if self.step % config.log_every == 0 or self.step == config.steps:
            self._log(reporter)
        if config.grid_every and self.step % config.grid_every == 0:
            self._grid(reporter)
        if config.save_every and self.step % config.save_every == 0:
            self.save()

    def _finish(self, reporter: Reporter) -> None:
        self._grid(reporter)
        self.export()
        reporter.say(f"weights: {self.output / 'weights.safetensors'}")

    # ---- one step ------------------------------------------------------------------------------

    def _train_step(self) -> None:
        for phase in self.phases:
            optimizer = self.optimizers[phase.name]
            rate = learning_rate(self.config.optim_for(phase.name), self.step, self.config.steps)
            for group in optimizer.param_groups:
                group["lr"].fill_(rate)  # a tensor on the device: a replayed graph sees it too
            for _ in range(phase.repeats):
                self._update(phase, optimizer)
        self._batches = []
        getattr(self.method, "after_step", lambda: None)()
        self.step += 1

    def _update(self, phase: Phase, optimizer: AdamWEMA) -> None:
        optimizer.zero_grad(set_to_none=True)
        if not (getattr(phase, "same_batch", False) and self._batches):
            self._batches = []
        for index in range(self.config.accumulate):
            if index == len(self._batches):
                self._batches.append(self.loader.next_batch())
            batch = self._batches[index]
            with self._autocast():
                losses = self.method.losses(batch, phase.name)
            total = torch.stack([loss.float() for loss in losses.values()]).sum()
            torch.autograd.backward(total / self.config.accumulate)
            self.meter.add(losses)
        optimizer.step()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16)

    # ---- what the host looks at, at log points and checkpoints ----------------------------------

    @property
    def skipped(self) -> int:
        """Updates skipped so far because a gradient was not finite (waits for the device)."""
        return sum(int(optimizer.skipped) for optimizer in self.optimizers.values())

    def _log(self, reporter: Reporter) -> None:
        losses, skipped = self.meter.means(), self._check_finite()
        if skipped > self._skipped:
            reporter.say(f"warning: step {self.step}: {skipped} updates skipped so far, not finite")
            self._skipped = skipped
        others = {"nonfinite/skipped_updates": float(skipped)}
        if (samples := getattr(self.method, "nonfinite", None)) is not None:
            others["nonfinite/left_out_samples"] = float(samples)
        monitors: dict[str, Tensor] = getattr(self.method, "monitors", dict)()
        others.update({f"monitor/{name}": float(value) for name, value in monitors.items()})
        for phase in self.phases:
            optimizer = self.optimizers[phase.name]
            others[f"learning_rate/{phase.name}"] = float(optimizer.param_groups[0]["lr"])
            others[f"gradient_norm/{phase.name}"] = float(optimizer.grad_norm)
        reporter.log(self.step, losses, others)

    def _check_finite(self) -> int:
        """The skipped updates; RunFailed where there are too many."""
        self.meter.read()
        skipped = self.skipped
        if skipped < self.config.max_nonfinite:
            return skipped
        culprits = ", ".join(f"{name} ({n}x)" for name, n in self.meter.nonfinite.items())
        found = list_checkpoints(self.output)
        kept = f"; last checkpoint: {found[-1][1]}" if found else ""
        raise RunFailed(
            f"step {self.step}: {skipped} updates skipped for non-finite gradients "
            f"(max_nonfinite {self.config.max_nonfinite}); "
            f"non-finite losses: {culprits or 'none, only gradients'}{kept}"
        )

    # ---- state ---------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this step, unless it is written already."""
        if self._saved_step == self.step:
            return
        self._check_finite()
        save_checkpoint(self.output, self.step, self.state_dict(), self.config.keep_last)
        self._saved_step = self.step

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "method": self.method.state_dict(),
            "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
            "meter": self.meter.state_dict(),
            "loader": self.loader.state_dict(),
            "random": random_state(self.device),
            "config": dataclasses.asdict(self.config),
            "sources": self._sources,
        }

    def _load(self, step: int, state: dict[str, Any], path: Path) -> list[str]:
        """Take a checkpoint's state over; warnings of what is no longer as it was."""
        if step > self.config.steps:
            raise UsageError(f"steps: got {self.config.steps}, but {path} is already at {step}")
        try:
            self.method.load_state_dict(state["method"])
            for name, optimizer in self.optimizers.items():
                load_optimizer(optimizer, state["optimizers"][name])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(f"output: {path} is of another model or method: {reason}") from error
        changed = changed_settings(self.config, state["config"])
        if step == self.config.steps and (self.output / WEIGHTS).is_file():
            check_finished(changed, self.output)
        self.meter.load_state_dict(state["meter"])
        size = self.loader.load_state_dict(state["loader"])
        set_random_state(state["random"], self.device)
        self.step = self._saved_step = step
        notices = changed_sources(self.config, state.get("sources", {}), self._sources)
        self._sources |= state.get("sources", {})
        if size != len(self.dataset):
            notices.append(
                f"warning: data: {len(self.dataset)} images, where the checkpoint was made with "
                f"{size}: a new epoch begins, and the resume is not bitwise"
            )
        if changed:
            names = ", ".join(changed)
            notices.append(
                f"warning: changed since the checkpoint: {names}; the resume is not bitwise"
            )
        return notices

    # ---- the deployed network ------------------------------------------------------------------

    def export(self) -> None:
        """Write `weights.safetensors` (EMA) and `model.json` of the deployed network."""
        network = self._network(self.method.deploy)
        merged = getattr(self.method, "merged", lambda network: network)
        with self._deployed():
            weights = {name: w.clone() for name, w in merged(network).state_dict().items()}
        for name, weight in weights.items():
            if weight.is_floating_point() and not bool(weight.isfinite().all()):
                raise RunFailed(f"step {self.step}: {name} is not finite; no weights are written")
        export_network(self.output, self.method, network, weights, self.config, self.step)

    def _ema_optimizer(self) -> AdamWEMA | None:
        """The optimiser that averages the deployed network's weights, if one does."""
        for phase in self.phases:
            averages = bool(self.config.optim_for(phase.name).ema_decays)
            if averages and self.method.deploy in phase.networks:
                return self.optimizers[phase.name]
        return None

    @contextlib.contextmanager
    def _deployed(self) -> Iterator[None]:
        """The networks as they will be deployed: EMA weights, eval mode, no generator disturbed."""
        modes = [(module, module.training) for module in self.method.modules()]
        devices = [self.device] if self.device.type == "cuda" else []
        optimizer = self._ema_optimizer()
        averaged = contextlib.nullcontext() if optimizer is None else optimizer.swap_ema(0)
        with torch.random.fork_rng(devices), torch.no_grad(), averaged:
            self.method.eval()
            try:
                yield
            finally:
                for module, training in modes:
                    module.training = training

    def _grid(self, reporter: Reporter) -> None:
        """Samples of the fixed noises: a column per class."""
        columns = min(len(self.dataset.classes), 10)
        count = self.config.grid_rows * columns
        generator = torch.Generator().manual_seed(self.config.seed)
        noise = torch.randn((count, *self.dataset.shape), generator=generator).to(self.device)
        conditions: dict[str, Tensor] = {}
        if self.config.data.labels:
            conditions["labels"] = torch.arange(count, device=self.device) % columns
        with self._deployed(), self._autocast():
            images = self.method.generate(noise, self.config.grid_steps, None, **conditions)
        path = self.output / "samples" / f"step-{self.step:08d}.png"
        reporter.grid(self.step, save_grid(path, images, columns))

    # ---- construction --------------------------------------------------------------------------

    def _optimizer(self, phase: Phase) -> AdamWEMA:
        settings = self.config.optim_for(phase.name)
        settings.validate(f"optimiser of phase {phase.name}")
        parameters = [
            parameter
            for name in phase.networks
            for parameter in self._network(name).parameters()
            if parameter.requires_grad  # an adapter's, beside the frozen weights it adapts
        ]
        return AdamWEMA(
            parameters,
            lr=torch.tensor(settings.lr, device=self.device),
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            ema_decays=settings.ema_decays,
            max_grad_norm=settings.max_grad_norm,
        )

    def _network(self, name: str) -> nn.Module:
        network: nn.Module = getattr(self.method, name)
        return network

    def _prepare_networks(self) -> None:
        networks = list(self.method.children())
        if self.config.gradient_checkpointing:
            offers = [getattr(n, "enable_gradient_checkpointing", None) for n in networks]
            if not any(offers):
                raise UsageError("gradient_checkpointing: no network of this method offers it")
            for enable in filter(None, offers):
                enable()
        if self.config.compile:
            for name, network in self.method.named_children():
                if name not in getattr(self.method, "uncompiled", ()):
                    compile_blocks(network)
