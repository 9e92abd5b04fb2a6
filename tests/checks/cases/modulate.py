"""modulated_norm, gated_residual and gated_residual_norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import flowkernels
from tests.checks.case import OpCase, bad, draw


def _well_posed(norm, columns):
    """norm and eps. A row of one or two elements normalises to ±1 (or 0) whatever it is, so its
    gradient is zero but for eps, and all that kernels could be compared by is rounding noise times
    1/√eps. An eps near the row's size makes it a function again; LayerNorm of one element is 0 even
    then (tests/ops/test_modulate.py looks at it).
    """
    return {"norm": "rms" if columns == 1 else norm, "eps": 25.0 if columns <= 2 else 1e-6}


# How an operand is spread over [B, S, D].
FORMS = {
    "d": lambda b, s, d: (d,),
    "bd": lambda b, s, d: (b, d),
    "b1d": lambda b, s, d: (b, 1, d),
    "bsd": lambda b, s, d: (b, s, d),
    "1d": lambda b, s, d: (1, d),
    "1sd": lambda b, s, d: (1, s, d),
    "11d": lambda b, s, d: (1, 1, d),
}


def _spread(operand):
    """[B, D] stands for [B, 1, D]."""
    return operand.unsqueeze(1) if operand is not None and operand.dim() == 2 else operand


def _norm(x, norm, eps):
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def _modulate(y, shift, scale):
    y = y if scale is None else y * (1 + _spread(scale))
    return y if shift is None else y + _spread(shift)


def _norm_inputs(shape, dtype, device, variant):
    """Variants: layer or rms, then what is there (shift and scale unless named otherwise)."""
    norm, _, rest = variant.partition("_")
    form = rest if rest in FORMS else "bd"
    operand = FORMS[form](*shape)
    inputs = {"x": 2 * draw(shape, dtype, device) + 0.5, **_well_posed(norm, shape[-1])}
    inputs["shift"] = inputs["scale"] = inputs["weight"] = inputs["bias"] = None
    if rest in FORMS or rest in ("", "affine", "mixed"):
        inputs["shift"] = draw(operand, dtype, device)
        inputs["scale"] = draw(FORMS["bsd"](*shape) if rest == "mixed" else operand, dtype, device)
    if rest == "shift":
        inputs["shift"] = draw(operand, dtype, device)
    if rest == "scale":
        inputs["scale"] = draw(operand, dtype, device)
    if rest in ("affine", "mixed", "weight"):
        inputs["weight"] = draw(shape[-1:], dtype, device)
    if rest in ("affine", "mixed", "bias"):
        inputs["bias"] = draw(shape[-1:], dtype, device)
    return inputs


def _norm_truth(x, shift, scale, weight, bias, norm, eps):
    y = _norm(x, norm, eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return _modulate(y, shift, scale)


def _bad_operand(name):
    return {
        f"{name} of another width": bad(
            ValueError,
            rf"^{name}: got shape \(3, 16\), need \[D\], \[B, D\]",
            **{name: torch.ones(3, 16)},
        ),
        f"{name} of another batch": bad(
            ValueError, rf"^{name}: got shape \(5, 17\), need", **{name: torch.ones(5, 17)}
        ),
        f"{name} of four dimensions": bad(
            ValueError, rf"^{name}: got shape", **{name: torch.ones(1, 1, 1, 17)}
        ),
        f"{name} elsewhere": bad(
            ValueError, rf"^{name}: is on meta, need cpu", **{name: torch.ones(17, device="meta")}
        ),
    }


MODULATED_NORM = OpCase(
    name="modulated_norm",
    function=flowkernels.ops.modulated_norm,
    reference=_norm_truth,
    make_inputs=_norm_inputs,
    differentiable=("x", "shift", "scale", "weight", "bias"),
    variants=(
        "layer",
        "layer_affine",
        "rms_affine",
        "rms_none",
        "layer_none",
        "layer_shift",
        "rms_scale",
        "rms_weight",
        "layer_bias",
        "layer_mixed",
        *(f"layer_{form}" for form in FORMS if form != "bd"),
    ),
    bad_inputs={
        "two dimensions": bad(ValueError, r"^x: got shape \(2, 3\), need", x=torch.ones(2, 3)),
        "unknown norm": bad(
            ValueError, r"^norm: got 'batch', need one of layer, rms", norm="batch"
        ),
        **_bad_operand("shift"),
        **_bad_operand("scale"),
        "weight": bad(ValueError, r"^weight: got shape \(16,\)", weight=torch.ones(16)),
        "bias": bad(ValueError, r"^bias: got shape \(1, 17\)", bias=torch.ones(1, 17)),
    },
)


def _gated_inputs(shape, dtype, device, variant):
    return {
        "residual": draw(shape, dtype, device),
        "x": draw(shape, dtype, device),
        "gate": draw(FORMS[variant](*shape), dtype, device),
    }


def _gated_truth(residual, x, gate):
    return residual + _spread(gate) * x


_BAD_GATED = {
    "two dimensions": bad(
        ValueError, r"^residual: got shape \(2, 3\), need", residual=torch.ones(2, 3)
    ),
    "x of another shape": bad(ValueError, r"^x: got shape \(3, 5, 16\)", x=torch.ones(3, 5, 16)),
    "no gate": bad(TypeError, r"^gate: got NoneType, need a torch.Tensor", gate=None),
    **_bad_operand("gate"),
}

GATED_RESIDUAL = OpCase(
    name="gated_residual",
    function=flowkernels.ops.gated_residual,
    reference=_gated_truth,
    make_inputs=_gated_inputs,
    differentiable=("residual", "x", "gate"),
    variants=("bd", *(form for form in FORMS if form != "bd")),
    bad_inputs=_BAD_GATED,
)


def _chain_inputs(shape, dtype, device, variant):
    norm, _, rest = variant.partition("_")
    gate, shift, scale = {
        "": ("bd", "bd", "bd"),
        "plain": ("bd", None, None),
        "shift": ("d", "bd", None),
        "scale": ("b1d", None, "d"),
        "bsd": ("bsd", "bsd", "bsd"),
        "mixed": ("1sd", "bsd", "11d"),
    }[rest]
    inputs = _gated_inputs(shape, dtype, device, gate)
    for name, form in (("shift", shift), ("scale", scale)):
        inputs[name] = None if form is None else draw(FORMS[form](*shape), dtype, device)
    return {**inputs, **_well_posed(norm, shape[-1])}


def _chain_truth(residual, x, gate, shift, scale, norm, eps):
    h = _gated_truth(residual, x, gate)
    return h, _modulate(_norm(h, norm, eps), shift, scale)


GATED_RESIDUAL_NORM = OpCase(
    name="gated_residual_norm",
    function=flowkernels.ops.gated_residual_norm,
    reference=_chain_truth,
    make_inputs=_chain_inputs,
    differentiable=("residual", "x", "gate", "shift", "scale"),
    variants=(
        "layer",
        "rms",
        "layer_plain",
        "layer_shift",
        "rms_scale",
        "layer_bsd",
        "layer_mixed",
    ),
    bad_inputs={
        **_BAD_GATED,
        **_bad_operand("shift"),
        **_bad_operand("scale"),
        "unknown norm": bad(
            ValueError, r"^norm: got 'batch', need one of layer, rms", norm="batch"
        ),
    },
)

CASES = (MODULATED_NORM, GATED_RESIDUAL, GATED_RESIDUAL_NORM)
