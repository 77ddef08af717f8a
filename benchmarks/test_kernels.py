"""Kernels in memory, against what else computes the same sum, and against a copy of as many bytes.

pytest benchmarks                        check and time everything: some thirty minutes
pytest benchmarks --benchmark-disable    check everything on small arrays: under a minute
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from benchmarks.kernel_cases import IN_MEMORY, KernelCase, make_cases
from benchmarks.kernel_rivals import ALL_THREADS, RIVALS, CannotError, Compile, Fastinterp, Rival

pytestmark = pytest.mark.filterwarnings("default")  # rivals' own warnings are not ours

_COPY_S = 0.03  # how long the copy is measured, before each case and after it


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    small = metafunc.config.getoption("benchmark_disable")
    found = []
    for case in make_cases(1 << 20 if small else IN_MEMORY):
        for rival in RIVALS:
            if not rival.takes(case) or (small and isinstance(rival, Compile) and (case.n, case.place) != (2, "cache")):
                continue
            found += [pytest.param(case, rival, t, id=f"{case}-{rival.name}-t{t}") for t in _threads(case, rival)]
    metafunc.parametrize(("case", "rival", "threads"), found)


def _threads(case: KernelCase, rival: Rival) -> list[int]:
    """In cache one thread: starting more takes longer than the work. In memory all; fastinterp one as well."""
    if case.place == "cache" or not rival.threads:
        return [1]
    return sorted({1, ALL_THREADS}) if isinstance(rival, Fastinterp) else [ALL_THREADS]


def test_combine(benchmark, case: KernelCase, rival: Rival, threads: int):
    if rival.missing:
        pytest.skip(rival.missing)  # why it cannot be imported
    case = _shared(case)
    case.clear()
    try:
        run = rival.prepare(case, threads)
        run()
    except CannotError as why:
        pytest.skip(str(why))  # what it cannot compute
    case.check(exact=isinstance(rival, Fastinterp), coarse=rival.coarse)
    copies = [] if benchmark.disabled else [copy_gb_s(case.bytes, threads)]
    benchmark.group = f"{case}-t{threads}"
    benchmark(run)
    if benchmark.disabled:
        return
    copy = statistics.mean([*copies, copy_gb_s(case.bytes, threads)])
    p20, p50, p80 = np.percentile(benchmark.stats.stats.sorted_data, [20, 50, 80]).tolist()
    gb_s = case.bytes / p50 / 1e9
    benchmark.extra_info |= {
        "dtype": case.dtype.name, "n": case.n, "k": case.k, "place": case.place, "numel": case.numel,
        "rival": rival.name, "threads": threads, "bytes": case.bytes, "reads": case.reads,
        "p20_s": p20, "p50_s": p50, "p80_s": p80, "gb_s": gb_s, "copy_gb_s": copy, "percent_of_copy": 100 * gb_s / copy,
    }  # fmt: skip


@lru_cache(maxsize=1)
def _shared(case: KernelCase) -> KernelCase:
    """One case's arrays serve all rivals, which follow each other. A copy, as pytest keeps the cases of all tests."""
    return replace(case)


# --- the floor -------------------------------------------------------------------------------------------------------


def copy_gb_s(nbytes: int, threads: int) -> float:
    """How fast numpy.copyto reads and writes `nbytes` together, half of them each: 10^9 bytes a second, the median."""
    run = _copier(nbytes // 2, threads)
    run()
    times: list[float] = []
    end = time.perf_counter() + _COPY_S
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return nbytes / statistics.median(times) / 1e9


@lru_cache(maxsize=2)
def _copier(nbytes: int, threads: int) -> Callable[[], None]:
    source, target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
    if threads == 1:
        return lambda: np.copyto(target, source)
    pool = ThreadPoolExecutor(threads)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))

    def run() -> None:
        list(pool.map(lambda part: np.copyto(*part), parts))

    return run
