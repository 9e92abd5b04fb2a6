"""Makes Triton's interpreter round as the hardware does, and not slower than it must be."""

from __future__ import annotations

from typing import Any

import numpy as np


def prepare() -> None:
    """For a process with TRITON_INTERPRET=1, before its first kernel."""
    _round_like_hardware()
    _multiply_like_hardware()
    _patch_language_once()


def _round_like_hardware() -> None:
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


def _multiply_like_hardware() -> None:
    """``tl.dot`` with the products and sums that the hardware makes.

    Of bfloat16 operands the interpreter multiplies the integers of their bits (Triton 3.6 and 3.7):
    here they are widened to float32, where their products are exact. Of float32 ones the fused
    multiply-adds of an "ieee" product go along k in order, so that an element has the same bits in
    whatever tile it is computed; NumPy's order depends on the shape.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.view(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def in_order(a: Any, b: Any, total: Any) -> Any:
        left, right = a.astype(np.float64), b.astype(np.float64)
        for k in range(left.shape[1]):
            total = (total + left[:, k, None] * right[k]).astype(np.float32)
        return total

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.float32 and d.data.dtype == np.float32:
            return interpreter.TensorHandle(in_order(a.data, b.data, d.data), tl.float32)
        return original(self, widened(a), widened(b), d, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _patch_language_once() -> None:
    """Every jit function finds the language patched already.

    The interpreter replaces all functions of ``triton.language`` before each call of a kernel and
    of every helper in it, which is half of the time it takes. Here they stay replaced.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._patch_lang
    patched: set[tuple[bool, bool]] = set()

    def patch(fn: Any) -> Any:
        modules = list(fn.__globals__.values())
        key = (any(m is tl for m in modules), any(m is tl.core for m in modules))
        if key not in patched:
            patched.add(key)
            original(fn)
            # Triton 3.6 converts an array of one element, which NumPy 2.4 refuses.
            tl.core.tensor.__index__ = lambda self: int(self.handle.data.squeeze())
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch
