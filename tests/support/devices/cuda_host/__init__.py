"""fastinterp._cuda for the host: the sources of csrc/cuda, compiled by a C++ compiler, on a CUDA runtime that is ours.

Kernels run as they are, thread by thread. `fake` controls the runtime: see runtime.cpp.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import shutil
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

from tests.support import build_cache

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[3] / "csrc"
FOLDER = build_cache.BUILD / "cuda_host"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")  # those are of unrolled loops


def _compiler() -> list[str]:
    return os.environ.get("CXX", "g++").split()


def missing() -> str:
    """Why the emulation cannot be built here; empty if it can."""
    return "" if shutil.which(_compiler()[0]) else f"no C++ compiler: {_compiler()[0]}"


def _object(source: Path) -> Path:
    """The object file of one source."""
    import pybind11

    includes = [f"-I{HERE / 'include'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags = [*FLAGS, *WARNINGS, *includes]
    headers = sorted([*CSRC.rglob("*.h"), *(HERE / "include").glob("*.h")])
    key = build_cache.key(_compiler(), [*flags, pybind11.__version__], [source, *headers])
    command = [*_compiler(), *flags, "-x", "c++", "-c", str(source), "-o"]
    return build_cache.made(FOLDER / f"{source.stem}-{key}.o", lambda path: build_cache.run([*command, str(path)]))


@cache
def library() -> Path:
    """The extension's file, in build/cuda_host."""
    cuda = [path for path in (CSRC / "cuda").rglob("*.c*") if path.suffix in (".cpp", ".cu")]
    sources = sorted([CSRC / "binding" / "parse.cpp", *cuda, *HERE.glob("*.cpp")])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(_object, sources)]
    flags = ["-shared", "-pthread", *objects]
    name = f"_cuda-{build_cache.key(_compiler(), flags, [])}{sysconfig.get_config_var('EXT_SUFFIX')}"
    return build_cache.made(FOLDER / name, lambda path: build_cache.run([*_compiler(), *flags, "-o", str(path)]))


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
    MEMORY_ALLOCATION, INSUFFICIENT_DRIVER, NO_DEVICE, NO_KERNEL_IMAGE, LAUNCH_FAILURE = 2, 35, 100, 209, 719

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

    def pools(self, there: bool) -> None:
        """Let devices say whether they have pools of memory."""
        self._lib.fake_pools(int(there))

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
