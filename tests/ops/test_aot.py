"""Every Triton kernel compiles for sm_80, sm_90 and sm_100, without a GPU, a spill or a surprise.

The small set: what each op launches by default at the shapes of real models. ``make aot`` compiles
every variant in every mix of dtypes.
"""

from __future__ import annotations

import pytest

from flowkernels.ops import _library
from tests.checks import aot
from tests.checks.case import triton_cases


@pytest.fixture(scope="module")
def wanted() -> dict[str, list[aot.Job]]:
    return {case.name: aot.jobs([case], small=True) for case in triton_cases()}


@pytest.fixture(scope="module")
def reports(wanted) -> dict[aot.Job, aot.Report]:
    distinct = dict.fromkeys(job for jobs in wanted.values() for job in jobs)
    return dict(aot.compile_all(list(distinct)))


def test_every_function_with_a_triton_kernel_has_a_case(wanted):
    assert set(wanted) >= {name for name, f in _library.FUNCTIONS.items() if f.triton}
    assert all(wanted.values()), "a case that launches nothing"


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_no_spills_and_shared_memory_fits(reports, arch: int):
    problems = [
        p for job, report in reports.items() if job.arch == arch for p in report.problems(job)
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_aligned_operands_are_read_in_whole_vectors(reports, arch: int):
    """The attributes were given: aligned rows of a real model are read 16 bytes at a time."""
    for case in triton_cases():
        found = [
            aot.job_of(kernel, args, options, arch)
            for kernel, args, options in aot.launches(
                case, case.benchmark_shapes[0], "float32", case.variants[0], True, arch
            )
        ]
        # The second stages of reductions walk over columns of partial results.
        assert max(reports[job].widest_load for job in found) == 128, case.name


def test_unaligned_operands_are_another_kernel(wanted):
    """The unaligned variant was compiled too: its operands carry no promise of alignment."""
    for name, jobs in wanted.items():
        promises = {sum(bool(value) for _, value in job.attributes) for job in jobs}
        assert len(promises) > 1, name
