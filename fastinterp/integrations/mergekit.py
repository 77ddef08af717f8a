"""The engine behind mergekit's own Python interface.

    from fastinterp.integrations import mergekit

    mergekit.run_merge(config, "merged/", options=MergeOptions())   # in place of mergekit.merge.run_merge
    mergekit.install()          # or: behind everything that calls mergekit, until mergekit.uninstall()

    python -m fastinterp.integrations.mergekit mergekit-multi merges.yml --out-path merged/ -I parts/

`install` replaces `run_merge` in every module that has it, those that were imported by name among them, and what the
built-in methods of mergekit's registry compute (mergekit_methods.py), so that `merge_tensors`, `merge_state_dicts`,
mergekit-pytorch and what is built on them use the same kernels. It works in this process, and in workers of Ray where
that is started later (mergekit_workers.py); other processes with a fresh interpreter (multiprocessing with spawn) call
it themselves.

What cannot be expressed here runs as mergekit runs it, and the reason is logged as a warning of the logger
`fastinterp.integrations.mergekit`; options that are not needed are logged as information.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from importlib.metadata import entry_points
from typing import Any

try:
    import mergekit.merge
except ModuleNotFoundError as error:
    if error.name != "mergekit":
        raise
    _needed = (
        "fastinterp.integrations.mergekit needs mergekit, which is not installed here: `pip install mergekit==0.1.5`. "
        "The command `fastinterp-mergekit config.yml merged/` merges as mergekit-yaml does, and needs none"
    )
    if __name__ == "__main__":
        raise SystemExit(f"error: {_needed}") from None
    raise ModuleNotFoundError(_needed, name=error.name) from None
import tqdm
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from pydantic import BaseModel

from fastinterp.backends.cpu import Progress
from fastinterp.backends.registry import device_spec, find_devices
from fastinterp.errors import BackendError, CheckpointError, UsageError
from fastinterp.integrations import mergekit_methods, mergekit_workers
from fastinterp.integrations.mergekit_options import OPTIONS, Settings, run, settings_of
from fastinterp.recipe.load import load_recipes

LOG = logging.getLogger(__name__)

_theirs: Callable[..., None] = mergekit.merge.run_merge  # imported before anything is installed


def run_merge(
    merge_config: MergeConfiguration,
    out_path: str,
    options: MergeOptions | None = None,
    config_source: str | None = None,
) -> None:
    """Merge as `mergekit.merge.run_merge` does, with its arguments.

    config_source  the text of the configuration, for the copy beside the weights; None: made from it

    What cannot be expressed here is merged by mergekit, and the reason logged.
    Raises: OutputError, if the output contains an input or cannot be written; StorageError; and what mergekit raises.
    """
    options = options or MergeOptions()
    try:
        settings = settings_of({o.name: getattr(options, o.name) for o in OPTIONS})
        (recipe,) = load_recipes(recipe_of(merge_config))
        recipe = replace(recipe, text=config_source or recipe.text)
        with _progress(quiet=options.quiet) as progress:
            report = run([recipe], recipe.text, out_path, _with_usable_device(settings), progress)
    except (UsageError, CheckpointError) as error:
        LOG.warning("merged by mergekit, not by fastinterp: %s", error)
        _theirs(merge_config, out_path, options=options, config_source=config_source)
        return
    for note in settings.notes:
        LOG.info(note)
    for warning in report.warnings:
        LOG.warning(warning)
    LOG.info(report.summary())


def recipe_of(config: BaseModel) -> dict[str, Any]:
    """A configuration of mergekit as the mapping that a recipe is. Values that are None are left out."""
    values = {name: getattr(config, name) for name in type(config).model_fields}
    return {name: _plain(value) for name, value in values.items() if value is not None}


def install() -> None:
    """Put the engine behind mergekit, in this process and in Ray's workers. Twice is as good as once."""
    _replace_everywhere(_theirs, run_merge)
    mergekit_methods.install()
    mergekit_workers.install()


def uninstall() -> None:
    """Give mergekit back what `install` replaced."""
    _replace_everywhere(run_merge, _theirs)
    mergekit_methods.uninstall()
    mergekit_workers.uninstall()


def installed() -> bool:
    """Whether mergekit's `run_merge` is this module's."""
    return mergekit.merge.run_merge is run_merge


def _replace_everywhere(old: object, new: object) -> None:
    """Replace an object in every module that has it under some name, but in this one."""
    for name, module in list(sys.modules.items()):
        if name == __name__ or not hasattr(module, "__dict__"):
            continue
        for key, value in list(vars(module).items()):
            if value is old:
                setattr(module, key, new)


def _plain(value: object) -> object:
    if isinstance(value, ModelReference):
        return _plain_reference(value)
    if isinstance(value, BaseModel):
        return recipe_of(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return value.value if isinstance(value, Enum) else value


def _plain_reference(model: ModelReference) -> object:
    """Its path, or the long form where that says more, or the path would be read as something else."""
    if model.lora is None and model.override_architecture is None and not {"@", "+"} & set(model.model.path):
        return str(model)
    return recipe_of(model)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Progress | None]:
    """Context manager: a progress bar of bytes, as mergekit has one of tasks."""
    if quiet:
        yield None
        return
    with tqdm.tqdm(desc="Merging", unit="B", unit_scale=True) as bar:

        def shown(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield shown


def _with_usable_device(settings: Settings) -> Settings:
    """The settings; with the CPU, if the device that they name cannot be used, which is logged."""
    try:
        find_devices(device_spec(settings.device))
    except BackendError as error:
        LOG.warning("computed on the CPU, with the same result: %s", error)
        return settings._replace(device="cpu")
    return settings


def main(arguments: Sequence[str]) -> None:
    """Run one of mergekit's commands with the engine installed: `mergekit-multi`, say, and its arguments."""
    scripts = {e.name: e for e in entry_points(group="console_scripts") if e.name.startswith("mergekit")}
    if not arguments or arguments[0] not in scripts:
        known = ", ".join(sorted(scripts))
        raise SystemExit(f"usage: python -m {__name__} COMMAND ...: one of {known}")
    install()
    command = scripts[arguments[0]].load()
    sys.argv = [*arguments]
    sys.exit(command())


if __name__ == "__main__":
    main(sys.argv[1:])
