"""The command line: help that teaches, overrides, exit codes with one line of reason."""

from __future__ import annotations

import ctypes
import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from flowkernels.cli import main
from flowkernels.train.boss import BOSSRecipe
from flowkernels.train.evaluate import EvaluateConfig
from flowkernels.train.recipe_file import load_recipe
from flowkernels.train.recipes import FGMRecipe, TeacherRecipe
from flowkernels.train.scflow import SCFlowRecipe
from flowkernels.train.scheduling import ScheduleConfig

ROOT = Path(__file__).resolve().parents[1]

TEACHER = """
steps: 2
batch_size: 8
device: cpu
tensorboard: false
grid_rows: 1
grid_steps: 2
model: {dim: 16, depth: 1, heads: 1}
optim: {lr: 1e-3, ema_decays: [0.9]}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "teacher.yaml"
    path.write_text(TEACHER)
    return path


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """Run a command that must fail; return its one line."""
    capsys.readouterr()
    assert main(arguments) == code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("flowkernels: ")]
    assert len(lines) == 1, error
    assert error.splitlines()[-1] == lines[0], "the reason is the last thing said"
    return lines[0]


FAULTS = """
import resource, sys
import torch
from flowkernels import cli

if sys.argv[1] == "command":
    sys.argv = ["flowkernels", "--help"]
    cli.main()
for _ in range(8):  # as steps do, of 40 MiB; until the places in the heap are found
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    (torch.ones(10 << 20) + 1).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc's malloc")
def test_a_command_keeps_the_memory_of_a_step_for_the_next() -> None:
    def faults(kind: str) -> int:
        run = subprocess.run(
            [sys.executable, "-c", FAULTS, kind],
            env={k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return int(run.stdout.split()[-1])

    assert faults("command") < 100
    assert faults("library") > 1000, "importing flowkernels leaves malloc as it is"


# ---- pipes ---------------------------------------------------------------------------------------


def piped(arguments: list[str], reads: int, folder: Path) -> tuple[int, str]:
    """(exit code, the rest of standard error) of a command whose reader leaves after some lines."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flowkernels", *arguments], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    for _ in range(reads):
        process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    return process.wait(120), said


def test_help_whose_reader_leaves_is_quiet(tmp_path: Path) -> None:
    code, said = piped(["--help"], 0, tmp_path)
    assert (code, said) == (1, "")


def test_an_output_that_is_full_or_closed(tmp_path: Path) -> None:
    command = f"{sys.executable} -m flowkernels --help"
    for redirect, code, said in ((">/dev/full", 1, "flowkernels: [Errno 28] No space left"),
                                 (">&-", 0, "")):  # fmt: skip
        run = subprocess.run(
            f"{command} {redirect}", shell=True, cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
        )  # fmt: skip
        assert run.returncode == code
        assert run.stderr.startswith(said)
        assert run.stderr.count("\n") == bool(said)


def test_a_run_goes_on_when_nobody_reads_its_lines(recipe: Path) -> None:
    command = [
        sys.executable, "-m", "flowkernels", "train", "--recipe", str(recipe),
        "--steps", "30", "--log-every", "1",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=recipe.parent, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        env=environment,
    )  # fmt: skip
    assert process.stderr is not None
    process.stderr.readline()
    process.stderr.close()
    assert process.wait(120) == 0
    assert list(recipe.parent.glob("**/weights.safetensors"))


# ---- help ----------------------------------------------------------------------------------------


def test_help_lists_commands_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("train", "distill fgm", "sample", "evaluate", "bench", "info", "--recipe", "Exit"):
        assert word in text


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            ["train"],
            ["--optim.lr", "Peak learning rate", "--data.kind", "flowkernels train --recipe"],
        ),
        (
            ["distill", "fgm"],
            ["--fake-optim.lr", "--method.lam", "--teacher", "--method.split-vjp"],
        ),
        (["distill"], ["--fake-optim.lr"]),
        (["sample"], ["--run", "--labels", "flowkernels sample"]),
        (["evaluate"], ["--teacher", "--student", "--samples"]),
        (["bench"], ["--quick", "--device"]),
        (["info"], ["backend"]),
    ],
)
def test_help_of_each_command(
    command: list[str], words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--help"]) == 0
    text = capfd.readouterr().out
    for word in words:
        assert word in text


def test_every_option_of_train_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """No option without a sentence: its help is more than its default."""
    main(["train", "--help"])
    text = capsys.readouterr().out
    assert text.count("(default:") >= 40
    lines = [line.strip(" │") for line in text.splitlines()]
    # A long name stands alone on its line, its sentence on the next; none: the default follows.
    bare = [
        name
        for name, line in itertools.pairwise(lines)
        if line.startswith("(default:") and name.startswith("--") and "  " not in name
    ]
    assert not bare


# ---- bad usage -----------------------------------------------------------------------------------


def test_exit_code_2_for_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert "needs a command" in fails(capsys, 2)
    assert "did you mean train?" in fails(capsys, 2, "trian")
    assert "needs a method: fgm" in fails(capsys, 2, "distill")
    assert "got 'sgm', needs a method: fgm" in fails(capsys, 2, "distill", "sgm")
    assert "takes no options" in fails(capsys, 2, "info", "now")


def test_exit_code_2_for_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, 2, "train", "--optim.lrr", "3")
    assert "--optim.lrr" in line
    assert "the nearest valid one is --optim.lr;" in line
    assert "could not convert string to float: 'x'" in fails(capsys, 2, "train", "--optim.lr", "x")
    assert "invalid choice 'c'" in fails(capsys, 2, "train", "--data.kind", "c")
    assert "steps: got 0, needs a whole number >= 1" in fails(capsys, 2, "train", "--steps", "0")
    assert "--recipe: got nothing" in fails(capsys, 2, "train", "--recipe")


def test_exit_code_2_for_bad_recipes(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text("optim: {learning_rat: 1}")
    line = fails(capsys, 2, "train", "--recipe", str(recipe))
    assert f"{recipe}: unknown key 'optim.learning_rat'" in line
    recipe.write_text("optim: {warmupp: 1}")
    line = fails(capsys, 2, "train", f"--recipe={recipe}")
    assert "the nearest valid one is 'optim.warmup'" in line
    assert "none.yaml: cannot read" in fails(capsys, 2, "train", "--recipe", "none.yaml")
    recipe.write_text("model: {dim: 10, heads: 3}")
    assert "dim is 10" in fails(capsys, 2, "train", "--recipe", str(recipe))


@pytest.mark.parametrize("text", ["output: 2024-30-12", "steps: " + "[" * 5000, "\0"])
def test_exit_code_2_for_yaml_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    assert main(["train", "--recipe", str(path)]) == 2
    said = capsys.readouterr().err
    assert "odd.yaml: not valid YAML" in said
    assert said.count("\n") == 1


def test_a_recipe_may_name_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    path = tmp_path / "fgm.yaml"
    path.write_text("output: ~/runs/fgm\nteacher: ~/runs/teacher\n")
    recipe = load_recipe(FGMRecipe, path)
    assert recipe.output == "/home/somebody/runs/fgm"
    assert recipe.teacher == "/home/somebody/runs/teacher"


@pytest.mark.parametrize(
    "option",
    [
        ["--optim.weight-decay", "-1"], ["--optim.weight-decay", "inf"], ["--optim.eps", "nan"],
        ["--seed", "99999999999999999999"], ["--model.mlp-ratio", "inf"],
    ],
)  # fmt: skip
def test_exit_code_2_for_numbers_that_make_no_sense(
    recipe: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    assert main(["train", "--recipe", str(recipe), *option]) == 2
    name = option[0].removeprefix("--").replace("-", "_")
    assert f"{name}: got" in capsys.readouterr().err


def test_exit_code_2_for_missing_or_corrupt_data(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, 2, "train", "--data.kind", "cifar10", "--data.path", "no.tar.gz")
    assert "no.tar.gz: no such CIFAR-10 archive or folder" in line
    (tmp_path / "no.tar.gz").write_bytes(b"not an archive")
    line = fails(capsys, 2, "train", "--data.kind", "cifar10", "--data.path", "no.tar.gz")
    assert "no.tar.gz: not a readable tar archive" in line
    (tmp_path / "test_batch").write_bytes(pickle.dumps(os.system, protocol=2))
    options = ["--data.kind", "cifar10", "--data.path", str(tmp_path), "--data.split", "test"]
    line = fails(capsys, 2, "train", *options)
    assert "test_batch: not a CIFAR-10 part: it names posix.system, which is not data" in line
    bad = tmp_path / "pictures" / "cats" / "bad.png"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"junk")
    options = ["--data.kind", "folder", "--data.path", "pictures", "--data.image-size", "8"]
    # Found when it is decoded, in the middle of a run.
    line = fails(capsys, 2, "train", "--recipe", str(recipe), *options)
    assert "bad.png: cannot be decoded as a picture" in line


def test_exit_code_2_for_missing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = str(tmp_path / "nowhere")
    for command in (
        ["distill", "fgm", "--teacher", nowhere],
        ["sample", "--run", nowhere],
        ["evaluate", "--teacher", nowhere],
    ):
        assert f"{nowhere}/model.json: cannot be read" in fails(capsys, 2, *command)


def test_exit_code_2_for_several_processes(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "WORLD_SIZE: got 4" in fails(capsys, 2, "train", "--recipe", str(recipe))


def test_exit_code_1_when_a_run_fails(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--optim.lr", "1e30", "--steps", "30", "--max-nonfinite", "2", "--log-every", "1"]
    line = fails(capsys, 1, "train", "--recipe", str(recipe), *options)
    assert "updates skipped for non-finite gradients" in line
    assert "flow_matching" in line


def test_bench_outside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import flowkernels.cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        flowkernels.cli, "__file__", str(tmp_path / "site" / "flowkernels" / "cli.py")
    )
    assert "no benchmark suites in" in fails(capsys, 2, "bench")


# ---- what works ----------------------------------------------------------------------------------


def test_recipe_gives_defaults_and_options_override(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flowkernels.cli import _parse

    options = ["--recipe", str(recipe), "--optim.lr", "2e-5", "--optim.betas", "0", "0.999"]
    parsed = _parse(TeacherRecipe, "flowkernels train", options)
    assert parsed.optim.lr == 2e-5
    assert parsed.optim.betas == (0.0, 0.999)
    assert parsed.optim.ema_decays == (0.9,)  # from the recipe
    assert parsed.model.dim == 16
    assert parsed.grid_steps == 2
    assert parsed.data.kind == "digits"  # the built-in default


def test_train_distill_sample_evaluate(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--recipe", str(recipe), "--output", "teacher"]) == 0
    assert main(["train", "--recipe", str(recipe), "--output", "teacher"]) == 0  # done already
    student = tmp_path / "fgm.yaml"
    student.write_text(
        "{steps: 2, batch_size: 8, device: cpu, tensorboard: false, grid_rows: 1, "
        "teacher: teacher, output: student}"
    )
    options = ["--method.fake-steps", "2", "--method.split-vjp", "--fake-optim.lr", "1e-4"]
    assert main(["distill", "fgm", "--recipe", str(student), *options]) == 0
    for run in ("teacher", "student"):
        assert (tmp_path / run / "weights.safetensors").exists()
        assert (tmp_path / run / "samples" / "step-00000002.png").exists()
    capsys.readouterr()
    assert main(["sample", "--run", "student", "--rows", "2", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == "student/samples.png"
    options = ["--teacher", "teacher", "--student", "student", "--output", "evaluation"]
    options += ["--steps", "1", "2", "--samples", "20", "--device", "cpu"]
    assert main(["evaluate", *options]) == 0
    text = capsys.readouterr().out
    assert "Fréchet distance" in text
    assert "evaluation/results.json" in text
    assert "teacher: student holds a student of few steps" in fails(
        capsys, 2, "distill", "fgm", "--teacher", "student"
    )


def test_info_prints_the_operators(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert "modulated_norm" in capsys.readouterr().out


def test_module_entry_point() -> None:
    command = [sys.executable, "-m", "flowkernels", "nonsense"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("flowkernels: no command 'nonsense'")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_file_is_valid(path: Path) -> None:
    kinds = {
        "teacher": TeacherRecipe,
        "contrastive": TeacherRecipe,
        "fm": TeacherRecipe,  # consistency-fm
        "sid": FGMRecipe,
        "fgm": FGMRecipe,
        "boss": BOSSRecipe,
        "reflow": BOSSRecipe,
        "scflow": SCFlowRecipe,
        "schedule": ScheduleConfig,
        "evaluate": EvaluateConfig,
    }
    recipe = load_recipe(kinds[path.stem.split("-")[-1]], path)
    recipe.validate()
    assert recipe.output == f"runs/{path.stem}"
