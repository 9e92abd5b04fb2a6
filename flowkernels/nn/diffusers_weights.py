"""diffusers' SD3 and FLUX transformers as states of `MMDiT`, and back, to the bit.

Every tensor of `MMDiT` is made of whole tensors of diffusers' model: alone, or several one under
the other (queries, keys and values; the modulations of a block's two streams). Some are laid out
otherwise: see `Form`. `links` is the one list of them, read in both directions; a tensor that is
in no link, on either side, is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowkernels.nn import diffusers_config
from flowkernels.nn.config import MMDiTConfig

State = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Form:
    """A reordering between diffusers' tensor and the rows that it is here, exact both ways."""

    ours: Callable[[Tensor], Tensor]
    theirs: Callable[[Tensor], Tensor]  # up to a reshape to their shape


def _swapped(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


PLAIN = Form(lambda tensor: tensor, lambda tensor: tensor)
# (scale, shift) there, (shift, scale) here.
SWAPPED = Form(_swapped, _swapped)
# A convolution [D, C, p, p] there, a matrix on flattened patches here.
CONVOLUTION = Form(lambda tensor: tensor.flatten(1), lambda tensor: tensor)
# [1, M², D] there.
TABLE = Form(lambda tensor: tensor.squeeze(0), lambda tensor: tensor)
# FLUX packs the values of a patch channel first; the last layer here has channels last.
PACKED = Form(
    lambda tensor: tensor.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1),
    lambda tensor: tensor.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1),
)

Piece = tuple[str, Form]
Link = tuple[str, tuple[Piece, ...]]


def read(model: nn.Module) -> tuple[MMDiTConfig, State]:
    """The configuration and the state of `MMDiT` for a diffusers model, in new memory.

    Raises:
        ImportError, TypeError, ValueError: see `MMDiT.from_diffusers`.
    """
    config = diffusers_config.read(model)
    theirs = dict(model.state_dict())
    state: State = {}
    for ours, pieces in links(config):
        missing = [name for name, _ in pieces if name not in theirs]
        if missing:
            raise ValueError(f"{type(model).__name__} has no weight {', '.join(missing)}")
        parts = [form.ours(theirs.pop(name).detach()) for name, form in pieces]
        # Joined, they have one dtype and one device; mixed ones would not come back as they were.
        for kind in ("dtype", "device"):
            found = {str(getattr(part, kind)) for part in parts}
            if len(found) > 1:
                names = ", ".join(name for name, _ in pieces)
                raise ValueError(f"{names} have {kind}s {', '.join(sorted(found))}; need one")
        state[ours] = torch.cat(parts)
    if theirs:
        raise ValueError(
            f"{type(model).__name__} has weights that MMDiT has no place for (adapters and fused "
            f"projections must be removed first): {_some(theirs)}"
        )
    return config, state


def write(config: MMDiTConfig, state: Mapping[str, Tensor]) -> Any:
    """The diffusers model of a configuration and a state of `MMDiT`, in new memory.

    Raises:
        ImportError, ValueError: see `MMDiT.to_diffusers`.
    """
    model = diffusers_config.build(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    ours = dict(state)
    if not (config.context_queries or config.single_depth):
        ours.update(_absent_queries(config, ours))
        config = dataclasses.replace(config, context_queries=True)
    theirs: State = {}
    for name, pieces in links(config):
        tensor = ours.pop(name).detach()
        # Among several, a piece has as many rows here as there.
        rows = [shapes[piece][0] for piece, _ in pieces] if len(pieces) > 1 else len(tensor)
        for (piece, form), part in zip(pieces, tensor.split(rows), strict=True):
            theirs[piece] = form.theirs(part).reshape(shapes[piece]).clone()
    if ours:
        raise ValueError(f"state has weights that diffusers has no place for: {_some(ours)}")
    model.load_state_dict(theirs, strict=True, assign=True)
    return model


def _absent_queries(config: MMDiTConfig, state: State) -> State:
    """The last context's query weights where the model has none: zero, and nobody reads them."""
    name = f"blocks.{config.depth - 1}.context."
    bias = state[name + "qkv.bias"]
    absent = {
        "unused_q_weight": bias.new_zeros(config.dim, config.dim),
        "unused_q_bias": bias.new_zeros(config.dim),
    }
    if config.qk_norm:
        absent["unused_q_norm"] = torch.ones_like(state[name + "qk_norm.k_weight"])
    return {name + key: value for key, value in absent.items()}


def links(config: MMDiTConfig) -> Iterator[Link]:
    """Each tensor of `MMDiT` with the tensors of diffusers' model that it is made of, in order."""
    flux = config.positions == "rope"
    yield from _embeddings(config, flux)
    for index in range(config.depth):
        pre_only = index == config.depth - 1 and not flux
        dual = index in config.dual_attention
        yield from _joint_block(config, index, pre_only=pre_only, dual=dual)
    for index in range(config.single_depth):
        yield from _single_block(config, index)
    yield from _linear("final_modulation", "norm_out.linear", form=SWAPPED)
    yield from _linear("final", "proj_out", form=PACKED if flux else PLAIN)


def _linear(ours: str, *theirs: str, form: Form = PLAIN) -> Iterator[Link]:
    """Weight and bias of a linear layer made of one or more."""
    for kind in ("weight", "bias"):
        yield f"{ours}.{kind}", tuple((f"{name}.{kind}", form) for name in theirs)


def _embeddings(config: MMDiTConfig, flux: bool) -> Iterator[Link]:
    patch = "patch_embedding.projection"
    if flux:
        yield from _linear(patch, "x_embedder")
    else:
        yield f"{patch}.weight", (("pos_embed.proj.weight", CONVOLUTION),)
        yield f"{patch}.bias", (("pos_embed.proj.bias", PLAIN),)
        yield "patch_embedding.positions", (("pos_embed.pos_embed", TABLE),)
    for ours, theirs in (
        ("time_embedding", "timestep_embedder"),
        ("pooled_embedding", "text_embedder"),
        *([("guidance_embedding", "guidance_embedder")] if config.guidance_embed else []),
    ):
        for number in (1, 2):
            yield from _linear(f"{ours}.fc{number}", f"time_text_embed.{theirs}.linear_{number}")
    yield from _linear("context_embedding", "context_embedder")


def _joint_block(config: MMDiTConfig, index: int, *, pre_only: bool, dual: bool) -> Iterator[Link]:
    ours, theirs = f"blocks.{index}", f"transformer_blocks.{index}"
    context_form = SWAPPED if pre_only else PLAIN
    for kind in ("weight", "bias"):
        yield (
            f"modulations.{index}.{kind}",
            (
                (f"{theirs}.norm1.linear.{kind}", PLAIN),
                (f"{theirs}.norm1_context.linear.{kind}", context_form),
            ),
        )
    image, context, attention = f"{ours}.image", f"{ours}.context", f"{theirs}.attn"
    yield from _attention(config, image, attention, "to_{}", "norm_{}")
    yield from _linear(f"{image}.out", f"{attention}.to_out.0")
    yield from _feed_forward(f"{image}.mlp", f"{theirs}.ff")
    if dual:
        yield from _attention(config, f"{image}.dual", f"{theirs}.attn2", "to_{}", "norm_{}")
        yield from _linear(f"{image}.dual.out", f"{theirs}.attn2.to_out.0")
    added = (context, attention, "add_{}_proj", "norm_added_{}")
    if pre_only:
        yield from _attention(config, *added, keys_only=True)
        yield f"{context}.unused_q_weight", ((f"{attention}.add_q_proj.weight", PLAIN),)
        yield f"{context}.unused_q_bias", ((f"{attention}.add_q_proj.bias", PLAIN),)
        if config.qk_norm:
            yield f"{context}.unused_q_norm", ((f"{attention}.norm_added_q.weight", PLAIN),)
        return
    yield from _attention(config, *added)
    yield from _linear(f"{context}.out", f"{attention}.to_add_out")
    yield from _feed_forward(f"{context}.mlp", f"{theirs}.ff_context")


def _single_block(config: MMDiTConfig, index: int) -> Iterator[Link]:
    ours, theirs = f"single_blocks.{index}", f"single_transformer_blocks.{index}"
    yield from _linear(f"single_modulations.{index}", f"{theirs}.norm.linear")
    yield from _attention(config, ours, f"{theirs}.attn", "to_{}", "norm_{}")
    yield from _linear(f"{ours}.fc1", f"{theirs}.proj_mlp")
    yield from _linear(f"{ours}.out", f"{theirs}.proj_out")


def _attention(
    config: MMDiTConfig,
    ours: str,
    theirs: str,
    projection: str,
    norm: str,
    *,
    keys_only: bool = False,
) -> Iterator[Link]:
    """Queries, keys and values in one matrix, and the norms of the first two."""
    names = ("k", "v") if keys_only else ("q", "k", "v")
    yield from _linear(f"{ours}.qkv", *(f"{theirs}.{projection.format(n)}" for n in names))
    if config.qk_norm:
        for name in ("k",) if keys_only else ("q", "k"):
            piece = f"{theirs}.{norm.format(name)}.weight"
            yield f"{ours}.qk_norm.{name}_weight", ((piece, PLAIN),)


def _feed_forward(ours: str, theirs: str) -> Iterator[Link]:
    yield from _linear(f"{ours}.fc1", f"{theirs}.net.0.proj")
    yield from _linear(f"{ours}.fc2", f"{theirs}.net.2")


def _some(names: Mapping[str, Tensor]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(listed[:5]) + more
