"""Commands whose system calls fail: the right exit code and a message, no part of an output, inputs as they were.

    python -m tests.attacks.faults [--most 50] [--only NAME,...] [--folder build/faults-cases]

A command runs once undisturbed, its calls on files of the case are counted (tests/support/faults.c names them), and
then it runs once for each call and each of its first occurrences, with that one failing. Prints a table by command and
every case that went wrong, as the rule that repeats it; exit code 1, if there is one.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.attacks.kills import make_models
from tests.support.fault_server import FaultServer, Run
from tests.support.faults import counts
from tests.support.written import tree

ROOT = Path(__file__).resolve().parents[2]

# What each call fails with: what file systems and limits make of it in practice. Others: EIO.
ERRORS = {
    "open": ("EACCES", "EMFILE"), "read": ("EIO", "ZERO", "SHORT"), "pread": ("EIO", "ZERO", "SHORT"),
    "write": ("ENOSPC", "ZERO", "SHORT"), "pwrite": ("ENOSPC", "EIO", "ZERO", "SHORT"),
    "fallocate": ("ENOSPC", "EOPNOTSUPP"),
    "mkdir": ("EACCES", "ENOSPC"), "rename": ("EIO", "EXDEV"), "unlink": ("EACCES",), "fsync": ("EIO", "EINVAL"),
    "close": ("EIO", "ENOSPC"), "flock": ("ENOLCK", "EIO"), "pthread_create": ("EAGAIN",), "mmap": ("ENOMEM", "ENODEV"),
    "stat": ("EACCES", "ESTALE"), "ftruncate": ("EFBIG",), "opendir": ("EACCES",), "lseek": ("EINVAL",),
}  # fmt: skip

COMMANDS: dict[str, list[str]] = {
    "merge": ["merge", "IN/linear.yml", "OUT", "--max-shard-size", "20KB", "--threads", "2"],
    "merge, durable": ["merge", "IN/linear.yml", "OUT", "--durable", "--threads", "2"],
    "merge, one file": ["merge", "IN/linear.yml", "OUT/merged.safetensors", "--threads", "2"],
    "ties": ["merge", "IN/ties.yml", "OUT", "--threads", "2"],
    "sweep": ["sweep", "IN/a", "IN/b", "--alphas", "0,0.5,1", "-o", "OUT"],
    "explain": ["explain", "IN/linear.yml"],
    "check": ["check", "IN/linear.yml"],
    "inspect": ["inspect", "IN/a"],
}
RECIPES = ("cannot read the recipe", "the recipe is empty")  # what cannot be read is a bad recipe: exit code 2
REPORTS = {"check", "explain", "inspect"}  # commands that write nothing


@dataclass
class Tally:
    """What became of the cases of one command: a case ended with an error, or as if nothing had been."""

    cases: int = 0
    refused: int = 0
    same: int = 0
    wrong: list[str] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)


def rules(found: dict[str, int], most: int) -> Iterator[str]:
    """One fault each. found: how often each call is made."""
    for call, count in sorted(found.items()):
        for nth in range(1, min(count, most) + 1):
            for error in ERRORS.get(call, ("EIO",)):
                yield f"{call}:{nth}:{error}"


def _plain(text: str) -> str:
    """Output without times and speeds."""
    return re.sub(r"[\d.,]+ ?(ms|s|[KMGT]?B/s)\b", "N", text)


def complaint(
    done: Run, undisturbed: Run, command: str, rule: str, got: dict[str, bytes], want: dict[str, bytes]
) -> str:
    """What is wrong with the end of a case; empty, if nothing is."""
    if "Traceback" in done.err or "Exception ignored" in done.err:
        return "traceback"
    if done.code not in (0, 3, 4) and not (done.code == 2 and any(word in done.err + done.out for word in RECIPES)):
        return f"exit code {done.code}"
    if done.code == 0:
        if got != want:
            return (
                f"success, but other files: {sorted(k for k in got.keys() | want.keys() if got.get(k) != want.get(k))}"
            )
        if command in REPORTS and _plain(done.out) != _plain(undisturbed.out) and not done.err.strip():
            return "success, but another text, without a remark"
        return ""
    if not done.err.strip() and not (command == "check" and "error" in done.out):
        return "no message"
    # Of several outputs, those before the failure are finished; what cannot be removed stays.
    finished = re.search(r"\b(complete|finished)\b", done.err) and any(name.endswith(".safetensors") for name in got)
    kept = {name: content for name, content in got.items() if "unlink" not in rule or "/." not in name}
    if got and not (finished and kept.items() <= want.items()):
        return f"error, and files: {sorted(got)}"
    return ""


def cases(server: FaultServer, name: str, folder: Path, most: int) -> Tally:
    """Run one command with each fault."""
    tally, out, trace = Tally(), folder / "out", folder.parent / f"{folder.name}.trace"
    models = folder / "in"
    args = [part.replace("IN/", f"{models}/").replace("OUT", str(out)) for part in COMMANDS[name]]
    before = tree(models)
    trace.unlink(missing_ok=True)
    undisturbed = server.run(args, under=[folder], trace=trace)
    assert undisturbed.code == 0, undisturbed.err
    want = tree(out)
    shutil.rmtree(out, ignore_errors=True)
    for rule in rules(dict(counts(trace)), most):
        done = server.run(args, rule, under=[folder])
        tally.cases += 1
        tally.calls[rule.split(":", maxsplit=1)[0]] += 1
        what = complaint(done, undisturbed, name, rule, tree(out), want)
        if tree(models) != before:
            what = "the inputs changed"
        tally.same += done.code == 0
        tally.refused += done.code != 0
        if what:
            last = (done.err.strip() or "-").splitlines()[-1]
            tally.wrong.append(f"{name} {rule}: {what} ({last[-200:]})")
        shutil.rmtree(out, ignore_errors=True)
        for left in out.parent.iterdir():
            if left != models:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return tally


def main() -> None:
    """Run every command with every fault, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=50, help="the first so many occurrences of each call")
    parser.add_argument("--only", default="", help="names of commands, separated by semicolons")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "faults-cases")
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    prepare(given.folder)
    tallies = {}
    with FaultServer(MODULES) as server:
        for name in COMMANDS:
            if not given.only or name in given.only.split(";"):
                tallies[name] = cases(server, name, given.folder, given.most)
                print(f"{name}: {len(tallies[name].wrong)} wrong of {tallies[name].cases}", flush=True)
                print(*(f"  {what}" for what in tallies[name].wrong), sep="\n", flush=True)
    print("| command | cases | error and nothing written | no effect | wrong |\n|---|---:|---:|---:|---:|")
    for name, t in tallies.items():
        print(f"| {name} | {t.cases} | {t.refused} | {t.same} | {len(t.wrong)} |")
    print(", ".join(f"{n} {k}" for n, k in sorted(sum((t.calls for t in tallies.values()), Counter()).items())))
    sys.exit(any(t.wrong for t in tallies.values()))


# Imported before the faults begin, so that what fails is the command, not the import of its modules.
_MODULES = """
api cli.merge cli.sweep cli.inspect execute.run execute.to_files inspect.check inspect.explain inspect.describe
paths.sweep
"""
MODULES = ["numpy", *(f"fastinterp.{name}" for name in _MODULES.split())]


def prepare(folder: Path) -> None:
    """Models of 60 KB and recipes that name them, in `folder`/in."""
    models = folder / "in"
    make_models(models, 0)
    for recipe in models.glob("*.yml"):
        text = re.sub(r"(model: |base_model: )(base|a|b)\b", rf"\1{models}/\2", recipe.read_text())
        recipe.write_text(text)


if __name__ == "__main__":
    main()
