"""A training run in a process of its own, which kills itself where the test says.

    python -m tests.train.run_toy OUTPUT STEPS [step N | write N | term N]

step N: SIGKILL in the middle of step N, after its first update. write N: SIGKILL at the N-th
operation on the disk (fsync, rename, removal) of any checkpoint. term N: SIGTERM in step N.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from typing import Any

import torch

from flowkernels.train.trainer import Trainer
from tests.train.toy import toy_config, toy_method


def kill_on_write(count: int) -> None:
    remaining = [count]

    def watched(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            remaining[0] -= 1
            if remaining[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    os.fsync, os.rename = watched(os.fsync), watched(os.rename)
    shutil.rmtree = watched(shutil.rmtree)


def signal_in_step(trainer: Trainer, step: int, number: int) -> None:
    update = trainer._update
    sent: list[int] = []

    def watched(*arguments: Any) -> None:
        update(*arguments)
        if trainer.step == step and not sent:
            sent.append(number)  # a second signal would end the run at once
            os.kill(os.getpid(), number)

    trainer._update = watched  # type: ignore[method-assign]


def main() -> None:
    torch.set_num_threads(1)
    output, steps = sys.argv[1], int(sys.argv[2])
    trainer = Trainer(toy_method(), toy_config(output, steps=steps))  # type: ignore[arg-type]
    if len(sys.argv) > 3:
        what, count = sys.argv[3], int(sys.argv[4])
        if what == "write":
            kill_on_write(count)
        else:
            signal_in_step(trainer, count, signal.SIGKILL if what == "step" else signal.SIGTERM)
    print(trainer.run())


if __name__ == "__main__":
    main()
