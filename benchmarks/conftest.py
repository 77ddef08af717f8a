"""Where the numbers come from, said once in each file of results; and what is left out, said before the first one."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.kernel_rivals import RIVALS
from fastinterp.bench.provenance import provenance


def pytest_report_header(config: pytest.Config) -> list[str]:
    found = provenance()
    lines = [f"fastinterp {found['fastinterp']} ({found['isa']}), {found['threads']} threads, {found['cpu']}"]
    if config.getoption("benchmark_disable"):
        lines.append("quick form: small arrays, torch.compile in one case of each dtype, nothing is timed")
    return lines + [f"left out: {r.name}: {r.missing}" for r in RIVALS if r.missing]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """In place of what pytest-benchmark collects, which has the machine's name in it."""
    machine_info.clear()
    machine_info.update(provenance() | {"rivals": {r.name: r.version for r in RIVALS if not r.missing}})


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Leave out what nobody reads again: each single round, and who committed when."""
    output_json["commit_info"] = {"id": output_json["machine_info"]["commit"]}
    for one in output_json["benchmarks"]:
        one["stats"].pop("data", None)
