"""The noising process and the losses: launch-bound, latent and pixel sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bench import peers
from bench.cases import Case, Context, Operation, Random, cases_of, size
from bench.shapes import latent_shapes
from bench.timing import REPLAY
from flowkernels import losses

TINY = (2, 4, 4, 4)
TRUNC = 0.4  # below which t_post is data


def _tensors(count: int, random: Random, shape: tuple[int, ...]) -> list[Any]:
    return [random.normal(*shape) for _ in range(count)]


def _interpolate_inputs(random: Random, shape: tuple[int, ...]) -> list[Any]:
    return [random.normal(*shape), random.times(shape[0]), random.normal(*shape)]


def _seeded_inputs(random: Random, shape: tuple[int, ...]) -> list[Any]:
    # The seed lives on the device: a CUDA graph would replay one noise for ever otherwise.
    seed = torch.full((), 1234, dtype=torch.int64, device=random.device)
    return [random.normal(*shape), random.times(shape[0]), seed]


def _drawn_truth(inputs: list[Any], outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """x_t from the noise that came with it."""
    x0, t, _ = inputs
    return [peers.interpolate(x0, t, outputs[1]), outputs[1]]


def _straightening_inputs(random: Random, shape: tuple[int, ...]) -> list[Any]:
    return [*_tensors(3, random, shape), -0.05 - random.times(shape[0])]


def _contrastive_inputs(random: Random, shape: tuple[int, ...]) -> list[Any]:
    batch = shape[0]
    negatives = (torch.arange(batch, device=random.device) + batch // 2) % batch
    return [*_tensors(3, random, shape), negatives]


def _fgm_inputs(random: Random, shape: tuple[int, ...]) -> list[Any]:
    return [*_tensors(4, random, shape), random.times(shape[0])]


def _fgm_sid_inputs(random: Random, shape: tuple[int, ...]) -> list[Any]:
    return [*_fgm_inputs(random, shape), random.normal(*shape)]


def _fgm_sid(u: Any, v: Any, x0: Any, noise: Any, t: Any, u_uncond: Any) -> torch.Tensor:
    return losses.fgm(u, v, x0, noise, t, normalize="sid", u_uncond=u_uncond, guidance=4.5)


def _self_corrected_inputs(random: Random, shape: tuple[int, ...]) -> list[Any]:
    """Neighbours up to 0.1 away."""
    v, v_teacher, v_post, v_prev, x0, noise = _tensors(6, random, shape)
    t, before, after = (random.times(shape[0]) for _ in range(3))
    t_post, t_prev = t - before * t.clamp(max=0.1), t + after * (1 - t).clamp(max=0.1)
    return [v, t, v_teacher, v_post, t_post, v_prev, t_prev, x0, noise]


def _self_corrected_reads(inputs: Sequence[Any]) -> int:
    """Of x0 and noise, or of v_post, a sample reads what it is compared with."""
    v, _, v_teacher, v_post, t_post, v_prev, _, x0, noise = inputs
    truncated = t_post < TRUNC
    return size((v, v_teacher, v_prev, v_post[~truncated], x0[truncated], noise[truncated]))


def _self_corrected(*inputs: Any) -> torch.Tensor:
    return losses.self_corrected(*inputs, trunc=TRUNC)[0]


def _self_reflow_inputs(random: Random, shape: tuple[int, ...]) -> list[Any]:
    return [*_tensors(2, random, shape), random.times(shape[0])]


FLOW_MATCHING = Operation(
    name="flow_matching", family="loss", make=lambda r, s: _tensors(3, r, s),
    ours=losses.flow_matching, eager=peers.flow_matching,
    names=("v", "x0", "noise"), gradients=(0,), one_pass=True,
)  # fmt: skip
STRAIGHTENING = Operation(
    name="straightening", family="loss", make=_straightening_inputs,
    ours=losses.straightening, eager=peers.straightening,
    names=("v", "x_start", "x_end", "dt"), gradients=(0,), one_pass=True,
)  # fmt: skip
CONTRASTIVE = Operation(
    name="contrastive_flow_matching", family="loss", make=_contrastive_inputs,
    ours=losses.contrastive_flow_matching, eager=peers.contrastive_flow_matching,
    names=("v", "x0", "noise", "negatives"), gradients=(0,), one_pass=True,
)  # fmt: skip
FGM = Operation(
    name="fgm", family="loss", make=_fgm_inputs, ours=losses.fgm, eager=peers.fgm,
    names=("u", "v", "x0", "noise", "t"), gradients=(0, 1, 2), one_pass=True,
)  # fmt: skip
FGM_SID = Operation(
    name="fgm_sid_guided", family="loss", make=_fgm_sid_inputs, ours=_fgm_sid, eager=peers.fgm_sid,
    names=("u", "v", "x0", "noise", "t", "u_uncond"), gradients=(0, 1, 2, 5), one_pass=True,
)  # fmt: skip
SELF_CORRECTED = Operation(
    name="self_corrected", family="loss", make=_self_corrected_inputs,
    ours=_self_corrected, eager=peers.self_corrected,
    names=("v", "t", "v_teacher", "v_post", "t_post", "v_prev", "t_prev", "x0", "noise"),
    gradients=(0,), one_pass=True, reads=_self_corrected_reads,
)  # fmt: skip
SELF_REFLOW = Operation(
    name="self_reflow", family="loss", make=_self_reflow_inputs,
    ours=losses.self_reflow, eager=peers.self_reflow,
    names=("v_r", "v_1", "t"), gradients=(0,), one_pass=True,
)  # fmt: skip
INTERPOLATE = Operation(
    name="interpolate", family="noising", make=_interpolate_inputs,
    ours=lambda x0, t, noise: losses.interpolate(x0, t, noise)[0], eager=peers.interpolate,
    names=("x0", "t", "noise"),
)  # fmt: skip
SEEDED = Operation(
    name="interpolate_seeded", family="noising", make=_seeded_inputs,
    ours=lambda x0, t, seed: losses.interpolate(x0, t, seed=seed),
    eager=lambda x0, t, seed: peers.draw_and_interpolate(x0, t),
    names=("x0", "t", "seed"), truth=_drawn_truth,
)  # fmt: skip

TRAINED = (FLOW_MATCHING, STRAIGHTENING, CONTRASTIVE, FGM, SELF_CORRECTED, SELF_REFLOW)


def cases(context: Context) -> list[Case]:
    shapes = latent_shapes(context.level)
    found = [
        case
        for operation in TRAINED
        for case in cases_of(operation, shapes, tiny=TINY)
        # A loss is computed to be differentiated.
        if case.direction == "forward+backward" or context.level == "full"
    ]
    later = [(shape, 1 + priority) for shape, priority in shapes]
    for operation in (FGM_SID, INTERPOLATE, SEEDED):
        chosen = later if context.level == "full" else later[:2]
        found += [
            case
            for case in cases_of(operation, chosen, tiny=TINY)
            if case.direction == "forward+backward" or not operation.gradients
        ]
    return found


@pytest.mark.benchmark(timer=REPLAY)
def test_losses(case: Case, variant: str, replay: Any) -> None:
    replay(case, variant)
