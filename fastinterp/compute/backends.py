"""Finds what can compute here. Nothing is chosen silently: a name that cannot be used is an error."""

from __future__ import annotations

import os

from fastinterp import _C
from fastinterp.errors import BackendError

ISA_VARIABLE = "FASTINTERP_ISA"
MAX_THREADS = 1024


def cpu_isa() -> str:
    """The instruction set of the CPU backend: the best of this machine, or what FASTINTERP_ISA names, in any case.

    Raises: BackendError, if FASTINTERP_ISA names one that this build or this processor does not have.
    """
    asked = os.environ.get(ISA_VARIABLE, "").lower()
    usable = _C.isas()
    if not asked:
        return usable[0]
    if asked in usable:
        return asked
    why = "this processor cannot run it" if asked in _C.built_isas() else "this build has no such instruction set"
    raise BackendError(f"{ISA_VARIABLE}={asked}, but {why}. Usable here: {', '.join(usable)}")


def cpu_threads(asked: int | None = None) -> int:
    """How many threads to use: `asked`, else one per CPU that this process may run on, at most 32.

    Raises: BackendError, if `asked` is not in 1..1024.
    """
    if asked is None:
        return min(32, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if type(asked) is not int or not 1 <= asked <= MAX_THREADS:
        raise BackendError(f"the number of threads must be a whole number in 1..{MAX_THREADS}, got {asked!r}")
    return asked


def check_device(device: str) -> None:
    """See that `device` can be used: `cpu`, or `auto`, which is the CPU because this version has no other backend.

    Raises: BackendError, if it cannot.
    """
    if device not in ("auto", "cpu"):
        raise BackendError(
            f"device {device!r} cannot be used: this version computes on the CPU. Usable here: auto, cpu"
        )
