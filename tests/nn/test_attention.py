"""Joint attention of two streams against softmax written out in float64."""

import pytest
import torch

from flowkernels.nn import joint_attention


def streams(dtype, lengths=(5, 3), keys_only=False):
    """Strided views of one projection per stream, as the blocks pass them."""
    torch.manual_seed(0)
    first, second = (torch.randn(2, S, 3, 4, 8).to(dtype).requires_grad_() for S in lengths)
    q, k, v = second.unbind(2)
    return first, second, (first.unbind(2), (q[:, :0] if keys_only else q, k, v))


def plain(first, second):
    q, k, v = (torch.cat([a, b], 1).transpose(1, 2) for a, b in zip(first, second, strict=True))
    out = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    out = out.transpose(1, 2).flatten(2)
    return out[:, : first[0].shape[1]], out[:, first[0].shape[1] :]


def results(function, dtype, **options):
    first, second, pair = streams(dtype, **options)
    outs = function(*pair)
    loss = sum((out * out).sum() for out in outs)
    return [*outs, *torch.autograd.grad(loss, [first, second])]


@pytest.mark.parametrize("keys_only", [False, True])
@pytest.mark.parametrize(
    # float64 by two algorithms; then the dtype's own rounding of values of size 1 to 10
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.01)],
)
def test_equals_softmax(dtype, tolerance, keys_only):
    mine = results(joint_attention, dtype, keys_only=keys_only)
    assert all(out.dtype == dtype for out in mine)

    # the same rounded inputs, in float64
    def exact(first, second):
        return plain(*(tuple(x.double() for x in stream) for stream in (first, second)))

    for out, expected in zip(mine, results(exact, dtype, keys_only=keys_only), strict=True):
        assert out.shape == expected.shape
        torch.testing.assert_close(out.double(), expected.double(), rtol=tolerance, atol=tolerance)


def test_autocast_does_not_narrow_what_is_computed_wide():
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = results(joint_attention, torch.bfloat16)
    for out, expected in zip(under_autocast, results(joint_attention, torch.bfloat16), strict=True):
        assert torch.equal(out, expected)


def test_a_stream_of_keys_alone_returns_nothing_for_itself():
    _, _, pair = streams(torch.float32, keys_only=True)
    first, second = joint_attention(*pair)
    assert first.shape == (2, 5, 32)
    assert second.shape == (2, 0, 32)
