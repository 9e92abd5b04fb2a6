"""Whole training steps on the digits model: losses, both passes, updates and averages.

The peers are the same method in plain PyTorch with `AdamW(fused=True)` and `_foreach_lerp_`, as it
stands and with its losses compiled whole, networks included. bfloat16 is autocast's, over float32
weights, as the trainer has it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from bench import training_peers as peers_of
from bench.cases import Case, Context, Prepared
from bench.peers import compiled
from bench.timing import REPLAY
from flowkernels.distill import FGM, Method, SCFlow
from flowkernels.nn import LatentDiscriminator, LatentDiscriminatorConfig, MMDiT, MMDiTConfig
from flowkernels.optim import AdamWEMA

VARIANTS = ("ours", "eager", "compile")
BATCH, TINY_BATCH = 64, 4
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}
R1_EVERY = 4


class Step(Protocol):
    autocast: bool

    def losses(self, x: Tensor, labels: Tensor, phase: str) -> list[Tensor]: ...

    def step(self, x: Tensor, labels: Tensor) -> None: ...


class Ours:
    """A method and its optimisers, driven as the trainer drives them."""

    autocast = False

    def __init__(self, method: Method, settings: dict[str, dict[str, Any]]) -> None:
        # Its networks are there already; its counters are not.
        self._method = method.to(next(method.parameters()).device)
        self._optimizers = {
            name: AdamWEMA(
                [p for p in method.get_submodule(name).parameters() if p.requires_grad], **options
            )
            for name, options in settings.items()
        }

    @peers_of.under_autocast
    def losses(self, x: Tensor, labels: Tensor, phase: str) -> list[Tensor]:
        return list(self._method.losses({"x0": x, "labels": labels}, phase).values())

    def step(self, x: Tensor, labels: Tensor) -> None:
        for phase, optimizer in self._optimizers.items():
            optimizer.zero_grad(set_to_none=True)
            torch.stack(self.losses(x, labels, phase)).sum().backward()
            optimizer.step()
        self._method.after_step()


def _network(device: torch.device, seed: int, tiny: bool) -> MMDiT:
    """The digits model, every weight away from zero; networks of two seeds are near each other."""
    size = {"dim": 16, "depth": 2, "heads": 2} if tiny else {"dim": 128, "depth": 4, "heads": 4}
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig(image_size=8, in_channels=1, patch_size=2, num_classes=10, **size))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.to(device)


def _fgm(context: Context, networks: list[MMDiT], compiler: peers_of.Compiler) -> dict[str, Step]:
    names = dict(zip(("teacher", "generator", "fake"), networks, strict=True))
    method = FGM(**copy.deepcopy(names), weighting="sid", t_range=(0.02, 0.98))
    momentless = {"betas": (0.0, 0.999)}
    settings = {
        "fake": {"lr": 6e-4, **momentless},
        "generator": {"lr": 3e-4, **momentless, "ema_decays": (0.99,)},
    }
    return {
        "ours": Ours(method, settings),
        "eager": peers_of.PlainFGM(names, lambda function: function),
        "compile": peers_of.PlainFGM(names, compiler),
    }


def _scflow(
    context: Context, networks: list[MMDiT], compiler: peers_of.Compiler
) -> dict[str, Step]:
    teacher, student, _ = networks
    # The target begins as the student does.
    names = {"teacher": teacher, "student": student, "target": student}
    torch.manual_seed(3)
    config = LatentDiscriminatorConfig(in_channels=1, num_classes=10)
    discriminator = LatentDiscriminator(config).to(context.torch_device)
    method = SCFlow(
        copy.deepcopy(teacher),
        copy.deepcopy(discriminator),
        student=copy.deepcopy(student),
        r1_every=R1_EVERY,
    )
    settings = {"student": {"lr": 3e-4, "ema_decays": (0.98,)}, "discriminator": {"lr": 4e-4}}
    return {
        "ours": Ours(method, settings),
        "eager": peers_of.PlainSCFlow(names, discriminator, lambda f: f, R1_EVERY),
        "compile": peers_of.PlainSCFlow(names, discriminator, compiler, R1_EVERY),
    }


METHODS: dict[str, tuple[Callable[..., dict[str, Step]], tuple[str, str], str]] = {
    "fgm_step": (_fgm, ("fake", "generator"), "FGM step"),
    "scflow_step": (_scflow, ("student", "discriminator"), "SCFlow step"),
}


def _build(name: str, batch: int, dtype: str) -> Callable[[Context], Prepared]:
    make, phases, _ = METHODS[name]

    def build(context: Context) -> Prepared:
        device = context.torch_device
        tiny = context.level == "tiny"
        networks = [_network(device, seed, tiny) for seed in range(3)]
        torch._dynamo.reset()
        steps = make(
            context,
            networks,
            lambda f: compiled(f, device=context.device, backend=context.compile_backend),
        )
        for step in steps.values():
            step.autocast = dtype == "bfloat16"
        torch.manual_seed(4)
        x = torch.rand(batch, 1, 8, 8, device=device) * 2 - 1
        labels = torch.randint(0, 10, (batch,), device=device)
        calls = {
            variant: (lambda index, step=step: step.step(x, labels))
            for variant, step in steps.items()
        }
        tolerance = TOLERANCES[dtype]
        verify = lambda: _verify(steps, x, labels, phases, tolerance)  # noqa: E731
        return Prepared(calls, 1, 1, verify, capture=False)

    return build


def _verify(
    steps: dict[str, Step], x: Tensor, labels: Tensor, phases: tuple[str, ...], tolerance: float
) -> dict[str, float]:
    """The losses of the first step, from the same draws, against the eager peer's.

    Raises:
        AssertionError: A variant's losses differ by more than `tolerance` of them.
    """
    found: dict[str, Tensor] = {}
    for name, step in steps.items():
        torch.manual_seed(5)
        sums = [torch.stack(step.losses(x, labels, phase)).sum().detach() for phase in phases]
        found[name] = torch.stack(sums).double()
    errors = {}
    for name, losses in found.items():
        errors[name] = float(((losses - found["eager"]).abs() / found["eager"].abs()).max())
        if not errors[name] <= tolerance:
            raise AssertionError(f"{name}: losses {losses.tolist()}, eager {found['eager']}")
    return errors


def cases(context: Context) -> list[Case]:
    batch = TINY_BATCH if context.level == "tiny" else BATCH
    return [
        Case(
            name, family, f"{batch}x1x8x8", batch * 64, dtype, "forward+backward", "speed", 1,
            VARIANTS, _build(name, batch, dtype),
        )
        for name, (_, _, family) in METHODS.items()
        for dtype in TOLERANCES
    ]  # fmt: skip


@pytest.mark.benchmark(timer=REPLAY)
def test_training(case: Case, variant: str, replay: Any) -> None:
    replay(case, variant)
