"""Walk the lines between the trained models and measure every point.

    python -m examples.paper_path.sweep build/paper --seeds 0 1 2

For each seed: the line from neg to pos at 31 alphas, -1 to 2; lines from the base; the plane of two attributes; the
controls; the mixtures of the ends' outputs that the line is compared with; what bf16 does to small changes. The points
are made by fastinterp, then evaluated one by one. Writes `seedN/results.json`; the points go, unless --keep is given.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.paper_path import checkpoints, points
from examples.paper_path.measure import Bench, against_mixtures, evaluate, geometry, nll
from examples.paper_path.model import model_of
from examples.paper_path.train import MODELS
from fastinterp.bench.provenance import provenance

LINE = tuple(round(-1 + 0.1 * i, 1) for i in range(31))
MIXTURES = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0)
ANCHORED = (-1.0, 0.5, 1.0, 1.5, 2.0, 3.0)
INDEPENDENT = (0.0, 0.25, 0.5, 0.75, 1.0)
RANDOM = (1.0, 2.0, 4.0)
SIDE = (-1.0, 0.0, 1.0)


@dataclass(frozen=True)
class Extent:
    """How much is measured: windows of held-out mixed text, and samples of each model."""

    line: Sequence[float] = LINE
    windows: int = 300
    samples: int = 256
    whole: bool = True  # the planes, the controls and the rest; else the line alone

    @staticmethod
    def quick() -> Extent:
        inside = [round(0.1 * i, 1) for i in range(11)]
        return Extent(line=(-0.5, *inside, 1.5), windows=150, samples=128, whole=False)


def measured(label: dict[str, float], folder: Path, bench: Bench) -> dict[str, Any]:
    return label | evaluate(checkpoints.load(folder), bench)


def walk(kind: str, models: tuple[Path, Path], alphas: Sequence[float], work: Path, bench: Bench) -> Iterator[Any]:
    """The points of a line, evaluated."""
    made = points.line(models, alphas, work / kind)
    for alpha, folder in made.folders.items():
        yield measured({"alpha": alpha}, folder, bench)


def main_line(seed_folder: Path, work: Path, bench: Bench, extent: Extent) -> dict[str, Any]:
    """From neg to pos, with everything that the engine promises of it."""
    ends = seed_folder / "neg", seed_folder / "pos"
    made = points.line(ends, extent.line, work / "line")
    found: list[dict[str, Any]] = []
    for alpha, folder in made.folders.items():
        found.append(measured({"alpha": alpha}, folder, bench))
        print(f"    alpha {alpha:4.1f}: {summary(found[-1])}", flush=True)
    a, b = (checkpoints.load(e) for e in ends)
    differences = []
    for point in found[:: 5 if extent.whole else 3]:
        weights = {n: torch.lerp(a[n], b[n], point["alpha"]) for n in a}
        differences.append(abs(point["nll_mixed"] - nll(model_of(weights), bench.windows["mixed"])))
    engine = made.as_dict() | points.promises(ends, made) | {"nll_off_torch_lerp": max(differences)}
    return {"line": found, "engine": engine}


def summary(point: dict[str, Any]) -> str:
    shown = {"P(pos)": "positive", "P(formal)": "formal", "NLL": "nll_mixed", "grammatical": "grammatical"}
    return ", ".join(f"{k} {'-' if point[v] is None else format(point[v], '.3f')}" for k, v in shown.items())


def planes(seed_folder: Path, work: Path, bench: Bench) -> dict[str, Any]:
    """Two attributes at once: task vectors added to and taken from the base, and the explicit opposite models."""
    base = seed_folder / "base"
    made = points.plane(base, {m: seed_folder / m for m in ("pos", "formal")}, SIDE, work / "plane")
    grid = []
    for (a, b), folder in made.items():
        grid.append(measured({"towards_pos": a, "towards_formal": b}, folder, bench))
        print(f"    pos {a:4.1f}, formal {b:4.1f}: {summary(grid[-1])}", flush=True)
    explicit = points.plane(base, {m: seed_folder / m for m in ("neg", "casual")}, (1.0,), work / "opposite")
    soup = points.average([seed_folder / m for m in ("pos", "neg", "formal", "casual")], work / "soup")
    return {
        "plane": grid,
        "neg_and_casual": measured({}, explicit[1.0, 1.0], bench),
        "soup": measured({}, soup, bench),
        "base": next(p for p in grid if p["towards_pos"] == p["towards_formal"] == 0),
    }


def random_end(seed_folder: Path, seed: int, work: Path) -> Path:
    """The base, moved in a random direction: each tensor as far as `pos` moved it."""
    generator = torch.Generator().manual_seed(seed)
    base, pos = checkpoints.load(seed_folder / "base"), checkpoints.load(seed_folder / "pos")

    def moved(name: str) -> Tensor:
        direction = torch.randn(base[name].shape, generator=generator)
        return base[name] + direction * ((pos[name] - base[name]).norm() / direction.norm())

    target = work / "random_end"
    checkpoints.save(target, {name: moved(name) for name in base}, model_of(base).shape)
    return target


def controls(seed_folder: Path, seed: int, work: Path, bench: Bench) -> dict[str, Any]:
    base = seed_folder / "base"
    end = random_end(seed_folder, seed, work)
    return {
        "independent": list(walk("independent", (base, seed_folder / "base2"), INDEPENDENT, work, bench)),
        "random": list(walk("random", (base, end), RANDOM, work, bench)),
        "anchored": list(walk("anchored", (base, seed_folder / "pos"), ANCHORED, work, bench)),
    }


def oracle(seed_folder: Path, work: Path, bench: Bench) -> dict[str, Any]:
    """The line against mixtures of the ends' outputs, and what a smaller dtype does to its middle."""
    ends = seed_folder / "neg", seed_folder / "pos"
    made = points.line(ends, MIXTURES, work / "mixtures")
    states = {alpha: checkpoints.load(folder) for alpha, folder in made.folders.items()}
    first, second = (checkpoints.load(e) for e in ends)
    exact = nll(model_of(states[0.5]), bench.windows["mixed"])
    precision = {}
    for dtype in ("bfloat16", "float16"):
        (report,) = (rounded := points.line(ends, (0.5,), work / dtype, dtype=dtype)).reports
        state = {n: t.float() for n, t in checkpoints.load(rounded.folders[0.5]).items()}
        off = nll(model_of(state), bench.windows["mixed"]) - exact
        precision[dtype] = {"nll_off": off, "strength": report.effect.strength}
    return {
        "mixtures": against_mixtures((first, second), states, bench),
        "precision": precision,
        "at_1.25": measured({"alpha": 1.25}, made.folders[1.25], bench),
    }


def sweep_seed(folder: Path, seed: int, extent: Extent, *, keep: bool = False) -> dict[str, Any]:
    """Everything that is measured of one seed; written into its folder, too."""
    seed_folder, work = folder / f"seed{seed}", folder / f"seed{seed}" / "points"
    start = time.perf_counter()
    bench = Bench.of(seed, windows=extent.windows, samples=extent.samples)
    if not (seed_folder / "base" / "training.json").exists():
        raise SystemExit(f"{seed_folder} holds no trained models. Run `train` into {folder} first")
    trained = [m for m in MODELS if (seed_folder / m / "training.json").exists()]
    note = json.loads((seed_folder / "base" / "training.json").read_text())
    found: dict[str, Any] = {
        "seed": seed,
        "settings": note["settings"],
        "machine": provenance() | {"torch": torch.__version__},
        "train_s": {m: json.loads((seed_folder / m / "training.json").read_text())["wall_s"] for m in trained},
        "windows": extent.windows,
        "samples": extent.samples,
    }
    found |= main_line(seed_folder, work, bench, extent)
    if extent.whole:
        found |= planes(seed_folder, work, bench)
        found |= oracle(seed_folder, work, bench)
        found |= controls(seed_folder, seed, work, bench)
        found["geometry"] = geometry({m: checkpoints.load(seed_folder / m) for m in MODELS})
        found["staircase"] = points.staircase(work / "staircase", seed)
    found["wall_s"] = round(time.perf_counter() - start, 1)
    (seed_folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    if not keep:
        shutil.rmtree(work)
    return found


def main() -> None:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="sweep", description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what was given to `train`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--quick", action="store_true", help="the line alone, at fewer points")
    parser.add_argument("--keep", action="store_true", help="keep the points: about 200 MB a seed")
    parser.add_argument("--threads", type=int, default=1, help="of torch; default: 1, as the model is small")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for seed in given.seeds:
        print(f"  seed {seed}", flush=True)
        found = sweep_seed(given.folder, seed, Extent.quick() if given.quick else Extent(), keep=given.keep)
        print(f"    {found['wall_s']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
