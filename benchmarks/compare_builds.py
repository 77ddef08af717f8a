"""Compares the bytes of everything that two builds of fastinterp write: every method, and what else recipes can say.

    python -m benchmarks.compare_builds BEFORE AFTER [--models DIR | --size small] [--only 'ties*,sweep/*'] [--jobs 2]

BEFORE and AFTER are Python interpreters in which fastinterp is installed, or source trees in which its extension is
built. BEFORE runs every command of `benchmarks/build_cases.py` once, AFTER runs it on every instruction set that BEFORE
can use, and with 1 and 2 threads: the bytes must depend on neither. All that a command writes (weights, index,
configuration, tokenizer, model card) must be the same files, by SHA-256. Exit code 1, if any is not: the first
difference is reported by file, tensor and offset.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from benchmarks.build_cases import INPUT_SIZES, MODELS, OUT, RECIPE, Command, commands, write_inputs

_ISAS = ("avx512", "avx2", "neon", "scalar")
_CHUNK = 1 << 20  # bytes
_LOCATE = "import fastinterp; print(fastinterp.__version__, fastinterp.__file__)"


class BuildError(Exception):
    """A build that cannot be run, or that runs nothing of what is to be compared."""


@dataclass(frozen=True)
class Build:
    """One of the two builds: how its program is started, and in which environment."""

    name: str
    python: str
    environment: dict[str, str]

    @classmethod
    def named(cls, name: str, text: str) -> Build:
        """`text`: an interpreter, or a source tree, which this interpreter then runs."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("FASTINTERP_", "PYTHON"))}
        if os.path.isdir(text):
            return cls(name, sys.executable, environment | {"PYTHONPATH": os.path.abspath(text)})
        python = shutil.which(text)
        if python is None:
            raise BuildError(f"{name}: {text} is neither an interpreter nor a folder")
        return cls(name, os.path.abspath(python), environment)  # not resolved: a virtual environment's is a link

    def run(self, arguments: Sequence[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the interpreter in `folder`."""
        return subprocess.run(
            [self.python, *arguments],
            cwd=folder, env=self.environment | environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    def output_of(self, arguments: Sequence[str], folder: Path) -> str:
        """What it prints. Raises: BuildError, if it fails."""
        done = self.run(arguments, folder)
        if done.returncode:
            raise BuildError(f"{self.name}: {self.python} {' '.join(arguments)} failed:\n{done.stderr.strip()}")
        return done.stdout


@dataclass(frozen=True)
class Variant:
    """One way to run a command: the same bytes are expected of each."""

    isa: str
    threads: int
    device: str

    def __str__(self) -> str:
        return f"{self.isa} x {self.threads}"


@dataclass
class Result:
    """What the runs of one command came to.

    runs, files, nbytes  of AFTER that were compared with the run of BEFORE
    digest               SHA-256 of the names, digests and lengths of BEFORE's files
    differences          one line for each run that differs
    """

    runs: int = 0
    files: int = 0
    nbytes: int = 0
    digest: str = ""
    differences: list[str] = field(default_factory=list)


# --- comparing -------------------------------------------------------------------------------------------------------


def tree_of(folder: Path) -> dict[str, tuple[str, int]]:
    """SHA-256 and length in bytes of every file below `folder`, by relative name."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest, length = hashlib.sha256(), 0
        for chunk in _chunks(path):
            digest.update(chunk)
            length += len(chunk)
        files[path.relative_to(folder).as_posix()] = (digest.hexdigest(), length)
    return files


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def first_difference(before: Path, after: Path) -> str | None:
    """Where the files of two folders first differ, in the order of their names; None, if they do not."""
    one, other = tree_of(before), tree_of(after)
    for name in sorted(one.keys() | other.keys()):
        if name not in one:
            return f"{name}: written by the second only"
        if name not in other:
            return f"{name}: written by the first only"
        if one[name] != other[name]:
            return f"{name}: {_place(before / name, after / name)}"
    return None


def _place(before: Path, after: Path) -> str:
    """The first byte that differs, and in a safetensors file what it belongs to."""
    offset = 0
    for one, other in zip(_chunks(before), _chunks(after), strict=False):
        if one != other:
            pairs = enumerate(zip(one, other, strict=False))
            offset += next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
            break
        offset += len(one)
    lengths = [path.stat().st_size for path in (before, after)]
    where = f"byte {offset} (lengths {lengths[0]} and {lengths[1]})" if lengths[0] != lengths[1] else f"byte {offset}"
    if before.suffix == ".safetensors":
        with open(before, "rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
            table = json.loads(stream.read(start - 8))
        if offset < start:
            return f"header, {where}"
        table.pop("__metadata__", None)
        for name, entry in table.items():
            first, end = (start + at for at in entry["data_offsets"])
            if first <= offset < end:
                return f"{name} ({entry['dtype']} {entry['shape']}), byte {offset - first} of its data, {where}"
    return where


# --- running ---------------------------------------------------------------------------------------------------------


def usable_isas(build: Build, probe: Command, work: Path, device: str) -> list[str]:
    """The instruction sets that a build can use, widest first.

    Raises: BuildError, if it fails for another reason than that the machine or the build lacks one.
    """
    usable = []
    for isa in _ISAS:
        done = _run(build, probe, Variant(isa, 1, device), work)
        shutil.rmtree(work / OUT, ignore_errors=True)
        if done.returncode == 0:
            usable.append(isa)
        elif "FASTINTERP_ISA" not in done.stderr:
            raise BuildError(f"{build.name}: `{probe.name}` on {isa} failed:\n{done.stderr.strip()}")
    return usable


def variants_on(isas: Sequence[str], device: str) -> list[Variant]:
    """The first instruction set with 1 and with 2 threads, each other one with either."""
    threads = [1, 2, 2, 1, 2][: len(isas) + 1]
    return [Variant(isa, count, device) for isa, count in zip([*isas[:1], *isas], threads, strict=True)]


def _run(build: Build, command: Command, variant: Variant, folder: Path) -> subprocess.CompletedProcess[str]:
    if command.recipe is not None:
        (folder / RECIPE).write_text(command.recipe)
    options = ("--threads", str(variant.threads), "--device", variant.device, "--quiet")
    return build.run(["-m", "fastinterp", *command.arguments, *options], folder, FASTINTERP_ISA=variant.isa)


def compare(command: Command, before: Build, after: Build, variants: Sequence[Variant], work: Path) -> Result:
    """Run one command in a folder of its own beside the models: by `before` in the first variant, by `after` in all."""
    folder = Path(tempfile.mkdtemp(dir=work))
    (folder / MODELS).symlink_to(work / MODELS)
    out, reference = folder / OUT, folder / "reference"
    result = Result()
    done = _run(before, command, variants[0], folder)
    if done.returncode:
        result.differences.append(_failure(before, variants[0], done))
        return result
    out.rename(reference)
    expected = tree_of(reference)
    result.digest = hashlib.sha256(json.dumps(expected).encode()).hexdigest()
    for variant in variants:
        done = _run(after, command, variant, folder)
        if done.returncode:
            result.differences.append(_failure(after, variant, done))
            break
        got = tree_of(out)
        if got != expected:
            result.differences.append(f"{after.name} ({variant}): {first_difference(reference, out)}")
        result.runs, result.files = result.runs + 1, result.files + len(got)
        result.nbytes += sum(length for _, length in got.values())
        shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(folder)
    return result


def _failure(build: Build, variant: Variant, done: subprocess.CompletedProcess[str]) -> str:
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"{build.name} ({variant}) failed with exit code {done.returncode}: {last}"


def methods_of(build: Build, work: Path) -> list[str]:
    """The methods that `fastinterp methods` lists."""
    table = build.output_of(["-m", "fastinterp", "methods", "--markdown"], work)
    return [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]


def _plan(before: Build, after: Build, work: Path, device: str) -> tuple[list[Command], list[Variant], list[str]]:
    """The commands to compare, the variants, and the methods that only `before` has."""
    methods, kept = methods_of(before, work), set(methods_of(after, work))
    every = commands([name for name in methods if name in kept])
    probe = next(command for command in every if command.name == "linear")
    isas = usable_isas(before, probe, work, device)
    return every, variants_on(isas, device), [name for name in methods if name not in kept]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, and print what was compared. Returns the exit code: 0 equal, 1 differences, 2 nothing compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="a Python interpreter, or a source tree")
    parser.add_argument("after", help="another")
    parser.add_argument("--models", type=Path, metavar="DIR", help="of BF16 checkpoints base, ft1 and ft2")
    parser.add_argument("--size", choices=INPUT_SIZES, default="small", help="of those that are made otherwise")
    parser.add_argument("--only", default="*", metavar="LIST", help="names of commands, with * for anything")
    parser.add_argument("--device", default="cpu", help="as of `fastinterp merge`")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="commands that run at a time")
    parser.add_argument("--dir", metavar="DIR", help="where scratch files go")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="compare-builds-", dir=options.dir) as scratch:
        work = Path(scratch).resolve()
        try:
            before, after = Build.named("before", options.before), Build.named("after", options.after)
            for build in (before, after):
                version, file = build.output_of(["-c", _LOCATE], work).split(maxsplit=1)
                print(f"{build.name:7} fastinterp {version} in {os.path.dirname(file)}", flush=True)
            write_inputs(work / MODELS, options.models, INPUT_SIZES[options.size])
            every, variants, lost = _plan(before, after, work, options.device)
        except BuildError as error:
            print(error, file=sys.stderr)
            return 2
        chosen = [c for c in every if any(fnmatch(c.name, p.strip()) for p in options.only.split(","))]
        if not chosen or not variants:
            print(f"nothing to compare: {len(chosen)} commands, {len(variants)} variants", file=sys.stderr)
            return 2
        print(f"{len(chosen)} commands; instruction sets and threads: {', '.join(map(str, variants))}", flush=True)
        run = partial(compare, before=before, after=after, variants=variants, work=work)
        with ThreadPoolExecutor(options.jobs) as pool:
            results = [_printed(c, r) for c, r in zip(chosen, pool.map(run, chosen), strict=True)]
    return _summary(results, lost)


def _printed(command: Command, result: Result) -> Result:
    print(f"{command.name:32} {result.runs} runs, {result.files} files, {result.nbytes / 1e6:.1f} MB", flush=True)
    for line in result.differences:
        print(f"  DIFFERENT: {line}", flush=True)
    return result


def _summary(results: Sequence[Result], lost: Sequence[str]) -> int:
    digest = hashlib.sha256("".join(r.digest for r in results).encode()).hexdigest()
    runs, files, nbytes = (sum(getattr(r, key) for r in results) for key in ("runs", "files", "nbytes"))
    print(f"compared: {len(results)} commands run once before and {runs} times after; {files} files, {nbytes:,} bytes")
    print(f"SHA-256 of all that was written before: {digest}")
    differences = [
        *(f"after has no method {name}" for name in lost),
        *(line for r in results for line in r.differences),
    ]
    print(f"differences: {len(differences)}")
    for line in differences[:1]:
        print(f"first: {line}")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
