"""Merges model checkpoints as fast as the files can be copied, exactly.

    merge(recipe, out, ...)           carry out a recipe
    interpolate(a, b, ...)            walk the line between two checkpoints, and beyond
    check(recipe)                     all that is wrong with a recipe and its models, and what looks odd
    explain(recipe)                   say what a merge would read, compute and write
    compare(a, b)                     measure how two checkpoints differ
    merge_tensors(tensors, method)    any method on tensors in memory
    merge_state_dicts(dicts, method)  the same, on whole models in memory
    weighted_sum(arrays, weights)     the same arithmetic on arrays in memory

The public names are imported when first used: the command line, which needs few of them, starts faster for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastinterp._version import __version__

if TYPE_CHECKING:
    from fastinterp.compute.arrays import weighted_sum
    from fastinterp.engine.check import check
    from fastinterp.engine.compare import compare
    from fastinterp.engine.memory import merge_state_dicts, merge_tensors
    from fastinterp.engine.report import Report
    from fastinterp.engine.run import explain, interpolate, merge
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

__all__ = [
    "BackendError",
    "CheckpointError",
    "FastinterpError",
    "MethodError",
    "OutputError",
    "RecipeError",
    "Report",
    "ShapeError",
    "StorageError",
    "UsageError",
    "__version__",
    "check",
    "compare",
    "explain",
    "interpolate",
    "merge",
    "merge_state_dicts",
    "merge_tensors",
    "weighted_sum",
]

# Where each name lives, beside the errors.
_HOMES = {
    "check": "fastinterp.engine.check",
    "compare": "fastinterp.engine.compare",
    "Report": "fastinterp.engine.report",
    "explain": "fastinterp.engine.run",
    "interpolate": "fastinterp.engine.run",
    "merge": "fastinterp.engine.run",
    "merge_state_dicts": "fastinterp.engine.memory",
    "merge_tensors": "fastinterp.engine.memory",
    "weighted_sum": "fastinterp.compute.arrays",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(_HOMES.get(name, "fastinterp.errors")), name)
    globals()[name] = value  # the next use does not come here again
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
