"""Merges model checkpoints as fast as the files can be copied, exactly.

help(fastinterp.merge) and so on explain each of these names:

    merge(recipe, out, ...)           carry out a recipe
    interpolate(a, b, ...)            interpolate between two checkpoints, or extrapolate
    average(checkpoints, out, ...)    average the checkpoints of a training run
    sweep(a, b, alphas, ...)          merge at many points of a path: to disk, in memory, or as recipes
    extract_lora(finetune, base, out) a fine-tune as a LoRA adapter of its base
    merge_adapters(recipe, out)       LoRA adapters merged with each other

    check(recipe)                     all errors of a recipe and its models, and warnings
    explain(recipe)                   what a merge would read, compute and write; explain_adapters(recipe)
    compare(a, b)                     measure how two checkpoints differ
    verify(output)                    whether an output has the bytes that its receipt says
    replay(output, out)               make an output again from its receipt

    load(recipe)                      a merged model as tensors, without writing files; load_iter(recipe)
    load_into(module, recipe)         the same into the weights of a torch module
    Live(module, ...)                 move a torch module along a path while it is in use
    path(a, b).evaluate(fn, alphas)   metrics along a path between models
    merge_tensors(tensors, method)    any method on tensors in memory
    merge_state_dicts(dicts, method)  the same, on whole models in memory
    weighted_sum(arrays, weights)     the same arithmetic on arrays in memory

    integrations.torch_ops            weighted sums for autograd, torch.compile and CUDA graphs; running averages
    integrations.transformers, .peft, .sd_mecha, .mergekit    for users of these: docs/INTEGRATIONS.md

Results; print() shows each, and `as_dict()` gives plain values:

    Report                            of merge, interpolate and average: bytes, time, the effect of rounding
    RoundingEffect                    how much of the change rounding to the output's dtype has kept
    Point                             of sweep, one each: its place, recipe, files, report
    Path, PathReport, PathPoint       of path; of its evaluate: metrics at each point, tables, files, figures
    CheckResult, Explanation          of check and explain
    Comparison                        of compare
    Verification, Replay              of verify and replay
    AdapterReport, AdapterExplanation of extract_lora and merge_adapters; of explain_adapters

Types of arguments, which have a text of their own:

    Source                            a recipe: a path, YAML text, a mapping, or a list of mappings
    Checkpoint                        where a model is: a folder, a file, a name on the Hub, with an adapter or without
    Model                             of path and Live: a checkpoint, or a state dict
    ModelPlaces                       of verify and replay: where models are now
    Alpha, Alphas                     a point of a path, and several
    Method                            a merge method, in place of its name: one of your own, say
    Progress                          a function that is told how much is done; True in its place shows a line
    PointCallback                     a function that sweep calls for each point in memory

`Array` in signatures is a numpy array, a torch tensor or another library's array with DLPack; results have the type of
the inputs.

Errors; each is a FastinterpError, with the exit_code that the command line ends with:

    UsageError                        arguments: 2. Its kinds are RecipeError, and of that MethodError; and BackendError
    CheckpointError                   models: 3. Its kind ShapeError, where models do not fit together
    StorageError                      the system cannot read or write: 4. Its kind OutputError

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
