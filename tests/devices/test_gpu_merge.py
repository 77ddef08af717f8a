"""Merges from file to file on a real GPU, and sums of more elements than 32 bits count: the processor's bytes.

CUDA's kernels and Triton's, where there is a GPU; where there is none, test_devices_cuda.py has such merges on the
host, by the sources of CUDA's kernels.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastinterp
from fastinterp import _C
from fastinterp.backends.triton.device import interpreted
from fastinterp.ops.combine import Row
from fastinterp.ops.dtypes import BF16, MERGING
from tests.support import backends
from tests.support.checkpoints import family, recipe, saved
from tests.support.devices.cuda_combine import piece_of
from tests.support.pumps import code
from tests.support.written import tree

REAL: list[Any] = [] if interpreted() else [name for name in backends.on_devices() if name != backends.EMULATED]


@pytest.fixture(params=REAL or [pytest.param("", marks=pytest.mark.skip(reason="there is no GPU"))], autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with backends.device(request.param, monkeypatch) as opened:
        monkeypatch.setenv("FASTINTERP_GPU", opened.backend)
        yield opened


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of all dtypes, each model another one, NaN and Inf among the values, at odd offsets, in several shards."""
    return saved(tmp_path_factory.mktemp("models"), family(3, mixed=True))


@pytest.fixture(scope="module")
def finite(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Models whose tensors any method takes."""
    left_out = ["one", "scale", *(f"patterns.{d}" for d in MERGING)]
    kept = [{n: t for n, t in m.items() if n.removeprefix("model.") not in left_out} for m in family(3)]
    return saved(tmp_path_factory.mktemp("finite"), kept)


HALVES: dict[str, Any] = {"weights": [0.5, 0.5], "parameters": {"density": 0.4}}
SUMS: dict[str, Any] = {
    "linear": {},
    "stochastic": {"rounding": "stochastic", "seed": 3},
    "float64": {"out_dtype": "float64"},
    "fp8": {"out_dtype": "float8_e4m3fn"},
}
METHODS: dict[str, Any] = {
    "ties": HALVES, "dare_ties": HALVES, "dare_linear": HALVES, "breadcrumbs": HALVES, "della": HALVES,
    "task_arithmetic": {"weights": [0.5, -0.5]}, "slerp": {"parameters": {"t": 0.3}}, "model_stock": {},
}  # fmt: skip


# Triton compiles a kernel for each mixture of dtypes: so some of the merges show that the engine drives it right.
BY_TRITON = ("stochastic", "fp8", "dare_ties", "slerp")


@pytest.mark.parametrize("name", SUMS)
def test_sums(tmp_path, models, device, name):
    only_some(device, name)
    check(tmp_path, recipe("linear", models, weights=[0.5, 0.3, 0.2], **SUMS[name]), device)


@pytest.mark.parametrize("method", METHODS)
def test_methods(tmp_path, finite, device, method):
    only_some(device, method)
    paths = finite[1 : 2 if method == "slerp" else 3]
    check(tmp_path, recipe(method, paths, base_model=finite[0], **METHODS[method]), device)


def only_some(device: Any, name: str) -> None:
    if device.backend == "triton" and name not in BY_TRITON:
        pytest.skip(f"of merges by Triton only {', '.join(BY_TRITON)}")


def check(folder: Path, asked: dict[str, Any], device: Any) -> None:
    fastinterp.merge(asked, folder / "cpu", device="cpu", max_shard_size=20_000)
    report = fastinterp.merge(asked, folder / "gpu", device="cuda", max_shard_size=20_000)
    assert tree(folder / "cpu") == tree(folder / "gpu")
    assert device.label in report.device and f"({device.backend})" in report.device


def test_a_path(tmp_path, models):
    alphas = [-0.5, 0, 0.5, 1]
    fastinterp.interpolate(models[0], models[1], alphas, tmp_path / "cpu", device="cpu", integers=models[0])
    fastinterp.interpolate(models[0], models[1], alphas, tmp_path / "gpu", device="cuda", integers=models[0])
    assert tree(tmp_path / "cpu") == tree(tmp_path / "gpu")


def test_the_command(tmp_path, models):
    for kind in ("cpu", "cuda:0"):
        command = [sys.executable, "-m", "fastinterp", "interpolate", models[0], models[1], "--alpha", "0.35"]
        command += ["-o", str(tmp_path / kind), "--device", kind, "--integers", models[0]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "cpu") == tree(tmp_path / "cuda:0")


def test_more_elements_than_32_bits_count(device):
    """The first and the last ones are right: 26 GB of device memory."""
    import torch

    numel, window = (1 << 32) + 12345, 100_003
    if torch.cuda.mem_get_info()[0] < 7 * numel:
        pytest.skip("the GPU's free memory is less than 30 GB")
    a, b, out = (torch.full((numel,), value, dtype=torch.bfloat16, device="cuda") for value in (1.5, 0.5, 9.0))
    for x in (a, b):
        x[:window].normal_()
        x[-window:].normal_()
    torch.cuda.synchronize()
    queue, row = device.queue(), Row(0, 1.0, ((1, 0.3),))
    piece = piece_of([x.data_ptr() for x in (a, b)], [BF16] * 2, [row], [out.data_ptr()], code(BF16), numel)
    queue.run([piece])
    queue.record().wait()
    for part in (slice(0, window), slice(numel // 2, numel // 2 + window), slice(numel - window, numel)):
        own = [x[part].cpu() for x in (a, b)]
        want, got = torch.empty_like(own[0]), out[part].cpu()
        _C.combine([x.data_ptr() for x in own], [code(BF16)] * 2, [row], [want.data_ptr()], code(BF16), window)
        assert torch.equal(want.view(torch.int16), got.view(torch.int16))
