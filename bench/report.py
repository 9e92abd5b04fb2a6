"""``python -m bench.report results.json ...``: the table, and plots of speed and peak memory.

Reads pytest-benchmark's JSON (of ``bench.run``), the rows that a run writes as it goes (.jsonl) and
the saved results in ``bench/results``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLUMNS = ("op", "shape", "dtype", "direction", "ours", "vs eager", "vs compile", "of copy",
           "target", "met")  # fmt: skip
# A processor is not named well enough for its times to mean anything to someone else: only the
# ratios of a CPU run are saved. (A call's cost to the host is kept: the target is stated in µs.)
ABSOLUTE = ("ours_us", "ours_spread_us", "copy_gb_per_s", "host_us")


@dataclass
class Result:
    """One run: its machine, the rows of its table, and what it had no time for."""

    name: str
    machine: dict[str, Any]
    rows: list[dict[str, Any]]
    about: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "machine": self.machine,
            "about": self.about,
            "skipped": self.skipped,
            "rows": self.rows,
        }


def load(path: Path) -> Result:
    """Read a run, from pytest-benchmark's JSON or from a saved result.

    Raises:
        SystemExit: The file is missing or is neither.
    """
    try:
        text = path.read_text()
        if path.suffix == ".jsonl":
            header, *rows = (json.loads(line) for line in text.splitlines())
            return Result(header["name"], header["machine"], rows, header["about"])
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: cannot read it as results ({error})") from error
    if "rows" in content:
        return Result(
            content["name"], content["machine"], content["rows"],
            content.get("about", {}), content.get("skipped", []),
        )  # fmt: skip
    if "benchmarks" not in content or "flowkernels" not in content:
        raise SystemExit(f"{path}: holds neither rows nor this project's benchmarks")
    info, ours = content["machine_info"], content["flowkernels"]
    rows = [e["extra_info"]["row"] for e in content["benchmarks"] if "row" in e["extra_info"]]
    about = {
        "commit": (content.get("commit_info") or {}).get("id", ""),
        "changed": (content.get("commit_info") or {}).get("dirty", None),
        "date": content.get("datetime", ""),
        "level": ours["level"],
        "compiler": ours["compiler"],
    }
    return Result(info["name"], info["flowkernels"], rows, about, ours["skipped"])


def savable(result: Result) -> Result:
    """The result as it is kept: a CPU run without its absolute times."""
    rows = [
        row
        if row["device"] != "cpu" or row["kind"] == "host"
        else {key: value for key, value in row.items() if key not in ABSOLUTE}
        for row in result.rows
    ]
    return Result(result.name, result.machine, rows, result.about, result.skipped)


def duration(microseconds: float | None) -> str:
    if microseconds is None:
        return "–"
    if microseconds < 1000:
        return f"{microseconds:.3g} µs"
    return f"{microseconds / 1000:.3g} ms"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row as text, in the order of :data:`COLUMNS`; ± is half the interquartile range."""

    def ratio(peer: str) -> str:
        if peer not in row["ratio"]:
            return "–"
        low, high = row["ratio_spread"][peer]
        return f"{row['ratio'][peer]:.2f} ±{(high - low) / 2:.2f}"

    fraction = row.get("bandwidth_fraction")
    shape = f"{row['shape']} (host)" if row["kind"] == "host" else row["shape"]
    return (
        row["op"], shape, row["dtype"], row["direction"], duration(row.get("ours_us")),
        ratio("eager"), ratio("compile"), "–" if fraction is None else f"{fraction:.0%}",
        row["target"] or "–", {True: "yes", False: "NO", None: "–"}[row["met"]],
    )  # fmt: skip


def compact(result: Result) -> str:
    """The table in lines of at most 125 characters, for a log of which only the end is kept."""
    lines = [headline(result)]
    for row in result.rows:
        op, shape, dtype, direction, ours, eager, compiled, copied, _, met = cells(row)
        short = {"forward": "fwd", "forward+backward": "fwd+bwd"}[direction]
        lines.append(
            f"{op:<20} {shape:<18} {dtype.replace('float', 'f'):<6} {short:<7} {ours:>8}  "
            f"eager {eager:>11}  compile {compiled:>11}  copy {copied:>5}  {met:>3}"
        )
    return "\n".join([*lines, verdict(result)])


def headline(result: Result) -> str:
    machine = result.machine
    what = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    if "driver_version" in machine:
        clocks = f"{machine.get('clocks.sm', '?')} / {machine.get('clocks.mem', '?')}"
        what += f", driver {machine['driver_version']}, clocks {clocks}"
    if machine.get("malloc") == "memory kept" and "gpu" not in machine:
        what += ", memory kept"
    versions = f"torch {machine['torch']}, Triton {machine['triton'] or 'none'}"
    return f"{what}; Python {machine['python']}, {versions}"


def verdict(result: Result) -> str:
    judged = [row["met"] for row in result.rows if row["met"] is not None]
    text = f"{sum(judged)} of {len(judged)} targets met"
    if result.skipped:
        text += f"; no time for {len(result.skipped)} more cases"
    return text


def print_table(result: Result) -> None:
    """Print with rich where it is installed, else as Markdown."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(markdown(result))
        return
    table = Table(title=headline(result), caption=verdict(result))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:4] else "right")
    previous = None
    for row in result.rows:
        if previous not in (None, row["op"]):
            table.add_section()
        previous = row["op"]
        style = "red" if row["met"] is False else ""
        table.add_row(*cells(row), style=style)
    console = Console()
    # A pipe has no width: give the table what it needs instead of folding its cells.
    Console(width=None if console.is_terminal else 170).print(table)


def markdown(result: Result) -> str:
    """The table and what was measured, for ``bench/results``."""
    lines = [
        f"# {result.name}",
        "",
        headline(result) + ".",
        "",
        f"Commit {result.about.get('commit', '')[:12] or 'unknown'}, "
        f"{result.about.get('date', '')[:10]}. {verdict(result)}.",
        "Ratios are how many times as long the peer took in the same run (median of rounds ± half "
        'the interquartile range); "of copy" is the time of a copy of as many bytes over ours.',
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in result.rows]
    memory = [row for row in result.rows if (row.get("peak_bytes") or {}).get("ours")]
    if memory:
        lines += ["", "Peak memory of one call beyond its inputs, MB:", ""]
        lines += ["| op | shape | dtype | direction | ours | eager | compile |", "|" + "---|" * 7]
        for row in memory:
            peaks = [row["peak_bytes"].get(name) for name in ("ours", "eager", "compile")]
            text = [f"{peak / 1e6:.3g}" if peak is not None else "–" for peak in peaks]
            lines.append("| " + " | ".join([*cells(row)[:4], *text]) + " |")
    if result.skipped:
        lines += ["", "Not measured, for want of time: " + ", ".join(result.skipped) + "."]
    return "\n".join(lines) + "\n"


def plot(result: Result, directory: Path) -> list[Path]:
    """Write ``<name>-speed.png`` and ``<name>-memory.png``; nothing where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    speed = [row for row in result.rows if row["kind"] == "speed"]
    memory = [r for r in speed if (r.get("peak_bytes") or {}).get("ours")]
    directory.mkdir(parents=True, exist_ok=True)
    made = []
    for rows, kind, label in (
        (speed, "speed", "times as fast as the peer"),
        (memory, "memory", "peak memory of ours, as a fraction of the peer's"),
    ):
        if rows:
            path = directory / f"{result.name}-{kind}.png"
            _bars(rows, kind, label, f"{result.name}: {kind}", path)
            made.append(path)
    return made


def _bars(rows: list[dict[str, Any]], kind: str, label: str, title: str, path: Path) -> None:
    from matplotlib import pyplot

    def value(row: dict[str, Any], peer: str) -> float:
        if kind == "speed":
            return float(row["ratio"].get(peer, 0))
        other = row["peak_bytes"].get(peer)
        return row["peak_bytes"]["ours"] / other if other else 0.0

    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.32 * len(rows)), layout="constrained")
    places = range(len(rows))
    for offset, peer in ((-0.2, "eager"), (0.2, "compile")):
        heights = [value(row, peer) for row in rows]
        axes.barh([p + offset for p in places], heights, height=0.36, label=f"against {peer}")
    axes.axvline(1, color="black", linewidth=0.8)
    names = [f"{r['op']} {r['shape']} {r['dtype']} {r['direction']}" for r in rows]
    axes.set_yticks(list(places), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_title(title)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def save(result: Result, directory: Path) -> list[Path]:
    """Write ``<name>.json`` and ``<name>.md``."""
    directory.mkdir(parents=True, exist_ok=True)
    kept = savable(result)
    json_path, text_path = directory / f"{kept.name}.json", directory / f"{kept.name}.md"
    json_path.write_text(json.dumps(kept.as_dict(), indent=1) + "\n")
    text_path.write_text(markdown(kept))
    return [json_path, text_path]


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files")
    parser.add_argument(
        "--plots", type=Path, default=Path("runs/bench"), help="folder of the plots"
    )
    parser.add_argument("--no-plots", action="store_true")
    options = parser.parse_args(list(arguments) if arguments is not None else None)
    for path in options.results:
        result = load(path)
        print_table(result)
        if not options.no_plots:
            for made in plot(result, options.plots):
                print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
