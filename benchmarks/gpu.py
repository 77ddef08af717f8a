"""Measures the kernels on a GPU, and merges from file to file, beside their floors and what else a user could call.

    python -m benchmarks.gpu [--backends cuda,triton] [--only WORD,...] [--runs 15] [--out FILE.json]
    python -m benchmarks.gpu --rehearse

Each answer is checked first: windows of the output must be the bytes that the CPU makes of the same inputs. Then the
case, its floor and its rivals run in turn, and the medians of the ratios in each turn are printed. The floor is a copy
on the device that moves as many bytes, those read and those written together. 55 GB of a GPU's memory are enough.

Merges from file to file are whole commands on checkpoints of 2.2 GB each, `--device cuda` and `--device cpu` in turn.

`--rehearse` goes through all of it with small arrays on a machine without a GPU: CUDA's kernels run on the host as
tests/support/devices/cuda_host has it, and Triton's in its interpreter. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_files
from benchmarks.gpu_cases import Bench, Case, Run


def measured(bench: Bench, case: Case, runs: int) -> dict[str, Any]:
    """Check it, then time it, its floor and its rivals in turn."""
    case.run()
    case.check()
    copy, part = bench.copy(case.nbytes)
    works: dict[str, Run] = {"fastinterp": case.run, "copy": copy, **case.rivals}
    for _ in range(1 if bench.rehearse else 3):
        for run in works.values():
            run()
    bench.synchronize()
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(runs):
        for name, run in works.items():
            taken[name].append(bench.seconds(run, case.wall) / (part if name == "copy" else 1.0))
    ratios = [ours / floor for ours, floor in zip(taken["fastinterp"], taken["copy"], strict=True)]
    ratio = statistics.median(ratios)
    return {
        "case": case.name, "bytes": case.nbytes, "bound": case.bound, "wall": case.wall, "ratio": ratio,
        "holds": None if case.bound is None else ratio <= case.bound,
        "ratios": ratios, "seconds": {name: statistics.median(times) for name, times in taken.items()},
        "gb_per_s": {name: case.nbytes / statistics.median(times) / 1e9 for name, times in taken.items()},
    }  # fmt: skip


def tried(measure: Callable[[], dict[str, Any]], name: str, rehearse: bool) -> dict[str, Any]:
    """What `measure` returns. A case that fails is reported, and the next ones are measured; not in a rehearsal."""
    try:
        return measure()
    except Exception as error:
        if rehearse:
            raise
        return {"case": name, "holds": False, "error": f"{type(error).__name__}: {error}"[:1000]}


def as_line(found: dict[str, Any]) -> str:
    """The result of a case as a line of text."""
    if "error" in found:
        return f"{found['case']:26}FAILED: {found['error']}"
    ours, floor = (found["gb_per_s"][name] for name in ("fastinterp", "copy"))
    bound = "" if found["bound"] is None else f", bound {found['bound']:.3f}: {'holds' if found['holds'] else 'MISSED'}"
    others = {name: s / found["seconds"]["fastinterp"] for name, s in found["seconds"].items()}
    rivals = "".join(f"; {name} {x:.2f}x" for name, x in others.items() if name not in ("fastinterp", "copy"))
    return f"{found['case']:26}{ours:8.0f} of {floor:.0f} GB/s, {found['ratio']:.3f} of a copy{bound}{rivals}"


def where(device: Any, asked: argparse.Namespace) -> dict[str, Any]:
    import torch
    import triton

    from fastinterp.bench.provenance import provenance

    found = provenance() | {
        "torch": torch.__version__, "triton": triton.__version__, "gpu": device.label, "rehearsal": asked.rehearse,
    }  # fmt: skip
    found["commit"] = found["commit"] or asked.commit or None
    if not asked.rehearse:
        at = torch.cuda.get_device_properties(0)
        found |= {
            "gpu_memory_bytes": at.total_memory, "capability": f"{at.major}.{at.minor}", "cuda": torch.version.cuda,
            "driver": _driver(),
        }  # fmt: skip
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def parsed(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backends", default="cuda,triton")
    parser.add_argument("--only", default="", help="words, of which a case's name has one")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--file-runs", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where checkpoints are made, which are removed in the end")
    parser.add_argument("--commit", default="", help="what is measured, where that is no checkout")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(given)
    if asked.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
        asked.runs = asked.file_runs = 1
    return asked


def main(given: Sequence[str] | None = None) -> int:
    asked = parsed(given)
    words = [word for word in asked.only.split(",") if word]
    results: dict[str, Any] = {"results": []}

    def add(found: dict[str, Any], line: str) -> None:
        results["results"].append(found)
        print(f"  {line}", flush=True)
        if asked.out:  # at once: what a later case breaks must not cost what there is
            asked.out.write_text(json.dumps(results, indent=2) + "\n", "utf-8")

    for backend in asked.backends.split(","):
        bench = Bench(backend, asked.rehearse)
        results |= where(bench.device, asked)
        print(f"{backend} on {bench.device.label}")
        for name, make in bench.cases():
            if not words or any(word in name for word in words):
                found = tried(lambda: measured(bench, make(), asked.runs), name, asked.rehearse)  # noqa: B023
                add({"backend": backend, **found}, as_line(found))
                gc.collect()
                bench.empty_cache()
    if not words or any(word in "file to file" for word in words):
        print("whole commands")
        how: dict[str, Any] = {"size": "1b", "device": "cuda"}
        if asked.rehearse:
            how = {"size": "tiny", "device": "triton", "recipes": ["linear"]}
        for found in gpu_files.files(runs=asked.file_runs, scratch=asked.scratch, **how):
            add(found, gpu_files.as_line(found))
    return 0 if asked.rehearse or all(r["holds"] is not False for r in results["results"]) else 1


if __name__ == "__main__":
    sys.exit(main())
