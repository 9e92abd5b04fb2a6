"""Nested state (dicts, lists, tuples, numbers, tensors) as JSON plus named tensors: no pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

_TENSOR, _TUPLE, _DICT, _FLOAT = "__tensor__", "__tuple__", "__dict__", "__float__"
_MARKS = {_TENSOR, _TUPLE, _DICT, _FLOAT}


def encode(value: Any, tensors: dict[str, torch.Tensor], path: str = "state") -> Any:
    """Turn `value` into JSON types; its tensors go to `tensors`, by name.

    Args:
        value: None, bool, int, float, str, tensors, and lists, tuples and mappings of them.
        tensors: filled with contiguous CPU tensors, each of which covers its whole storage.
        path: name of the value, the prefix of its tensors' names.

    Returns:
        What `json.dumps` takes; `decode` turns it back, types included.

    Raises:
        TypeError: a value of another type, named by its path.

    Example:
        >>> tensors = {}
        >>> tree = encode({"step": 3, "moments": (torch.ones(2), None)}, tensors)
        >>> sorted(tensors), decode(tree, tensors)["moments"][1]
        (['state.moments.0'], None)
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        # JSON has no infinity and no NaN.
        return value if math.isfinite(value) else {_FLOAT: repr(value)}
    if isinstance(value, torch.Tensor):
        # {"a.b": x, "a": {"b": y}}: two tensors, one path.
        while path in tensors:
            path += "'"
        tensors[path] = _portable(value)
        return {_TENSOR: path}
    if isinstance(value, list):
        return [encode(item, tensors, f"{path}.{i}") for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {_TUPLE: [encode(item, tensors, f"{path}.{i}") for i, item in enumerate(value)]}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and not _MARKS & set(value):
            return {key: encode(item, tensors, f"{path}.{key}") for key, item in value.items()}
        pairs = []
        for i, (key, item) in enumerate(value.items()):
            # Tensors are named by the pair's position: two keys may print alike (1 and "1").
            key_tree = encode(key, tensors, f"{path}.key{i}")
            pairs.append([key_tree, encode(item, tensors, f"{path}.{i}")])
        return {_DICT: pairs}
    raise TypeError(f"{path}: cannot save a {type(value).__name__}; needs tensors or plain values")


def decode(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Undo `encode`."""
    if isinstance(tree, list):
        return [decode(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        ((mark, content),) = tree.items()
        if mark == _TENSOR:
            return tensors[content]
        if mark == _TUPLE:
            return tuple(decode(item, tensors) for item in content)
        if mark == _DICT:
            return {decode(key, tensors): decode(item, tensors) for key, item in content}
        if mark == _FLOAT:
            return float(content)
    return {key: decode(item, tensors) for key, item in tree.items()}


def _portable(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous CPU tensor that covers its whole storage."""
    host = tensor.detach().cpu()
    # A view of a larger tensor: safetensors would refuse it, or write more than the view.
    shares = host.untyped_storage().nbytes() != host.numel() * host.element_size()
    if shares or not host.is_contiguous():
        return host.clone(memory_format=torch.contiguous_format)
    return host
