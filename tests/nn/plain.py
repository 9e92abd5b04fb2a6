"""The network of `MMDiT` from its weights in the plainest PyTorch, and models to compare with it.

No fusion, no views, no operators of this package: what the formulas say.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from flowkernels.nn import MMDiT, MMDiTConfig
from flowkernels.nn.embeddings import patchify, sincos_positions_2d, timestep_embedding, unpatchify

CLASS_CONFIG = MMDiTConfig(
    image_size=(4, 6),
    in_channels=3,
    patch_size=2,
    dim=24,
    depth=3,
    heads=2,
    num_classes=5,
    class_tokens=2,
)
TEXT_CONFIG = MMDiTConfig(
    image_size=4,
    in_channels=2,
    patch_size=1,
    dim=16,
    depth=2,
    heads=2,
    mlp_ratio=3.0,
    text_dim=7,
    pooled_dim=9,
    qk_norm=True,
    frequency_dim=32,
)
# SD3.5's blocks: a second attention in the first and in the last, a table that is cropped.
DUAL_CONFIG = MMDiTConfig(
    image_size=(4, 6),
    in_channels=3,
    patch_size=2,
    dim=16,
    depth=3,
    heads=2,
    text_dim=7,
    pooled_dim=9,
    qk_norm=True,
    frequency_dim=32,
    positions="learned",
    position_side=5,
    dual_attention=(0, 2),
)
# FLUX's: single blocks, rotations, a guidance scale.
FLUX_CONFIG = MMDiTConfig(
    image_size=(4, 6),
    in_channels=2,
    patch_size=2,
    dim=24,
    depth=2,
    heads=2,
    text_dim=7,
    pooled_dim=9,
    qk_norm=True,
    frequency_dim=32,
    positions="rope",
    rope_axes=(4, 2, 6),
    single_depth=2,
    guidance_embed=True,
)
CONFIGS = {"classes": CLASS_CONFIG, "text": TEXT_CONFIG, "dual": DUAL_CONFIG, "flux": FLUX_CONFIG}


def build(config, seed=0, scale=0.3):
    """A model with no zeros in it, so that every weight matters."""
    torch.manual_seed(seed)
    model = MMDiT(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=scale)
    return model


def inputs(config, rows=3, dtype=torch.float32, lengths=True):
    """(x, t, conditions); dual and FLUX models get padded text too."""
    torch.manual_seed(1)
    x = torch.randn(rows, config.in_channels, *config.image_shape).to(dtype)
    t = torch.rand(rows)
    if config.text_dim is None:
        return x, t, {"labels": torch.randint(0, config.num_classes + 1, (rows,))}
    conditions = {
        "text": torch.randn(rows, 5, config.text_dim).to(dtype),
        "pooled": torch.randn(rows, config.pooled_dim).to(dtype),
    }
    if config.guidance_embed:
        conditions["guidance"] = 3 * torch.rand(rows)
    if lengths and config.positions != "sincos":
        conditions["text_lengths"] = torch.tensor([5, 2, 0] * rows)[:rows].clone()
    return x, t, conditions


def rotations(config, grid, context):
    """[S, E/2] complex: the turn of each pair of channels."""
    places = [(0, row, column) for row in range(grid[0]) for column in range(grid[1])]
    angles = [
        [
            place * config.rope_theta ** (-2 * i / axis)
            for place, axis in zip(coordinates, config.rope_axes, strict=True)
            for i in range(axis // 2)
        ]
        for coordinates in places + [(0, 0, 0)] * context
    ]
    angles = torch.tensor(angles, dtype=torch.float64)
    # The model's tables are float32.
    return torch.complex(angles.cos().float().double(), angles.sin().float().double())


class Plain:
    """The network of `config` with `weights`, a dictionary of its parameters."""

    def __init__(self, weights, config):
        self.weights, self.config = weights, config

    def __call__(self, x, t, labels=None, text=None, pooled=None, guidance=None, text_lengths=None):
        weights, config = self.weights, self.config
        D, depth = config.dim, config.depth
        grid = (x.shape[2] // config.patch_size, x.shape[3] // config.patch_size)
        h = self.linear("patch_embedding.projection", patchify(x, config.patch_size))
        h = h + self.positions(grid, x.dtype)

        def sinusoids(value):
            return timestep_embedding(value, config.frequency_dim).to(x.dtype)

        vector = self.mlp("time_embedding", sinusoids(t))
        if text is None:
            vector = vector + weights["class_embedding.weight"][labels]
            c = weights["context_embedding.table.weight"][labels].view(len(x), -1, D)
        else:
            vector = vector + self.mlp("pooled_embedding", pooled)
            c = self.linear("context_embedding", text)
        if guidance is not None:
            vector = vector + self.mlp("guidance_embedding", sinusoids(guidance))
        self.vector = F.silu(vector)
        self.turn = rotations(config, grid, c.shape[1]) if config.positions == "rope" else None
        rows = torch.arange(c.shape[1])
        valid = rows < (c.shape[1] if text_lengths is None else text_lengths[:, None])
        valid = valid.expand(len(x), -1)
        self.valid = torch.cat([torch.ones(len(x), h.shape[1], dtype=torch.bool), valid], 1)
        for i in range(depth):
            h, c = self.joint_block(i, h, c)
        joined = torch.cat([h, c], 1)
        for i in range(config.single_depth):
            joined = self.single_block(i, joined)
        h = joined[:, : h.shape[1]]
        shift, scale = self.modulation("final_modulation")
        out = self.linear("final", self.norm(h, shift, scale))
        return unpatchify(out, config.in_channels, config.patch_size, grid)

    def linear(self, name, h):
        return h @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def mlp(self, name, h):
        return self.linear(f"{name}.fc2", F.silu(self.linear(f"{name}.fc1", h)))

    def gelu_mlp(self, name, h):
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", h), approximate="tanh"))

    def norm(self, h, shift, scale):
        mean, variance = h.mean(-1, keepdim=True), h.var(-1, unbiased=False, keepdim=True)
        return (h - mean) / (variance + self.config.eps).sqrt() * (1 + scale) + shift

    def modulation(self, name):
        return [m[:, None] for m in self.linear(name, self.vector).split(self.config.dim, -1)]

    def positions(self, grid, dtype):
        config = self.config
        if config.positions == "rope":
            return 0
        if config.positions == "sincos":
            return sincos_positions_2d(config.dim, *grid).to(dtype)
        side = config.position_side
        table = self.weights["patch_embedding.positions"].reshape(side, side, -1)
        top, left = (side - grid[0]) // 2, (side - grid[1]) // 2
        return table[top : top + grid[0], left : left + grid[1]].reshape(-1, config.dim)

    def heads(self, h, name, count=3):
        """(q,) k, v, each [B, H, S, E], normed."""
        H, E = self.config.heads, self.config.head_dim
        parts = self.linear(f"{name}.qkv", h).chunk(count, -1)
        parts = [p.reshape(*p.shape[:2], H, E).transpose(1, 2) for p in parts]
        if self.config.qk_norm:
            for index, weight in ((-2, "k_weight"), *([(-3, "q_weight")] if count == 3 else [])):
                p = parts[index]
                rms = (p.square().mean(-1, keepdim=True) + self.config.eps).sqrt()
                parts[index] = p / rms * self.weights[f"{name}.qk_norm.{weight}"]
        return parts

    def turned(self, heads):
        """Queries or keys [B, H, S, E] of the first S tokens, each pair of channels turned."""
        if self.turn is None:
            return heads
        pairs = heads.unflatten(-1, (-1, 2))
        turn = self.turn[: heads.shape[2]]
        cos, sin = turn.real.to(heads.dtype), turn.imag.to(heads.dtype)
        a, b = pairs.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    def attention(self, q, k, v, valid=None):
        scores = q @ k.mT / self.config.head_dim**0.5
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None, None], float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def joint_block(self, i, h, c):
        config = self.config
        last = i == config.depth - 1 and not config.single_depth
        dual = i in config.dual_attention
        mods = self.modulation(f"modulations.{i}")
        x_mod, c_mod = (mods[:9], mods[9:]) if dual else (mods[:6], mods[6:])
        q, k, v = self.heads(self.norm(h, *x_mod[:2]), f"blocks.{i}.image")
        context = self.heads(self.norm(c, *c_mod[:2]), f"blocks.{i}.context", 2 if last else 3)
        q = q if last else torch.cat([q, context[0]], 2)
        k, v = torch.cat([k, context[-2]], 2), torch.cat([v, context[-1]], 2)
        out = self.attention(self.turned(q), self.turned(k), v, self.valid)
        streams = [("image", h, x_mod, out[:, : h.shape[1]])]
        if not last:
            streams.append(("context", c, c_mod, out[:, h.shape[1] :]))
        done = []
        for stream, s, (_, _, gate1, shift2, scale2, gate2, *second), attended in streams:
            name, before = f"blocks.{i}.{stream}", s
            s = s + gate1 * self.linear(f"{name}.out", attended)
            if second:
                alone = self.heads(self.norm(before, *second[:2]), f"{name}.dual")
                s = s + second[2] * self.linear(f"{name}.dual.out", self.attention(*alone))
            done.append(s + gate2 * self.gelu_mlp(f"{name}.mlp", self.norm(s, shift2, scale2)))
        return done[0], done[1] if len(done) == 2 else c

    def single_block(self, i, h):
        name = f"single_blocks.{i}"
        shift, scale, gate = self.modulation(f"single_modulations.{i}")
        normed = self.norm(h, shift, scale)
        q, k, v = self.heads(normed, name)
        attended = self.attention(self.turned(q), self.turned(k), v, self.valid)
        hidden = F.gelu(self.linear(f"{name}.fc1", normed), approximate="tanh")
        return h + gate * self.linear(f"{name}.out", torch.cat([attended, hidden], -1))


def gradients_of(function, x, weights):
    """(output, gradient of x, gradients of the weights) of a fixed random functional."""
    x = x.detach().requires_grad_()
    out = function(x)
    torch.manual_seed(2)
    weight = torch.randn(x.shape, dtype=torch.float64).to(out.dtype)
    return out, *torch.autograd.grad((out * weight).sum(), [x, *weights])


def run(config, dtype):
    """(model, plain) in `dtype`, each an output and all gradients."""
    model = build(config).to(dtype)
    x, t, conditions = inputs(config, dtype=dtype)
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    plain = Plain(weights, config)
    mine = gradients_of(lambda x: model(x, t, **conditions), x, list(model.parameters()))
    other = gradients_of(lambda x: plain(x, t, **conditions), x, list(weights.values()))
    return mine, other
