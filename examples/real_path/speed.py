"""What a step of alpha costs on this model, and many outputs from one read, beside other ways to the same weights.

    python -m examples.real_path.speed build/real_path

Needs the models of one training seed. Times are medians, of all processors. Writes FOLDER/speed.json.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastinterp
from examples.real_path import base
from examples.real_path.controls import same_bits, weights
from examples.real_path.design import LINE, on_line
from examples.real_path.main import write

ROOT = Path(__file__).resolve().parents[2]
MERGEKIT = ROOT / ".venv-oracle" / "bin" / "mergekit-yaml"


def seconds(step: Callable[[], object], times: int = 5) -> float:
    """The median wall time, after one call that is not counted."""
    step()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def steps(neg: Path, pos: Path) -> dict[str, float]:
    """Seconds to give a module in memory the weights of one alpha; its own are float32, the ends' bf16."""
    model = base.empty(neg)
    recipe = on_line(neg, pos, 0.3)
    found = {"load_into, from files": seconds(lambda: fastinterp.load_into(model, recipe))}
    with fastinterp.Live(model, a=neg, b=pos) as live:
        found["Live.set"] = seconds(lambda: live.set(0.3))
    a, b = ({n: t.float() for n, t in weights(end).items()} for end in (neg, pos))
    places = model.state_dict()

    def lerp() -> None:
        for name, start in a.items():
            torch.lerp(start, b[name], 0.3, out=places[name])

    with torch.no_grad():
        found["torch.lerp into the module, from float32 copies of the ends"] = seconds(lerp)
    return found


def outputs(neg: Path, pos: Path, work: Path) -> dict[str, Any]:
    """Seconds for a bf16 checkpoint at each alpha of the line, from one read and by one merge after another."""
    shutil.rmtree(work, ignore_errors=True)
    start = time.perf_counter()
    made = fastinterp.sweep(neg, pos, LINE, work / "sweep")
    once = time.perf_counter() - start
    read = made[0].report.bytes_read if made[0].report is not None else 0
    one_by_one, same = 0.0, True
    for alpha, point in zip(LINE, made, strict=True):
        start = time.perf_counter()
        fastinterp.merge(on_line(neg, pos, alpha, dtype="bfloat16"), work / "one", force=True)
        one_by_one += time.perf_counter() - start
        same = same and point.path is not None and same_bits(weights(point.path), weights(work / "one"))
    found: dict[str, Any] = {"one_read_s": once, "merges_s": one_by_one, "bytes_read": read, "same_bits": same}
    found["programs"] = programs(neg, pos, work)
    shutil.rmtree(work)
    return found


def programs(neg: Path, pos: Path, work: Path) -> dict[str, float]:
    """Seconds for such a checkpoint at one alpha by a program, its start included; mergekit's where it is installed."""
    import yaml

    recipe, out = work / "recipe.yml", work / "program"
    recipe.write_text(yaml.safe_dump(on_line(neg, pos, 0.3, dtype="bfloat16")))
    commands: dict[str, list[str | Path]] = {
        "fastinterp merge": [sys.executable, "-m", "fastinterp", "merge", recipe, out]
    }
    if MERGEKIT.exists():
        commands["mergekit-yaml"] = [MERGEKIT, recipe, out]

    def once(command: list[str | Path]) -> None:
        shutil.rmtree(out, ignore_errors=True)
        subprocess.run(command, check=True, capture_output=True)

    return {name: seconds(partial(once, command), 3) for name, command in commands.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="speed", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="what was given to `main`")
    folder = parser.parse_args().folder.resolve()
    seed = min(folder.glob("seed*"))
    neg, pos = seed / "neg", seed / "pos"
    each, many = steps(neg, pos), outputs(neg, pos, folder / "speed")
    size = sum((end / "model.safetensors").stat().st_size for end in (neg, pos))
    lines = [f"one step of alpha by {name}: {s:.3f} s" for name, s in each.items()]
    lines.append(
        f"{len(LINE)} bf16 checkpoints from one read ({many['bytes_read'] / size:.2f} times the bytes of both ends): "
        f"{many['one_read_s']:.1f} s; by {len(LINE)} merges {many['merges_s']:.1f} s, "
        f"{'with the same bits' if many['same_bits'] else 'with OTHER bits'}"
    )
    lines += [f"one of these checkpoints by `{name}`: {s:.1f} s" for name, s in many["programs"].items()]
    write(folder / "speed.json", {"steps": each, "outputs": many, "lines": lines})
    print("\n".join(lines))


if __name__ == "__main__":
    main()
