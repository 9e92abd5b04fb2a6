"""Whether diffusers still computes what the chains were written after.

A chain stands in for a forward of diffusers 0.42.1. Under any other version the code of every
function that it stands in for is compared with that version's; where one has changed, the modules
are left alone and the report names it. Comments, docstrings, annotations and messages do not count.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Iterable
from typing import Any

import diffusers

WRITTEN_AFTER = "0.42.1"

FINGERPRINTS: dict[str, str] = {
    "AdaLayerNormContinuous.forward": "98e1fd5ac357813f",
    "AdaLayerNormZero.forward": "7dde3fd906972362",
    "AdaLayerNormZeroSingle.forward": "3f08086109088556",
    "Attention.forward": "2c09e44179cd86ec",
    "BasicTransformerBlock.forward": "b70d124dbd9dcbba",
    "FeedForward.forward": "f2758cc90b58b9a7",
    "Flux2Modulation.split": "b089304ff227dda1",
    "Flux2SingleTransformerBlock.forward": "daac230726f3f72a",
    "Flux2TransformerBlock.forward": "526207df8c37d220",
    "FluxAttention.forward": "d688c79051c824b9",
    "FluxAttnProcessor.__call__": "69ad1b9bc4e3051d",
    "FluxSingleTransformerBlock.forward": "0b116839d642d3bd",
    "FluxTransformerBlock.forward": "85cd7ce98bb37cd7",
    "FusedJointAttnProcessor2_0.__call__": "a73e97dadb9232bf",
    "GELU.forward": "991bb57833ef4490",
    "GELU.gelu": "61a22bd046cef37d",
    "JointAttnProcessor2_0.__call__": "f25d0ea18661de52",
    "JointTransformerBlock.forward": "f5a65c7e2aaa739e",
    "QwenImageTransformerBlock._modulate": "c3c03f041ccc1d2c",
    "QwenImageTransformerBlock.forward": "8b2cee775f210afa",
    "RMSNorm.forward": "8486c8e24319fcfd",
    "SD35AdaLayerNormZeroX.forward": "2e14fc1cc9041d5e",
    "SD3SingleTransformerBlock.forward": "d953ff481a29d2ee",
    "SanaTransformerBlock.forward": "e2bf467e42ef8c61",
    "_get_fused_projections": "a89c7cec8e0a001a",
    "_get_projections": "f740c583dcebd685",
    "apply_rotary_emb": "514a759b91aaf011",
}


def drift(functions: Iterable[Any]) -> str | None:
    """The first function that is not the one a chain was written after, in a sentence."""
    if diffusers.__version__ == WRITTEN_AFTER:
        return None
    for function in functions:
        name = function.__qualname__
        if fingerprint(function) != FINGERPRINTS.get(name):
            return f"not served: diffusers {diffusers.__version__} has another {name}"
    return None


@functools.cache
def fingerprint(function: Any) -> str:
    """A digest of what a function does; "" where its source cannot be had."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return ""
    code = ast.unparse(_Bare().visit(tree))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


class _Bare(ast.NodeTransformer):
    """Drops what a reader needs and the machine does not."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        self.generic_visit(node)
        node.returns, node.decorator_list = None, []
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            node.body = node.body[1:] or [ast.Pass()]
        return node

    def visit_arg(self, node: ast.arg) -> Any:
        node.annotation = None
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> Any:
        # Messages; Python versions also write them differently.
        return ast.Constant("")
