"""Every example in the documentation runs: docstrings and the Python blocks of the README."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import flowkernels

# Triton's kernels are no Python to import where Triton is absent; they carry no examples.
MODULES = [
    module.name
    for module in pkgutil.walk_packages(flowkernels.__path__, "flowkernels.")
    if not module.name.endswith(
        ("kernels", "_device", "_sample_tiles", "__main__", "_triton", "._C")
    )
]
README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str):
    if name.startswith("flowkernels.integrations."):
        pytest.importorskip("diffusers")
    torch.manual_seed(0)
    module = importlib.import_module(name)
    assert doctest.testmod(module, globs={**vars(module), "torch": torch}).failed == 0


def test_public_functions_have_an_example():
    for module in (flowkernels.ops, flowkernels.losses):
        for name in module.__all__:
            assert ">>>" in getattr(module, name).__doc__, name


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_readme_examples(index: int):
    if "diffusers" in BLOCKS[index]:
        pytest.importorskip("diffusers")
    exec(BLOCKS[index], {})


def test_the_readme_has_its_four_examples():
    assert len(BLOCKS) == 4
