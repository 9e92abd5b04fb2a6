"""What a run may go on from: nothing whole is lost, nothing that is untrue is written."""

from __future__ import annotations

import os
import signal
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from flowkernels.train import checkpoint as module
from flowkernels.train.boss import BOSSRecipe
from flowkernels.train.checkpoint import (
    list_checkpoints,
    remove_leftovers,
    save_checkpoint,
    save_weights,
)
from flowkernels.train.config import OptimConfig, TrainConfig
from flowkernels.train.data import TensorDataset
from flowkernels.train.errors import RunFailed, UsageError
from flowkernels.train.process import StopRequest
from flowkernels.train.trainer import Trainer
from tests.train.toy import toy_config, toy_method


def trainer(output: Path, **changes: Any) -> Trainer:
    return Trainer(toy_method(), toy_config(output, **changes))  # type: ignore[arg-type]


def hurt(checkpoint: Path) -> None:
    tensors = checkpoint / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")


def test_damaged_checkpoints_are_set_aside_and_do_not_push_out_new_ones(tmp_path: Path) -> None:
    trainer(tmp_path, keep_last=2).run()
    for _, path in list_checkpoints(tmp_path):
        hurt(path)
    again = trainer(tmp_path, keep_last=1, steps=3, save_every=1)
    again.run()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3]
    aside = sorted(path.name for path in tmp_path.glob("damaged-*"))
    assert aside == ["damaged-checkpoint-00000008", "damaged-checkpoint-00000012"]


def test_the_checkpoint_just_written_is_never_pruned(tmp_path: Path) -> None:
    for step in (900, 901, 5):
        save_checkpoint(tmp_path, step, {"a": torch.ones(1)}, keep_last=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [5]


def test_what_cannot_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(tmp_path, steps=4).run()
    before = list_checkpoints(tmp_path)

    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(module, "fingerprint", refuse)
    with pytest.raises(PermissionError, match="tensors"):
        trainer(tmp_path, steps=8).run()
    assert list_checkpoints(tmp_path) == before


def test_weights_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        save_weights(tmp_path / "w.safetensors", {"a": torch.ones(2)})
        path = save_checkpoint(tmp_path, 1, {"a": torch.ones(2)})
    finally:
        os.umask(umask)
    for file in (tmp_path / "w.safetensors", path / "tensors.safetensors", path / "state.json"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_full_disk_is_an_error_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path) -> None:
        raise SafetensorError("No space left on device")

    save_checkpoint(tmp_path, 1, {"a": torch.ones(2)})
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="cannot be written: No space left"):
        save_checkpoint(tmp_path, 2, {"a": torch.ones(2)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000001"]


def test_files_of_other_people_are_no_leftovers(tmp_path: Path) -> None:
    for name in (".tmp-notes", ".tmp-0123abcd-results.json"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-notes"]


# ---- settings ------------------------------------------------------------------------------------


def test_a_finished_run_is_not_written_anew_with_other_settings(tmp_path: Path) -> None:
    trainer(tmp_path, steps=4).run()
    model = (tmp_path / "model.json").read_bytes()
    with pytest.raises(UsageError, match=r"finished run of other settings \(seed, optim\)"):
        trainer(tmp_path, steps=4, seed=3, optim=OptimConfig(ema_decays=(0.9,))).run()
    assert (tmp_path / "model.json").read_bytes() == model
    # How a step is computed does not matter any more, and neither does what is only shown.
    assert trainer(tmp_path, steps=4, deterministic=False, log_every=1).run() == "finished"


@dataclass
class Distillation(TrainConfig):
    teacher: str = ""


def distillation(output: Path, teacher: Path, steps: int) -> Trainer:
    settings = vars(toy_config(output, steps=steps))
    return Trainer(toy_method(), Distillation(**settings, teacher=str(teacher)))  # type: ignore[arg-type]


def test_another_teacher_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        save_weights(tmp_path / name / "weights.safetensors", {"a": torch.full((2,), value)})
    distillation(tmp_path / "run", tmp_path / "one", 4).run()
    distillation(tmp_path / "run", tmp_path / "one", 5).run()
    assert "other weights" not in capsys.readouterr().err
    for steps in (6, 7):  # also after a resume that took no notice of it
        distillation(tmp_path / "run", tmp_path / "two", steps).run()
        told = capsys.readouterr().err
        assert f"teacher: {tmp_path / 'two'} holds other weights than this run began with" in told


def test_a_teachers_folder_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is the folder of the teacher"):
        distillation(tmp_path / "run", tmp_path / "run" / ".." / "run", 4)


def test_an_output_that_is_a_file_is_bad_usage(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    for output in (tmp_path / "taken", tmp_path / "taken" / "run"):
        with pytest.raises(UsageError, match=r"output: .* is a file, needs a folder"):
            trainer(output).run()


def test_fewer_images_begin_a_new_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    labels = torch.arange(40) % 10
    names = tuple("0123456789")

    def run(count: int, steps: int) -> Trainer:
        dataset = TensorDataset(images[:count], labels[:count], names)
        made = Trainer(toy_method(), toy_config(tmp_path, steps=steps), dataset)  # type: ignore[arg-type]
        made.run()
        return made

    run(40, 4)
    capsys.readouterr()
    again = run(39, 5)
    assert "39 images, where the checkpoint was made with 40" in capsys.readouterr().err
    assert again.loader.state_dict()["size"] == 39


# ---- what is not finite --------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=1, optim=OptimConfig(lr=0.0))
    with torch.no_grad():
        run.method.generator.classes.weight[3] = float("nan")
    with pytest.raises(RunFailed, match=r"classes\.weight is not finite; no weights are written"):
        run.export()
    assert not (tmp_path / "weights.safetensors").exists()


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_request_within_another_asks_both(number: signal.Signals) -> None:
    heard: list[int] = []
    handler = lambda number, _: heard.append(number)  # noqa: E731
    before = signal.signal(number, handler)
    try:
        with StopRequest() as outer:
            with StopRequest() as inner:
                os.kill(os.getpid(), number)
                assert inner.requested
            assert outer.requested
            with StopRequest() as late:
                assert not late.requested
        assert signal.getsignal(number) is handler
        assert heard == []
    finally:
        signal.signal(number, before)


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_between_two_students_ends_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes in a student's last save, when its own loop is over."""
    ran = []

    class Student:
        def run(self) -> str:
            ran.append(self)
            os.kill(os.getpid(), signal.SIGTERM)
            return "finished"

    monkeypatch.setattr(BOSSRecipe, "trainers", lambda *_: iter([Student(), Student()]))
    assert BOSSRecipe().run() == "interrupted"
    assert len(ran) == 1
    monkeypatch.setattr(BOSSRecipe, "trainers", lambda *_: iter([Student()]))
    assert BOSSRecipe().run() == "finished"  # nothing is left to be done
