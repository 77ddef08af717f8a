"""Commands killed at random moments: the same command again ends with the bytes of one that ran undisturbed.

    python -m tests.attacks.kills [--kills 200] [--seed 0] [--folder build/kills] [--mb 48] [--only NAME,...]

Each case starts a command and sends its process a signal, up to three times in a row: at a moment drawn between its
start and its end, or, most often, between the first change of the output and its end. Unless all was done by then, the
same command runs again, undisturbed. The output must have the bytes of an undisturbed run, file for file, nothing else
may lie beside it, and the inputs must be as they were. Prints a table; exit code 1, if a case failed.

Of torchrun's processes, the launcher, a rank or all of them get the signal.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np

from tests.support.models import bf16, save
from tests.support.processes import interruptible
from tests.support.written import tree

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = [
    signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU, signal.SIGPIPE,
    signal.SIGALRM, signal.SIGUSR1, signal.SIGABRT, signal.SIGSEGV,
]  # fmt: skip
LIMIT_S = 300  # of one command
ENV = {k: v for k, v in os.environ.items() if not k.startswith("FASTINTERP_")} | {"PYTHONPATH": str(ROOT)}
SCRIPT = str(ROOT / "tests" / "support" / "resume_program.py")
PROGRAM = [sys.executable, SCRIPT]
RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", SCRIPT]
# With short rounds, and everything kept, a run of a second is one that is worth resuming. For three cases in four.
SHORT_ROUNDS = {"ROUND": "4000000", "KEPT_S": "0"}

JOBS: dict[str, list[str]] = {
    "merge": [*PROGRAM, "merge", "linear.yml", "OUT"],
    "merge, one file": [*PROGRAM, "merge", "linear.yml", "OUT/merged.safetensors"],
    "merge, several documents": [*PROGRAM, "merge", "chain.yml", "OUT"],
    "merge, durable": [*PROGRAM, "merge", "linear.yml", "OUT", "--durable", "--max-shard-size", "9MB"],
    "interpolate": [*PROGRAM, "interpolate", "a", "b", "--alpha", "0:1:0.25", "-o", "OUT"],
    "sweep": [*PROGRAM, "sweep", "a", "b", "--alphas", "-0.5:1.5:0.5", "-o", "OUT"],
    "ties": [*PROGRAM, "merge", "ties.yml", "OUT"],
    "ties over an older output": [*PROGRAM, "merge", "ties.yml", "OUT", "--force"],
    "torchrun": [*RANKS, "merge", "ties.yml", "OUT"],
}  # fmt: skip
OVER_OLDER = {"ties over an older output"}


@dataclass
class Tally:
    """What became of the cases of one command."""

    cases: int = 0
    kills: int = 0  # signals that a running process got
    earlier: int = 0  # it had ended before the signal
    resumed: int = 0  # the last run said that it kept something
    equal: int = 0
    wrong: list[str] = field(default_factory=list)
    by_signal: Counter[str] = field(default_factory=Counter)


def make_models(folder: Path, megabytes: int) -> None:
    """base, a and b: bf16, 12 tensors each, of `megabytes` together; and the recipes of JOBS."""
    rng = np.random.default_rng(0)
    rows = max(4, megabytes * 10**6 // (12 * 2 * 512))
    base = {f"model.layers.{i}.mlp.up_proj.weight": rng.normal(size=(rows, 512)).astype("f4") * 0.02 for i in range(12)}
    for name in ("base", "a", "b"):
        moved = {n: x if name == "base" else x + rng.normal(size=x.shape).astype("f4") * 1e-3 for n, x in base.items()}
        save(folder / name, {n: bf16(x) for n, x in moved.items()})
    listed = "".join(f"- {{model: {m}, parameters: {{weight: 0.5, density: 0.5}}}}\n" for m in "ab")
    linear = f"merge_method: linear\nmodels:\n{listed.replace(', density: 0.5', '')}"
    (folder / "linear.yml").write_text(linear)
    (folder / "ties.yml").write_text(f"merge_method: ties\nbase_model: base\nmodels:\n{listed}")
    (folder / "chain.yml").write_text(
        f"name: first\nmerge_method: ties\nbase_model: base\nmodels:\n{listed}---\n"
        "merge_method: slerp\nbase_model: base\nmodels: [{model: first}]\nparameters: {t: 0.3}\n"
    )


def run(command: Sequence[str], folder: Path, env: dict[str, str] = ENV) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def names_of(out: Path) -> set[str]:
    """Names beside and in an output."""
    return {entry.name for place in (out.parent, out) if place.is_dir() for entry in os.scandir(place)}


def begun(process: subprocess.Popen[bytes], out: Path, before: set[str]) -> None:
    """Wait until the output changes, or the process ends."""
    while process.poll() is None and names_of(out) == before:
        time.sleep(0.0005)


def duration(command: Sequence[str], folder: Path, out: Path) -> tuple[float, float]:
    """Seconds of a whole run, and from the first change of its output on."""
    began, before = time.perf_counter(), names_of(out)
    process = subprocess.Popen(command, cwd=folder, env=ENV, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    begun(process, out, before)
    changed = time.perf_counter()
    assert process.wait(LIMIT_S) == 0
    ended = time.perf_counter()
    return ended - began, ended - changed


def disturbed(
    command: Sequence[str],
    folder: Path,
    env: dict[str, str],
    out: Path,
    times: tuple[float, float],
    number: signal.Signals,
    random: Random,
) -> int:
    """The exit code of a command that gets a signal. Of several processes all get it, or one that is drawn.

    times  what `duration` measured
    """
    before = names_of(out)
    with interruptible():
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    children: list[int] = []
    try:
        if random.random() < 0.8:
            begun(process, out, before)
            time.sleep(random.uniform(0, times[1]))
        else:
            time.sleep(random.uniform(0, times[0]))
        children = _children(process.pid)
        every = [process.pid, *children]
        for pid in every if random.random() < 0.4 else [random.choice(every)]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        return process.wait(LIMIT_S)
    finally:
        for left in [process.pid, *children]:
            _end(left)
        process.wait()


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _end(pid: int) -> None:
    """Kill a process, and wait until it is gone: ranks outlive the launcher that was killed."""
    for _ in range(500):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)


def contents(out: Path) -> dict[str, bytes]:
    """Files of an output, beside which nothing else may lie: what a run left there counts as a file of it."""
    beside = {
        f"../{p.name}": b"" for p in out.parent.iterdir() if p.name.startswith((".", f"{out.name}.", out.name + "-"))
    }
    return {**tree(out), **beside}


def named(command: Sequence[str], out: Path) -> list[str]:
    return [part.replace("OUT", str(out)) for part in command]


def older(out: Path, folder: Path) -> None:
    """An older checkpoint at `out`: a copy of the one in `folder`."""
    shutil.copytree(folder / "older", out)


def cases(name: str, folder: Path, count: int, random: Random, signals: Sequence[signal.Signals] = SIGNALS) -> Tally:
    """Kill one command `count` times, in as many cases as that takes."""
    command, tally = JOBS[name], Tally()
    inputs = {n: (folder / n).stat() for n in ("base", "a", "b")}
    before = {n: tree(folder / n) for n in inputs}
    if not (folder / "older").exists():
        assert run(named(JOBS["merge"], folder / "older"), folder).returncode == 0
    whole = folder / "whole" / name.replace(" ", "-").replace(",", "") / "out"
    whole.parent.mkdir(parents=True)
    if name in OVER_OLDER:
        older(whole, folder)
    times = duration(named(command, whole), folder, whole)
    want = contents(whole)
    for number in range(10**6):
        if tally.kills >= count or tally.earlier > 3 * count + 10:
            break
        case = folder / "cases" / f"{name.replace(' ', '-').replace(',', '')}-{number}"
        out = case / "out"
        case.mkdir(parents=True)
        if name in OVER_OLDER:
            older(out, folder)
        tally.cases += 1
        env = ENV | (SHORT_ROUNDS if random.random() < 0.75 else {})
        ended, history = False, []
        for _ in range(random.randint(1, 3)):
            chosen = random.choice(list(signals))
            code = disturbed(named(command, out), folder, env, out, times, chosen, random)
            history.append(f"{chosen.name}: {code}")
            ended = contents(out) == want  # the signal may come when all is done
            if code == 0:
                tally.earlier += 1
            else:
                tally.kills += 1
                tally.by_signal[chosen.name] += 1
            if ended:
                break
        if not ended:
            last = run(named(command, out), folder, env)
            tally.resumed += "resumed" in last.stderr + last.stdout
            if last.returncode:
                tally.wrong.append(
                    f"{case}: {'; '.join(history)}; then {last.returncode}: {last.stderr.strip()[-600:]}"
                )
                continue
        got = contents(out)
        if got != want:
            differ = sorted(k for k in got.keys() | want.keys() if got.get(k) != want.get(k))
            tally.wrong.append(f"{case}: {'; '.join(history)}; then other bytes of {', '.join(differ)}")
            continue
        tally.equal += 1
        shutil.rmtree(case)
    if {n: tree(folder / n) for n in inputs} != before:
        tally.wrong.append(f"{name}: the inputs changed")
    return tally


def rows(tallies: dict[str, Tally]) -> Iterator[str]:
    yield "| command | cases | kills | resumed | equal bytes |"
    yield "|---|---:|---:|---:|---:|"
    for name, t in tallies.items():
        yield f"| {name} | {t.cases} | {t.kills} | {t.resumed} | {t.equal} |"


def main() -> None:
    """Kill every command, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "kills")
    parser.add_argument("--mb", type=int, default=48, help="megabytes of a model")
    parser.add_argument("--only", default="", help="names of commands, separated by semicolons")
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True)
    make_models(given.folder, given.mb)
    names = [n for n in JOBS if not given.only or n in given.only.split(";")]
    random, tallies = Random(given.seed), {}
    print(f"seed {given.seed}", flush=True)
    for name in names:
        tallies[name] = cases(name, given.folder, -(-given.kills // len(names)), random)
        print(f"{name}: {tallies[name].equal} of {tallies[name].cases}", *tallies[name].wrong, sep="\n  ", flush=True)
    print(*rows(tallies), sep="\n")
    signals = sum((t.by_signal for t in tallies.values()), Counter())
    print(", ".join(f"{n} {k}" for n, k in sorted(signals.items())))
    (given.folder / "table.json").write_text(json.dumps({n: vars(t) for n, t in tallies.items()}, indent=1))
    sys.exit(any(t.wrong for t in tallies.values()))


if __name__ == "__main__":
    main()
