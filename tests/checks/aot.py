"""Compiles Triton kernels ahead of time, with no GPU: ``python -m tests.checks.aot [names]``.

Each case's public function runs forward and backward on meta tensors while launches are
intercepted, so the kernels, signatures, specialisations and options seen are those that the JIT
would find. Each distinct one is compiled for sm_80, sm_90 and sm_100; registers, spills and shared
memory come from the log of Triton's own ptxas.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flowkernels.ops import _library
from tests.checks.case import DTYPES, OpCase, Shape, map_tensors, triton_cases
from tests.checks.compare import evaluate

ARCHITECTURES = (80, 90, 100)
# Bytes of shared memory that one block may have.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# float32 and bfloat16 models, and activations in bfloat16 under float32 modulation.
SWEEP_DTYPES = ("bfloat16", "float32", "mixed_bf16_fp32")
CORE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ATTENTION_CORE = "flowkernels.ops.attention._core"


class Job(NamedTuple):
    """One kernel as the JIT would compile it; picklable, and equal where the kernel is the same."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], tuple[tuple[str, int], ...]], ...]
    options: tuple[tuple[str, Any], ...]
    arch: int

    def __str__(self) -> str:
        types = " ".join(kind for _, kind in self.signature if kind.startswith("*"))
        names = [name for name, _ in self.signature]
        given = [(names[path[0]], value) for path, value in self.constants]
        constants = [(name, value) for name, value in given if name.isupper()]
        shape = " ".join(f"{name}={value}" for name, value in (*constants, *self.options))
        return f"{self.kernel} sm_{self.arch} [{types}] {shape}"


class Report(NamedTuple):
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    async_copies: int
    widest_load: int
    tma_loads: int
    wgmma: int
    tf32_products: int

    def problems(self, job: Job) -> list[str]:
        found = []
        allowed = spills_allowed(job)
        if allowed is not None and max(self.spill_stores, self.spill_loads) > allowed:
            found.append(f"spills {self.spill_stores} B out, {self.spill_loads} B in")
        if self.tf32_products:
            found.append(f"{self.tf32_products} TF32 products")
        if self.shared > SHARED_LIMIT[job.arch]:
            found.append(f"{self.shared} B of shared memory, limit {SHARED_LIMIT[job.arch]}")
        return [f"{job}: {each}" for each in found]


def spills_allowed(job: Job) -> int | None:
    """Bytes, None for any number: a row-wise kernel spills nothing, attention's tiles may a little.

    float32 attention is there to be right, and is reported only.
    """
    if not job.module.startswith(ATTENTION_CORE):
        return 0
    kinds = {kind for name, kind in job.signature if name in ("q", "grad_out")}
    return None if "*fp32" in kinds else 128


@contextlib.contextmanager
def launchers_on_meta() -> Iterator[None]:
    """Public functions choose Triton on the meta device, and operators call their launchers."""
    choose, call = _library.choose, _library.Operator.__call__
    _library.choose = lambda *args: "triton"  # type: ignore[assignment]
    _library.Operator.__call__ = (  # type: ignore[method-assign]
        lambda self, backend, *args: self.launch(*args) if self._triton else self.default(*args)
    )
    try:
        yield
    finally:
        _library.choose, _library.Operator.__call__ = choose, call  # type: ignore[method-assign]


def _unaligned(x: torch.Tensor) -> torch.Tensor:
    """The same shape at an address and with strides that 16 does not divide."""
    *leading, columns = x.shape
    return x.new_empty([*leading, columns + 1])[..., 1:]


def launches(
    case: OpCase, shape: Shape, dtypes: str, variant: str, aligned: bool, arch: int = 90
) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(kernel, arguments, options) of everything that forward and backward would launch."""
    from flowkernels.ops import _triton

    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    inputs = case.inputs(shape, dtypes, variant, device="meta")
    inputs = inputs if aligned else map_tensors(inputs, _unaligned)

    def grads(outputs: Any) -> list[torch.Tensor]:
        made = [torch.empty_like(out, memory_format=torch.contiguous_format) for out in outputs]
        return made if aligned else [_unaligned(g) if g.dim() else g for g in made]

    with (
        launchers_on_meta(),
        _triton.compiling_for(arch),
        _triton.intercepted(
            lambda kernel, grid, args, options: seen.append((kernel, args, options))
        ),
    ):
        needs = case.needs(inputs)
        evaluate(case, case.function, inputs, needs, grads)
        with torch.no_grad():
            evaluate(case, case.function, inputs, (), grads)
    return seen


def job_of(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], arch: int) -> Job:
    """What the JIT would compile for these arguments: types, divisibility by 16, constants."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", arch, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = binder(*args, **options)
    _, signature, constants, attributes = kernel._pack_args(
        backend, dict(options), bound, specialization, options
    )
    names = [parameter.name for parameter in kernel.params]
    return Job(
        kernel.fn.__module__,
        kernel.fn.__name__,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple((key, tuple(map(tuple, value))) for key, value in attributes.items()),
        tuple((k, v) for k, v in options.items() if k not in names),
        arch,
    )


def jobs(
    cases: Iterable[OpCase],
    architectures: Iterable[int] = ARCHITECTURES,
    *,
    small: bool = False,
) -> list[Job]:
    """The distinct kernels of the cases.

    The sweep takes the default variant in every benchmark shape and mix of dtypes, aligned and not,
    and every other variant in the first shape. ``small`` takes the default variant alone: each
    shape in bfloat16, the first also in float32, mixed, and as an unaligned view.
    """
    found: dict[Job, None] = {}
    for case in cases:
        shapes = case.benchmark_shapes
        default, *others = case.variants
        if small:
            plan = [(shapes[0], each, default, True) for each in SWEEP_DTYPES]
            plan += [(shape, "bfloat16", default, True) for shape in shapes[1:]]
            plan += [(shapes[0], "bfloat16", default, False)]
        else:
            plan = [
                (shape, dtypes, default, aligned)
                for shape in shapes
                for dtypes in DTYPES
                for aligned in (True, False)
            ]
            plan += [(shapes[0], each, other, True) for other in others for each in SWEEP_DTYPES]
        for number, entry in enumerate(plan):
            for arch in architectures:
                # The small set looks at sm_90 in all of it, at the others in two dtypes.
                if not small or arch == 90 or number < 2:
                    for kernel, args, options in launches(case, *entry, arch):
                        found[job_of(kernel, args, options, arch)] = None
    return list(found)


# (head width, dtype, whether samples have lengths, whether TMA may read): every tile of the core's
# table. A tensor that all samples share has a stride of 0, which TMA refuses.
CORE_SWEEP = (
    *((E, dtype, True, True) for E in (32, 64, 80, 128, 256) for dtype in CORE_DTYPES),
    *((E, torch.bfloat16, False, True) for E in (64, 128)),
    *((E, torch.bfloat16, True, False) for E in (64, 80, 128)),
)


def core_jobs(
    architectures: Iterable[int] = ARCHITECTURES,
    settings: Iterable[tuple[int, torch.dtype, bool, bool]] = CORE_SWEEP,
) -> list[Job]:
    """The attention core's kernels, launched as a pass over 24 heads would."""
    from flowkernels.ops import _triton
    from flowkernels.ops.attention import core_kernels

    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    found: dict[Job, None] = {}
    for arch, (width, dtype, ragged, tma) in itertools.product(architectures, settings):
        q, k, v, grad = torch.empty((4, 2, 1357, 24, width), dtype=dtype, device="meta")
        lengths = torch.empty(2, dtype=torch.int32, device="meta") if ragged else None
        if not tma:
            q, k, v, grad = (x[:1].expand_as(x) for x in (q, k, v, grad))
        with (
            _triton.compiling_for(arch),
            _triton.intercepted(
                lambda kernel, grid, args, options: seen.append((kernel, args, options))
            ),
        ):
            out, lse = core_kernels.attention_forward(q, k, v, lengths, 0.125)
            core_kernels.attention_backward(grad, q, k, v, out, lse, lengths, 0.125)
        found |= dict.fromkeys(job_of(*launch, arch) for launch in seen)
        seen.clear()
    return list(found)


def compile_job(job: Job) -> Report:
    """Compile, or take the report of an earlier compilation of the same source."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(job.module), job.kernel)
    source = ASTSource(
        fn=kernel,
        signature=dict(job.signature),
        constexprs=dict(job.constants),
        attrs={key: [list(item) for item in value] for key, value in job.attributes},
    )
    identity = f"{triton.__version__} {source.hash()} {job.options} {job.arch} 2"
    cached = _cache_folder() / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Report(*json.loads(cached.read_text()))
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            source, target=GPUTarget("cuda", job.arch, 32), options=dict(job.options)
        )
    report = _read(log.getvalue(), compiled.asm["ptx"], compiled.metadata.shared)
    with contextlib.suppress(OSError):
        cached.parent.mkdir(parents=True, exist_ok=True)
        temporary = cached.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(list(report)))
        temporary.replace(cached)
    return report


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "flowkernels" / "aot"


def _read(log: str, ptx: str, shared: int) -> Report:
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.findall(r"Used (\d+) registers", log)
    assert spills, f"ptxas said nothing to read: {log[:300]!r}"
    vectors = re.findall(r"ld\.global(?:\.\w+)*?\.v(\d)\.b(\d+)", ptx)
    scalars = re.findall(r"ld\.global(?:\.(?!v\d)\w+)*?\.b(\d+)", ptx)
    bits = [int(n) * int(b) for n, b in vectors] + [int(b) for b in scalars]
    return Report(
        max(map(int, registers)),
        sum(int(out) for out, _ in spills),
        sum(int(back) for _, back in spills),
        shared,
        len(re.findall(r"cp\.async\.c[ag]\.", ptx)),
        max(bits, default=0),
        ptx.count("cp.async.bulk.tensor"),
        len(re.findall(r"wgmma\.mma_async\.", ptx)),
        len(re.findall(r"mma\S*\.tf32|kind::tf32", ptx)),
    )


def compile_all(wanted: list[Job], workers: int | None = None) -> Iterator[tuple[Job, Report]]:
    """Each job and its report, as they come; two processes, or as many as there are cores."""
    count = workers or max(2, os.cpu_count() or 2)
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        yield from zip(wanted, pool.map(compile_job, wanted, chunksize=1), strict=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.checks.aot", description=__doc__)
    parser.add_argument("names", nargs="*", help="public functions; all where none is named")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES)
    parser.add_argument("--small", action="store_true", help="the set that `make test` compiles")
    parser.add_argument("--workers", type=int)
    options = parser.parse_args(arguments)
    cases = [case for case in triton_cases() if not options.names or case.name in options.names]
    if not cases and "attention_core" not in options.names:
        names = [case.name for case in triton_cases()]
        parser.error(f"no op of that name; there are {', '.join(names)}, attention_core")
    wanted = jobs(cases, options.arch or ARCHITECTURES, small=options.small)
    if "attention_core" in options.names or not (options.names or options.small):
        wanted += core_jobs(options.arch or ARCHITECTURES)
    print(f"{len(wanted)} kernels to compile", flush=True)
    problems: list[str] = []
    for job, report in compile_all(wanted, options.workers):
        print(
            f"{report.registers:4d} registers {report.shared:6d} B shared "
            f"{report.spill_stores:4d} B spilt {report.widest_load:4d}-bit loads "
            f"{report.async_copies:3d} async copies {report.tma_loads:3d} TMA loads "
            f"{report.wgmma:3d} wgmma  {job}",
            flush=True,
        )
        problems += report.problems(job)
    print("\n".join(problems) or f"{len(wanted)} kernels: spills and shared memory within limits")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
