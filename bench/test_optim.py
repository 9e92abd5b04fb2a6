"""AdamW with two averages and a gradient norm, over the parameters of transformer blocks.

The eager peer is what people run: ``clip_grad_norm_``, ``AdamW(fused=True)`` and
``torch._foreach_lerp_``, one after the other. The compiled peer is the same arithmetic written over
lists of tensors, in one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bench import optimiser_peers as peers_of
from bench.cases import SPEED, Call, Case, Context, Prepared, Random
from bench.peers import compiled, copy_call
from bench.shapes import SD3_MEDIUM, block_parameters
from bench.timing import REPLAY
from flowkernels.optim import AdamWEMA

Tensor = torch.Tensor
BYTES_A_PARAMETER = {True: 48, False: 44}
"""float32, two averages: with the pass that finds the norm, and without."""


@dataclass(frozen=True)
class Setting:
    """What is stepped: settings of the update, and how many blocks of which width."""

    name: str
    family: str
    recipe: peers_of.Recipe
    width: int
    blocks: int
    priority: int
    variants: tuple[str, ...] = SPEED

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return block_parameters(self.width) * self.blocks

    @property
    def elements(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def bytes_moved(self) -> int:
        each = BYTES_A_PARAMETER[self.recipe.max_grad_norm is not None]
        # Without momentum the first moment is neither read nor written.
        return self.elements * (each - (8 if self.recipe.betas[0] == 0 else 0))


CLIPPED = peers_of.Recipe(max_grad_norm=1.0)
MOMENTLESS = peers_of.Recipe(betas=(0.0, 0.999), max_grad_norm=1.0)
UNCLIPPED = peers_of.Recipe()


def settings(context: Context) -> list[Setting]:
    """One block that compiles in seconds; on a GPU also as many SD3 blocks as fit."""
    few = ("ours", "eager", "copy")
    if context.level == "tiny":
        return [
            Setting("adamw_ema_clip", "optimiser", CLIPPED, 16, 1, 1),
            Setting("adamw_ema_beta1_0", "optimiser", MOMENTLESS, 16, 1, 1, few),
            Setting("adamw_ema", "optimiser", UNCLIPPED, 16, 1, 2, few),
        ]
    width = {"cpu": 512, "cuda": SD3_MEDIUM.width}[context.device]
    found = [
        Setting("adamw_ema_clip", "optimiser", CLIPPED, width, 1, 1),
        Setting("adamw_ema_beta1_0", "optimiser without momentum", MOMENTLESS, width, 1, 1),
        Setting("adamw_ema", "optimiser without clip", UNCLIPPED, width, 1, 2),
    ]
    if context.device == "cuda":
        # Ours, the eager peer and the copy at a block's 36·D² parameters: 24 + 24 + 48 bytes each.
        a_block = 36 * width * width * 96
        free, _ = torch.cuda.mem_get_info()
        most = min(SD3_MEDIUM.blocks, int(free * 0.85) // a_block)
        found.append(Setting("adamw_ema_clip", "optimiser", CLIPPED, width, most, 2, few))
    return found


def cases(context: Context) -> list[Case]:
    return [
        Case(
            setting.name, setting.family, f"{setting.elements / 1e6:.3g}M", setting.elements,
            "float32", "forward", "speed", setting.priority, setting.variants, _builder(setting),
        )
        for setting in settings(context)
    ]  # fmt: skip


def _builder(setting: Setting) -> Callable[[Context], Prepared]:
    def build(context: Context) -> Prepared:
        device, recipe = context.torch_device, setting.recipe

        def random_list(seed: int, scale: float) -> list[Tensor]:
            random = Random(seed, torch.float32, device)
            return [random.normal(*shape, scale=scale) for shape in setting.shapes]

        values, grads = random_list(0, 0.02), random_list(1, 1e-3)
        steppers: dict[str, peers_of.Stepper] = {
            "ours": Fused(values, grads, recipe),
            "eager": peers_of.Eager(values, grads, recipe),
        }
        if "compile" in setting.variants:
            steppers["compile"] = peers_of.Lists(
                values,
                grads,
                recipe,
                lambda f: compiled(f, device=context.device, backend=context.compile_backend),
            )
        variants: dict[str, Call] = {name: stepper.call for name, stepper in steppers.items()}
        variants["copy"] = copy_call(setting.bytes_moved, 1, device)
        return Prepared(
            {name: variants[name] for name in setting.variants},
            setting.bytes_moved,
            1,
            lambda: peers_of.verify(steppers, values, grads, recipe),
            # The fused AdamW of torch keeps its step on the host unless it is told otherwise.
            capture=False,
        )

    return build


class Fused:
    """Ours: one optimiser, one pass for the norm and one for the rest."""

    def __init__(
        self, values: Sequence[Tensor], grads: Sequence[Tensor], recipe: peers_of.Recipe
    ) -> None:
        self._model = torch.nn.ParameterList([x.clone() for x in values])
        for parameter, grad in zip(self._model, grads, strict=True):
            parameter.grad = grad.clone()
        self._optimiser = AdamWEMA(
            self._model.parameters(),
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            ema_decays=recipe.ema_decays,
            max_grad_norm=recipe.max_grad_norm,
        )

    def call(self, index: int) -> Any:
        return self._optimiser.step()

    def state(self) -> list[Tensor]:
        averages = [
            self._optimiser.ema_state_dict(self._model, i)[str(j)]
            for i in range(2)
            for j in range(len(self._model))
        ]
        return [*self._model, *averages]


@pytest.mark.benchmark(timer=REPLAY)
def test_optim(case: Case, variant: str, replay: Any) -> None:
    replay(case, variant)
