"""The loop: what a step does, what it leaves behind, what it refuses."""

from __future__ import annotations

import copy
import gc
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowkernels.train.checkpoint import list_checkpoints
from flowkernels.train.config import OptimConfig
from flowkernels.train.errors import RunFailed, UsageError
from flowkernels.train.trainer import Trainer, compile_blocks
from tests.train.toy import ToyMethod, ToyNetwork, toy_config, toy_method


def trainer(output: Path, method: ToyMethod | None = None, **changes: Any) -> Trainer:
    return Trainer(method or toy_method(), toy_config(output, **changes))  # type: ignore[arg-type]


def test_step_runs_the_phases_in_order_with_repeats(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    seen: list[tuple[str | None, Tensor]] = []
    losses = run.method.losses

    def watched(batch: dict[str, Tensor], phase: str | None = None) -> dict[str, Tensor]:
        seen.append((phase, batch["x0"]))
        return losses(batch, phase)

    run.method.losses = watched  # type: ignore[method-assign]
    before = copy.deepcopy(run.method.state_dict())
    run._train_step()
    assert [phase for phase, _ in seen] == ["fake", "fake", "generator"]
    assert not torch.equal(seen[0][1], seen[1][1])  # a fresh batch for every update
    after = run.method.state_dict()
    for name in after:
        assert torch.equal(before[name], after[name]) == name.startswith("teacher."), name


def test_step_never_waits_for_the_device(tmp_path: Path) -> None:
    """No value is read on the host: no `.item()`, no `bool(tensor)`, no `.tolist()`."""

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            assert "_local_scalar_dense" not in str(func), "a step read a value from the device"
            return func(*args, **(kwargs or {}))

    run = trainer(tmp_path)
    run.loader.next_batch()
    with NoReads():
        run._train_step()
        run._train_step()


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    class Plain(ToyMethod):
        """Deterministic given the batch, and linear in it."""

        def losses(self, batch: dict[str, Tensor], phase: str | None = None) -> dict[str, Tensor]:
            x0 = batch["x0"]
            t = torch.full((len(x0),), 0.5)
            out = getattr(self, phase or "generator")(x0, t, batch["labels"])
            return {"loss": (out - x0).square().mean()}

    torch.manual_seed(0)
    first = Plain()
    second = copy.deepcopy(first)
    # Adam's first step is ±lr whatever the gradient; with a large eps it is proportional to it.
    optim = OptimConfig(lr=1.0, eps=1e3)
    one = trainer(tmp_path / "one", first, batch_size=16, optim=optim)
    two = trainer(tmp_path / "two", second, batch_size=8, accumulate=2, optim=optim)
    one._train_step()
    two._train_step()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        # The sums are taken in another order: rounding of fp32, no more.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Poisoned(ToyMethod):
    """Its fake loss is not finite from the third update on."""

    count = 0
    until = 10**9

    def losses(self, batch: dict[str, Tensor], phase: str | None = None) -> dict[str, Tensor]:
        losses = super().losses(batch, phase)
        if phase == "fake":
            self.count += 1
            if 3 <= self.count <= self.until:
                losses["fake"] = losses["fake"] * float("nan")
        return losses


def test_nonfinite_loss_is_skipped_and_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    method = Poisoned()
    method.until = 5
    run = trainer(tmp_path, method, max_nonfinite=4)
    assert run.run() == "finished"
    assert run.skipped == 3
    assert run.meter.nonfinite == {"fake": 3}
    assert all(bool(torch.isfinite(p).all()) for p in method.parameters())
    # The counts are part of the state: a resumed run goes on counting.
    torch.manual_seed(0)
    again = trainer(tmp_path, Poisoned(), max_nonfinite=4)
    again._begin()
    assert again.skipped == 3
    assert again.meter.nonfinite == {"fake": 3}


def test_stops_after_max_nonfinite(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = trainer(tmp_path, Poisoned(), steps=100, log_every=1, save_every=2, max_nonfinite=6)
    with pytest.raises(RunFailed, match=r"6 updates skipped.*fake \(6x\)") as failure:
        run.run()
    assert "\n" not in str(failure.value)
    # The last checkpoint from before the limit is whole, and named.
    step, path = list_checkpoints(tmp_path)[-1]
    assert step == 2
    assert str(path) in str(failure.value)
    assert not (tmp_path / "weights.safetensors").exists()


def test_ema_is_exported(tmp_path: Path) -> None:
    decay = 0.9
    run = trainer(tmp_path, steps=5)
    average = {n: p.detach().clone() for n, p in run.method.generator.named_parameters()}
    step = run._train_step

    def watched() -> None:
        step()
        for name, parameter in run.method.generator.named_parameters():
            average[name].lerp_(parameter.detach(), 1 - decay)

    run._train_step = watched  # type: ignore[method-assign]
    run.run()
    exported = load_file(tmp_path / "weights.safetensors")
    raw = run.method.generator.state_dict()
    assert exported.keys() == raw.keys()
    for name, value in exported.items():
        # One rounding of fp32 in each of five updates, at magnitudes up to one.
        torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(exported[name], raw[name]) for name in raw)
    assert json.loads((tmp_path / "model.json").read_text())["step"] == 5


def test_no_ema_exports_the_raw_weights(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=2, optim=OptimConfig(lr=1e-2))
    run.run()
    for name, value in load_file(tmp_path / "weights.safetensors").items():
        assert torch.equal(value, run.method.generator.state_dict()[name])


def test_grid_shows_the_averaged_weights_and_disturbs_nothing(tmp_path: Path) -> None:
    """A run with grids at every step ends with the same bits as one without."""
    plain, watched = trainer(tmp_path / "plain"), trainer(tmp_path / "grids", grid_every=1)
    plain.run()
    watched.run()
    for folder in ("plain", "grids"):
        assert (tmp_path / folder / "weights.safetensors").exists()
    weights = [(tmp_path / f / "weights.safetensors").read_bytes() for f in ("plain", "grids")]
    assert weights[0] == weights[1]
    pictures = sorted((tmp_path / "grids" / "samples").glob("*.png"))
    assert len(pictures) == 12
    # Same noises, other weights: alike, not equal. And the last grids of both runs are equal.
    first, last = (np.asarray(Image.open(p)) for p in (pictures[0], pictures[-1]))
    assert first.shape == last.shape
    assert not np.array_equal(first, last)
    final = tmp_path / "plain" / "samples" / pictures[-1].name
    assert np.array_equal(last, np.asarray(Image.open(final)))


def test_bf16_autocast_keeps_float32_weights(tmp_path: Path) -> None:
    seen = []
    run = trainer(tmp_path, steps=3, precision="bf16")
    run.method.generator.outward.register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype)
    )
    run.run()
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in run.method.parameters()} == {torch.float32}
    weights = load_file(tmp_path / "weights.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}


@pytest.mark.parametrize("offers", [False, True])
def test_auto_precision_is_bf16_where_the_processor_multiplies_it(
    offers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: offers)
    assert trainer(tmp_path, precision="auto").bfloat16 is offers
    assert trainer(tmp_path, precision="bf16").bfloat16
    assert not trainer(tmp_path, precision="fp32").bfloat16


def test_tensorboard_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(tmp_path, steps=8, tensorboard=True).run()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()
    assert {
        "loss/fake",
        "loss/generator",
        "learning_rate/generator",
        "speed/steps_per_second",
    } <= set(tags["scalars"])
    assert tags["images"] == ["samples"]
    assert [event.step for event in events.Scalars("loss/fake")] == [4, 8]
    assert all(np.isfinite(event.value) for event in events.Scalars("gradient_norm/fake"))


def test_compile_serves_each_block(tmp_path: Path) -> None:
    class Blocks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(
                torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in "ab"
            )
            self.plain = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

    network = Blocks()
    names = list(network.state_dict())
    compile_blocks(network)
    assert all(block._compiled_call_impl is not None for block in network.blocks)
    assert network.plain[0]._compiled_call_impl is None
    assert network._compiled_call_impl is None
    assert list(network.state_dict()) == names
    whole = ToyNetwork()
    compile_blocks(whole)
    assert whole._compiled_call_impl is not None


def test_gradient_checkpointing_asks_the_networks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gradient_checkpointing: no network"):
        trainer(tmp_path, gradient_checkpointing=True)
    asked = []
    ToyNetwork.enable_gradient_checkpointing = lambda self: asked.append(self)  # type: ignore[attr-defined]
    try:
        trainer(tmp_path, gradient_checkpointing=True)
    finally:
        del ToyNetwork.enable_gradient_checkpointing  # type: ignore[attr-defined]
    assert len(asked) == 3


def test_collector_passes_over_what_was_there_before(tmp_path: Path) -> None:
    before, frozen = gc.get_freeze_count(), []
    run = trainer(tmp_path)
    update = run._update
    run._update = lambda *a: (frozen.append(gc.get_freeze_count()), update(*a))  # type: ignore
    run.run()
    assert min(frozen) > before + 10_000
    assert gc.get_freeze_count() == 0


def test_objects_that_somebody_froze_stay_frozen(tmp_path: Path) -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        trainer(tmp_path).run()
        assert gc.get_freeze_count() > frozen // 2
    finally:
        gc.unfreeze()


def test_interrupted_run_goes_on_in_the_same_process(tmp_path: Path) -> None:
    trainer(tmp_path / "whole").run()
    run = trainer(tmp_path / "stopped")
    update = run._update

    def interrupt_once(*arguments: Any) -> None:
        update(*arguments)
        if run.step == 5:
            signal.raise_signal(signal.SIGINT)
            run._update = update  # type: ignore[method-assign]

    run._update = interrupt_once  # type: ignore[method-assign]
    handler = signal.getsignal(signal.SIGINT)
    assert run.run() == "interrupted"
    assert signal.getsignal(signal.SIGINT) is handler
    assert run.run() == "finished"
    ours, theirs = (tmp_path / f / "weights.safetensors" for f in ("stopped", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="WORLD_SIZE: got 2, needs 1"):
        trainer(tmp_path)


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    from flowkernels.train.process import exclusive

    with exclusive(tmp_path), pytest.raises(UsageError, match="another run is writing"):
        trainer(tmp_path).run()


def test_damaged_checkpoint_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path / "whole").run()
    trainer(tmp_path / "hurt").run()
    newest = list_checkpoints(tmp_path / "hurt")[-1][1]
    tensors = newest / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    (tmp_path / "hurt" / "weights.safetensors").unlink()
    capsys.readouterr()
    trainer(tmp_path / "hurt").run()
    told = capsys.readouterr().err
    assert f"{newest} is damaged and passed over" in told
    assert "resuming from" in told
    ours, theirs = (tmp_path / f / "weights.safetensors" for f in ("hurt", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_changed_settings_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, steps=4).run()
    trainer(tmp_path, steps=5, batch_size=8).run()
    told = capsys.readouterr().err
    assert "changed since the checkpoint: steps, batch_size; the resume is not bitwise" in told


def test_fewer_steps_than_the_checkpoint(tmp_path: Path) -> None:
    trainer(tmp_path, steps=4).run()
    with pytest.raises(UsageError, match=r"steps: got 3, but .* is already at 4"):
        trainer(tmp_path, steps=3).run()


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, steps=2).run()
    other = toy_method()
    other.generator = ToyNetwork(width=8)
    with pytest.raises(UsageError, match="is of another model or method"):
        trainer(tmp_path, other, steps=4).run()


def test_fresh_begins_at_step_0(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    weights = (tmp_path / "weights.safetensors").read_bytes()
    run = trainer(tmp_path, fresh=True)
    assert run._begin() == []
    assert list_checkpoints(tmp_path) == []
    run.run()
    assert (tmp_path / "weights.safetensors").read_bytes() == weights
