"""Who may import whom, and what importing the package may not do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_lower_room_never_imports_a_higher_one():
    """The layers of pyproject.toml, checked by import-linter."""
    code = "import sys; from importlinter.cli import lint_imports_command as c; sys.exit(c())"
    run = python(code)
    assert run.returncode == 0, run.stdout + run.stderr


# Any use of the driver would need one of these.
_NO_GPU = """
import torch

def touched(*args, **kwargs):
    raise AssertionError("importing flowkernels touched the GPU")

for name in ("_lazy_init", "current_device", "device_count", "get_device_capability",
             "get_device_properties", "is_available", "is_bf16_supported", "synchronize"):
    setattr(torch.cuda, name, touched)
"""


def test_importing_never_touches_the_gpu():
    run = python(
        _NO_GPU
        + "import sys, flowkernels, flowkernels.losses, flowkernels.ode, flowkernels.optim\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    assert run.returncode == 0, run.stderr


def test_importing_loads_neither_triton_nor_kernels():
    """Kernels are imported at their first use."""
    run = python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import flowkernels, flowkernels.losses, flowkernels.ode, flowkernels.optim\n"
        "new = set(sys.modules) - before\n"
        "kernels = {m for m in new if m.startswith('flowkernels.') and m.endswith('kernels')}\n"
        "assert not kernels, kernels\n"
        "assert 'triton' not in new, 'triton imported'\n"
    )
    assert run.returncode == 0, run.stderr


# As if it were not installed: nothing on sys.path has it.
_BLOCKED = """
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name.split(".")[0] == "triton" else find_spec(name, *rest)
)
"""

_WORKS = """
import torch, flowkernels
x = torch.randn(2, 3, 8, requires_grad=True)
y = flowkernels.ops.modulated_norm(x, torch.randn(2, 8), torch.randn(2, 8))
y.sum().backward()
print(flowkernels.describe())
"""


def test_works_without_triton():
    run = python(_BLOCKED + _WORKS)
    assert run.returncode == 0, run.stderr
    assert "triton is not installed" in run.stdout


@pytest.mark.parametrize(
    "reason", ["native library not built", "FLOWKERNELS_NATIVE=0 when installed"]
)
def test_works_without_the_native_library(tmp_path: Path, reason: str):
    """A copy of the package without its shared objects: the reference serves, and says why."""
    package = tmp_path / "flowkernels"
    for source in (ROOT / "flowkernels").rglob("*.py"):
        target = package / source.relative_to(ROOT / "flowkernels")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    if reason.startswith("FLOWKERNELS"):
        (package / "_lib").mkdir()
        (package / "_lib" / "build.json").write_text(f'{{"cpu": "{reason}", "cuda": "{reason}"}}')
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + _WORKS
    run = python(code + f"assert flowkernels.__file__.startswith({str(tmp_path)!r})\n")
    assert run.returncode == 0, run.stderr
    assert reason in run.stdout
