"""Recipe files: YAML into dataclasses, with errors that name the key and the nearest valid one."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from flowkernels.train.errors import UsageError

T = TypeVar("T")


def load_recipe(kind: type[T], path: str | Path) -> T:
    """Read a recipe file.

    Args:
        kind: the dataclass to make; keys that the file leaves out keep its defaults.
        path: a YAML file.

    Raises:
        UsageError: the file is missing or is no YAML mapping, a key is unknown (the message gives
            the nearest valid one), or a value has the wrong type. One line that names the file.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot read the recipe: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date of month 30, say
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: not valid YAML: {reason}") from error
    try:
        return from_mapping(kind, {} if content is None else content)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def from_mapping(kind: type[T], values: Any, prefix: str = "") -> T:
    """A dataclass from nested mappings, checked key by key.

    Example:
        >>> from flowkernels.train.config import OptimConfig
        >>> from_mapping(OptimConfig, {"lr": "2e-5", "betas": [0, 0.999]}).betas
        (0.0, 0.999)
        >>> from_mapping(OptimConfig, {"lrr": 1})
        Traceback (most recent call last):
        ...
        flowkernels.train.errors.UsageError: unknown key 'lrr'; the nearest valid one is 'lr'
    """
    if not isinstance(values, dict):
        raise UsageError(f"{prefix or 'the recipe'}: got {values!r}, needs keys and values")
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind) if field.init]  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        if key not in known:
            raise UsageError(_unknown(prefix, str(key), known))
        arguments[key] = _convert(hints[key], value, f"{prefix}{key}")
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{prefix or 'the recipe'}: {error}") from error


def _unknown(prefix: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if near:
        return f"unknown key '{prefix}{key}'; the nearest valid one is '{prefix}{near[0]}'"
    return f"unknown key '{prefix}{key}'; known are {', '.join(known)}"


def _convert(kind: Any, value: Any, name: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return from_mapping(kind, value, f"{name}.")  # type: ignore[arg-type]
    if origin in (typing.Union, types.UnionType):
        return _convert_union(typing.get_args(kind), value, name)
    if origin is typing.Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise UsageError(f"{name}: got {value!r}, needs one of {', '.join(map(str, choices))}")
        return value
    if origin is tuple:
        return _convert_tuple(typing.get_args(kind), value, name)
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        # YAML 1.1 reads 2e-5 (no dot) as text.
        try:
            return float(value)
        except ValueError:
            raise UsageError(f"{name}: got {value!r}, needs a number") from None
    if type(value) is kind:
        # What a shell does to an option.
        return os.path.expanduser(value) if name in _PATHS else value
    raise UsageError(f"{name}: got {value!r}, needs {_KINDS.get(kind, kind)}")


_PATHS = ("output", "teacher", "student", "start", "run", "schedules")
_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
}


def _convert_union(kinds: tuple[Any, ...], value: Any, name: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    problems = []
    for kind in kinds:
        if kind is types.NoneType:
            continue
        try:
            return _convert(kind, value, name)
        except UsageError as error:
            problems.append(error)
    raise problems[0]


def _convert_tuple(kinds: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise UsageError(f"{name}: got {value!r}, needs a list")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise UsageError(f"{name}: got {len(value)} values, needs {len(kinds)}")
    return tuple(
        _convert(kind, item, f"{name}[{i}]")
        for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )
