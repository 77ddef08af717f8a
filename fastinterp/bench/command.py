"""`fastinterp bench`: compares the time of a merge with that of other programs, on this machine."""

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
_SMALL = 20_000_000  # bytes: copied in less time than Python takes to start
_DELTA = (0.6, -0.3)  # weights of task vectors, alternately

# Program for another Python that prints its packages without importing them; not those that it does not find.
_PROBE = (
    "import json; from importlib.metadata import distributions; from importlib.util import find_spec; "
    f"gone = [n for n in {sorted({n for names in _NEEDS.values() for n in names})} if find_spec(n) is None]; "
    "found = {d.metadata['Name'].lower(): d.version for d in distributions()}; "
    "print(json.dumps({n: v for n, v in found.items() if n not in gone}))"
)


@click.command()
@click.option(
    "--size", type=click.Choice(_SIZES), default="1b", show_default=True, help="Size of the checkpoints to create."
)
@click.option(
    "--models", metavar="DIR", help="Use the checkpoints in DIR; if there are none, create and keep them there."
)
@click.option(
    "--dir", "scratch", default=".", metavar="DIR", help="Folder for temporary files. Default: the current one."
)
@click.option(
    "--recipe", type=click.Choice(["average", "delta"]), default="average", show_default=True, help="The merge to run."
)
@click.option(
    "--runs",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Number of timed rounds, after one that is not timed.",
)
@click.option("--cold", is_flag=True, help="Drop the inputs from the page cache before every run.")
@click.option(
    "--against",
    metavar="LIST",
    help=f"Any of {','.join(RIVALS)}. Default: copy,touch, and naive if torch and safetensors are there.",
)
@click.option("--python", default=sys.executable, metavar="EXE", help="A Python that has torch or mergekit.")
@click.option("--json", "as_json", is_flag=True, help="Print every run and the machine as JSON.")
def bench(
    size: str, models: str | None, scratch: str, recipe: str, runs: int, cold: bool, against: str | None, python: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Compare the speed of a merge with other programs.

    All programs merge the same files, in turn, each in a process of its own; their outputs are checked first. `copy` is
    `cp` of one input: no merge writes fewer bytes. `touch` also reads every input. `naive` is a loop in PyTorch.

    The folder of --models contains checkpoints as folders or links. The one named `base` is the base, the others are
    merged: `average` is their mean, `delta` adds their differences from the base with weights 0.6 and -0.3 alternately.

    \b
    Example:
      fastinterp bench --size 100m
      fastinterp bench --models ~/mine --against copy,naive --json > race.json
    """
    packages = _packages(python)
    names = _rivals(against, packages, python)
    work = Path(tempfile.mkdtemp(prefix="fastinterp-bench-", dir=_folder(scratch))).resolve()
    try:
        job = _job(_checkpoints(models, work / "models", size), recipe)
        values = _measure(job, names, work, packages, python, runs=runs, cold=cold)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    values = {"benchmark": "race", "recipe": recipe, "size": None if models else size, **values}
    if as_json:
        click.echo(json.dumps({"ok": True, **values}, indent=1))
    else:
        click.echo(_fitting("\n".join(as_text(values)), sys.stdout))


def _say(text: str) -> None:
    click.echo(_fitting(text, sys.stderr), err=True)


def _fitting(text: str, stream: Any) -> str:
    """On a terminal no line is cut inside a word."""
    from fastinterp.messages import broken

    return broken(text, shutil.get_terminal_size().columns) if stream is not None and stream.isatty() else text


def _folder(scratch: str) -> Path:
    if not os.path.isdir(scratch) or not os.access(scratch, os.W_OK):
        raise UsageError(f"--dir {scratch}: there is no such folder, or it cannot be written to")
    return Path(scratch)


# --- the programs -----------------------------------------------------------------------------------------------------


def _packages(python: str) -> dict[str, str]:
    """The packages of `python` and their versions."""
    try:
        done = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(f"--python {python}: it cannot be run: {getattr(error, 'stderr', None) or error}") from None
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


def _rivals(against: str | None, packages: dict[str, str], python: str) -> list[str]:
    """The names of the programs to compare with.

    Raises: UsageError, if one is unknown or cannot run.
    """
    if against is None:
        missing = [package for package in _NEEDS["naive"] if package not in packages]
        if not missing:
            return ["copy", "touch", "naive"]
        _say(f"without naive: {python} does not have {' and '.join(missing)}. {_INSTALL['naive']}")
        return ["copy", "touch"]
    names = [name.strip() for name in against.split(",") if name.strip()]
    for name in names:
        if name not in RIVALS:
            raise UsageError(f"--against {name}: unknown. Known: {', '.join(RIVALS)}")
        for package in _NEEDS.get(name, ()):
            if package not in packages:
                raise UsageError(
                    f"--against {name} needs {package}, which {python} does not have. {_INSTALL[name]}, or choose with "
                    "--python another Python that has it"
                )
    return list(dict.fromkeys(names))


def _racers(job: Job, names: Sequence[str], work: Path, packages: dict[str, str], python: str) -> list[Racer]:
    """fastinterp and the programs `names`, in the order of RIVALS. Writes their recipes into `work`."""
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
    # Its text, not its path, which would put this folder first in sys.path.
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
        Racer("mergekit", mergekit, coarse_answer, packages.get("mergekit")),  # it computes in the stored dtype
    ]
    return [racer for racer in known if racer.name in ("fastinterp", *names)]


def _own_command(recipe: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "fastinterp", "merge", str(recipe), str(out), "--quiet"]


def _same_files(job: Job, names: Sequence[str]) -> None:
    for model in job.inputs:
        if sorted(f.name for f in model.glob("*.safetensors")) != list(names):
            raise UsageError(
                f"--against naive: it needs the same files in all models, but those of {model} and "
                f"{job.models[0]} differ. Leave naive out"
            )


def _same_size(files: Sequence[Path], out: Path) -> int:
    """Check the sizes of the copies. Returns the number of elements compared: 0."""
    for file in files:
        if (out / file.name).stat().st_size != file.stat().st_size:
            raise FastinterpError(f"the copy of {file.name} has another size than the original")
    return 0


# --- the checkpoints --------------------------------------------------------------------------------------------------


def _checkpoints(models: str | None, made: Path, size: str) -> list[Path]:
    """The folders of the checkpoints, created if there are none.

    Raises: OutputError, if the disk is too small; CheckpointError, if `models` contains something else.
    """
    folder = Path(models).expanduser().absolute() if models else made
    checkpoints = sorted(p for p in folder.glob("[!.]*") if p.is_dir() and any(p.glob("*.safetensors")))
    if checkpoints:
        return checkpoints
    if any(folder.glob("[!.]*")):
        raise CheckpointError("it contains no folder with .safetensors files", file=str(folder))
    from fastinterp.bench.checkpoints import SIZES, write_checkpoints

    _need(folder.parent, 3 * SIZES[size].nbytes, f"three checkpoints of size {size}")
    return write_checkpoints(folder, SIZES[size], say=_say)


def _job(folders: Sequence[Path], recipe: str) -> Job:
    from fastinterp.bench.check import Job

    tuned = tuple(f for f in folders if f.name != "base")
    base = next((f for f in folders if f.name == "base"), None)
    if recipe == "delta":
        if base is None or not tuned:
            raise UsageError(
                f"--recipe delta needs a folder `base` and at least one other, got {', '.join(f.name for f in folders)}"
            )
        return Job(tuned, tuple(_DELTA[i % 2] for i in range(len(tuned))), base)
    if len(tuned) < 2:
        raise UsageError(
            f"--recipe average needs at least two checkpoints beside `base`, got {', '.join(f.name for f in folders)}"
        )
    return Job(tuned, (1 / len(tuned),) * len(tuned))


def _need(folder: Path, nbytes: int, what: str) -> None:
    from fastinterp.messages import size

    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OutputError(
            f"{folder}: not enough space: {what} need {size(nbytes)}, but {size(free)} are free. Free "
            f"{size(nbytes - free)}, or use another folder or a smaller size"
        )


# --- the measurement --------------------------------------------------------------------------------------------------


def _measure(
    job: Job, names: Sequence[str], work: Path, packages: dict[str, str], python: str, *, runs: int, cold: bool
) -> dict[str, Any]:
    from fastinterp.bench.check import read_tensors, weight_files
    from fastinterp.bench.provenance import file_system, provenance
    from fastinterp.bench.race import race

    nbytes = sum(f.stat().st_size for f in weight_files(job.models[0]))
    # Twice the output: a program may write temporary files beside it.
    _need(work, 2 * nbytes, "an output and temporary files")
    racers = _racers(job, names, work, packages, python)
    inputs = [f for model in job.inputs for f in weight_files(model)]
    cached = race(racers, inputs, work, runs=runs, cold=cold, say=_say)
    return {
        "inputs": len(job.inputs),
        "model_bytes": nbytes,
        "dtypes": sorted({t.dtype for t in read_tensors(job.models[0]).values()}),
        "cache": "cold" if cold else "warm",
        "cached": cached,  # smallest and largest fraction of the inputs in the page cache before a run, or None
        "runs": runs,
        "racers": {r.name: r.as_dict(racers[0]) for r in racers},
        "provenance": provenance(work) | {"models_file_system": file_system(job.models[0])},
    }


def as_text(values: dict[str, Any]) -> list[str]:
    """The result as a table."""
    from fastinterp.messages import counted, size, table

    where = values["provenance"]
    least = ""
    if values["cached"] is None:
        least = " (not verified: it needs write permission for the files)"
    elif values["cache"] == "warm" and values["cached"][0] <= 0.99:
        least = f" (at least {values['cached'][0]:.0%} of the inputs)"
    rows = [["", "wall s", "min", "max", "cpu s", "memory", "time of fastinterp / this"]]
    for name, r in values["racers"].items():
        ratio = r["ratio"]
        share = f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})" if name != "fastinterp" else ""
        seconds = [f"{v:.3f}" for v in (r["median_wall_s"], min(r["wall_s"]), max(r["wall_s"]), r["median_cpu_s"])]
        rows.append([name, *seconds, size(r["peak_anon_bytes"]), share])
    small = values["model_bytes"] < _SMALL
    return [
        f"{values['recipe']} of {counted(values['inputs'], 'checkpoint')} of {size(values['model_bytes'])}, "
        f"{'+'.join(values['dtypes'])}; {values['cache']} page cache{least}; {counted(values['runs'], 'run')}",
        f"{where['cpu']}, {counted(where['cores'], 'core')}, {size(where['memory_bytes'])} of memory, "
        f"{where['file_system']}, {where['system']}; fastinterp {where['fastinterp']} ({where['isa']})",
        *table(rows, "<>>>>><"),
        *(["with models this small, most of the time is the start of the programs"] if small else []),
    ]
