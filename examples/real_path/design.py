"""What is trained, which points are made of it, and how much is measured at each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from examples.real_path.finetune import Settings

PRETRAINED, BASE = "pretrained", "base"
LINE = tuple(round(-0.5 + 0.1 * i, 1) for i in range(21))
STEPS = (-1.0, 0.0, 1.0)  # of the plane, in both directions
STAIRS = (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)  # where the weights after rounding are compared with the alpha asked for
# Where what rounding makes of the behaviour is measured; in float32 they are points of the line.
ROUNDED = (0.2, 0.4, 0.8)
HALVES = (0.0, 0.5, 1.0)
FULL = ("neg", "pos", "short", "shuffled")
LORA = ("neg", "pos")


@dataclass(frozen=True)
class Design:
    """A run.

    adapting  how the base is made: of the pretrained model, on snippets of all ratings; the same for all seeds
    training  how the fine-tunes are made of the base
    samples, tokens   of what each point generates
    held_out  snippets whose likelihood is measured
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    full: tuple[str, ...] = FULL
    lora: tuple[str, ...] = LORA
    adapting: Settings = field(default_factory=lambda: Settings(steps=80, rate=1e-4))
    training: Settings = field(default_factory=Settings)
    line: tuple[float, ...] = LINE
    whole: bool = True  # the plane, other methods, roundings and controls; else the line alone
    samples: int = 64
    tokens: int = 24
    held_out: int = 72

    @staticmethod
    def quick() -> Design:
        return Design(
            seeds=(0,), full=("neg", "pos"), lora=(), adapting=Settings(steps=30, batch=4, rate=1e-4),
            training=Settings(steps=25, batch=4, warm_up=3), line=(0.0, 0.5, 1.0), whole=False, samples=64,
            tokens=20, held_out=36,
        )  # fmt: skip

    @property
    def measured(self) -> str:
        """A short name of all that decides the results of a point, but for its recipe."""
        kept = {k: v for k, v in asdict(self).items() if k in ("adapting", "training", "samples", "tokens", "held_out")}
        return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Point:
    """A model to be measured. at: its coordinates in its walk; recipe: of fastinterp, or a checkpoint's folder."""

    seed: int
    walk: str
    at: Mapping[str, Any]
    recipe: Any

    @property
    def name(self) -> str:
        return "_".join(f"{k}_{v}" for k, v in self.at.items())


Models = Mapping[str, Path | str]


def weighted(method: str, models: Sequence[tuple[Path | str, float]], base: Path | None = None, **more: Any) -> Any:
    """A recipe: models with their weights; in float32, unless `dtype` says otherwise."""
    listed = [{"model": str(model), "parameters": {"weight": weight}} for model, weight in models]
    start = {} if base is None else {"base_model": str(base)}
    return {"merge_method": method, **start, "models": listed, "dtype": "float32", **more}


def on_line(a: Path | str, b: Path | str, alpha: float, **more: Any) -> Any:
    """The recipe of a + alpha * (b - a). At the ends that is a copy."""
    return weighted("linear", [(a, 1 - alpha), (b, alpha)], **more)


def points(design: Design, folder: Path, seed: int) -> Iterator[Point]:
    """Every model of a training seed that is measured. folder: where `base` and the seeds' folders are."""
    base, own = folder / "base", folder / f"seed{seed}"
    neg, pos, short = (own / name for name in ("neg", "pos", "short"))
    for alpha in design.line:
        yield Point(seed, "line", {"alpha": alpha}, on_line(neg, pos, alpha))
    if not design.whole:
        return
    for a in STEPS:
        for b in STEPS:
            recipe = weighted("task_arithmetic", [(pos, a), (short, b)], base)
            yield Point(seed, "plane", {"pos": a, "short": b}, recipe if a or b else str(base))
    for alpha in ROUNDED:
        yield Point(seed, "nearest", {"alpha": alpha}, on_line(neg, pos, alpha, dtype="bfloat16"))
        stochastic = on_line(neg, pos, alpha, dtype="bfloat16", rounding="stochastic")
        yield Point(seed, "stochastic", {"alpha": alpha}, stochastic)
    slerp = {"merge_method": "slerp", "base_model": str(neg), "models": [{"model": str(neg)}, {"model": str(pos)}]}
    yield Point(seed, "methods", {"is": "slerp"}, {**slerp, "parameters": {"t": 0.5}, "dtype": "float32"})
    both = [(pos, 1.0), (neg, 1.0)]
    yield Point(seed, "methods", {"is": "sum"}, weighted("task_arithmetic", both, base))
    yield Point(seed, "methods", {"is": "negated"}, weighted("task_arithmetic", [(neg, -1.0)], base))
    ties = weighted("ties", both, base, parameters={"density": 0.5})
    yield Point(seed, "methods", {"is": "ties"}, ties)
    yield Point(seed, "controls", {"is": "random"}, str(own / "random"))
    yield Point(seed, "controls", {"is": "shuffled"}, str(own / "shuffled"))
    yield Point(seed, "controls", {"is": "pretrained"}, str(folder / PRETRAINED))
    if design.lora:
        ends = [f"{base}+{own / f'lora-{name}'}" for name in ("neg", "pos")]
        for alpha in HALVES:
            yield Point(seed, "lora", {"alpha": alpha}, on_line(ends[0], ends[1], alpha))
