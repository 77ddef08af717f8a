"""Judge the results of `sweep`, and write them as JSON, CSV, figures and a part of a page.

    python -m examples.paper_path.report build/paper -o docs/paper --page docs/paper.md

FOLDER is what was given to `sweep`, or a folder that this command has written. Prints the table of acceptance; ends
with exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.paper_path.acceptance import Verdict, at, fit_log_odds, judge

Results = Mapping[str, Any]
WALKS = ("line", "anchored", "independent", "random", "plane")
SINGLE = ("base", "soup", "neg_and_casual", "at_1.25")
COLUMNS = (
    "positive", "positive_error", "positive_log_odds", "formal", "formal_error", "grammatical", "grammatical_error",
    "nll_mixed", "nll_pos", "nll_neg",
)  # fmt: skip
BEGIN, END = "<!-- paper:begin -->\n", "<!-- paper:end -->"


# --- reading and writing ---------------------------------------------------------------------------------------------


def load(folder: Path) -> list[Results]:
    """The results of every seed. Raises: SystemExit, if there are none."""
    whole = folder / "results.json"
    if whole.exists():
        found: list[Results] = json.loads(whole.read_text())
        return found
    files = sorted(folder.glob("seed*/results.json"), key=lambda f: int(f.parent.name[4:]))
    if not files:
        raise SystemExit(f"{folder} holds no results. Run `train`, then `sweep`, into it first")
    return [shortened(json.loads(f.read_text())) for f in files]


def shortened(value: Any) -> Any:
    """Numbers to six digits, which is more than they are good for, and a small file."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: shortened(v) for k, v in value.items()}
    return [shortened(v) for v in value] if isinstance(value, list) else value


def as_json(value: Any, depth: int = 0) -> str:
    """A line for each point: short, and a change shows in a diff."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not any(isinstance(p, (dict, list)) for p in parts):
        return json.dumps(value)
    is_list = isinstance(value, list)
    ends, labels = ("[]", [""] * len(value)) if is_list else ("{}", [f"{json.dumps(k)}: " for k in value])
    inner = (f"{' ' * (depth + 1)}{k}{as_json(p, depth + 1)}" for k, p in zip(labels, parts, strict=True))
    return ends[0] + "\n" + ",\n".join(inner) + f"\n{' ' * depth}{ends[1]}"


def as_csv(results: Sequence[Results]) -> str:
    """Every point of every seed, a row each; empty where a coordinate does not apply."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["seed", "walk", "alpha", "towards_pos", "towards_formal", *COLUMNS])
    for r in results:
        points = [(walk, p) for walk in WALKS for p in r.get(walk, ())] + [(one, r[one]) for one in SINGLE if one in r]
        for walk, p in points:
            where = [p.get(k) for k in ("alpha", "towards_pos", "towards_formal")]
            rows.writerow([r["seed"], walk, *where, *(p[c] for c in COLUMNS)])
    return text.getvalue()


def verdicts_as_json(verdicts: Sequence[Verdict]) -> str:
    found = [
        {
            "number": v.check.number, "what": v.check.what, "expected": v.check.pilot,
            "margin_before": v.check.bound(v.check.first), "margin": v.check.bound(v.check.margin),
            "got": shortened(v.mean), "seeds": shortened(list(v.values)), "passed": v.passed,
            "passed_before": v.passed_first,
        }
        for v in verdicts
    ]  # fmt: skip
    return as_json(found) + "\n"


# --- tables ----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Markdown; the first `left` columns are of text."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def number(value: float | None) -> str:
    if value is None:
        return "-"
    if value != 0 and abs(value) < 5e-4:
        return f"{value:.1e}"
    return f"{value:.3f}"


def acceptance_table(verdicts: Sequence[Verdict]) -> str:
    rows = [
        [
            str(v.check.number), v.check.what, v.check.pilot, v.check.bound(v.check.first),
            v.check.bound(v.check.margin), number(v.mean), ", ".join(map(number, v.values)),
            "pass" if v.passed else "**FAIL**",
        ]
        for v in verdicts
    ]  # fmt: skip
    head = ["", "what", "pilot", "margin set before", "margin fitted once", "got", "each seed", ""]
    return table(head, rows, left=2)


def mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


SHOWN = {
    "P(positive)": "positive", "P(formal)": "formal", "grammatical": "grammatical", "NLL mixed": "nll_mixed",
    "NLL positive": "nll_pos", "NLL negative": "nll_neg",
}  # fmt: skip


def points_table(rows: Mapping[str, Sequence[Results]]) -> str:
    """`rows`: by name, the same point of every seed."""
    lines = [[name, *(number(mean([p[key] for p in seeds])) for key in SHOWN.values())] for name, seeds in rows.items()]
    return table(["", *SHOWN], lines)


def line_rows(results: Sequence[Results], alphas: Sequence[float]) -> dict[str, list[Results]]:
    return {f"alpha {a:g}": [at(r["line"], alpha=a) for r in results] for a in alphas}


def other_rows(results: Sequence[Results]) -> dict[str, list[Results]]:
    rows: dict[str, list[Results]] = {"base": [r["base"] for r in results]}
    for alpha in (-1.0, 0.5, 1.5, 2.0):
        rows[f"base {alpha:+g} (pos - base)"] = [at(r["anchored"], alpha=alpha) for r in results]
    for a, b in ((1, 0), (0, 1), (1, 1), (-1, -1)):
        name = " ".join(["base", *(f"{far:+g} ({m} - base)" for far, m in ((a, "pos"), (b, "formal")) if far)])
        rows[name] = [at(r["plane"], towards_pos=a, towards_formal=b) for r in results]
    rows["base +1 (neg - base) +1 (casual - base)"] = [r["neg_and_casual"] for r in results]
    rows["mean of pos, neg, formal, casual"] = [r["soup"] for r in results]
    for alpha in (1.0, 2.0, 4.0):
        rows[f"base +{alpha:g} random direction, as long"] = [at(r["random"], alpha=alpha) for r in results]
    for alpha in (0.25, 0.5, 0.75):
        rows[f"alpha {alpha:g} between independent bases"] = [at(r["independent"], alpha=alpha) for r in results]
    return rows


def sample_list(results: Sequence[Results]) -> str:
    """What the same random numbers write along the line, of the first seed."""
    first = results[0]
    return "\n".join(f"* alpha {a:g}: `{at(first['line'], alpha=a)['sample']}`" for a in (-1, 0, 0.5, 1, 2))


def small_print(results: Sequence[Results]) -> str:
    """What no table holds, as a list."""
    slope = mean([fit_log_odds(r)[0] for r in results]) or 0
    lengths = [g[f"length_{m}"] for r in results for g in [r["geometry"]] for m in ("pos", "neg", "formal", "casual")]
    far = mean([r["geometry"]["length_base2"] for r in results]) or 0
    opposite = mean([r["geometry"]["cosine_pos_neg"] for r in results]) or 0
    across = [r["geometry"][f"cosine_{a}_{b}"] for r in results for a in ("pos", "neg") for b in ("formal", "casual")]
    off = {d: max(abs(r["precision"][d]["nll_off"]) for r in results) for d in ("bfloat16", "float16")}
    first = results[0]
    machine, settings, engine = first["machine"], first["settings"], first["engine"]
    trained = mean([sum(r["train_s"].values()) / 60 for r in results]) or 0
    swept = mean([r["wall_s"] / 60 for r in results]) or 0
    merged = mean([r["engine"]["wall_s"] for r in results]) or 0
    said = (
        f"Log-odds of a positive word rise by {slope:.1f} from neg to pos, along a straight line.",
        f"Task vectors are {min(lengths):.1%} to {max(lengths):.1%} of the base's length; the independent base is "
        f"{far:.0%} away. Cosine of the task vectors pos and neg: {opposite:.2f}; across the attributes: "
        f"{min(across):.2f} to {max(across):.2f}.",
        f"Stored in bf16, the middle of the line changes its NLL by {off['bfloat16']:.1e} at most, in f16 by "
        f"{off['float16']:.1e}.",
        f"The {engine['outputs']} points of the line were made in {merged:.2f} s a seed, from "
        f"{engine['bytes_read'] / engine['bytes_of_inputs']:.3g} times the bytes of both inputs.",
        f"{len(results)} seeds ({', '.join(str(r['seed']) for r in results)}); base and base2 {settings['base_steps']} "
        f"steps, fine-tunes {settings['tune_steps']}, of {settings['batch']} x 96 bytes; matrix products of the "
        f"training in {'bfloat16, all else in float32' if settings['bf16'] else 'float32'}.",
        f"At each point {first['samples']} samples of 95 bytes, and {first['windows']} windows of 96 bytes of mixed "
        "text.",
        f"Training took {trained:.0f} minutes a seed and the sweep {swept:.0f}, on one thread of {machine['cpu']} "
        f"({machine['cores']} cores, busy with other work besides), torch {machine['torch']}, fastinterp "
        f"{machine['fastinterp']} at {(machine['commit'] or 'no commit')[:9]} ({machine['isa']}).",
    )
    return "\n".join(f"* {line}" for line in said)


def page(results: Sequence[Results], verdicts: Sequence[Verdict]) -> str:
    """The generated part of docs/paper.md."""
    failed = [v for v in verdicts if not v.passed]
    count = f"{len(verdicts) - len(failed)} of {len(verdicts)} checks pass."
    alphas = (-1, -0.5, 0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.5, 2)
    return f"""\
![From neg to pos, and beyond](paper/path.svg)

Seeds are thin lines, their mean is a thick one, its standard error a band; grey: between the ends.

{points_table(line_rows(results, alphas))}

One sample of seed {results[0]["seed"]}, written with the same random numbers at each alpha. A stroke ends a review;
the text is cut at 95 bytes.

{sample_list(results)}

![Two attributes](paper/plane.svg)

![Controls](paper/controls.svg)

{points_table(other_rows(results))}

![The staircase of bf16](paper/staircase.svg)

### Acceptance

{count}

{acceptance_table(verdicts)}

### Small print

{small_print(results)}
"""


def put_into(text: str, generated: str) -> str:
    """A page with its generated part renewed. Raises: SystemExit, if it has no markers."""
    if BEGIN not in text or END not in text:
        raise SystemExit(f"the page has no markers {BEGIN.strip()} and {END}")
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + generated + END + rest.partition(END)[2]


def write(results: Sequence[Results], verdicts: Sequence[Verdict], out: Path) -> None:
    """Results, verdicts and figures, into a folder."""
    from examples.paper_path import plots

    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(as_json(list(results)) + "\n")
    (out / "points.csv").write_text(as_csv(results))
    (out / "acceptance.json").write_text(verdicts_as_json(verdicts))
    plots.write(results, out)


def main() -> None:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="report", description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the results are")
    parser.add_argument("-o", "--out", type=Path, help="folder for results.json, points.csv, acceptance.json, figures")
    parser.add_argument("--page", type=Path, help="a Markdown page, whose generated part is renewed")
    parser.add_argument("--quick", action="store_true", help="results of the short form: judge the line alone")
    given = parser.parse_args()
    results = load(given.folder)
    verdicts = judge(results, whole=not given.quick)
    for v in verdicts:
        mark = "pass" if v.passed else "FAIL"
        print(f"{mark}  {v.check.number:2}  {v.check.what}: {number(v.mean)} ({v.check.bound(v.check.margin)})")
    if given.out is not None:
        write(results, verdicts, given.out)
    if given.page is not None:
        given.page.write_text(put_into(given.page.read_text(), page(results, verdicts)))
    if not all(v.passed for v in verdicts):
        sys.exit(1)


if __name__ == "__main__":
    main()
