"""Recipe files, settings and the learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowkernels.train.config import DataConfig, OptimConfig, TrainConfig
from flowkernels.train.errors import UsageError
from flowkernels.train.learning_rate import learning_rate
from flowkernels.train.recipe_file import from_mapping, load_recipe


def test_recipe_values_take_their_types() -> None:
    values = {
        "steps": 5,
        "optim": {"lr": "2e-5", "betas": [0, 0.5], "max_grad_norm": 1, "ema_decays": [0.9, 0.99]},
        "data": {"kind": "folder", "path": "x", "image_size": 8},
    }
    config = from_mapping(TrainConfig, values)
    assert config.optim.lr == 2e-5  # YAML 1.1 reads a number without a dot as text
    assert config.optim.betas == (0.0, 0.5)
    assert config.optim.max_grad_norm == 1.0
    assert config.optim.ema_decays == (0.9, 0.99)
    assert config.data == DataConfig(kind="folder", path="x", image_size=8)
    assert config.batch_size == TrainConfig().batch_size
    assert from_mapping(TrainConfig, {"optim": {"max_grad_norm": None}}).optim.max_grad_norm is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 3}, "unknown key 'stepz'; the nearest valid one is 'steps'"),
        ({"optim": {"lrr": 1}}, "unknown key 'optim.lrr'; the nearest valid one is 'optim.lr'"),
        ({"zzz": 1}, "unknown key 'zzz'; known are output, steps"),
        ({"steps": 1.5}, "steps: got 1.5, needs a whole number"),
        ({"steps": True}, "steps: got True, needs a whole number"),
        ({"compile": 1}, "compile: got 1, needs true or false"),
        ({"optim": {"lr": "fast"}}, "optim.lr: got 'fast', needs a number"),
        ({"optim": {"lr": True}}, "optim.lr: got True, needs a number"),
        ({"optim": {"betas": [0.9]}}, "optim.betas: got 1 values, needs 2"),
        ({"optim": {"ema_decays": 0.9}}, "optim.ema_decays: got 0.9, needs a list"),
        ({"precision": "fp8"}, "precision: got 'fp8', needs one of fp32, bf16, auto"),
        ({"data": "digits"}, "data.: got 'digits', needs keys and values"),
        ([1], r"the recipe: got \[1\], needs keys and values"),
    ],
)
def test_recipe_faults_name_the_key(values: Any, message: str, tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UsageError, match=message) as failure:
        load_recipe(TrainConfig, path)
    assert str(failure.value).startswith(f"{path}: ")
    assert "\n" not in str(failure.value)


def test_recipe_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.yaml: cannot read the recipe: No such file"):
        load_recipe(TrainConfig, tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1")
    with pytest.raises(UsageError, match=r"bad\.yaml: not valid YAML"):
        load_recipe(TrainConfig, bad)
    bad.write_text("a: !!python/object/apply:os.system ['false']")
    with pytest.raises(UsageError, match=r"bad\.yaml: not valid YAML"):
        load_recipe(TrainConfig, bad)
    bad.write_text("")
    assert load_recipe(TrainConfig, bad) == TrainConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"batch_size": -1}, "batch_size: got -1"),
        ({"log_every": 0}, "log_every: got 0"),
        ({"max_nonfinite": 0}, "max_nonfinite: got 0"),
        ({"optim": OptimConfig(lr=float("nan"))}, "optim.lr: got nan"),
        ({"optim": OptimConfig(betas=(0.9, 1.0))}, "optim.betas: got"),
        ({"optim": OptimConfig(ema_decays=(1.5,))}, "optim.ema_decays: got"),
        ({"optim": OptimConfig(max_grad_norm=0.0)}, "optim.max_grad_norm: got 0.0"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(**changes).validate()


def test_learning_rate_schedules() -> None:
    constant = OptimConfig(lr=2.0, warmup=4)
    assert [learning_rate(constant, s, 100) for s in (0, 1, 3, 4, 99)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    cosine = OptimConfig(lr=2.0, schedule="cosine", warmup=10, final_lr=0.1)
    rates = [learning_rate(cosine, s, 111) for s in range(111)]
    assert rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(1.1)  # half way between 2 and 0.2
    assert rates[110] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(OptimConfig(schedule="cosine"), 0, 1) == 1e-3  # a run of one step
