"""The README's table, made from the files in benchmarks/results/, so that no number in it is typed.

python -m benchmarks.table            print it
python -m benchmarks.table --write    put it between the markers in README.md
python -m benchmarks.table --check    fail if it is not what stands there
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from fastinterp.engine.text import size

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
RIVALS = {
    "copy": "`cp` of one input",
    "touch": "`cat` of all, `cp` of one",
    "naive": "PyTorch loop",
    "mergekit": "mergekit",
}


def load(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The races, and the kernel benchmarks if they are there. Everything else in the folder is an error."""
    races, kernels = [], None
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text("utf-8"))
        if found.get("benchmark") == "race":
            races.append(found)
        elif "benchmarks" in found:
            kernels = found
        else:
            raise SystemExit(f"{path}: neither a race nor pytest-benchmark's results")
    if not races:
        raise SystemExit(f"{folder}: no race in it. Make one: fastinterp bench --json > {folder}/race-1b-warm.json")
    return sorted(races, key=lambda r: (r["model_bytes"], r["recipe"], r["cache"] == "cold")), kernels


def table(races: list[dict[str, Any]], kernels: dict[str, Any] | None) -> list[str]:
    shown = [name for name in RIVALS if any(name in r["racers"] for r in races)]
    head = ["merge", "fastinterp", "memory", *(RIVALS[name] for name in shown)]
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    for race in races:
        own = race["racers"]["fastinterp"]
        cells = [_race(race), _seconds(own["median_wall_s"]), f"{own['peak_anon_bytes'] / 1e6:.0f} MB"]
        for name in shown:
            r = race["racers"].get(name)
            cells.append(f"{_seconds(r['median_wall_s'])} ({_digits(r['ratio']['median'])})" if r else "")
        lines.append(_row(cells))
    runs = sorted({r["runs"] for r in races})
    return [
        *lines, "",
        f"Wall time, process start included: medians of {' or '.join(map(str, runs))} interleaved runs; in brackets, "
        "fastinterp's time as a part of that. Memory: peak anonymous memory.",
        *sorted({_machine(race) for race in races}),
        _slowest(races),
        *([_kernels(kernels["benchmarks"])] if kernels else []),
    ]  # fmt: skip


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _race(race: dict[str, Any]) -> str:
    return (
        f"{race['recipe']} of {race['inputs']} checkpoints of {size(race['model_bytes'])}, "
        f"{'+'.join(race['dtypes'])}, {race['cache']} page cache"
    )


def _seconds(value: float) -> str:
    return f"{_digits(value)} s"


def _digits(value: float) -> str:
    """Two digits at least: 0.0093, 0.52, 3.4, 61."""
    return (
        f"{value:.0f}" if value >= 9.95 else f"{value:.2g}" if value < 0.0995 else f"{value:.{1 if value >= 1 else 2}f}"
    )


def _machine(race: dict[str, Any]) -> str:
    where = race["provenance"]
    versions = [f"{n}: {r['version']}" for n, r in race["racers"].items() if r["version"] and n != "fastinterp"]
    return (
        f"Measured on {where['cpu']}, {where['cores']} cores, {where['memory_bytes'] / 1e9:.0f} GB, "
        f"{where['file_system']}, {where['system']}, with fastinterp {where['fastinterp']} at "
        f"{(where['commit'] or '?')[:9]} ({where['isa']}, {where['threads']} threads"
        f"{''.join('; ' + v for v in versions)})."
    )


def _slowest(races: list[dict[str, Any]]) -> str:
    """The race in which fastinterp stands worst against the floor, and how."""
    found = [(race["racers"][name]["ratio"]["median"], name, race) for race in races for name in ("touch", "copy")
             if name in race["racers"]]  # fmt: skip
    if not found:
        return "No floor was measured."
    name = "touch" if any(n == "touch" for _, n, _ in found) else "copy"
    ratio, _, race = max((f for f in found if f[1] == name), key=lambda f: f[0])
    return f"Slowest against its floor ({RIVALS[name]}): {_race(race)}, {_digits(ratio)} times the floor's time."


def _kernels(benchmarks: list[dict[str, Any]]) -> str:
    every = [b["extra_info"] for b in benchmarks]
    own = [e for e in every if e["rival"] == "fastinterp"]
    memory = [e for e in own if e["place"] == "memory" and e["threads"] == max(o["threads"] for o in own)]
    best, worst = (pick(memory, key=lambda e: e["percent_of_copy"]) for pick in (max, min))
    slow = min(own, key=lambda e: e["percent_of_copy"])
    behind = []
    contested = 0
    for e in own:
        others = [o for o in every if o["rival"] != "fastinterp" and _case(o) == _case(e)]
        contested += bool(others)
        first = min(others, key=lambda o: o["p50_s"], default=None)
        if first and first["p50_s"] < e["p50_s"]:
            behind.append((e["p50_s"] / first["p50_s"], _case(e), first["rival"]))
    text = (
        f"Kernels alone, in memory: {worst['percent_of_copy']:.0f} % ({_case(worst)}) to "
        f"{best['percent_of_copy']:.0f} % ({_case(best)}) of the speed of a copy of as many bytes. "
        f"Slowest of all {len(own)} cases: {_case(slow)}, {slow['percent_of_copy']:.0f} %. "
    )
    if not behind:
        return text + f"No other is faster in any of {contested} cases."
    ratio, case, rival = max(behind)
    return text + (
        f"Another is faster in {len(behind)} of {contested} cases, most in {case}: {rival}, {ratio:.1f} times as fast."
    )


def _case(e: dict[str, Any]) -> str:
    return f"{e['dtype'].lower()}-n{e['n']}-k{e['k']}-{e['place']}-t{e['threads']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true")
    what.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    lines = "\n".join(table(*load(asked.results)))
    if not (asked.write or asked.check):
        print(lines)
        return
    text = asked.readme.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        sys.exit(f"{asked.readme}: it needs one line {BEGIN} and, below it, one line {END}")
    made = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{lines}\n{END}", text, flags=re.DOTALL)
    if asked.write:
        asked.readme.write_text(made, "utf-8")
    elif made != text:
        sys.exit(f"{asked.readme}: the table is not that of {asked.results}. Run: python -m benchmarks.table --write")


if __name__ == "__main__":
    main()
