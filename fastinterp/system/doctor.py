"""`doctor`: versions, hardware, settings and bandwidth of this machine."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

import numpy as np

from fastinterp import _C
from fastinterp._version import __version__
from fastinterp.backends.registry import GPU_VARIABLE, ISA_VARIABLE, cpu_isa, cpu_threads, gpu_backends, nvcc
from fastinterp.errors import FastinterpError
from fastinterp.in_memory.weighted_sum import weighted_sum

_PACKAGES = ("numpy", "torch", "triton", "safetensors", "huggingface_hub")
_PREFIX = "FASTINTERP_"
_READ = (
    ISA_VARIABLE,
    GPU_VARIABLE,
    "FASTINTERP_CUDA",
    "FASTINTERP_CUDA_ARCHITECTURES",
    "FASTINTERP_WERROR",
    "FASTINTERP_REQUIRE",
    "FASTINTERP_LONG",
)  # builds, tests
_PROBE_S = 0.6  # seconds of each of the three measurements
_ARRAY = 64 << 20  # bytes: much larger than the caches
_FILE = 512 << 20  # bytes: the most that are written
_WRITE = 128 << 10  # bytes of one write, as in a merge


def examine() -> dict[str, Any]:
    """Plain values, bandwidths in 10^9 bytes per second. Takes about two seconds."""
    return {
        "fastinterp": __version__,
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "isa": _isa(),
        "threads": cpu_threads(),
        "gpus": _gpus(),
        "backends": {"cpu": None, **gpu_backends()},
        "nvcc": _nvcc(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_PREFIX)},
        "bandwidth": {"memory": _memory(), "files": _file_writes()},
    }


def as_text(values: dict[str, Any]) -> str:
    """The same as text."""
    isa, memory, files = values["isa"], values["bandwidth"]["memory"], values["bandwidth"]["files"]
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in values["packages"].items())
    backends = ", ".join(n if why is None else f"{n} (not usable: {why})" for n, why in values["backends"].items())
    force = isa["in_force"] or isa["problem"]
    unknown = " (unknown: it has no effect)"
    settings = ", ".join(f"{k}={v}{'' if k in _READ else unknown}" for k, v in values["environment"].items())
    rows = [
        ("fastinterp", values["fastinterp"]),
        ("python", values["python"]),
        ("os", values["os"]),
        ("cpu", values["cpu"]),
        ("isa", f"{force} (usable: {', '.join(isa['usable'])}; built: {', '.join(isa['built'])})"),
        ("threads", str(values["threads"])),
        ("gpus", "; ".join(values["gpus"]) or "none found"),
        ("backends", backends),
        ("nvcc", values["nvcc"] or "none found"),
        ("packages", packages),
        ("settings", settings or f"no {_PREFIX} variables are set"),
    ]
    if memory["problem"]:
        rows.append(("memory", "not measured, see isa" if isa["problem"] else memory["problem"]))
    else:
        share = memory["combine_gb_per_s"] / memory["copy_gb_per_s"]
        rows.append(
            (
                "memory",
                f"{memory['combine_gb_per_s']:.1f} GB/s read and written for the mean of two float32 arrays; a copy: "
                f"{memory['copy_gb_per_s']:.1f} GB/s ({share:.0%})",
            )
        )
    rows.append(
        (
            "files",
            files["problem"] or f"{files['write_gb_per_s']:.1f} GB/s written to the page cache, in {files['folder']}",
        )
    )
    return "\n".join(f"{name:10}  {value}" for name, value in rows)


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            for line in stream:
                if line.startswith(("model name", "Hardware", "cpu model")):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _isa() -> dict[str, Any]:
    try:
        in_force, problem = cpu_isa(), None
    except FastinterpError as error:
        in_force, problem = None, str(error)
    return {"built": _C.built_isas(), "usable": _C.isas(), "in_force": in_force, "problem": problem}


def _gpus() -> list[str]:
    """`NAME, MEMORY, driver VERSION` of each GPU, from nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    rows = [line.rsplit(", ", 1) for line in _output(command).splitlines() if line.count(", ") >= 2]
    return [f"{gpu}, driver {driver}" for gpu, driver in rows]


def _nvcc() -> str | None:
    path = nvcc()
    if path is None:
        return None
    release = re.search(r"release \S+ V?(\S+)|release ([\d.]+)", _output([path, "--version"]))
    return f"{release[1] or release[2]} ({path})" if release else None


def _output(command: list[str]) -> str:
    """The standard output of a program; empty if it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _memory() -> dict[str, Any]:
    """Bandwidth of a weighted sum of arrays in memory, and for comparison of a copy with as many threads."""
    a, b, out = (np.full(_ARRAY // 4, v, np.float32) for v in (1.0, 2.0, 0.0))
    try:
        combine = _gb_per_s(3 * _ARRAY, lambda: weighted_sum([a, b], [0.5, 0.5], out=out))
    except FastinterpError as error:
        return {"combine_gb_per_s": None, "copy_gb_per_s": None, "threads": cpu_threads(), "problem": str(error)}

    threads = cpu_threads()
    parts = list(zip(np.array_split(out, threads), np.array_split(a, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        copy = _gb_per_s(2 * _ARRAY, lambda: list(pool.map(lambda part: np.copyto(*part), parts)))
    return {"combine_gb_per_s": combine, "copy_gb_per_s": copy, "threads": threads, "problem": None}


def _gb_per_s(nbytes: int, work: Callable[[], object]) -> float:
    """Bandwidth of the fastest of several runs."""
    best, end = float("inf"), time.perf_counter() + _PROBE_S
    work()  # the first one also touches the memory
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return nbytes / best / 1e9


def _file_writes() -> dict[str, Any]:
    """Bandwidth of buffered writes by one thread to a temporary file, which is removed."""
    folder = tempfile.gettempdir()
    block, done = bytes(range(256)) * (_WRITE // 256), 0
    try:
        with tempfile.TemporaryFile(buffering=0) as stream:
            start = time.perf_counter()
            while done < _FILE and time.perf_counter() - start < _PROBE_S:
                done += stream.write(block)
            wall = time.perf_counter() - start
    except OSError as error:
        return {"write_gb_per_s": None, "folder": folder, "problem": f"{folder} cannot be written: {error.strerror}"}
    return {"write_gb_per_s": done / wall / 1e9, "folder": folder, "problem": None}
