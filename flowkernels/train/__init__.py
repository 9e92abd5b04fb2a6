"""The engine in which every method runs: loop, checkpoints, data, evaluation, logs.

Names are imported when they are first used: importing the package loads no dataset, no picture
library and no TensorBoard.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowkernels.train.boss import BOSSRecipe
    from flowkernels.train.config import DataConfig, OptimConfig, TrainConfig
    from flowkernels.train.data import Loader, load_dataset
    from flowkernels.train.errors import DataError, RunFailed, UsageError
    from flowkernels.train.evaluate import EvaluateConfig
    from flowkernels.train.export import TrainedModel, load_model
    from flowkernels.train.frechet import frechet_distance
    from flowkernels.train.recipe_file import load_recipe
    from flowkernels.train.recipes import FGMRecipe, TeacherRecipe
    from flowkernels.train.scflow import SCFlowRecipe
    from flowkernels.train.scheduling import ScheduleConfig, schedule
    from flowkernels.train.trainer import Trainer

_HOMES = {
    "BOSSRecipe": "boss",
    "DataConfig": "config",
    "DataError": "errors",
    "EvaluateConfig": "evaluate",
    "FGMRecipe": "recipes",
    "Loader": "data",
    "OptimConfig": "config",
    "RunFailed": "errors",
    "SCFlowRecipe": "scflow",
    "ScheduleConfig": "scheduling",
    "TeacherRecipe": "recipes",
    "TrainConfig": "config",
    "TrainedModel": "export",
    "Trainer": "trainer",
    "UsageError": "errors",
    "frechet_distance": "frechet",
    "load_dataset": "data",
    "load_model": "export",
    "load_recipe": "recipe_file",
    "schedule": "scheduling",
}

__all__ = [
    "BOSSRecipe",
    "DataConfig",
    "DataError",
    "EvaluateConfig",
    "FGMRecipe",
    "Loader",
    "OptimConfig",
    "RunFailed",
    "SCFlowRecipe",
    "ScheduleConfig",
    "TeacherRecipe",
    "TrainConfig",
    "TrainedModel",
    "Trainer",
    "UsageError",
    "frechet_distance",
    "load_dataset",
    "load_model",
    "load_recipe",
    "schedule",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
