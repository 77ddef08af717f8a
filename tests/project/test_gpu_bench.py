"""The benchmarks for a GPU run to their end on emulations of one, so that they do where nobody looks on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.devices import cuda_host

pytest.importorskip("torch")
pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow(25)
@pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())
def test_rehearsal(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(out), "--commit", "none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text("utf-8"))
    assert {"commit", "date", "torch", "triton", "gpu", "cpu"} <= found.keys() and found["rehearsal"]
    names = {
        backend: [r["case"] for r in found["results"] if r.get("backend") == backend] for backend in ("cuda", "triton")
    }
    assert names["cuda"] == names["triton"] and len(names["cuda"]) == 9
    *cases, merged = found["results"]
    assert all(r["ratio"] > 0 and set(r["seconds"]) >= {"fastinterp", "copy"} for r in cases)
    assert merged["auto"].startswith("cpu ") and merged["device"].startswith("triton:0")
