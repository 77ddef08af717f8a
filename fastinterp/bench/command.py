"""`fastinterp bench`: what a merge costs on this machine, and what it would cost otherwise."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastinterp._version import __version__
from fastinterp.errors import CheckpointError, FastinterpError, OutputError, UsageError

if TYPE_CHECKING:
    from fastinterp.bench.check import Job
    from fastinterp.bench.race import Racer

RIVALS = ("copy", "touch", "naive", "mergekit")
_NEEDS = {"naive": ("torch", "safetensors"), "mergekit": ("mergekit",)}  # packages
_INSTALL = {"naive": "pip install torch safetensors", "mergekit": "pip install 'fastinterp[mergekit]'"}
_SIZES = ("tiny", "100m", "1b", "7b")
_SMALL = 20_000_000  # bytes; that many are copied in less time than Python takes to start
_DELTA = (0.6, -0.3)  # weights of task vectors, in turn

# Asks another Python for its packages: importing them all would take long.
_PROBE = (
    "import json, sys; from importlib.metadata import distributions; "
    "print(json.dumps({d.metadata['Name'].lower(): d.version for d in distributions()}))"
)


@click.command()
@click.option("--size", type=click.Choice(_SIZES), default="1b", show_default=True, help="Of the models that are made.")
@click.option(
    "--models", metavar="DIR", help="Race on the checkpoints in DIR. Made there, and kept, if there are none."
)
@click.option("--dir", "scratch", default=".", metavar="DIR", help="Where scratch files go. Default: here.")
@click.option("--recipe", type=click.Choice(["average", "delta"]), default="average", show_default=True)
@click.option(
    "--runs", type=click.IntRange(1), default=5, show_default=True, help="Timed rounds, after one that is not."
)
@click.option("--cold", is_flag=True, help="Drop the inputs from the page cache before every run.")
@click.option(
    "--against",
    metavar="LIST",
    help=f"Any of {','.join(RIVALS)}. Default: copy,touch, and naive if torch and safetensors are there.",
)
@click.option(
    "--python", default=sys.executable, metavar="EXE", help="A Python with torch or mergekit, if this has none."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout: every run, and where it was measured.")
def bench(
    size: str, models: str | None, scratch: str, recipe: str, runs: int, cold: bool, against: str | None, python: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Race whole merges against the alternatives, on this machine.

    Everybody does the same job on the same files, in turn, in processes of their own, and is checked first. `copy` is
    `cp` of one input: the fewest bytes that any merge writes. `touch` also reads every input. `naive` is a loop in
    PyTorch.

    The folder that --models names holds checkpoints as folders (links will do). The one called `base` is the base, the
    others are merged: `average` takes their mean, `delta` adds 0.6 and -0.3 of their differences from the base in turn.

    \b
    Example:
      fastinterp bench --size 100m
      fastinterp bench --models ~/models/mine --against copy,naive,mergekit --json > race.json
    """
    packages = _packages(python)
    names = _rivals(against, packages, python)
    work = Path(tempfile.mkdtemp(prefix="fastinterp-bench-", dir=_folder(scratch))).resolve()
    try:
        job = _job(_checkpoints(models, work / "models", size), recipe)
        found = _measure(job, names, work, packages, python, runs=runs, cold=cold)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    found = {"benchmark": "race", "recipe": recipe, "size": None if models else size, **found}
    click.echo(json.dumps(found, indent=1) if as_json else "\n".join(as_text(found)))


def _say(text: str) -> None:
    click.echo(text, err=True)


def _folder(scratch: str) -> Path:
    if not os.path.isdir(scratch) or not os.access(scratch, os.W_OK):
        raise UsageError(f"--dir {scratch}: there is no such folder, or it cannot be written to. Name another")
    return Path(scratch)


# --- who races -------------------------------------------------------------------------------------------------------


def _packages(python: str) -> dict[str, str]:
    """Package -> version, of the Python that rivals run in; `python` is its own."""
    try:
        done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(f"--python {python}: it cannot be run: {getattr(error, 'stderr', None) or error}") from None
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _rivals(against: str | None, packages: dict[str, str], python: str) -> list[str]:
    """The names of those that were asked for, and that can run."""
    if against is None:
        missing = [package for package in _NEEDS["naive"] if package not in packages]
        if not missing:
            return ["copy", "touch", "naive"]
        _say(f"naive is left out: {python} does not have {' and '.join(missing)}. {_INSTALL['naive']}")
        return ["copy", "touch"]
    names = [name.strip() for name in against.split(",") if name.strip()]
    for name in names:
        if name not in RIVALS:
            raise UsageError(f"--against {name}: unknown. Known: {', '.join(RIVALS)}")
        for package in _NEEDS.get(name, ()):
            if package not in packages:
                raise UsageError(
                    f"--against {name} needs {package}, which {python} does not have. {_INSTALL[name]}, or name with "
                    "--python another Python that has it"
                )
    return list(dict.fromkeys(names))


def _racers(job: Job, names: Sequence[str], work: Path, packages: dict[str, str], python: str) -> list[Racer]:
    """fastinterp and the rivals that are named, in the order of RIVALS. Writes their recipes into `work`."""
    from fastinterp.bench.check import check, weight_files
    from fastinterp.bench.race import Racer

    out, recipe, settings = work / "out", work / "recipe.yml", work / "job.json"
    recipe.write_text(json.dumps(job.recipe()))  # JSON is YAML
    one = weight_files(job.models[0])
    base = str(job.base) if job.base else None
    models, files = [str(m) for m in job.models], [f.name for f in one]
    settings.write_text(json.dumps({"files": files, "models": models, "weights": job.weights, "base": base}))
    if "naive" in names:
        _same_files(job, files)
    every = shlex.join(str(f) for model in job.inputs for f in weight_files(model))
    copy = f"mkdir {shlex.quote(str(out))} && cp --reflink=never {shlex.join(map(str, one))} {shlex.quote(str(out))}"
    # Not by its path, which would put this folder first in its sys.path.
    naive = [python, "-c", Path(__file__).with_name("naive.py").read_text("utf-8"), str(settings), str(out)]
    mergekit = [python, "-m", "mergekit.scripts.run_yaml", str(recipe), str(out)]

    def answer() -> int:
        return check(out, job)

    def coarse_answer() -> int:
        return check(out, job, coarse=True)

    def length() -> int:
        return _same_size(one, out)

    known = [
        Racer("fastinterp", _own_command(recipe, out), answer, __version__),
        Racer("copy", ["sh", "-c", copy], length),
        Racer("touch", ["sh", "-c", f"cat {every} >/dev/null && {copy}"], length),
        Racer("naive", naive, answer, f"torch {packages.get('torch')}"),
        Racer("mergekit", mergekit, coarse_answer, packages.get("mergekit")),  # it computes in the dtype that it stores
    ]
    return [racer for racer in known if racer.name in ("fastinterp", *names)]


def _own_command(recipe: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "fastinterp", "merge", str(recipe), str(out), "--quiet"]


def _same_files(job: Job, names: Sequence[str]) -> None:
    for model in job.inputs:
        if sorted(f.name for f in model.glob("*.safetensors")) != list(names):
            raise UsageError(
                f"--against naive: the loop goes from file to file, but {model} has others than {job.models[0]}. "
                "Leave naive out"
            )


def _same_size(files: Sequence[Path], out: Path) -> int:
    """cp is trusted with the content: no element is compared."""
    for file in files:
        if (out / file.name).stat().st_size != file.stat().st_size:
            raise FastinterpError(f"the copy of {file.name} is not as long as the original")
    return 0


# --- what they race on -----------------------------------------------------------------------------------------------


def _checkpoints(models: str | None, made: Path, size: str) -> list[Path]:
    """The folders of the checkpoints, made if need be. Raises OutputError if that would fill the disk."""
    given = Path(models).expanduser().absolute() if models else made
    found = sorted(p for p in given.glob("[!.]*") if p.is_dir() and any(p.glob("*.safetensors")))
    if found:
        return found
    if any(given.glob("[!.]*")):
        raise CheckpointError("there is no folder with .safetensors files in it", file=str(given))
    from fastinterp.bench.checkpoints import SIZES, write_checkpoints

    _need(given.parent, 3 * SIZES[size].nbytes, f"three checkpoints of size {size}")
    return write_checkpoints(given, SIZES[size], say=_say)


def _job(folders: Sequence[Path], recipe: str) -> Job:
    from fastinterp.bench.check import Job

    tuned = tuple(f for f in folders if f.name != "base")
    base = next((f for f in folders if f.name == "base"), None)
    if recipe == "delta":
        if base is None or not tuned:
            raise UsageError(
                f"--recipe delta needs a folder `base` and another, got {', '.join(f.name for f in folders)}"
            )
        return Job(tuned, tuple(_DELTA[i % 2] for i in range(len(tuned))), base)
    if len(tuned) < 2:
        raise UsageError(
            f"--recipe average needs two checkpoints beside `base`, got {', '.join(f.name for f in folders)}"
        )
    return Job(tuned, (1 / len(tuned),) * len(tuned))


def _need(folder: Path, nbytes: int, what: str) -> None:
    from fastinterp.messages import size

    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OutputError(
            f"{folder}: not enough space: {what} take {size(nbytes)}, but {size(free)} are free. Free "
            f"{size(nbytes - free)}, or name another folder or a smaller size"
        )


# --- the race --------------------------------------------------------------------------------------------------------


def _measure(
    job: Job, names: Sequence[str], work: Path, packages: dict[str, str], python: str, *, runs: int, cold: bool
) -> dict[str, Any]:
    from fastinterp.bench.check import read_tensors, weight_files
    from fastinterp.bench.provenance import file_system, provenance
    from fastinterp.bench.race import race

    nbytes = sum(f.stat().st_size for f in weight_files(job.models[0]))
    # A second one: what a command keeps in temporary files while it writes.
    _need(work, 2 * nbytes, "an output and what a command may need beside it")
    racers = _racers(job, names, work, packages, python)
    inputs = [f for model in job.inputs for f in weight_files(model)]
    cached = race(racers, inputs, work, runs=runs, cold=cold, say=_say)
    return {
        "inputs": len(job.inputs),
        "model_bytes": nbytes,
        "dtypes": sorted({t.dtype for t in read_tensors(job.models[0]).values()}),
        "cache": "cold" if cold else "warm",
        "cached": cached,  # part of the inputs that was in the page cache before a run: smallest, largest; or None
        "runs": runs,
        "racers": {r.name: r.as_dict(racers[0]) for r in racers},
        "provenance": provenance(work) | {"models_file_system": file_system(job.models[0])},
    }


def as_text(found: dict[str, Any]) -> list[str]:
    """The table that people read."""
    from fastinterp.messages import counted, size, table

    where = found["provenance"]
    least = ""
    if found["cached"] is None:
        least = " as far as one can tell (only who may write the files is told)"
    elif found["cache"] == "warm" and found["cached"][0] <= 0.99:
        least = f" ({found['cached'][0]:.0%} of it at least)"
    rows = [["", "wall s", "min", "max", "cpu s", "memory", "fastinterp takes"]]
    for name, r in found["racers"].items():
        ratio = r["ratio"]
        share = (
            f"{ratio['median']:.3f} of it ({ratio['min']:.3f} to {ratio['max']:.3f})" if name != "fastinterp" else ""
        )
        seconds = [f"{v:.3f}" for v in (r["median_wall_s"], min(r["wall_s"]), max(r["wall_s"]), r["median_cpu_s"])]
        rows.append([name, *seconds, size(r["peak_anon_bytes"]), share])
    small = found["model_bytes"] < _SMALL
    return [
        f"{found['recipe']} of {counted(found['inputs'], 'checkpoint')} of {size(found['model_bytes'])}, "
        f"{'+'.join(found['dtypes'])}; {found['cache']} page cache{least}; {counted(found['runs'], 'run')}",
        f"{where['cpu']}, {counted(where['cores'], 'core')}, {size(where['memory_bytes'])} of memory, "
        f"{where['file_system']}, {where['system']}; fastinterp {where['fastinterp']} ({where['isa']})",
        *table(rows, "<>>>>><"),
        *(["models this small measure the start-up of the programs, and little else"] if small else []),
    ]
