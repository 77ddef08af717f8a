"""Merges from file to file, whole commands: `--device cuda` beside `--device cpu`, and what `--device auto` chooses."""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastinterp.bench.check import weight_files
from fastinterp.bench.checkpoints import SIZES, write_checkpoints
from fastinterp.bench.race import Racer, race

BOUND = 1.1  # of the time on the GPU over that on the processor; or auto does not choose the GPU
_MEMORY = Path("/dev/shm")


def files(
    *, size: str, device: str, runs: int, scratch: Path | None, recipes: Sequence[str] = ("linear", "ties")
) -> Iterator[dict[str, Any]]:
    """Results of recipes on checkpoints of `size` (see fastinterp.bench), which are made in `scratch` and removed.

    device   that is compared with cpu, as --device takes it
    scratch  None: a file system in memory, if there is one with room, else the system's folder for temporary files
    """
    need = 5 * SIZES[size].nbytes
    if scratch is None and _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > need:
        scratch = _MEMORY
    with tempfile.TemporaryDirectory(prefix="fastinterp-gpu-", dir=scratch) as made:
        folder = Path(made)
        base, one, other = write_checkpoints(folder / "models", SIZES[size])
        linear: dict[str, Any] = {"merge_method": "linear", "models": _weighted(one, other), "dtype": "bfloat16"}
        ties = linear | {"merge_method": "ties", "base_model": str(base), "parameters": {"density": 0.5}}
        known = {"linear": (linear, (one, other)), "ties": (ties, (base, one, other))}
        for name in recipes:
            recipe, inputs = known[name]
            yield _compared(f"{size} {name}, file to file", recipe, inputs, folder, device, runs)


def _weighted(*models: Path) -> list[dict[str, Any]]:
    return [{"model": str(m), "parameters": {"weight": 0.5}} for m in models]


def _compared(
    name: str, recipe: Mapping[str, Any], inputs: Sequence[Path], folder: Path, device: str, runs: int
) -> dict[str, Any]:
    asked, out = folder / "recipe.yml", folder / "out"
    asked.write_text(json.dumps(recipe))  # JSON is YAML
    digests: set[str] = set()

    def same() -> int:
        """All write the same files."""
        digests.add(_digest(out))
        assert len(digests) == 1, f"{name}: the files that --device {device} and --device cpu write differ"
        return 0

    def command(where: str) -> list[str]:
        return [sys.executable, "-m", "fastinterp", "merge", str(asked), str(out), "--device", where]

    racers = [Racer(where, [*command(where), "--quiet"], same) for where in (device, "cpu")]
    every = [f for model in inputs for f in weight_files(model)]
    race(racers, every, folder, runs=runs, cold=False, say=lambda line: None)
    reports = {where: _report(command(where), out) for where in (device, "auto")}
    ratios = [ours / cpu for ours, cpu in zip(racers[0].wall_s, racers[1].wall_s, strict=True)]
    ratio, chosen = statistics.median(ratios), reports["auto"]["device"]
    return {
        "case": name, "bytes": reports[device]["bytes_read"] + reports[device]["bytes_written"], "bound": BOUND,
        "ratio": ratio, "ratios": ratios, "seconds": {r.name: statistics.median(r.wall_s) for r in racers},
        "device": reports[device]["device"], "on_cpu": reports[device]["on_cpu"], "auto": chosen,
        "auto_why": reports["auto"]["chosen"], "holds": ratio <= BOUND or chosen.startswith("cpu"),
    }  # fmt: skip


def _report(command: Sequence[str], out: Path) -> dict[str, Any]:
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    shutil.rmtree(out)
    found = json.loads(done.stdout)
    report: dict[str, Any] = found[0] if isinstance(found, list) else found
    return report


def _digest(folder: Path) -> str:
    found = hashlib.blake2b()
    for path in sorted(folder.iterdir()):
        found.update(path.name.encode())
        with open(path, "rb") as stream:
            while block := stream.read(1 << 24):
                found.update(block)
    return found.hexdigest()


def as_line(found: Mapping[str, Any]) -> str:
    """The result as a line of text."""
    times = ", ".join(f"{name} {s:.2f} s" for name, s in found["seconds"].items())
    verdict = "holds" if found["holds"] else "MISSED"
    chosen = found["auto_why"] or f"--device auto took {found['auto']}"
    return f"{found['case']:26}{times}, {found['ratio']:.3f} of the cpu, bound {BOUND}: {verdict}; {chosen}"
