"""Training steps in plain PyTorch: what ours are measured against, network, losses and updates.

The plan of network calls is ours (batched calls, no graph where none is needed), so that what is
compared is how each piece is computed. Losses are functions of drawn numbers, so that each can be
compiled whole; a penalty on gradients cannot be, and stays eager.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowkernels.nn import MMDiT
from flowkernels.nn.embeddings import timestep_embedding, unpatchify

Compiler = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
Losses = Callable[[Any, Tensor, Tensor, str], list[Tensor]]


def under_autocast(losses: Losses) -> Losses:
    """A step's losses in bfloat16 where its `autocast` says so, over float32 weights."""

    @functools.wraps(losses)
    def wrapped(self: Any, x: Tensor, labels: Tensor, phase: str) -> list[Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            return losses(self, x, labels, phase)

    return wrapped


class PlainMMDiT(MMDiT):
    """The weights of a class-conditional `MMDiT`; the forward pass as it is commonly written."""

    def forward(self, x: Tensor, t: Tensor, *, labels: Tensor) -> Tensor:  # type: ignore[override]
        vector = self.time_embedding(timestep_embedding(t, self.config.frequency_dim))
        vector = F.silu(vector + self.class_embedding(labels))
        h, c = self.patch_embedding(x), self.context_embedding(labels)
        for block, modulation in zip(self.blocks, self.modulations, strict=True):
            h, c = self._joint(block, modulation(vector), h, c)
        shift, scale = self.final_modulation(vector).chunk(2, -1)
        side = x.shape[-1] // self.config.patch_size
        out = self.final(self._norm(h, shift, scale))
        return unpatchify(out, self.config.in_channels, self.config.patch_size, (side, side))

    def _norm(self, h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normed = F.layer_norm(h, (h.shape[-1],), eps=self.config.eps)
        return normed * (1 + scale[:, None]) + shift[:, None]

    def _joint(self, block: nn.Module, modulation: Tensor, h: Tensor, c: Tensor) -> list[Tensor]:
        parts = modulation.chunk(modulation.shape[-1] // self.config.dim, -1)
        streams = [(block.image, h, parts[:6]), (block.context, c, parts[6:])]
        heads = []
        for stream, state, (shift, scale, *_) in streams:
            qkv = stream.qkv(self._norm(state, shift, scale))
            heads.append(qkv.unflatten(-1, (-1, self.config.heads, self.config.head_dim)))
        k, v = (
            torch.cat([each[:, :, index] for each in heads], 1).transpose(1, 2)
            for index in (-2, -1)
        )
        q = torch.cat([each[:, :, 0] for each in heads if each.shape[2] == 3], 1).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        done, start = [], 0
        for stream, state, (_, _, *rest) in streams:
            if not rest:  # the last block's context, read by nobody
                done.append(state)
                continue
            gate, shift, scale, mlp_gate = rest
            rows = attended[:, start : start + state.shape[1]]
            start += state.shape[1]
            state = state + gate[:, None] * stream.out(rows)
            hidden = stream.mlp.fc1(self._norm(state, shift, scale))
            branch = stream.mlp.fc2(F.gelu(hidden, approximate="tanh"))
            done.append(state + mlp_gate[:, None] * branch)
        return done


def plain(model: MMDiT) -> PlainMMDiT:
    """The same weights and settings, as a plain network."""
    made = PlainMMDiT(model.config).to(next(model.parameters()).device)
    made.load_state_dict(model.state_dict())
    for mine, theirs in zip(made.parameters(), model.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return made.train(model.training)


class Updater:
    """Fused AdamW, and an average of the weights."""

    def __init__(
        self, module: nn.Module, lr: float, betas: tuple[float, float], decay: float | None
    ) -> None:
        self.weights = [p for p in module.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self.weights, lr, betas=betas, weight_decay=0.0, fused=True
        )
        self._decay = decay
        self._average = [p.detach().clone() for p in self.weights] if decay is not None else []

    def step(self, losses: Iterable[Tensor]) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses)).sum().backward()
        self._optimizer.step()
        if self._decay is not None:
            torch._foreach_lerp_(self._average, [p.detach() for p in self.weights], 1 - self._decay)


def frozen(module: nn.Module, flag: bool) -> None:
    for parameter in module.parameters():
        parameter.requires_grad_(not flag)


def column(t: Tensor) -> Tensor:
    return t[:, None, None, None]


# ---- Flow Generator Matching --------------------------------------------------------------------


def fake_loss(fake: nn.Module, x0: Tensor, t: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
    x_t = (1 - column(t)) * x0 + column(t) * noise
    return F.mse_loss(fake(x_t, t, labels=labels), noise - x0)


def one_step(generator: nn.Module, z: Tensor, labels: Tensor) -> Tensor:
    return z - generator(z, torch.ones(len(z), device=z.device), labels=labels)


def generator_loss(
    teacher: nn.Module,
    fake: nn.Module,
    generator: nn.Module,
    z: Tensor,
    t: Tensor,
    noise: Tensor,
    labels: Tensor,
) -> Tensor:
    """λ = 0 with SiD's normaliser."""
    x0 = one_step(generator, z, labels)
    x_t = (1 - column(t)) * x0 + column(t) * noise
    u, v, w = teacher(x_t, t, labels=labels), fake(x_t, t, labels=labels), noise - x0
    size = (u - w).abs().mean((1, 2, 3)).clamp(min=1e-5).detach()
    each = (2 * (u - v) * (v - w)).mean((1, 2, 3))
    return (each * t / (2 * size)).mean()


class PlainFGM:
    """One FGM step of the digits recipe."""

    autocast = False

    def __init__(self, networks: dict[str, MMDiT], compiler: Compiler) -> None:
        self.teacher, self.generator, self.fake = (
            plain(networks[name]) for name in ("teacher", "generator", "fake")
        )
        self._fake_loss, self._generator_loss = compiler(fake_loss), compiler(generator_loss)
        self._one_step = compiler(one_step)
        self._updaters = {
            "fake": Updater(self.fake, 6e-4, (0.0, 0.999), None),
            "generator": Updater(self.generator, 3e-4, (0.0, 0.999), 0.99),
        }

    @under_autocast
    def losses(self, x: Tensor, labels: Tensor, phase: str) -> list[Tensor]:
        z = torch.randn_like(x)
        if phase == "fake":
            frozen(self.fake, False)
            with torch.no_grad():
                x0 = self._one_step(self.generator, z, labels)
            t = 0.02 + 0.96 * torch.rand(len(x), device=x.device)
            return [self._fake_loss(self.fake, x0, t, torch.randn_like(x), labels)]
        frozen(self.fake, True)
        t = 0.02 + 0.96 * torch.rand(len(x), device=x.device)
        noise = torch.randn_like(x)
        return [self._generator_loss(self.teacher, self.fake, self.generator, z, t, noise, labels)]

    def step(self, x: Tensor, labels: Tensor) -> None:
        for phase, updater in self._updaters.items():
            updater.step(self.losses(x, labels, phase))


# ---- Self-Corrected Flow ------------------------------------------------------------------------


def huber(d: Tensor, c: float = 0.01) -> Tensor:
    return (d * d + c * c).sqrt() - c


def scflow_targets(
    teacher: nn.Module,
    target: nn.Module,
    x_t: Tensor,
    t: Tensor,
    t_post: Tensor,
    t_prev: Tensor,
    labels: Tensor,
) -> Tensor:
    """The endpoints that the target network sees from both neighbours, [2B, ...]."""
    v = teacher(x_t, t, labels=labels)
    x = torch.cat([x_t + column(t_post - t) * v, x_t + column(t_prev - t) * v])
    times = torch.cat([t_post, t_prev])
    return x - column(times) * target(x, times, labels=torch.cat([labels, labels]))


def scflow_student(
    student: nn.Module,
    discriminator: nn.Module,
    x0: Tensor,
    noise: Tensor,
    x_t: Tensor,
    t: Tensor,
    t_post: Tensor,
    endpoints: Tensor,
    labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of all four terms, and the one-step images."""
    post, prev = endpoints.chunk(2)
    both = student(
        torch.cat([x_t, noise]),
        torch.cat([t, torch.ones_like(t)]),
        labels=torch.cat([labels, labels]),
    )
    v, v_1 = both.chunk(2)
    f = x_t - column(t) * v
    fake = noise - v_1
    loss = huber(f - torch.where(column(t_post) < 0.4, x0, post)).mean()
    loss = loss + 0.1 * huber(f - prev).mean()
    loss = loss + 0.1 * F.softplus(-discriminator(fake, None, labels=labels)).mean()
    image = fake.detach()
    x_r = (1 - column(t)) * image + column(t) * noise
    f_r = x_r - column(t) * student(x_r, t, labels=labels)
    return loss + 0.1 * F.mse_loss(f_r, image), image


class PlainSCFlow:
    """One SCFlow step of the digits recipe, after its warm-ups."""

    autocast = False

    def __init__(
        self,
        networks: dict[str, MMDiT],
        discriminator: nn.Module,
        compiler: Compiler,
        r1_every: int,
    ) -> None:
        self.teacher, self.student, self.target = (
            plain(networks[name]) for name in ("teacher", "student", "target")
        )
        self.discriminator = copy.deepcopy(discriminator)
        self._targets, self._student_loss = compiler(scflow_targets), compiler(scflow_student)
        self._steps, self._r1_every = 0, r1_every
        self._images = torch.empty(0)
        self._updaters = {
            "student": Updater(self.student, 3e-4, (0.9, 0.999), 0.98),
            "discriminator": Updater(self.discriminator, 4e-4, (0.9, 0.999), None),
        }

    @under_autocast
    def losses(self, x0: Tensor, labels: Tensor, phase: str) -> list[Tensor]:
        frozen(self.discriminator, phase == "student")
        if phase == "student":
            return [self._student_phase(x0, labels)]
        due = self._steps % self._r1_every == 0
        real = x0.detach().requires_grad_(due)
        real_logits = self.discriminator(real, None, labels=labels)
        fake_logits = self.discriminator(self._images, None, labels=labels)
        losses = [F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()]
        if due:
            (slope,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
            losses.append(self._r1_every / 2 * slope.square().sum((1, 2, 3)).mean())
        return losses

    def _student_phase(self, x0: Tensor, labels: Tensor) -> Tensor:
        noise = torch.randn_like(x0)
        t = torch.rand(len(x0), device=x0.device)
        down, up = torch.rand((2, len(x0)), device=x0.device)
        t_post = t - down * t.clamp(max=0.1)
        t_prev = t + up * (1 - t).clamp(max=0.1)
        x_t = (1 - column(t)) * x0 + column(t) * noise
        with torch.no_grad():
            ends = self._targets(self.teacher, self.target, x_t, t, t_post, t_prev, labels)
        loss, self._images = self._student_loss(
            self.student, self.discriminator, x0, noise, x_t, t, t_post, ends, labels
        )
        return loss

    def step(self, x0: Tensor, labels: Tensor) -> None:
        for phase, updater in self._updaters.items():
            updater.step(self.losses(x0, labels, phase))
        targets = [p.detach() for p in self.target.parameters()]
        torch._foreach_lerp_(targets, [p.detach() for p in self.student.parameters()], 0.1)
        self._steps += 1
