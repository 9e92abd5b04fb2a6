"""The command line: `flowkernels COMMAND [OPTIONS]`.

Exit codes: 0 done (or stopped by a signal, with a checkpoint), 1 failed, 2 bad usage; each failure
says why in one line on standard error.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import difflib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_OVERVIEW = """\
usage: flowkernels COMMAND [OPTIONS]

Train a flow-matching teacher, distil it into a generator of one step or a few, look at the result.

{commands}

flowkernels COMMAND --help explains every option, with its unit and default.

The three steps on scikit-learn's bundled digits, a few minutes on two cores:

  flowkernels train --recipe recipes/digits-teacher.yaml
  flowkernels distill fgm --recipe recipes/digits-fgm.yaml
  flowkernels evaluate --recipe recipes/digits-evaluate.yaml

A recipe is a YAML file of options; what you add on the command line overrides it:

  flowkernels train --recipe recipes/digits-teacher.yaml --optim.lr 5e-4 --steps 2000

A run that was killed goes on from its last checkpoint when the same command is given again.
Exit codes: 0 done, 1 failed, 2 bad usage; failures say why in one line.
"""


class _Exit(Exception):
    """Ends the command with an exit code and, unless it is 0, a line on standard error."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after the program's name; by default the process's own.

    Returns:
        The exit code: 0 done, 1 failed, 2 bad usage.

    Example:
        >>> from flowkernels.cli import main
        >>> main(["trian"])
        2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        _keep_memory()
    try:
        _dispatch(arguments)
        if sys.stdout is not None:  # as it is where a shell has closed it
            sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # `| head` wants to hear no more
            print(f"flowkernels: {_one_line(error)}", file=sys.stderr)
        # What could not be written would be tried again at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _Exit as end:
        if end.reason:
            print(f"flowkernels: {end.reason}", file=sys.stderr)
        return end.code
    except KeyboardInterrupt:
        print("flowkernels: interrupted", file=sys.stderr)
        return 1
    return 0


def _keep_memory() -> None:
    """Have malloc keep what is freed: the next step wants as much again.

    glibc's would give the temporaries of a step back to the system and have them faulted in, page
    by page, in the next: a quarter of the time of a small model's step on a CPU. Nothing happens
    where another malloc is.
    """
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


def _dispatch(arguments: list[str]) -> None:
    if not arguments:
        raise _Exit(2, f"needs a command: {', '.join(_COMMANDS)}; see flowkernels --help")
    if arguments[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:<16}{help_}" for name, (help_, _) in _COMMANDS.items())
        print(_OVERVIEW.format(commands=commands), end="")
        return
    name, rest = _command(arguments)
    _guarded(_COMMANDS[name][1], f"flowkernels {name}", rest)


def _command(arguments: list[str]) -> tuple[str, list[str]]:
    """The command's name, of one word or two, and what follows it."""
    first = arguments[0]
    if first in _COMMANDS:
        return first, arguments[1:]
    methods = [name.split()[1] for name in _COMMANDS if name.startswith(f"{first} ")]
    if methods:
        if len(arguments) > 1 and arguments[1] in methods:
            return f"{first} {arguments[1]}", arguments[2:]
        if len(arguments) > 1 and arguments[1] in ("-h", "--help"):
            return f"{first} {methods[0]}", arguments[1:]
        got = f"got {arguments[1]!r}" if len(arguments) > 1 else "got none"
        raise _Exit(2, f"{first}: {got}, needs a method: {', '.join(methods)}")
    near = difflib.get_close_matches(first, [n.split()[0] for n in _COMMANDS], n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(_COMMANDS)}"
    raise _Exit(2, f"no command {first!r}{hint}")


def _guarded(command: Callable[[str, list[str]], None], program: str, rest: list[str]) -> None:
    """Turn expected errors into exit codes; anything else is a defect, and shows itself."""
    from flowkernels.train.errors import RunFailed, UsageError

    try:
        command(program, rest)
    except UsageError as error:
        raise _Exit(2, _one_line(error)) from error
    except RunFailed as error:
        raise _Exit(1, _one_line(error)) from error
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "flowkernels"):
            raise
        raise _Exit(
            2, f"this needs the package {package}: pip install 'flowkernels[train]'"
        ) from error
    except BrokenPipeError:
        raise
    except OSError as error:
        # A full disk, a folder without permission.
        raise _Exit(1, _one_line(error)) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---- options ------------------------------------------------------------------------------------


def _parse(kind: type[T], program: str, arguments: list[str]) -> T:
    """Options into a dataclass; a `--recipe` file gives the defaults."""
    import tyro

    default: Any = None
    if any(field.name == "recipe" for field in dataclasses.fields(kind)):  # type: ignore[arg-type]
        path = _recipe_path(arguments)
        if path is not None:
            from flowkernels.train.recipe_file import load_recipe

            default = load_recipe(kind, path)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            given = {} if default is None else {"default": default}
            parsed: T = tyro.cli(kind, prog=program, args=arguments, **given)
            return parsed
    except SystemExit as end:
        if end.code in (0, None):  # --help has been printed
            raise _Exit(0) from None
        raise _Exit(2, _shorten(complaint.getvalue(), program)) from None


def _recipe_path(arguments: list[str]) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == "--recipe":
            if i + 1 == len(arguments):
                raise _Exit(2, "--recipe: got nothing, needs the path of a YAML file")
            return arguments[i + 1]
        if argument.startswith("--recipe="):
            return argument.partition("=")[2]
    return None


def _shorten(complaint: str, program: str) -> str:
    """The boxed error of the option parser as one line, with its first suggestion."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", complaint)
    lines = [line.strip(" │") for line in plain.splitlines()]
    # Sections are ruled off. The title is in the box's edge, or (no Unicode) the first section.
    sections: list[list[str]] = [[]]
    for line in (line for line in lines if line and line[0] not in "╭╰"):
        if set(line) <= {"─", "-"}:
            sections.append([])
        else:
            sections[-1].append(line)
    if "╭" not in plain:
        sections = sections[1:]
    text = " ".join(sections[0]) if sections and sections[0] else "bad options"
    if "Perhaps you meant:" in lines:
        nearest = lines[lines.index("Perhaps you meant:") + 1].split()[0]
        text += f"; the nearest valid one is {nearest}"
    return f"{text}; see {program} --help"


# ---- commands -----------------------------------------------------------------------------------


def _train(program: str, rest: list[str]) -> None:
    from flowkernels.train.recipes import TeacherRecipe

    _parse(TeacherRecipe, program, rest).build().run()


def _distill_fgm(program: str, rest: list[str]) -> None:
    from flowkernels.train.recipes import FGMRecipe

    _parse(FGMRecipe, program, rest).build().run()


def _distill_boss(program: str, rest: list[str]) -> None:
    from flowkernels.train.boss import BOSSRecipe

    _parse(BOSSRecipe, program, rest).run()


def _distill_scflow(program: str, rest: list[str]) -> None:
    from flowkernels.train.scflow import SCFlowRecipe

    _parse(SCFlowRecipe, program, rest).build().run()


def _schedule(program: str, rest: list[str]) -> None:
    from flowkernels.train.scheduling import SCHEDULES, ScheduleConfig, schedule

    config = _parse(ScheduleConfig, program, rest)
    schedule(config)
    for name in (SCHEDULES, "schedules.png"):
        print(Path(config.output) / name)


def _sample(program: str, rest: list[str]) -> None:
    from flowkernels.train.sampling import SampleConfig, sample_images

    print(sample_images(_parse(SampleConfig, program, rest)))


def _evaluate(program: str, rest: list[str]) -> None:
    from flowkernels.train.evaluate import EvaluateConfig, evaluate

    config = _parse(EvaluateConfig, program, rest)
    evaluate(config)
    for name in ("results.json", "samples.png"):
        print(Path(config.output) / name)


def _bench(program: str, rest: list[str]) -> None:
    """The suites are part of the checkout, not of the installed package; so are their options."""
    here, checkout = Path.cwd(), Path(__file__).resolve().parent.parent
    root = next((r for r in (here, checkout) if (r / "bench" / "run.py").is_file()), None)
    if root is None:
        raise _Exit(2, f"no benchmark suites in {here}: run it in a checkout of the repository")
    command = [sys.executable, "-m", "bench.run", *rest]
    code = subprocess.run(command, cwd=root, check=False).returncode
    if code:
        raise _Exit(2 if code == 2 else 1, f"the benchmarks ended with exit code {code}")


def _info(program: str, rest: list[str]) -> None:
    if rest and rest[0] in ("-h", "--help"):
        print(
            f"usage: {program}\n\n"
            "List every operator, the backend it uses on this machine, and for each backend that\n"
            "is off, why."
        )
        return
    if rest:
        raise _Exit(2, f"info: got {rest[0]!r}, takes no options")
    import flowkernels

    print(flowkernels.describe())


_COMMANDS: dict[str, tuple[str, Callable[[str, list[str]], None]]] = {
    "train": ("train a flow-matching teacher on images", _train),
    "distill fgm": ("distil a teacher into a one-step generator", _distill_fgm),
    "distill boss": ("distil a teacher into students of a few steps", _distill_boss),
    "distill scflow": (
        "distil a teacher into one student of one step and of several",
        _distill_scflow,
    ),
    "schedule": ("a teacher's best few steps, and what they should buy", _schedule),
    "sample": ("draw images from a finished run", _sample),
    "evaluate": ("accuracy, Fréchet distance and time of teacher and student", _evaluate),
    "bench": ("time the operators against PyTorch (in a checkout)", _bench),
    "info": ("the operators and their backends on this machine", _info),
}


if __name__ == "__main__":
    sys.exit(main())
