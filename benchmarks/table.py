"""Tables made from the files in benchmarks/results/, so that no number in them is typed.

python -m benchmarks.table            print the table of the races
python -m benchmarks.table --write    put it, and those of methods and kernels, into docs/performance.md
python -m benchmarks.table --check    fail if they are not what stands there
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from fastinterp.messages import size

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
METHODS = "methods-1b.json"  # what `python -m benchmarks.methods --out` writes
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
        elif found.get("benchmark") in ("decoding", "installed", "methods", "tools"):
            continue
        else:
            raise SystemExit(f"{path}: neither a race nor pytest-benchmark's results")
    if not races:
        raise SystemExit(f"{folder}: no race in it. Make one: fastinterp bench --json > {folder}/race-1b-warm.json")
    return sorted(races, key=lambda r: (r["model_bytes"], r["recipe"], r["cache"] == "cold")), kernels


def table(races: list[dict[str, Any]], kernels: dict[str, Any] | None) -> list[str]:
    shown = [name for name in RIVALS if any(name in r["racers"] for r in races)]
    head = ["merge", "measured", "fastinterp", "memory", *(RIVALS[name] for name in shown)]
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    machines = list(dict.fromkeys(map(_machine, races)))
    for race in races:
        own = race["racers"]["fastinterp"]
        cells = [
            _race(race),
            f"({1 + machines.index(_machine(race))})",
            _seconds(own["median_wall_s"]),
            f"{own['peak_anon_bytes'] / 1e6:.0f} MB",
        ]
        for name in shown:
            r = race["racers"].get(name)
            cells.append(f"{_seconds(r['median_wall_s'])} ({_digits(r['ratio']['median'])})" if r else "")
        lines.append(_row(cells))
    runs = sorted({r["runs"] for r in races})
    return [
        *lines, "",
        f"Wall time, process start included: medians of {' or '.join(map(str, runs))} interleaved runs; in brackets, "
        "fastinterp's time as a part of that. Memory: peak anonymous memory.",
        *(f"({i}) {machine}" for i, machine in enumerate(machines, 1)),
        _slowest(races),
        *([_kernels(kernels["benchmarks"])] if kernels else []),
    ]  # fmt: skip


def methods_table(found: dict[str, Any]) -> list[str]:
    """Every method: seconds, memory, reads, and its time as a part of the floor's and of mergekit's."""
    head = ["method", "inputs", "read", "fastinterp", "memory", RIVALS["touch"], "mergekit"]
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    for name, one in found["methods"].items():
        own, floor, rival = (one["racers"].get(r) for r in ("fastinterp", "floor", "mergekit"))
        lines.append(
            _row([
                f"`{name}`", str(one["inputs"]), f"{one['reads']:.2f} x", _seconds(own["median_wall_s"]),
                f"{own['peak_anon_bytes'] / 1e6:.0f} MB",
                f"{_seconds(floor['median_wall_s'])} ({_digits(floor['ratio']['median'])})",
                f"{_seconds(rival['median_wall_s'])} ({_digits(rival['ratio']['median'])})" if rival else "",
            ])
        )  # fmt: skip
    race = {"racers": {}, "provenance": found["provenance"]}
    return [*lines, "", _machine(race)]


def kernels_table(found: dict[str, Any]) -> list[str]:
    """Every sum of kernels.json: its rate, as a part of a copy's, and the fastest other that can compute it."""
    every = [b["extra_info"] for b in found["benchmarks"]]
    places = sorted({(e["place"], e["threads"]) for e in every})
    heads = [f"{'one thread' if t == 1 else f'{t} threads'}, in {place}" for place, t in places]
    head = ["dtype", "inputs", "outputs", *(text for h in heads for text in (h, "fastest other"))]
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    for dtype, k, n in dict.fromkeys((e["dtype"], e["k"], e["n"]) for e in every):
        cells = [dtype, str(n), str(k)]
        for place, threads in places:
            wanted = (dtype, n, k, place, threads)
            case = [e for e in every if (e["dtype"], e["n"], e["k"], e["place"], e["threads"]) == wanted]
            own = next(e for e in case if e["rival"] == "fastinterp")
            other = max((e for e in case if e is not own), key=lambda e: e["gb_s"], default=None)
            cells.append(f"{_digits(own['gb_s'])} ({own['percent_of_copy']:.0f} %)")
            ahead = "**" if other and other["gb_s"] > own["gb_s"] else ""
            cells.append(f"{ahead}{other['rival']} {_digits(other['gb_s'])}{ahead}" if other else "")
        lines.append(_row(cells))
    where = found["machine_info"]
    versions = ", ".join(f"{name} {version}" for name, version in where["rivals"].items() if name != "fastinterp")
    return [
        *lines, "",
        "GB/s read and written; in brackets, as a part of a copy of as many bytes on as many threads. In bold: another "
        "is faster.",
        f"Measured on {where['cpu']}, {where['cores']} cores, {where['memory_bytes'] / 1e9:.0f} GB, {where['system']}, "
        f"with fastinterp {where['fastinterp']} at {where['commit'][:9]} ({where['isa']}); {versions}.",
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


def _between(file: Path, begin: str, end: str, lines: list[str], write: bool) -> None:
    """Put the lines between the markers, or exit if they do not stand there."""
    text = file.read_text("utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        sys.exit(f"{file}: it needs one line {begin} and, below it, one line {end}")
    block = "\n".join([begin, *lines, end])
    made = re.sub(f"{begin}.*{end}", lambda _: block, text, flags=re.DOTALL)
    if write:
        file.write_text(made, "utf-8")
    elif made != text:
        sys.exit(f"{file}: the table is not that of the results. Run: python -m benchmarks.table --write")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md", help="with the tables")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true")
    what.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    races, kernels = load(asked.results)
    lines = table(races, kernels)
    if not (asked.write or asked.check):
        print("\n".join(lines))
        return
    _between(asked.page, BEGIN, END, lines, asked.write)
    methods = asked.results / METHODS
    if methods.exists():
        rows = methods_table(json.loads(methods.read_text("utf-8")))
        _between(asked.page, "<!-- methods:begin -->", "<!-- methods:end -->", rows, asked.write)
    if kernels:
        _between(asked.page, "<!-- kernels:begin -->", "<!-- kernels:end -->", kernels_table(kernels), asked.write)


if __name__ == "__main__":
    main()
