"""Every system call of a command made to fail, one after the other: what ends well and what does not.

    python -m tests.support.fault_survey [--most 50] [COMMAND ...]

A run ends well if it exits with 0 and wrote what the command writes without a fault; or with 3 or 4, one line that
names a file of it, and no output.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.fault_server import FaultServer, Run
from tests.support.faults import Call, calls
from tests.support.models import layers, save

# What each call is made to do; the others fail with EIO.
OUTCOMES: Mapping[str, Sequence[str]] = {
    "open": ("EMFILE", "EACCES", "EINTR"), "read": ("EIO", "ZERO", "SHORT", "EINTR"),
    "pread": ("EIO", "ZERO", "SHORT", "EINTR"), "write": ("ENOSPC", "SHORT", "EINTR"),
    "pwrite": ("EIO", "ENOSPC", "ZERO", "SHORT", "EINTR"), "ftruncate": ("EIO", "EINTR"),
    "fallocate": ("ENOSPC", "EOPNOTSUPP", "EINTR"), "pthread_create": ("EAGAIN",), "mmap": ("ENOMEM",),
    "fsync": ("EIO", "ENOSPC"), "rename": ("EIO", "EACCES"), "mkdir": ("EIO", "EACCES", "ENOSPC"),
}  # fmt: skip
MODULES = (  # loaded once, before runs are forked
    "fastinterp.cli.merge", "fastinterp.cli.sweep", "fastinterp.cli.inspect", "fastinterp.cli.lora", "fastinterp.api",
    "fastinterp.execute.to_files", "fastinterp.inspect.check", "fastinterp.inspect.explain",
    "fastinterp.inspect.compare", "fastinterp.inspect.describe", "fastinterp.lora.extract", "fastinterp.paths.sweep",
    "fastinterp.cli.average", "fastinterp.cli.verify", "fastinterp.verification.verify",
    "fastinterp.verification.replay",
)  # fmt: skip
_TIMES = re.compile(r"[0-9.]+ ?(?:s|ms|[KMG]?B/s)\b")  # that differ between runs


@dataclass(frozen=True)
class Bad:
    """A fault that did not end well."""

    command: str
    rule: str
    path: str
    why: str

    def __str__(self) -> str:
        return f"{self.command}: {self.rule} of {self.path}: {self.why}"


class Place:
    """A folder with models and a recipe, and the commands that are tried there, by name; `out` is what they write."""

    def __init__(self, root: Path):
        self.root, self.out = root, root / "out"
        self.a, self.b = save(root / "a", layers(1)), save(root / "b", layers(1, noise=0.1))
        recipe = root / "ties.yml"
        recipe.write_text(
            f"merge_method: ties\nbase_model: {self.a}\nparameters: {{density: 0.5}}\n"
            f"models: [{{model: {self.b}, parameters: {{weight: 1}}}}]\n"
        )
        pair, to = [self.a, self.b], ["-o", self.out]
        self.commands: dict[str, list[object]] = {
            "interpolate": ["interpolate", *pair, *to, "--alpha", "0.5"],
            "merge": ["merge", recipe, self.out],
            "force": ["interpolate", *pair, *to, "--alpha", "0.5", "--force"],
            "durable": ["interpolate", *pair, *to, "--alpha", "0.5", "--durable"],
            "file": ["interpolate", *pair, "-o", root / "out.safetensors", "--alpha", "0.5"],
            "sweep": ["sweep", *pair, *to, "--alphas", "0:1:3"],
            "extract-lora": ["extract-lora", self.b, "--base", self.a, *to, "--rank", "2"],
            "check": ["check", recipe],
            "explain": ["explain", recipe],
            "inspect": ["inspect", self.a],
            "diff": ["diff", *pair],
            "average": ["average", root / "[ab]", "--in-order", *to],
            "verify": ["verify", root / "made", "--full", "--inputs"],
            "replay": ["replay", root / "made", *to],
        }

    def prepared(self, server: FaultServer, name: str) -> None:
        """Nothing at the output's place but what the command replaces; and the output that it reads."""
        self.clear()
        if name == "force":
            server.run(self.commands["interpolate"])
        if name in ("verify", "replay") and not (self.root / "made").exists():
            server.run(["merge", self.root / "ties.yml", self.root / "made"])

    def clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        for path in self.root.iterdir():
            if path.name.lstrip(".").startswith("out.safetensors"):
                path.unlink()

    def written(self) -> dict[str, bytes]:
        """What is at the output's place, by name."""
        found = [*self.out.rglob("*"), *self.root.glob("*out.safetensors*")]
        return {str(p.relative_to(self.root)): p.read_bytes() for p in found if p.is_file()}


def survey(
    server: FaultServer, place: Place, name: str, picked: Sequence[Call] | None, most: int = 50
) -> Iterator[Bad | None]:
    """Every outcome of every one of the first `most` occurrences of each call of a command: None, where it ended well.

    picked  only these calls, of those that `traced` has
    """
    good, expected, every = traced(server, place, name)
    for call in every if picked is None else picked:
        for outcome in OUTCOMES.get(call.name, ("EIO",)) if call.nth <= most else ():
            place.prepared(server, name)
            rule = f"{call.name}:{call.nth}:{outcome}"
            run = server.run(place.commands[name], rule, [place.root])
            why = _wrong(run, place, name, good, expected)
            yield Bad(name, rule, call.path, why) if why else None


def traced(server: FaultServer, place: Place, name: str) -> tuple[Run, dict[str, bytes], list[Call]]:
    """The command without faults: how it ended, what it wrote, and its calls."""
    place.prepared(server, name)
    trace = place.root.with_name(f"{place.root.name}.trace")
    trace.unlink(missing_ok=True)
    run = server.run(place.commands[name], under=[place.root], trace=trace)
    if run.code:
        raise RuntimeError(f"{name} fails without faults: {run.err}")
    return run, place.written(), calls(trace)


def _wrong(run: Run, place: Place, name: str, good: Run, expected: Mapping[str, bytes]) -> str:
    """What is wrong about how a run ended; empty: nothing."""
    if "Traceback" in run.out + run.err or "Exception ignored" in run.err:
        return run.err.strip().splitlines()[-1]
    unread = "cannot read the recipe" in run.err or "the recipe is empty" in run.err  # a bad recipe: exit code 2
    if run.code not in (0, 3, 4) and not (run.code == 2 and (name == "check" or unread)):
        return f"it exits with {run.code}: {run.err}"
    if run.code == 0:
        if place.written() != expected:
            return f"it says success, but the output differs: {run.err}"
        same = _TIMES.sub("", run.out) == _TIMES.sub("", good.out)
        return "" if same or expected else "it says success, but its text differs"
    if len(run.err.strip().splitlines()) > 1:
        return f"several lines: {run.err}"
    said = run.out + run.err if name in ("check", "verify") else run.err  # what is wrong is their result
    if str(place.root) not in said and "not enough memory" not in said and "no thread" not in said:
        return f"it names no file: {said}"
    # A journal without a record: the next run takes it.
    left = {name for name, raw in place.written().items() if raw or not name.endswith("-journal")}
    if "the output is complete" in run.err and set(expected) <= left:
        return ""
    if name not in ("force", "sweep") and left:  # a sweep keeps the points that are complete
        return f"it leaves {', '.join(sorted(left))}: {run.err}"
    return ""


def main() -> int:
    """Survey, and print what did not end well and a table."""
    options = argparse.ArgumentParser()
    options.add_argument("--most", type=int, default=50)
    options.add_argument("commands", nargs="*")
    asked = options.parse_args()
    totals: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, FaultServer(MODULES) as server:
        place = Place(Path(folder).resolve() / "faults")
        for name in asked.commands or place.commands:
            for found in survey(server, place, name, None, asked.most):
                totals[name] += 1
                if found is not None:
                    bad[name] += 1
                    sys.stdout.write(f"{found}\n")
            sys.stdout.write(f"{name:14} {totals[name]:6} faults, {bad[name]} did not end well\n")
            sys.stdout.flush()
    return 1 if sum(bad.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
