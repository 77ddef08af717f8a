"""The backends and instruction sets that can be used here. One that is named but cannot be used is an error."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from fastinterp import _C
from fastinterp.errors import BackendError

if TYPE_CHECKING:
    from fastinterp.backends.device import Device

ISA_VARIABLE = "FASTINTERP_ISA"
GPU_VARIABLE = "FASTINTERP_GPU"
MAX_THREADS = 1024


@dataclass(frozen=True, slots=True)
class _Row:
    """One backend for accelerators.

    module  in backends/; it has `missing`, `device_count` and `device`, as device.py describes them
    needs   modules that it imports, and the remedy if one is not installed; empty: fastinterp is to be built again
    kinds   the values of `--device` that it serves
    """

    module: str
    needs: dict[str, str]
    kinds: tuple[str, ...]


# The backends for accelerators, the preferred one first.
_EXTRA = "pip install 'fastinterp[gpu]'"
_BACKENDS = {
    "cuda": _Row("cuda", {"fastinterp._cuda": ""}, ("cuda",)),
    "triton": _Row("triton.device", {"torch": _EXTRA, "triton": _EXTRA}, ("cuda", "triton")),
}
_NVCC = "/usr/local/cuda/bin/nvcc"  # where it is, if PATH does not have it
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # of NVIDIA, under Windows, of AMD


def cpu_isa() -> str:
    """The instruction set of the CPU backend: the best of this machine, or what FASTINTERP_ISA names, in any case.

    Raises: BackendError, if FASTINTERP_ISA names one that this build or this processor does not have.
    """
    name = os.environ.get(ISA_VARIABLE, "").lower()
    usable = _C.isas()
    if not name:
        return usable[0]
    if name in usable:
        return name
    why = "this processor cannot run it" if name in _C.built_isas() else "this build has no such instruction set"
    raise BackendError(f"{ISA_VARIABLE}={name}, but {why}. Usable here: {', '.join(usable)}")


def cpu_threads(threads: int | None = None) -> int:
    """The number of threads: `threads`, else one per CPU that this process may run on, at most 32.

    Raises: BackendError, if `threads` is not in 1..1024.
    """
    if threads is None:
        return min(32, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if type(threads) is not int or not 1 <= threads <= MAX_THREADS:
        raise BackendError(f"the number of threads must be a whole number in 1..{MAX_THREADS}, got {threads!r}")
    return threads


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """The value of `--device`, parsed.

    kind      cpu, auto, or one that a backend for accelerators serves
    ordinals  numbers of the devices, in the order given; empty: the first
    """

    kind: str
    ordinals: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}:{','.join(map(str, self.ordinals))}" if self.ordinals else self.kind


def _kinds() -> list[str]:
    """The values of `--device` that stand for accelerators."""
    return list(dict.fromkeys(kind for row in _BACKENDS.values() for kind in row.kinds))


def device_spec(device: object) -> DeviceSpec:
    """Parse `device`: "cpu", "auto", "cuda", "cuda:1", "cuda:0,1", and "triton" as "cuda".

    Raises: BackendError, if it is none of these.
    """
    spec = rf"(cpu|auto)|({'|'.join(_kinds())})(?::(\d{{1,4}}(?:,\d{{1,4}})*))?"
    match = re.fullmatch(spec, device) if isinstance(device, str) else None
    if match is None:
        known = ", ".join(["auto", "cpu", *_kinds()])
        raise BackendError(f"device {device!r} cannot be used. Known: {known}, cuda:0 or cuda:0,1 for several")
    ordinals = tuple(int(digits) for digits in (match[3] or "").split(",") if digits)
    if len(set(ordinals)) < len(ordinals):
        raise BackendError(f"device {device!r} repeats a device")
    return DeviceSpec(match[1] or match[2], ordinals)


def find_devices(spec: DeviceSpec, local: int = 0) -> list[Device]:
    """The accelerators of a specification, ready for use; none for cpu and auto.

    `cuda` is the extension fastinterp._cuda if it was built and its kernels run on the device, else Triton;
    FASTINTERP_GPU names one of them. Without ordinals it is device number `local`, modulo the number of devices.
    Raises: BackendError with what is missing, if they cannot be used.
    """
    if spec.kind in ("cpu", "auto"):
        return []
    why = []
    for name in _serving(spec.kind):
        backend = _backend(name)
        if backend.missing is not None:
            why.append(f"{name}: {backend.missing}")
            continue
        missing = [i for i in spec.ordinals if i >= backend.count]
        if missing:
            there = ", ".join(f"{spec.kind}:{i}" for i in range(backend.count))
            raise BackendError(f"device {str(spec)!r}: there is no device {missing[0]}. There are {there}")
        try:
            return [backend.open(i) for i in spec.ordinals or (local % backend.count,)]
        except BackendError as error:  # as if it were missing: the next backend may have code for this device
            why.append(f"{name}: {error}")
    raise BackendError(f"device {str(spec)!r} cannot be used: {'; '.join(why)}. Usable here: auto, cpu")


def maybe_devices() -> bool:
    """Whether there may be usable accelerators: a driver, and torch or fastinterp._cuda. Does not import torch."""
    return maybe_driver() and ("torch" in sys.modules or built("fastinterp._cuda"))


def maybe_driver() -> bool:
    """Whether there is a device file of an accelerator's driver."""
    return any(os.path.exists(path) for path in _DRIVERS)


def gpu_backends() -> dict[str, str | None]:
    """For every backend for accelerators the reason why it cannot be used here, or None if its first device can."""
    return {name: _unusable(_backend(name)) for name in _BACKENDS}


def _unusable(backend: _Backend) -> str | None:
    if backend.missing is None:
        try:
            backend.open(0)
        except BackendError as error:
            return str(error)
    return backend.missing


def _serving(kind: str) -> list[str]:
    """The backends of a kind, the preferred one first; of `cuda` the one that FASTINTERP_GPU names, if it does."""
    names = [name for name, row in _BACKENDS.items() if kind in row.kinds]
    chosen = os.environ.get(GPU_VARIABLE, "").lower()
    if kind != "cuda" or not chosen:
        return names
    if chosen not in names:
        raise BackendError(f"{GPU_VARIABLE}={chosen} is no backend. Known: {', '.join(names)}")
    return [chosen]


def nvcc() -> str | None:
    """The path of CUDA's compiler, on PATH or where the toolkit is installed; None: it is not found."""
    import shutil

    return shutil.which("nvcc") or (_NVCC if os.access(_NVCC, os.X_OK) else None)


def how_to_build() -> str:
    """Why fastinterp has no CUDA kernels, and the command that builds them."""
    import shlex
    import shutil

    path = nvcc()
    compiler = "" if path is None or shutil.which("nvcc") else f"CUDACXX={shlex.quote(path)} "  # CMake looks on PATH
    command = f"In the folder of its source: {compiler}FASTINTERP_CUDA=1 pip install ."
    if path is None:
        return f"fastinterp was built without nvcc. Install the CUDA toolkit, then build again. {command}"
    return f"fastinterp was built with FASTINTERP_CUDA=0, or before nvcc ({path}) was there. {command}"


def built(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    from importlib.util import find_spec

    return find_spec(module) is not None


@dataclass(frozen=True, slots=True)
class _Backend:
    """missing: why it cannot be used, or None; count, open: its devices."""

    missing: str | None
    count: int
    open: Callable[[int], Device]


def _backend(name: str) -> _Backend:
    row = _BACKENDS[name]
    for module, remedy in row.needs.items():
        if not built(module):
            return _Backend(f"{module} is missing: {remedy or how_to_build()}", 0, _none)
    backend = import_module(f"fastinterp.backends.{row.module}")
    missing = backend.missing()
    return _Backend(missing, 0, _none) if missing else _Backend(None, backend.device_count(), backend.device)


def _none(ordinal: int) -> Device:
    raise BackendError(f"there is no device {ordinal}")
