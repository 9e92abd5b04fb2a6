"""Makes Triton's interpreter round as the hardware does."""

from __future__ import annotations

from typing import Any

import numpy as np


def round_like_hardware() -> None:
    """float32 → bfloat16 to nearest, ties to even, as ``cvt.rn.bf16.f32`` does.

    The interpreter cuts the low bits off (Triton 3.6 and 3.7), an error of up to one unit where the
    hardware makes half of one: twice what the tolerance allows.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(data).view(np.uint32)
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
            is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
            return np.where(is_nan, 0x7FC0, rounded).astype(np.uint16).reshape(data.shape)
        return original(data, source, target, rounding_mode)

    interpreter._convert_float = convert
