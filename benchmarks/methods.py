"""Races every merge method as a whole command: answer and reads are checked first, then time is taken, beside a floor.

    python -m benchmarks.methods MODELS_DIR [--only ties,slerp] [--runs 3] [--mergekit PYTHON] [--out FILE.json]

MODELS_DIR holds base/, ft1/ and ft2/, BF16, as `fastinterp bench --models DIR` makes them. Floor: `cat` of every input
that the method reads, then `cp` of one. The answer is compared with tests/support/drive.py, which evaluates the same
definitions in float64, on the smallest tensors.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastinterp.bench.check import WrongAnswerError, allowed_error, read_tensors, weight_files
from fastinterp.bench.provenance import provenance
from fastinterp.bench.race import Racer, race
from fastinterp.methods import Sidecar, find, names
from tests.support.drive import run as evaluate

_SAMPLED = 0.5  # of one read: what a `select` may read beside its full pass: a sample, and small tensors twice
_CHECKED = 6  # tensors


@dataclass(frozen=True)
class Case:
    """How one method is raced.

    reads   full reads of its inputs, as its docstring says
    models  of base, ft1, ft2, in the order of the recipe
    each    parameters of every model but the base
    once    parameters of the merge
    rival   whether mergekit has the method
    """

    reads: int
    models: tuple[str, ...] = ("base", "ft1", "ft2")
    each: dict[str, Any] = field(default_factory=dict)
    once: dict[str, Any] = field(default_factory=dict)
    rival: bool = True


HALF = {"weight": 0.5}
THIN = {"weight": 0.5, "density": 0.5}
CASES = {
    "arcee_fusion": Case(3, ("base", "ft1")),
    "breadcrumbs": Case(2, each=THIN),
    "breadcrumbs_ties": Case(2, each=THIN),
    "dare_linear": Case(2, each=THIN),
    "dare_ties": Case(2, each=THIN),
    "della": Case(2, each=THIN),
    "della_linear": Case(2, each=THIN),
    "ema": Case(1, ("ft1", "ft2"), once={"decay": 0.5}, rival=False),
    "expo": Case(1, ("base", "ft1"), once={"alpha": 0.3}, rival=False),
    "fisher": Case(1, ("ft1", "ft2"), each={"weight": 0.5, "fisher": Sidecar("fisher")}, rival=False),
    "geometric_median": Case(2, rival=False),
    "ignore_k": Case(2, each={"weight": 0.5}, rival=False),
    "karcher": Case(2, ("ft1", "ft2")),
    "linear": Case(1, ("ft1", "ft2"), each=HALF),
    "lines": Case(1, each=HALF, once={"alpha": 0.5, "beta": 0.5}, rival=False),
    "model_stock": Case(2),
    "multislerp": Case(2, ("ft1", "ft2"), each=HALF),
    "nearswap": Case(1, ("base", "ft1"), once={"t": 0.001}),
    "nuslerp": Case(2, ("ft1", "ft2"), each=HALF),
    "passthrough": Case(1, ("ft1",), each={"scale": 0.5}),
    "ram": Case(1),
    "ramplus_tl": Case(2),
    "sce": Case(3, once={"select_topk": 0.5}),
    "slerp": Case(2, ("ft1", "ft2"), once={"t": 0.3}),
    "slerp_lengths": Case(2, ("ft1", "ft2"), once={"t": 0.3}, rival=False),
    "task_arithmetic": Case(1, each=HALF),
    "ties": Case(2, each=THIN),
}


def recipe(name: str, case: Case, models: Path) -> dict[str, Any]:
    """As fastinterp and mergekit read it."""
    method = find(name)
    tuned = [m for m in case.models if m != "base"] if method.base == "required" else list(case.models)
    found: dict[str, Any] = {"merge_method": name, "models": []}
    if method.base == "required":
        found["base_model"] = str(models / case.models[0])
        tuned = list(case.models[1:])
    if name == "slerp":  # mergekit wants both of them listed
        tuned = list(case.models)
    for model in tuned:
        entry: dict[str, Any] = {"model": str(models / model)}
        if case.each and entry["model"] != found.get("base_model"):
            own = {k: str(models / f"{model}-{v}") if isinstance(v, Sidecar) else v for k, v in case.each.items()}
            entry["parameters"] = own
        found["models"].append(entry)
    if case.once:
        found["parameters"] = case.once
    return found | {"dtype": "bfloat16"}


def main() -> None:
    """Run the races and print, or write, what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--mergekit", metavar="PYTHON", help="a Python that has mergekit")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if set(CASES) != set(names()):
        sys.exit(f"methods and cases differ: {sorted(set(CASES) ^ set(names()))}")
    found: dict[str, Any] = {"benchmark": "methods", "provenance": provenance(asked.models), "methods": {}}
    for name in asked.only.split(","):
        result = measured(name, CASES[name], asked.models.resolve(), asked.runs, asked.mergekit)
        found["methods"][name] = result
        racers = {r: f"{v['median_wall_s']:.2f} s" for r, v in result["racers"].items()}
        print(f"{name:17} reads {result['reads']:.2f}  {racers}", flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


def measured(name: str, case: Case, models: Path, runs: int, mergekit: str | None) -> dict[str, Any]:
    """One method's race. Raises: WrongAnswerError, if the answer is wrong or the inputs are read too often."""
    write_sidecars(case, models)
    folders = [models / m for m in case.models] + [models / f"{m}-fisher" for m in case.models if name == "fisher"]
    with tempfile.TemporaryDirectory(dir=models, prefix=".race-") as scratch:
        work = Path(scratch)
        out, file, log = work / "out", work / "recipe.yml", work / "log"
        file.write_text(json.dumps(recipe(name, case, models)))
        one, files = weight_files(folders[0]), [f for folder in folders for f in weight_files(folder)]
        input_bytes, reads = sum(2 * int(np.prod(t.shape)) for f in folders for t in read_tensors(f).values()), 0.0

        def check() -> int:
            nonlocal reads
            reads = json.loads(log.read_text())["bytes_read"] / input_bytes
            if not case.reads - 0.001 < reads < case.reads + _SAMPLED:
                raise WrongAnswerError(f"{name} read its inputs {reads:.3f} times, expected {case.reads}")
            return checked(name, case, models, out)

        copy = f"mkdir {out} && cp --reflink=never {shlex.join(map(str, one))} {out}"
        racers = [
            Racer("fastinterp", [sys.executable, "-m", "fastinterp", "merge", str(file), str(out), "--json"], check),
            Racer("floor", ["sh", "-c", f"cat {shlex.join(map(str, files))} >/dev/null && {copy}"], lambda: 0),
        ]
        race(racers, files, work, runs=runs, cold=False, say=lambda _: None)
        found = {r.name: r.as_dict(racers[0]) for r in racers}
        if mergekit and case.rival:
            rival = Racer("mergekit", [mergekit, "-m", "mergekit.scripts.run_yaml", str(file), str(out)], lambda: 0)
            pacer = Racer("fastinterp", racers[0].command, lambda: 0)
            race([pacer, rival], files, work, runs=1, cold=False, say=lambda _: None)
            found["mergekit"] = rival.as_dict(pacer)
    return {"reads": reads, "inputs": len(folders), "input_bytes": input_bytes, "racers": found}


def checked(name: str, case: Case, models: Path, out: Path) -> int:
    """Compare tensors with float64 evaluation; returns how many elements. Raises: WrongAnswerError."""
    stored, method = read_tensors(out), find(name)
    inputs = {m: read_tensors(models / m) for m in case.models}
    side = {m: read_tensors(models / f"{m}-fisher") for m in case.models} if name == "fisher" else {}
    compared = 0
    for tensor in sorted(stored, key=lambda n: (np.prod(stored[n].shape), n))[:_CHECKED]:
        shape, count = stored[tensor].shape, int(np.prod(stored[tensor].shape))

        def read(table: dict[str, Any], tensor: str = tensor, count: int = count, shape: Any = shape) -> Any:
            return table[tensor].read(0, count).astype(np.float32).reshape(shape)

        x = [read(inputs[m]) for m in case.models]
        base = x.pop(0) if method.base == "required" else None
        parameters = case.once | {k: v for k, v in case.each.items() if not isinstance(v, Sidecar)}
        if side:
            parameters |= {"fisher": tuple(read(side[m]) for m in case.models)}
        layer, layers = _layer(tensor, stored)
        truth = evaluate(name, x, base=base, parameters=parameters, name=tensor, layer=layer, layers=layers)
        largest = np.max(np.abs([*x, *([] if base is None else [base])]), axis=0).astype(np.float64)
        # No method here weighs a model by more than 4: rescaling is by about 2, extrapolation and shares by less.
        allowed = allowed_error(truth.ravel(), largest.ravel(), (4.0,) * 3, stored[tensor].dtype, False)
        got = stored[tensor].read(0, count)
        wrong = ~(np.abs(got - truth.ravel()) <= allowed)
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            raise WrongAnswerError(f"{name}: {tensor}[{at}]: expected {truth.ravel()[at]}, got {got[at]}")
        compared += count
    return compared


def _layer(tensor: str, every: dict[str, Any]) -> tuple[int | None, int]:
    numbers = {n: int(p) for n in every for p in n.split(".") if p.isdecimal()}
    return numbers.get(tensor), max(numbers.values()) + 1


def write_sidecars(case: Case, models: Path) -> None:
    """Write importances for `fisher` beside the models: their own magnitudes, the sign bits of BF16 cleared."""
    for model in case.models if any(isinstance(v, Sidecar) for v in case.each.values()) else ():
        folder = models / f"{model}-fisher"
        if folder.exists():
            continue
        folder.mkdir()
        for file in weight_files(models / model):
            raw = np.fromfile(file, np.uint8)
            start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
            raw[start + 1 :: 2] &= 0x7F
            raw.tofile(folder / file.name)


if __name__ == "__main__":
    main()
