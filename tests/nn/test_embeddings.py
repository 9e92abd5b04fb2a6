"""Times, positions and patches against their formulas."""

import math

import pytest
import torch

from flowkernels.nn import (
    network_time,
    patchify,
    rotary_positions_2d,
    sincos_positions_2d,
    timestep_embedding,
    unpatchify,
)


def test_network_time_is_a_thousand_t():
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    assert network_time(t).dtype == torch.float32
    assert network_time(t).tolist() == [0.0, 250.0, 1000.0]


def test_timestep_embedding_equals_the_formula():
    t = torch.tensor([0.0, 0.001, 0.3, 1.0])
    out = timestep_embedding(t, 6)
    for row, time in zip(out, t.tolist(), strict=True):
        angles = [1000 * time * 10000 ** (-i / 3) for i in range(3)]
        expected = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        # an angle of 1000 radians has a float32 spacing of 6e-5
        torch.testing.assert_close(row, expected, rtol=0, atol=2e-4)
    assert timestep_embedding(t.bfloat16(), 6).dtype == torch.float32


def test_positions_equal_the_formula():
    rows, columns, dim = 3, 5, 8
    out = sincos_positions_2d(dim, rows, columns)
    assert out.shape == (15, 8)
    for row in range(rows):
        for column in range(columns):
            expected = []
            for position in (column, row):
                angles = [position / 10000 ** (i / 2) for i in range(2)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(out[row * columns + column], torch.tensor(expected))
    assert len(out.unique(dim=0)) == 15


def test_spacing_shrinks_the_table():
    """Three patches a third apart stand within the field of one."""
    fine, coarse = sincos_positions_2d(8, 7, 7, spacing=1 / 3), sincos_positions_2d(8, 3, 3)
    torch.testing.assert_close(fine.view(7, 7, 8)[::3, ::3], coarse.view(3, 3, 8))


def test_rotations_equal_the_formula():
    axes, rows, columns, context = (2, 4, 6), 3, 2, 2
    cos, sin = rotary_positions_2d(axes, rows, columns, context=context, theta=100.0)
    assert cos.shape == sin.shape == (8, 12)
    assert cos.dtype == sin.dtype == torch.float32
    places = [(0, row, column) for row in range(rows) for column in range(columns)]
    for token, coordinates in enumerate(places + [(0, 0, 0)] * context):
        angles = [
            place * 100.0 ** (-2 * (i // 2) / axis)
            for place, axis in zip(coordinates, axes, strict=True)
            for i in range(axis)
        ]
        # the last bit of float32
        expected = torch.tensor(angles, dtype=torch.float64)
        torch.testing.assert_close(cos[token], expected.cos().float(), rtol=0, atol=1e-7)
        torch.testing.assert_close(sin[token], expected.sin().float(), rtol=0, atol=1e-7)


def test_patchify_equals_a_strided_convolution():
    x = torch.randn(2, 3, 6, 4)
    weight = torch.randn(5, 3, 2, 2)
    expected = torch.nn.functional.conv2d(x, weight, stride=2).flatten(2).mT
    torch.testing.assert_close(patchify(x, 2) @ weight.flatten(1).mT, expected)


def test_unpatchify_puts_channels_last_inside_a_patch():
    tokens = torch.arange(2 * 6 * 12.0).view(2, 6, 12)
    x = unpatchify(tokens, 3, 2, (3, 2))
    assert x.shape == (2, 3, 6, 4)
    for row in range(6):
        for column in range(4):
            patch = tokens[:, (row // 2) * 2 + column // 2].view(2, 2, 2, 3)
            assert torch.equal(x[:, :, row, column], patch[:, row % 2, column % 2])


def test_bad_widths_are_named():
    with pytest.raises(ValueError, match="dim is 5; it must be even"):
        timestep_embedding(torch.zeros(1), 5)
    with pytest.raises(ValueError, match="dim is 6; it must be a multiple of 4"):
        sincos_positions_2d(6, 2, 2)
