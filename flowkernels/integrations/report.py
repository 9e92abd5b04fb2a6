"""What :func:`flowkernels.patch` did, module by module, and which calls it left to diffusers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Fallback", "Report", "Row"]

PATCHED, SKIPPED = "patched", "skipped"


@dataclass(frozen=True)
class Row:
    """One operator of one module.

    Attributes:
        module: The module's name in the model; "" is the model itself.
        op: The operator's name, "-" for a module that is not served at all.
        status: "patched" or "skipped".
        why: Why it was skipped, or how it is served.
        wanted: Whether ``ops`` asked for it; what was not asked for does not count as missing.
    """

    module: str
    op: str
    status: str
    why: str = ""
    wanted: bool = True


@dataclass(frozen=True)
class Fallback:
    """Calls of one module that took the original forward."""

    module: str
    why: str
    calls: int


class Report:
    """The rows of a patch; ``str()`` is the table.

    Attributes:
        rows: One :class:`Row` per module and operator.
        fallbacks: Calls since patching that took the original forward, with the reason. Under
            torch.compile a graph counts once, where it is traced.
        title: What was patched, and how.
    """

    def __init__(self, title: str, rows: Sequence[Row], fallbacks: Iterable[Fallback] = ()) -> None:
        self.title = title
        self.rows = tuple(rows)
        self.fallbacks = tuple(fallbacks)

    @property
    def patched(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status == PATCHED)

    @property
    def skipped(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status == SKIPPED)

    @property
    def missing(self) -> tuple[Row, ...]:
        """What was skipped though ``ops`` asked for it: what ``strict=True`` raises for."""
        return tuple(row for row in self.skipped if row.wanted)

    def __str__(self) -> str:
        rows = [(row.module or "(model)", row.op, row.status, row.why) for row in self.rows]
        lines = [self.title, ""]
        lines += table(("module", "op", "status", "why"), rows)
        lines += ["", f"{len(self.patched)} patched, {len(self.skipped)} skipped"]
        if self.fallbacks:
            calls = [
                (item.module or "(model)", str(item.calls), item.why) for item in self.fallbacks
            ]
            lines += ["", "Calls that took the original forward:", ""]
            lines += table(("module", "calls", "why"), calls)
        return "\n".join(lines)

    __repr__ = __str__


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns padded to their widest cell."""
    everything = [header, *rows]
    widths = [max(len(row[column]) for row in everything) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in everything
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
