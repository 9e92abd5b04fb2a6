"""gan_generator, gan_discriminator, r1_penalty: the checks of every op, and what is their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import flowkernels
from flowkernels.losses import gan_discriminator, gan_generator, r1_penalty
from flowkernels.ops import _library
from tests.checks import OpChecks
from tests.checks.cases import adversarial as cases
from tests.checks.contexts import interpretable

KERNELS = "triton" if _library.INTERPRETED else "native"
BACKENDS = pytest.mark.parametrize(
    "backend", [KERNELS] if _library.INTERPRETED else [KERNELS, "reference"]
)


class TestGANGenerator(OpChecks):
    case = cases.GAN_GENERATOR


class TestGANDiscriminator(OpChecks):
    case = cases.GAN_DISCRIMINATOR


class TestGradientPenalty(OpChecks):
    case = cases.R1_PENALTY


def value_and_gradient(loss_of, x):
    x = x.clone().requires_grad_()
    loss = loss_of(x)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


@interpretable
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saturated_logits_are_exact(backend, dtype):
    """|logit| = 1e4, and the infinities: no overflow, no 0·∞, and no softplus(x) ≠ x far out."""
    for size in (1e4, float("inf")):
        logits = torch.tensor([size, -size], dtype=dtype)
        size = logits[0].float()  # 1e4 rounded to dtype
        with flowkernels.backend(backend):
            found, gradient = value_and_gradient(gan_generator, logits)
            right = value_and_gradient(lambda x: gan_discriminator(x[:1], x[1:]), logits)
            wrong = value_and_gradient(lambda x: gan_discriminator(x[1:], x[:1]), logits)
        assert torch.equal(found, size / 2)
        assert gradient.tolist() == [0.0, -0.5]
        assert right[0] == 0
        assert right[1].tolist() == [0.0, 0.0]
        assert torch.equal(wrong[0], 2 * size)
        assert wrong[1].tolist() == [1.0, -1.0]


@interpretable
@BACKENDS
def test_small_losses_keep_their_digits(backend):
    """A logit of 30: e⁻³⁰ = 9e-14, not the 0 that ln(1 + e⁻³⁰) rounds to."""
    logits = torch.tensor([[30.0], [80.0]])
    with flowkernels.backend(backend):
        for each in logits:
            loss, gradient = value_and_gradient(gan_generator, each)
            exact = torch.exp(-each.double())
            # The exponential of float32 has 1 ulp of its result, and 2 of what it reduces.
            torch.testing.assert_close(loss.double(), exact[0], rtol=1e-6, atol=0)
            torch.testing.assert_close(gradient.double(), -exact, rtol=1e-6, atol=0)


@interpretable
@BACKENDS
def test_at_zero_logits(backend):
    """ln 2 and half a gradient: were a sigmoid before the softplus, this would be ln(1 + √e)."""
    with flowkernels.backend(backend):
        loss, gradient = value_and_gradient(gan_generator, torch.zeros(4, 1))
        both = gan_discriminator(torch.zeros(4), torch.zeros(3, 2))
    torch.testing.assert_close(loss, torch.tensor(0.6931471805599453))
    torch.testing.assert_close(gradient, torch.full((4, 1), -0.125))
    torch.testing.assert_close(both, torch.tensor(2 * 0.6931471805599453))


@interpretable
@BACKENDS
def test_float16_gradients_survive_a_grad_scaler(backend):
    """1/N of 300 000 logits is 3e-6, which float16 holds with 5 bits: the scale comes first."""
    logits = torch.zeros(300_001, dtype=torch.float16, requires_grad=True)
    with flowkernels.backend(backend):
        (gradient,) = torch.autograd.grad(gan_generator(logits), logits, torch.tensor(65536.0))
    expected = torch.full((300_001,), -0.5 * 65536 / 300_001)
    torch.testing.assert_close(gradient.float(), expected, rtol=2**-11, atol=0)


class Critic(nn.Module):
    """Smooth, and apart from its scale too small for a test to be slow."""

    def __init__(self, features: int, hidden: int = 7) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Parameter(torch.randn(features, hidden, generator=generator))
        self.second = nn.Parameter(torch.randn(hidden, generator=generator))

    def forward(self, x):
        return torch.tanh(x.flatten(1) @ self.first) @ self.second


def literal_r1(critic, real, gamma):
    """γ/2 of the mean over samples of ‖∇D(x_b)‖², a sample at a time."""
    total = 0.0
    for sample in real.detach():
        x = sample[None].requires_grad_()
        (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        total = total + gradient.square().sum()
    return gamma / 2 * total / len(real)


@pytest.fixture
def real():
    torch.manual_seed(0)
    return torch.randn(5, 3, 4, requires_grad=True)


@interpretable
@BACKENDS
def test_r1_is_the_literal_formula(backend, real):
    """Value, and gradients to the weights and the images, against float64, sample by sample."""
    critic = Critic(12)
    with flowkernels.backend(backend):
        penalty = r1_penalty(critic(real), real, 0.6)
        found = torch.autograd.grad(penalty, [*critic.parameters(), real])
    exact_critic = Critic(12).double()
    exact_real = real.detach().double()
    exact = literal_r1(exact_critic, exact_real, 0.6)
    wanted = torch.autograd.grad(exact, list(exact_critic.parameters()))
    # float32 against float64 through two backward passes of a 12-feature network.
    torch.testing.assert_close(penalty.double(), exact, rtol=1e-5, atol=0)
    for ours, truth in zip(found, wanted, strict=False):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-5)
    shifted = exact_real.clone().requires_grad_()
    again = r1_penalty(exact_critic(shifted), shifted, 0.6)
    (to_real,) = torch.autograd.grad(again, shifted)
    torch.testing.assert_close(found[2].double(), to_real, rtol=1e-4, atol=1e-5)


def test_r1_gradient_to_the_weights_by_finite_differences(real):
    critic = Critic(12).double()
    x = real.detach().double().requires_grad_()

    def penalty(first, second):
        logits = torch.tanh(x.flatten(1) @ first) @ second
        return r1_penalty(logits, x, 1.3)

    assert torch.autograd.gradcheck(penalty, tuple(critic.parameters()))


@interpretable
@BACKENDS
def test_r1_of_a_linear_critic(backend):
    """The gradient of x·w is w for every sample: γ/2·‖w‖², with gradient γ·w, to the last bit."""
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    x = torch.randn(8, 2, requires_grad=True)
    with flowkernels.backend(backend):
        penalty = r1_penalty(x @ weight, x, 2.0)
    assert penalty.item() == 25.0
    penalty.backward()
    assert weight.grad.tolist() == [6.0, 8.0]


@interpretable
@BACKENDS
def test_r1_beside_the_discriminators_loss(backend, real):
    """One backward pass over both, as a training step does; a second one gives the same."""
    critic = Critic(12)
    fake = torch.randn(5, 3, 4)
    with flowkernels.backend(backend):
        logits = critic(real)
        loss = gan_discriminator(logits, critic(fake)) + r1_penalty(logits, real, 1.0)
        weights = list(critic.parameters())
        found = torch.autograd.grad(loss, weights, retain_graph=True)
        parts = [
            torch.autograd.grad(part, weights, retain_graph=True)
            for part in (
                gan_discriminator(logits, critic(fake)),
                r1_penalty(logits, real, 1.0),
            )
        ]
        again = torch.autograd.grad(loss, weights)
    for total, first, second, repeated in zip(found, *parts, again, strict=True):
        torch.testing.assert_close(total, first + second)
        assert torch.equal(total, repeated)


@BACKENDS
def test_r1_through_our_own_operators(backend):
    """A discriminator made of fused operators: each has a second order."""
    from flowkernels.ops import gelu_tanh, modulated_norm

    torch.manual_seed(0)
    weight = torch.randn(8, requires_grad=True)

    def penalty(dtype, name):
        x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
        x.requires_grad_()
        with flowkernels.backend(name):
            logits = (gelu_tanh(modulated_norm(x)) @ weight.to(dtype)).mean(1)
            loss = r1_penalty(logits, x, 1.0)
            return loss, torch.autograd.grad(loss, weight)[0]

    loss, gradient = penalty(torch.float32, backend)
    exact, exact_gradient = penalty(torch.float64, "reference")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-4, atol=1e-6)


def test_r1_takes_logits_of_any_shape(real):
    """Patches, one a sample, or their sum already: it is the sum that is differentiated."""
    weight = torch.randn(12)

    def penalty(shape):
        logits = (real.flatten(1) * weight).square()
        return r1_penalty(logits.view(shape), real, 1.0)

    expected = penalty((5, 12))
    for shape in ((5, 1, 3, 4), (60,)):
        torch.testing.assert_close(penalty(shape), expected)
    total = (real.flatten(1) * weight).square().sum()
    torch.testing.assert_close(r1_penalty(total, real, 1.0), expected)


def test_r1_wants_as_many_logits_for_each_sample(real):
    with pytest.raises(ValueError, match="logits: got 3 for 5 samples"):
        r1_penalty(real.flatten(1).sum(1)[:3], real, 1.0)
    with pytest.raises(ValueError, match="gamma: got inf"):
        r1_penalty(real.flatten(1).sum(1), real, float("inf"))


def test_r1_reads_each_samples_own_gradient_unless_the_discriminator_mixes(real):
    """What the docstring says of minibatch statistics: rows hold a sample's effect on all."""
    alone = r1_penalty(real.flatten(1).sum(1), real, 2.0)
    mixed = r1_penalty(real.flatten(1).sum(1) + real.sum(), real, 2.0)
    torch.testing.assert_close(alone, torch.tensor(12.0))
    torch.testing.assert_close(mixed, torch.tensor(12.0 * (1 + 5) ** 2))


def test_r1_under_autocast(real):
    """The discriminator in bfloat16, the penalty in float32."""
    layer = nn.Linear(12, 1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(real.flatten(1))
        penalty = r1_penalty(logits, real, 1.0)
    assert logits.dtype == torch.bfloat16
    assert penalty.dtype == torch.float32
    penalty.backward()
    rounded = layer.weight.detach().bfloat16().float()
    torch.testing.assert_close(penalty.detach(), rounded.square().sum() / 2)
    # Its gradient is γ·w in bfloat16, of which each step through the graph rounds.
    torch.testing.assert_close(layer.weight.grad, rounded, rtol=2**-7, atol=0)


def test_r1_does_not_autocast_the_backward_pass(real):
    """A discriminator that ran in float32 has its gradients in float32 inside autocast too."""
    critic = Critic(12)
    logits = critic(real)
    expected = r1_penalty(logits, real, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(r1_penalty(logits, real, 1.0), expected)


def test_r1_of_a_compiled_discriminator_is_pytorchs_error_not_a_wrong_gradient(real):
    """The docstring's reason to leave it uncompiled: a compiled graph has one backward pass."""
    critic = Critic(12)
    torch._dynamo.reset()
    compiled = torch.compile(critic, backend="aot_eager")
    penalty = r1_penalty(compiled(real), real, 1.0)
    torch.testing.assert_close(penalty, r1_penalty(critic(real), real, 1.0))
    with pytest.raises(RuntimeError, match="double backward"):
        penalty.backward()


NO_GRAPH = "^r1_penalty: no graph is recorded here"
ERRORS = {
    "real without a gradient": (
        ValueError,
        r"^real: does not require grad, need real.requires_grad_\(\)",
        lambda critic, x: r1_penalty(critic(x), x.detach(), 1.0),
    ),
    "logits of other images": (
        ValueError,
        "^logits: do not depend on real",
        lambda critic, x: r1_penalty(critic(x.detach()), x, 1.0),
    ),
    "logits without a graph": (
        ValueError,
        "^logits: do not depend on real",
        lambda critic, x: r1_penalty(critic(x).detach(), x, 1.0),
    ),
    "a negative gamma": (
        ValueError,
        "^gamma: got -1.0, need a number of at least 0",
        lambda critic, x: r1_penalty(critic(x), x, -1.0),
    ),
    "a gamma that is no number": (
        ValueError,
        "^gamma: got nan, need",
        lambda critic, x: r1_penalty(critic(x), x, float("nan")),
    ),
    "a string for gamma": (
        TypeError,
        "^gamma: got str, need a number",
        lambda critic, x: r1_penalty(critic(x), x, "1"),
    ),
    "integer images": (
        TypeError,
        "^real: got dtype torch.int64",
        lambda critic, x: r1_penalty(critic(x), x.long(), 1.0),
    ),
    "a list for logits": (
        TypeError,
        "^logits: got list",
        lambda critic, x: r1_penalty([1.0], x, 1.0),
    ),
    "real without a dimension": (
        ValueError,
        "^real: got a tensor with no dimension",
        lambda critic, x: r1_penalty(critic(x), x.sum(), 1.0),
    ),
    "logits elsewhere": (
        ValueError,
        "^logits: is on meta, need cpu",
        lambda critic, x: r1_penalty(torch.ones(5, device="meta"), x, 1.0),
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_r1_names_what_is_wrong(case, real):
    error, match, call = ERRORS[case]
    with pytest.raises(error, match=match) as caught:
        call(Critic(12), real)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_r1_is_refused_where_no_graph_is_recorded(context, real):
    logits = Critic(12)(real)
    with context(), pytest.raises(RuntimeError, match=NO_GRAPH):
        r1_penalty(logits, real, 1.0)


def test_gamma_of_zero_and_of_a_numpy_scalar(real):
    import numpy as np

    critic = Critic(12)
    penalty = r1_penalty(critic(real), real, 0)
    penalty.backward()
    assert penalty.item() == 0
    assert not critic.first.grad.any()
    torch.testing.assert_close(
        r1_penalty(critic(real), real, np.float64(0.5)),
        r1_penalty(critic(real), real, torch.tensor(0.5)),
    )
