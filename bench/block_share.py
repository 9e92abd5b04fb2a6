"""``python -m bench.block_share``: how much faster an SD3 block could become at all.

Matrix products and the attention core are library calls that patching leaves alone. If they are a
share p of eager's time, no fusion of the rest makes the block more than 1/p times as fast.
"""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from bench.cases import Random
from bench.test_block import SHAPE, _eager, _inputs

CORES = ("aten::addmm", "aten::mm", "aten::bmm", "aten::_scaled_dot_product")


def share(shape: tuple[int, ...] = SHAPE, calls: int = 3) -> float:
    """The share of matrix products and attention in an eager block's forward and backward."""
    random = Random(0, torch.float32, torch.device("cpu"))
    inputs = [x.requires_grad_() for x in _inputs(random, shape)]

    def run() -> None:
        outputs = _eager(*inputs)
        torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs])

    run()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(calls):
            run()
    rows = recorded.key_averages()
    total = sum(row.self_cpu_time_total for row in rows)
    return sum(row.self_cpu_time_total for row in rows if row.key.startswith(CORES)) / total


if __name__ == "__main__":
    found = share()
    print(f"joint block {'x'.join(map(str, SHAPE))}, float32, forward and backward on the CPU:")
    print(f"matrix products and attention take {found:.1%}: at most {1 / found:.2f} times eager")
