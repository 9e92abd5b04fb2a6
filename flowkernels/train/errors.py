"""The two ways a command ends badly: bad usage (exit code 2) and a failed run (exit code 1)."""

from __future__ import annotations


class UsageError(ValueError):
    """Something the caller gave is wrong: a key, a value, a path. One line; exit code 2."""


class DataError(UsageError):
    """A data file or folder is missing or damaged. One line that names it; exit code 2."""


class RunFailed(RuntimeError):
    """The run itself went wrong, with usage in order. One line; exit code 1."""
