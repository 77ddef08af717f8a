"""fastinterp._cuda for the host: the sources of csrc/cuda, compiled by a C++ compiler, on a CUDA runtime that is ours.

Kernels run as they are, thread by thread. `fake` controls the runtime: see runtime.cpp.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[3]
CSRC, HERE = ROOT / "csrc", Path(__file__).resolve().parent
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")  # those are of unrolled loops


def _compiler() -> list[str]:
    return os.environ.get("CXX", "g++").split()


def missing() -> str:
    """Why the emulation cannot be built here; empty if it can."""
    return "" if shutil.which(_compiler()[0]) else f"no C++ compiler: {_compiler()[0]}"


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _object(source: Path, folder: Path) -> Path:
    """Compile one source, unless that was done before with the same contents of everything it may include."""
    import pybind11

    includes = [f"-I{HERE / 'include'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    compiler, flags = _compiler(), [*FLAGS, *WARNINGS, *includes]
    headers = sorted([*CSRC.rglob("*.h"), *(HERE / "include").glob("*.h")])
    key = hashlib.sha256(repr((compiler, flags)).encode())
    for path in (source, *headers):
        key.update(path.read_bytes())
    target = folder / f"{source.stem}-{key.hexdigest()[:16]}.o"
    if not target.exists():
        made = target.with_suffix(f".{os.getpid()}.o")
        _compile([*compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(made)])
        made.replace(target)
    return target


@cache
def library() -> Path:
    """The extension's file, built if its sources have changed: in build/cuda_host."""
    folder = ROOT / "build" / "cuda_host"
    folder.mkdir(parents=True, exist_ok=True)
    cuda = [path for path in (CSRC / "cuda").rglob("*.c*") if path.suffix in (".cpp", ".cu")]
    sources = sorted([CSRC / "binding" / "parse.cpp", *cuda, *HERE.glob("*.cpp")])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _object(source, folder), sources))
    key = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:16]
    target = folder / f"_cuda-{key}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.exists():
        made = target.with_suffix(f".{os.getpid()}")
        _compile([*_compiler(), "-shared", "-pthread", "-o", str(made), *map(str, objects)])
        made.replace(target)
    return target


@cache
def module() -> ModuleType:
    """The extension, loaded. It is put in no place of the package: a test does that, as it needs it."""
    name = f"{__name__}._cuda"
    loader = importlib.machinery.ExtensionFileLoader(name, str(library()))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded


class Fake:
    """The controls of the runtime: modes, how many devices and how much memory, calls that fail, and what it saw."""

    EAGER, DEFERRED, THREADS = 0, 1, 2
    MEMORY_ALLOCATION, INSUFFICIENT_DRIVER, NO_DEVICE, LAUNCH_FAILURE = 2, 35, 100, 719

    def __init__(self) -> None:
        self._lib = ctypes.CDLL(str(library()))
        self._lib.fake_reset.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
        self._lib.fake_fail.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int]
        self._lib.fake_capture.argtypes = [ctypes.c_void_p, ctypes.c_int]
        self._lib.fake_wrong.restype = ctypes.c_char_p
        for name in ("fake_calls", "fake_used", "fake_host_blocks", "fake_kept"):
            getattr(self._lib, name).restype = ctypes.c_int64

    def reset(self, mode: int = EAGER, devices: int = 1, limit_bytes: int = 1 << 32, delay_us: int = 0) -> None:
        """Begin anew. `limit_bytes` is the memory of each device; `delay_us` passes before each thing a queue does."""
        self._lib.fake_reset(mode, devices, limit_bytes, delay_us)

    def fail(self, call: str, error: int, n: int = 1) -> None:
        """The n-th next call of a function of the runtime fails; "launch" is one."""
        self._lib.fake_fail(call.encode(), n, error)

    def calls(self, call: str) -> int:
        """How often a function was called since the reset; "launch" is one."""
        return int(self._lib.fake_calls(call.encode()))

    def used(self, device: int = 0) -> int:
        """Bytes of the device's memory in use."""
        return int(self._lib.fake_used(device))

    def has_context(self, device: int) -> bool:
        """Whether anything has made a context on the device since the reset."""
        return bool(self._lib.fake_has_context(device))

    def kept(self, device: int = 0, nbytes: int = -1) -> int:
        """Bytes of freed memory that the device's pool does not give back to the system. nbytes: let it be so many."""
        return int(self._lib.fake_kept(device, ctypes.c_int64(nbytes)))

    def host_blocks(self) -> int:
        """Blocks of pinned host memory in use."""
        return int(self._lib.fake_host_blocks())

    def capture(self, handle: int, on: bool) -> None:
        """Let a stream say that it is captured for a CUDA graph."""
        self._lib.fake_capture(handle, int(on))

    def sum(self, kind: int, threads: int, blocks: int) -> list[int]:
        """Launch a kernel of faults.cpp. Returns the sums of the blocks."""
        sums = (ctypes.c_int64 * blocks)()
        self._lib.fake_sum(kind, threads, sums, blocks)
        return list(sums)

    def wrong(self) -> str:
        """What kernels did wrong since the reset: barriers that not all reach, bytes written beside memory."""
        return (self._lib.fake_wrong() or b"").decode()


@cache
def fake() -> Fake:
    return Fake()
