"""Merges model checkpoints as fast as the files can be copied, exactly.

    merge(recipe, out, ...)           carry out a recipe
    interpolate(a, b, ...)            interpolate between two checkpoints, or extrapolate
    average(checkpoints, out, ...)    average the checkpoints of a training run
    extract_lora(finetune, base, out) a fine-tune as a LoRA adapter of its base
    merge_adapters(recipe, out)       LoRA adapters merged with each other; explain_adapters
    sweep(a, b, alphas, ...)          merge at many points of a path: to disk, in memory, or as recipes
    load(recipe)                      a merged model as tensors, without writing files; load_iter, load_into
    Live(module, ...)                 move a torch module along a path while it is in use
    check(recipe)                     all errors of a recipe and its models, and warnings
    explain(recipe)                   describe what a merge would read, compute and write
    compare(a, b)                     measure how two checkpoints differ
    merge_tensors(tensors, method)    any method on tensors in memory
    merge_state_dicts(dicts, method)  the same, on whole models in memory
    verify(output)                    whether an output has the bytes that its receipt says; replay(output, out)
    weighted_sum(arrays, weights)     the same arithmetic on arrays in memory
    path(a, b).evaluate(fn, alphas)   metrics along a path between models
    Report                            what merge, interpolate and average return: bytes, time, the effect of rounding
    Point                             what sweep returns for each point: its place, recipe, path, report
    PathReport                        what path(...).evaluate returns: metrics at each point; tables, files, figures
    Verification, Replay              what verify and replay return
    integrations.torch_ops            weighted sums for autograd, torch.compile and CUDA graphs; running averages
    integrations.transformers, .peft, .sd_mecha    for users of these: docs/INTEGRATIONS.md

All errors are FastinterpErrors, with the exit_code that the command line ends with: UsageError for arguments, its kinds
RecipeError and MethodError for recipes and methods, and BackendError for devices: 2; CheckpointError, and its kind
ShapeError where models do not fit: 3; StorageError where the system cannot read or write, its kind OutputError for
outputs: 4. `progress=True` shows a line on stderr while a function works.
__version__ is the version.

Public names are imported on first use, so that the command line, which needs few of them, starts fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastinterp._version import __version__

if TYPE_CHECKING:
    from fastinterp.api import average, explain, explain_adapters, interpolate, merge, merge_adapters
    from fastinterp.arguments import Checkpoint
    from fastinterp.errors import (
        BackendError,
        CheckpointError,
        FastinterpError,
        MethodError,
        OutputError,
        RecipeError,
        ShapeError,
        StorageError,
        UsageError,
    )
    from fastinterp.execute.report import Report, RoundingEffect
    from fastinterp.in_memory.merge import merge_state_dicts, merge_tensors
    from fastinterp.in_memory.weighted_sum import weighted_sum
    from fastinterp.inspect.check import check
    from fastinterp.inspect.check_result import CheckResult
    from fastinterp.inspect.compare import Comparison, compare
    from fastinterp.inspect.explain import Explanation
    from fastinterp.lora.explain import AdapterExplanation
    from fastinterp.lora.extract import extract_lora
    from fastinterp.lora.report import AdapterReport
    from fastinterp.methods import Method
    from fastinterp.paths.path import Alpha, Alphas, Path, path
    from fastinterp.paths.points import Point
    from fastinterp.paths.report import PathPoint, PathReport
    from fastinterp.paths.sweep import PointCallback, sweep
    from fastinterp.progress import Progress
    from fastinterp.recipe.document import Source
    from fastinterp.torch_models.endpoints import Model
    from fastinterp.torch_models.live import Live
    from fastinterp.torch_models.load import load, load_into, load_iter
    from fastinterp.verification.models import ModelPlaces
    from fastinterp.verification.replay import Replay, replay
    from fastinterp.verification.verify import Verification, verify

__all__ = [
    "AdapterExplanation",
    "AdapterReport",
    "Alpha",
    "Alphas",
    "BackendError",
    "CheckResult",
    "Checkpoint",
    "CheckpointError",
    "Comparison",
    "Explanation",
    "FastinterpError",
    "Live",
    "Method",
    "MethodError",
    "Model",
    "ModelPlaces",
    "OutputError",
    "Path",
    "PathPoint",
    "PathReport",
    "Point",
    "PointCallback",
    "Progress",
    "RecipeError",
    "Replay",
    "Report",
    "RoundingEffect",
    "ShapeError",
    "Source",
    "StorageError",
    "UsageError",
    "Verification",
    "__version__",
    "average",
    "check",
    "compare",
    "explain",
    "explain_adapters",
    "extract_lora",
    "interpolate",
    "load",
    "load_into",
    "load_iter",
    "merge",
    "merge_adapters",
    "merge_state_dicts",
    "merge_tensors",
    "path",
    "replay",
    "sweep",
    "verify",
    "weighted_sum",
]

# The module of each name; those that are missing here are in fastinterp.errors.
_MODULES = {
    "AdapterExplanation": "fastinterp.lora.explain",
    "AdapterReport": "fastinterp.lora.report",
    "Alpha": "fastinterp.paths.path",
    "Alphas": "fastinterp.paths.path",
    "CheckResult": "fastinterp.inspect.check_result",
    "Checkpoint": "fastinterp.arguments",
    "Comparison": "fastinterp.inspect.compare",
    "Explanation": "fastinterp.inspect.explain",
    "Live": "fastinterp.torch_models.live",
    "Method": "fastinterp.methods",
    "Model": "fastinterp.torch_models.endpoints",
    "ModelPlaces": "fastinterp.verification.models",
    "Path": "fastinterp.paths.path",
    "PathPoint": "fastinterp.paths.report",
    "PathReport": "fastinterp.paths.report",
    "Point": "fastinterp.paths.points",
    "PointCallback": "fastinterp.paths.sweep",
    "Progress": "fastinterp.progress",
    "Replay": "fastinterp.verification.replay",
    "Report": "fastinterp.execute.report",
    "RoundingEffect": "fastinterp.execute.report",
    "Source": "fastinterp.recipe.document",
    "Verification": "fastinterp.verification.verify",
    "average": "fastinterp.api",
    "check": "fastinterp.inspect.check",
    "compare": "fastinterp.inspect.compare",
    "explain": "fastinterp.api",
    "explain_adapters": "fastinterp.api",
    "extract_lora": "fastinterp.lora.extract",
    "interpolate": "fastinterp.api",
    "load": "fastinterp.torch_models.load",
    "load_into": "fastinterp.torch_models.load",
    "load_iter": "fastinterp.torch_models.load",
    "merge": "fastinterp.api",
    "merge_adapters": "fastinterp.api",
    "merge_state_dicts": "fastinterp.in_memory.merge",
    "merge_tensors": "fastinterp.in_memory.merge",
    "path": "fastinterp.paths.path",
    "replay": "fastinterp.verification.replay",
    "sweep": "fastinterp.paths.sweep",
    "verify": "fastinterp.verification.verify",
    "weighted_sum": "fastinterp.in_memory.weighted_sum",
}


def __getattr__(name: str) -> object:
    if name == "_C":
        return _native()
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: Any = getattr(import_module(_MODULES.get(name, "fastinterp.errors")), name)
    if hasattr(value, "__metadata__"):  # a type alias, Annotated[type, text]: the text is what help() shows
        value.__doc__, value.__name__ = value.__metadata__[0], name
    globals()[name] = value  # the next use finds it without this function
    return value


def _native() -> object:
    """The extension module. Raises: ImportError with the remedy, if it is not built."""
    from importlib import import_module

    try:
        return import_module("fastinterp._C")
    except ModuleNotFoundError as error:
        if error.name != "fastinterp._C":
            raise
        raise ImportError(
            f"{__path__[0]} is fastinterp's source, without its compiled part. Python found it before the installed "
            "package: start it in another folder, or build in place: pip install -e ."
        ) from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
