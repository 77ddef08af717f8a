"""Device 0 of the CUDA sources as they are compiled for the host."""

from __future__ import annotations

import sys
from typing import Any

import pytest


def deferred_cuda(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A CudaDevice of an emulated runtime, which does nothing before it is waited for, and the runtime.

    Skips the test, with the reason, where the sources cannot be compiled.
    """
    host: Any = pytest.importorskip("tests.support.devices.cuda_host")
    if host.missing():
        pytest.skip(host.missing())
    runtime = host.fake()
    runtime.reset(runtime.DEFERRED)
    monkeypatch.setitem(sys.modules, "fastinterp._cuda", host.module())
    monkeypatch.setattr("fastinterp._cuda", host.module(), raising=False)
    from fastinterp.backends.cuda import CudaDevice

    return CudaDevice(0), runtime
