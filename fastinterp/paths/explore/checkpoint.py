"""A setting of the sliders as a recipe, as a command, and as a checkpoint that the engine writes."""

from __future__ import annotations

import re
import shlex
import threading
from collections.abc import Mapping
from typing import Any

from fastinterp.checkpoint.names import names_file
from fastinterp.errors import OutputError, UsageError
from fastinterp.execute.report import Report
from fastinterp.execute.to_files import write_outputs
from fastinterp.paths.explore.sliders import Sliders
from fastinterp.paths.points import point_mapping
from fastinterp.plan.plan import make_plan
from fastinterp.recipe.load import load_recipe

_MEMORY = 512_000_000  # bytes of scratch memory
_OUT = "merged"  # of the command, for the user to change


def recipe_of(sliders: Sliders, alphas: Mapping[str, float]) -> dict[str, Any]:
    """The recipe of a setting: of one direction without a base of its own the line, else task vectors."""
    if len(sliders.models) == 1:
        ((name, model),) = sliders.models.items()
        return point_mapping(sliders.base, model, alphas[name], None)
    models = [{"model": m, "parameters": {"weight": alphas[name]}} for name, m in sliders.models.items()]
    return {"merge_method": "task_arithmetic", "base_model": sliders.base, "models": models}


def recipe_text(sliders: Sliders, alphas: Mapping[str, float]) -> str:
    """The same as YAML."""
    import yaml

    text: str = yaml.safe_dump(recipe_of(sliders, alphas), sort_keys=False, allow_unicode=True)
    return text


def command_of(sliders: Sliders, alphas: Mapping[str, float]) -> str:
    """The shell command that writes a setting into the folder `merged`, to be run where the page was started."""
    if len(sliders.models) == 1:
        ((name, model),) = sliders.models.items()
        ends = shlex.join([sliders.base, model])
        return f"fastinterp interpolate {ends} --alpha {alphas[name]:.10g} -o {_OUT}"
    return f"fastinterp merge - {_OUT} <<'END'\n{recipe_text(sliders, alphas)}END"


def _without_options(message: str) -> str:
    """A message about an output, for the page: it never replaces anything, and has no options."""
    message = message.replace(", and --force does not remove them", "")
    return re.sub(r"(?:To throw it away, a|A)dd --force \(in Python force=True\)[^.;]*", "Name a new folder", message)


class CheckpointWriter:
    """Writes settings as checkpoints, one at a time, from any thread. A context manager: at its end none is written.

    fraction  of the one that is being written, 0..1; None if none is
    """

    def __init__(self, sliders: Sliders, *, threads: int | None = None):
        self.fraction: float | None = None
        self._sliders, self._threads = sliders, threads
        self._one_at_a_time = threading.Lock()
        self._ended = False

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        with self._one_at_a_time:
            pass

    def end(self) -> None:
        """Stop the writing: nothing of the unfinished checkpoint is left."""
        self._ended = True

    def write(self, alphas: Mapping[str, float], folder: str) -> Report:
        """Write a setting into a new folder. Raises: UsageError, if another is being written; what `merge` does."""
        if not self._one_at_a_time.acquire(blocking=False):
            raise UsageError("another checkpoint is being written: wait for it")
        try:
            self.fraction = 0.0
            plan = make_plan([load_recipe(recipe_of(self._sliders, alphas))], one_file=names_file(folder))
            (report,) = write_outputs(
                [plan], [[folder]], device="auto", threads=self._threads, max_memory=_MEMORY, force=False,
                durable=False, progress=self._progress,
            )  # fmt: skip
            return report
        except OutputError as error:
            raise OutputError(_without_options(str(error))) from error
        finally:
            self.fraction = None
            self._one_at_a_time.release()

    def _progress(self, done: int, total: int) -> None:
        if self._ended:
            raise UsageError("the program was ended before the checkpoint was complete")
        self.fraction = done / max(1, total)
