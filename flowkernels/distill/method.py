"""What every method has in common: phases, losses and generation."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

NullConditions = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Makes the unconditional inputs of given conditions."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """One optimiser's part of a training step.

    Args:
        name: what `Method.losses(batch, phase=name)` computes.
        networks: names of the method's sub-modules whose weights this phase updates.
        repeats: updates in one training step, each with fresh randomness.
        same_batch: its updates see the batches of the phase before again, where that saves
            network calls, in place of fresh ones.

    Raises:
        ValueError: no network, or `repeats` below 1.

    Example:
        >>> Phase("fake", ("fake",), repeats=5)
        Phase(name='fake', networks=('fake',), repeats=5, same_batch=False)
    """

    name: str
    networks: tuple[str, ...]
    repeats: int = 1
    same_batch: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.networks, str) or not self.networks:
            raise ValueError(f"networks is {self.networks!r}; it needs a tuple of names")
        if type(self.repeats) is not int or self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats!r}; it must be an int of at least 1")


class Method(nn.Module):
    """A training method: networks, the phases of one step, and the losses of each phase.

    A method owns no optimiser, no device and no loop. It draws its noise and times from torch's
    default generator of the batch's device. One training step is: for each phase in order,
    `repeats` times, the sum of `losses(batch, phase.name)` is back-propagated and the phase's
    networks are updated; then `after_step()`.

    Attributes:
        deploy: name of the network that is evaluated and shipped.
        uncompiled: names of networks that torch.compile must leave alone: their gradient is
            differentiated again, which compiled code does not offer.
    """

    deploy: str
    uncompiled: tuple[str, ...] = ()

    def phases(self) -> tuple[Phase, ...]:
        """The phases of one training step, in order."""
        raise NotImplementedError

    def losses(self, batch: Mapping[str, Tensor], phase: str | None = None) -> dict[str, Tensor]:
        """Named scalar losses of one phase, or of all phases where `phase` is None.

        Args:
            batch: "x0" [B, ...] data, and conditions [B, ...] by keyword.
            phase: the name of a phase.

        Returns:
            0-d tensors to sum and call backward on.
        """
        raise NotImplementedError

    def generate(
        self, noise: Tensor, steps: int, network: nn.Module | None = None, **conditions: Tensor
    ) -> Tensor:
        """Samples from noise, for grids and evaluation.

        Args:
            noise: [B, ...] standard normal.
            steps: sampling steps.
            network: used in place of the deployed one (an EMA copy, a teacher).
            **conditions: keyword tensors for the network.

        Returns:
            [B, ...] samples, made in evaluation mode and without a graph.
        """
        raise NotImplementedError

    def after_step(self) -> None:
        """What follows the last phase's update in every training step; by default nothing."""

    def monitors(self) -> dict[str, Tensor]:
        """Further 0-d values of the last losses, for logs; by default none."""
        return {}

    def wants(self, name: str, phase: str | None) -> bool:
        """Whether `losses(..., phase)` includes the phase `name`.

        Raises:
            ValueError: the method has no phase of the name asked for.
        """
        names = [each.name for each in self.phases()]
        if phase is not None and phase not in names:
            raise ValueError(f"phase is {phase!r}; it must be None or one of {', '.join(names)}")
        return phase is None or phase == name

    def deployed(self, network: nn.Module | None) -> nn.Module:
        """`network`, or the deployed one where it is None."""
        return self.get_submodule(self.deploy) if network is None else network


def split_batch(batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """A batch as its data and its conditions.

    Raises:
        ValueError: no "x0", or a condition whose first size is not the batch's.
    """
    if "x0" not in batch:
        raise ValueError(f"batch has the keys {sorted(batch)}; it needs 'x0'")
    x0 = batch["x0"]
    conditions = {name: value for name, value in batch.items() if name != "x0"}
    for name, value in conditions.items():
        if value.dim() == 0 or len(value) != len(x0):
            raise ValueError(
                f"batch[{name!r}] has shape {tuple(value.shape)}; its first size must be that "
                f"of x0, {len(x0)}"
            )
    return x0, conditions


def null_conditions_of(
    network: nn.Module, given: NullConditions | None, option: str
) -> NullConditions:
    """The caller's way to make unconditional inputs, or the network's own.

    Raises:
        ValueError: neither exists; `option` is the argument that asked for it.
    """
    make = given if given is not None else getattr(network, "null_conditions", None)
    if make is None:
        raise ValueError(
            f"{option} needs unconditional inputs: pass null_conditions, or a network that has "
            "that method"
        )
    return make


def trainable(network: nn.Module | None, teacher: nn.Module, name: str) -> nn.Module:
    """The network given, or a copy of the teacher with weights that ask for gradients.

    Raises:
        ValueError: it is the teacher itself, or has no weights to train; names the argument.
    """
    if network is teacher:
        raise ValueError(f"{name} is the teacher itself; it needs its own weights")
    network = copy.deepcopy(teacher).requires_grad_(True).train() if network is None else network
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(f"{name} has no weights to train; pass a network that has")
    return network


@contextlib.contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode restored after."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """No weight asks for a gradient inside; every weight's own setting is restored after.

    It must be entered before the forward and left after the backward: a checkpointed block
    runs again in backward and must find the same setting.
    """
    settings = [(p, p.requires_grad) for network in networks for p in network.parameters()]
    try:
        for parameter, _ in settings:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, setting in settings:
            parameter.requires_grad_(setting)


def check_reduction(reduction: str) -> None:
    """Raises ValueError unless `reduction` is one that methods offer."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean' or 'sum'")


def scaled(loss: Tensor, reduction: str, batch_size: int) -> Tensor:
    """A loss operator's result as methods report it: "sum" runs over a sample's elements only."""
    return loss / batch_size if reduction == "sum" else loss


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float (and not a bool)."""
    return type(value) in (int, float) and abs(float(value)) < float("inf")  # type: ignore[arg-type]


def standard_normal_like(x: Tensor) -> Tensor:
    """Fresh N(0, 1) noise of x's shape, dtype and device, contiguous and without a graph."""
    return torch.randn(x.shape, dtype=x.dtype, device=x.device)
