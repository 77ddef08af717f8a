"""The backends under test, as functions of a case: which can run here, which cannot and why."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastinterp.errors import BackendError
from fastinterp.ops.combine import Row
from fastinterp.ops.dtypes import DType
from tests.support.cases import Case, Guarded
from tests.support.devices import cuda_combine, cuda_host

ISAS = ("scalar", "avx2", "avx512", "neon")  # of csrc/cpu
EMULATED = "cuda-emulated"  # the CUDA kernels on the host, see tests/support/devices/cuda_host


def usable() -> list[str]:
    """The instruction sets that this machine can run, of those that were built."""
    try:
        from fastinterp import _C
    except ImportError:
        return []
    return [isa for isa in ISAS if isa in _C.isas()]


def combining() -> list[str]:
    """The backends that can do a combine here: instruction sets, and CUDA on a device or emulated."""
    return usable() + [name for name in ("cuda", EMULATED) if name not in _cuda_skipped()]


def nvcc_missing() -> str:
    """Why nvcc is not tried here; empty if it is."""
    if os.environ.get("FASTINTERP_CUDA") == "0":
        return "FASTINTERP_CUDA is 0"
    return "" if shutil.which("nvcc") else "it is not on PATH"


@cache
def _cuda_skipped() -> dict[str, str]:
    from fastinterp.backends import cuda

    reasons = {}
    try:
        if cuda.device_count() == 0:
            reasons["cuda"] = "there is no device"
    except BackendError as error:
        reasons["cuda"] = str(error)
    if why := cuda_host.missing():
        reasons[EMULATED] = why
    if why := nvcc_missing():
        reasons["nvcc"] = f"{why}, so what it makes of the CUDA kernels is not looked at"
    return reasons


@cache
def _triton_skipped() -> str:
    """Why Triton's kernels are neither run on a GPU here nor interpreted; empty if they are."""
    from fastinterp.backends.registry import maybe_driver
    from fastinterp.backends.triton import device as triton

    if not triton.interpreted() and not maybe_driver() and "gpu" not in _required():
        return "there is no driver of a GPU, and TRITON_INTERPRET is not 1"  # torch is not loaded to find that out
    return triton.missing()


def on_devices() -> list[str]:
    """The kernels of accelerators that can be run here, on one or as if: see `device`."""
    cuda = [name for name in ("cuda", EMULATED) if name not in _cuda_skipped()]
    return cuda[:1] + ([] if _triton_skipped() else ["triton"])


@contextmanager
def device(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The first device by this name of `on_devices`."""
    from fastinterp.backends import cuda
    from fastinterp.backends.triton import device as triton

    if name == "triton":
        yield triton.TritonDevice(0)
        return
    if name == EMULATED:
        emulated = cuda_module(name)
        monkeypatch.setitem(sys.modules, "fastinterp._cuda", emulated)
        monkeypatch.setattr("fastinterp._cuda", emulated, raising=False)
    yield cuda.device(0)
    assert name == "cuda" or cuda_host.fake().wrong() == ""


def cuda_module(name: str) -> ModuleType:
    """fastinterp._cuda, or its emulation, begun anew."""
    if name == EMULATED:
        cuda_host.fake().reset(cuda_host.Fake.DEFERRED)
        return cuda_host.module()
    from fastinterp import _cuda

    return _cuda


def mergekit_missing() -> str:
    """Why results cannot be compared with mergekit here; empty if they can."""
    try:
        import mergekit  # noqa: F401
    except ImportError as error:
        return f"mergekit cannot be imported: {error}"
    return ""


def sd_mecha_missing() -> str:
    """Why results cannot be compared with sd-mecha here; empty if they can."""
    try:
        import sd_mecha  # noqa: F401
    except ImportError as error:
        return f"sd_mecha cannot be imported: {error}"
    return ""


def skipped() -> dict[str, str]:
    """What cannot be tested here, and why: name -> reason."""
    others = {
        "triton": _triton_skipped(), "gpu": _gpu_missing(), "mergekit": mergekit_missing(),
        "sd_mecha": sd_mecha_missing(),
    }  # fmt: skip
    return _isas_skipped() | _cuda_skipped() | {name: reason for name, reason in others.items() if reason}


def _gpu_missing() -> str:
    """Why not all that a GPU can be tested with is here; empty if it is."""
    from fastinterp.backends.triton import device as triton

    reasons = {"cuda": _cuda_skipped().get("cuda"), "triton": _triton_skipped()}
    reasons["triton"] = reasons["triton"] or ("it is interpreted" if triton.interpreted() else "")
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)


def _isas_skipped() -> dict[str, str]:
    try:
        from fastinterp import _C
    except ImportError as error:
        return dict.fromkeys(ISAS, f"fastinterp._C cannot be imported: {error}")
    built = _C.built_isas()
    return {
        isa: "this processor cannot run it" if isa in built else "not built for this kind of processor"
        for isa in ISAS
        if isa not in usable()
    }


def missing_required() -> list[str]:
    """What FASTINTERP_REQUIRE (a list with commas) demands and is not usable, with reasons."""
    reasons = skipped()
    known = (*ISAS, "cuda", EMULATED, "triton", "gpu", "nvcc", "mergekit", "sd_mecha")
    return [f"{name} ({reasons.get(name, 'unknown')})" for name in _required() if name in reasons or name not in known]


def _required() -> list[str]:
    return [name.strip() for name in os.environ.get("FASTINTERP_REQUIRE", "").split(",") if name.strip()]


def run(
    isa: str,
    inputs: Sequence[Guarded],
    dtypes: Sequence[DType],
    rows: Sequence[Row],
    outputs: Sequence[Guarded],
    out_dtype: DType,
    **options: Any,
) -> list[dict[str, float]]:
    """One native combine of whole buffers; `options` as for `_C.combine`. Returns the statistics of each row."""
    if isa in ("cuda", EMULATED):
        found = cuda_combine.run(cuda_module(isa), inputs, dtypes, rows, outputs, out_dtype, **options)
        assert isa == "cuda" or cuda_host.fake().wrong() == ""
        return found
    from fastinterp import _C

    numel = inputs[0].view.size * 8 // dtypes[0].bits
    return _C.combine(
        [x.address for x in inputs],
        [_code(d) for d in dtypes],
        rows,
        [out.address for out in outputs],
        _code(out_dtype),
        numel,
        isa=isa,
        **options,
    )


def run_case(
    isa: str, case: Case, inputs: Sequence[Guarded], outputs: Sequence[Guarded], **options: Any
) -> list[dict[str, float]]:
    """The case on an instruction set; `options` override the case's own."""
    own: dict[str, Any] = {
        "stochastic": case.rounding == "stochastic",
        "keys": case.keys,
        "fp8_saturate": case.fp8_overflow == "saturate",
        "stats_every": case.stats_every,
    }
    return run(isa, inputs, case.dtypes, case.rows(), outputs, case.out_dtype, **(own | options))


def _code(dtype: DType) -> int:
    assert dtype.code is not None
    return dtype.code


def assert_same_bits(expected: NDArray[np.uint8], got: NDArray[np.uint8], dtype: DType, what: str) -> None:
    """Fail with the number of elements that differ and the first of them, its bits and its neighbours."""
    assert expected.size == got.size, f"{what}: {got.size} bytes, expected {expected.size}"
    width = dtype.bits // 8
    want, have = (np.array(v).view(f"u{width}") for v in (expected, got))
    wrong = np.flatnonzero(want != have)
    if wrong.size:
        at = int(wrong[0])
        around = slice(max(at - 2, 0), at + 3)
        raise AssertionError(
            f"{what}: {wrong.size} of {want.size} elements differ, first {at}: expected {int(want[at]):0{2 * width}x}, "
            f"got {int(have[at]):0{2 * width}x}; around it expected {[f'{int(v):x}' for v in want[around]]}, "
            f"got {[f'{int(v):x}' for v in have[around]]}; last {int(wrong[-1])}"
        )
