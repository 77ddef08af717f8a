"""Judge what `main` measured, and write it as JSON, figures and a part of a page.

    python -m examples.real_path.report build/real_path -o docs/real-model --page docs/real-model.md

FOLDER is what was given to `main`, or a folder that this command has written. Prints each check, pass or fail; ends
with exit code 1 if one fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from examples.paper_path.report import as_json, number, put_into, shortened, table
from examples.real_path.design import Design, points
from examples.real_path.main import read, result_file, weights_file
from examples.real_path.margins import Results, Verdict, at, judge, of_the_way

SHOWN = (-0.5, 0.0, 0.2, 0.5, 0.8, 1.0, 1.5)  # of the table of samples


def load(folder: Path, design: Design) -> list[Results]:
    """The results of every training seed. Raises: SystemExit, if they are not complete."""
    whole = folder / "results.json"
    if whole.exists():
        found: list[Results] = json.loads(whole.read_text())["seeds"]
        return found
    return [shortened(of_seed(folder, design, seed)) for seed in design.seeds]


def of_seed(folder: Path, design: Design, seed: int) -> dict[str, Any]:
    walks: dict[str, Any] = {}
    for point in points(design, folder.resolve(), seed):
        result = read(result_file(folder, point))
        if result is None:
            raise SystemExit(f"{folder} has no results of seed {seed}, {point.walk} {point.name}. Run `main` first")
        dropped = ("recipe", "design") if point.walk == "line" else ("recipe", "design", "texts")
        walks.setdefault(point.walk, []).append({k: v for k, v in result.items() if k not in dropped})
    training = {
        name: read(folder / f"seed{seed}" / name / "training.json")
        for name in (*design.full, *(f"lora-{name}" for name in design.lora))
    }
    times = {name: told["wall_s"] for name, told in training.items() if told}
    return {"seed": seed, **walks, "weights": read(weights_file(folder, seed)), "training_s": times}


# --- tables ----------------------------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def with_error(points: Sequence[Results], key: str) -> str:
    """The mean over the training seeds, and its standard error over the generation seeds of all of them."""
    error = sqrt(sum(p["errors"][key] ** 2 for p in points)) / len(points)
    return f"{mean([p[key] for p in points]):.3f} ± {error:.3f}"


def row(name: str, results: Sequence[Results], points: Sequence[Results]) -> list[str]:
    return [
        name,
        with_error(points, "sentiment"),
        f"{mean([p['positive'] for p in points]):.2f} / {mean([p['negative'] for p in points]):.2f}",
        f"{mean([of_the_way(r, p) for r, p in zip(results, points, strict=True)]):.3f}",
        f"{mean([p['nll'] for p in points]):.4f}",
        f"{mean([p['distinct_2'] for p in points]):.3f}",
        f"{mean([p['repetition'] for p in points]):.3f}",
        with_error(points, "ended"),
    ]


HEAD = [
    "", "sentiment", "share positive / negative", "preference, of the way", "NLL", "distinct-2", "repetition", "ended",
]  # fmt: skip


def walk_table(results: Sequence[Results], walk: str, label: str = "alpha") -> str:
    rows = []
    for point in results[0][walk]:
        where = {k: point[k] for k in ("alpha", "pos", "short", "is") if k in point}
        name = ", ".join(str(v) if k == "is" else f"{label if k == 'alpha' else k} {v:g}" for k, v in where.items())
        rows.append(row(name, results, [at(r[walk], **where) for r in results]))
    return table(HEAD, rows)


def beside_table(results: Sequence[Results]) -> str:
    """What is no point of the line, beside its middle and its ends."""
    middle = [at(r["line"], alpha=0.5) for r in results]
    named = {
        "methods": {
            "slerp": "slerp of neg and pos at 0.5",
            "sum": "base + (pos - base) + (neg - base)",
            "negated": "base - (neg - base)",
            "ties": "TIES of both on the base, density 0.5",
        },
        "controls": {
            "random": "neg + random direction, as long",
            "shuffled": "trained on shuffled labels",
            "pretrained": "the pretrained model",
        },
    }
    rows = [row("line at 0.5", results, middle)]
    for walk, names in named.items():
        rows += [row(text, results, [at(r[walk], **{"is": name}) for r in results]) for name, text in names.items()]
    base = [at(r["plane"], pos=0, short=0) for r in results]
    return table(HEAD, [*rows, row("base", results, base)])


def stairs_table(results: Sequence[Results]) -> str:
    rows = []
    for first in results[0]["weights"]["nearest"]:
        alpha = first["alpha"]
        forms = [
            [at(r["weights"][form], alpha=alpha) for r in results] for form in ("float32", "nearest", "stochastic")
        ]
        arrived = [mean([p["arrived"] for p in form]) for form in forms]
        told = mean([p["told"] for p in forms[1]])
        rows.append([f"{alpha:g}", *(f"{value:.3f}" for value in (*arrived, told))])
    head = ["alpha", "float32", "bf16, nearest", "bf16, stochastic", "nearest, as fastinterp tells it"]
    return table(head, rows)


def rounded_table(results: Sequence[Results]) -> str:
    rows = []
    for first in results[0]["nearest"]:
        alpha = first["alpha"]
        for walk, name in (("line", "float32"), ("nearest", "bf16, nearest"), ("stochastic", "bf16, stochastic")):
            rows.append(row(f"alpha {alpha:g}, {name}", results, [at(r[walk], alpha=alpha) for r in results]))
    return table(HEAD, rows)


def escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def samples_table(result: Results) -> str:
    """The first generation seeds of a training seed, written with the same random numbers at each alpha."""
    rows = []
    for alpha in SHOWN:
        texts = at(result["line"], alpha=alpha)["texts"]
        rows.append([f"{alpha:g}", *(escaped(t) for t in texts[:2])])
    return table(["alpha", "generation seed 0", "generation seed 1"], rows, left=3)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    rows = [
        [
            str(v.check.number), v.check.what, v.check.pilot, v.check.bound, number(v.mean),
            ", ".join(map(number, v.values)), "pass" if v.passed else "**FAIL**",
        ]
        for v in verdicts
    ]  # fmt: skip
    return table(["", "what", "pilot", "margin, set before", "got", "each seed", ""], rows, left=2)


# --- the page --------------------------------------------------------------------------------------------------------


def small_print(results: Sequence[Results], run: Results) -> str:
    design, machine = run["design"], run["machine"]
    training, weights = design["training"], [r["weights"] for r in results]
    measured = [p["wall_s"] for r in results for w in r.values() if isinstance(w, list) for p in w if "wall_s" in p]
    trained = [s for r in results for s in r["training_s"].values()]
    said = [
        f"{len(results)} training seeds ({', '.join(str(r['seed']) for r in results)}); {training['steps']} steps of "
        f"{training['batch']} snippets, AdamW at {training['rate']:g} (LoRA of rank {training['rank']}: "
        f"{training['lora_rate']:g}); matrix products of the training in bfloat16.",
        f"At each point {design['samples']} samples of at most {design['tokens']} tokens, each with a generation seed "
        f"of its own that is the same at all points, and {design['held_out']} held-out snippets; all in float32.",
        f"From neg to pos is {100 * mean([w['relative_length'] for w in weights]):.2f} % of the length of the weights; "
        f"{100 * mean([w['changed'] for w in weights]):.0f} % of the bf16 numbers differ.",
        f"A training took {mean(trained):.0f} s, a point {mean(measured):.0f} s, each on one thread; the whole run "
        f"{run['wall_s'] / 60:.0f} minutes with {run['workers']} workers on {machine['cpu']} ({machine['cores']} "
        f"cores), torch {machine['torch']}, fastinterp {machine['fastinterp']} at "
        f"{(machine['commit'] or 'no commit')[:9]}.",
    ]
    return "\n".join(f"* {line}" for line in said)


def page(results: Sequence[Results], verdicts: Sequence[Verdict], run: Results) -> str:
    """The generated part of docs/real-model.md."""
    failed = sum(not v.passed for v in verdicts)
    speed = "" if not run.get("speed") else f"\n### Speed\n\n{speed_list(run['speed'])}\n"
    return f"""\
### The line

![Sentiment, likelihood and fluency from neg to pos, and beyond](real-model/path.svg)

Thin lines are training seeds, thick ones their mean; bars are standard errors over generation seeds.

{walk_table(results, "line")}

The same random numbers at each alpha, training seed {results[0]["seed"]}; the text is cut at {run["design"]["tokens"]}
tokens:

{samples_table(results[0])}

### The staircase of bf16

![The alpha that arrives, in weights and in behaviour](real-model/staircase.svg)

The alpha that arrives in the weights, as the projection of the change on the whole way:

{stairs_table(results)}

What the model does there:

{rounded_table(results)}

### Two attributes

![Two attributes](real-model/plane.svg)

{walk_table(results, "plane")}

### Other methods, and controls

{beside_table(results)}

### LoRA fine-tunes

{walk_table(results, "lora")}

The column "of the way" is that of the full fine-tunes.

### Margins

{len(verdicts) - failed} of {len(verdicts)} checks pass.

{verdict_table(verdicts)}
{speed}
### Small print

{small_print(results, run)}
"""


def speed_list(speed: Results) -> str:
    return "\n".join(f"* {line}" for line in speed["lines"])


def main() -> None:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="report", description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the results are")
    parser.add_argument("--seeds", type=int, nargs="+", help="as was given to `main`")
    parser.add_argument("-o", "--out", type=Path, help="folder for results.json and figures")
    parser.add_argument("--page", type=Path, help="a Markdown page, whose generated part is renewed")
    parser.add_argument("--quick", action="store_true", help="results of the short form")
    given = parser.parse_args()
    design = Design.quick() if given.quick else Design()
    seeds = tuple(given.seeds or design.seeds)
    results, run = load_all(given.folder, design, seeds)
    verdicts = judge(results, whole=not given.quick)
    for v in verdicts:
        mark = "pass" if v.passed else "FAIL"
        print(f"{mark}  {v.check.number:2}  {v.check.what}: {number(v.mean)} ({v.check.bound})")
    if given.out is not None:
        write(results, run, given.out)
    if given.page is not None:
        given.page.write_text(put_into(given.page.read_text(), page(results, verdicts, run)))
    if not all(v.passed for v in verdicts):
        sys.exit(1)


def load_all(folder: Path, design: Design, seeds: tuple[int, ...]) -> tuple[list[Results], Results]:
    """The results of the training seeds, and what is known of the run."""
    from dataclasses import replace

    results = load(folder, replace(design, seeds=seeds))
    whole = read(folder / "results.json")
    if whole is not None:
        return results, whole["run"]
    run = read(folder / "run.json")
    return results, {**run, "speed": read(folder / "speed.json")}


def write(results: Sequence[Results], run: Results, out: Path) -> None:
    """Results and figures, into a folder."""
    from examples.real_path import plots

    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(as_json({"run": run, "seeds": list(results)}) + "\n")
    plots.write(results, out)


if __name__ == "__main__":
    main()
