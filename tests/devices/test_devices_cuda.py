"""Merges through the CUDA sources, which run on the host: the processor's bytes, whatever the order of the queues."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

import fastinterp
from fastinterp.errors import BackendError
from fastinterp.execute.device import executor as machine
from fastinterp.ops.dtypes import MERGING
from tests.support.checkpoints import family, recipe, saved
from tests.support.devices import cuda_host
from tests.support.written import tree

pytestmark = pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[cuda_host.Fake]:
    """The emulated runtime, with two devices; small slots, so that there are many batches."""
    monkeypatch.setitem(sys.modules, "fastinterp._cuda", cuda_host.module())
    monkeypatch.setattr("fastinterp._cuda", cuda_host.module(), raising=False)
    monkeypatch.setattr(machine, "SLOT_BYTES", 64 << 10)
    monkeypatch.setattr(machine, "_LEAST_BATCH", 1)
    found = cuda_host.fake()
    found.reset(found.THREADS, devices=2, delay_us=200)
    yield found
    assert found.wrong() == ""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of all dtypes, each model another one, NaN and Inf among the values, at odd offsets, in several shards."""
    return saved(tmp_path_factory.mktemp("models"), family(3, mixed=True))


ASKED: dict[str, Any] = {
    "linear": {"weights": [0.5, 0.3, 0.2]},
    "stochastic": {"weights": [0.5, 0.3, 0.2], "rounding": "stochastic", "seed": 3},
    "float64": {"weights": [1.5, -0.5, 0.25], "out_dtype": "float64"},
    "fp8": {"weights": [0.5, 0.3, 0.2], "out_dtype": "float8_e4m3fn"},
}


@pytest.mark.parametrize("mode", ["EAGER", "DEFERRED", "THREADS"])
@pytest.mark.parametrize("name", ASKED)
def test_the_sources_give_the_processors_bytes(tmp_path, models, fake, name, mode):
    fake.reset(getattr(fake, mode), devices=2)
    asked = recipe("linear", models, **ASKED[name])
    want = fastinterp.merge(asked, tmp_path / "cpu", device="cpu", max_shard_size=20_000)
    got = fastinterp.merge(asked, tmp_path / "gpu", device="cuda:0,1", max_shard_size=20_000)
    assert tree(tmp_path / "cpu") == tree(tmp_path / "gpu")
    assert fake.calls("launch") and got.device.startswith("cuda:0 Emulated device 0 (cuda), cuda:1 ")
    for tensor, effect in want.tensors.items():
        found = got.tensors[tensor]
        assert (found.nan_in, found.inf_in, found.nan_out, found.inf_out, found.sampled, found.changed) == (
            effect.nan_in, effect.inf_in, effect.nan_out, effect.inf_out, effect.sampled, effect.changed,
        ), tensor  # fmt: skip
    assert fake.used(0) == fake.used(1) == 0


def test_a_path_of_many_outputs(tmp_path, models, fake):
    alphas = [-0.5, 0, 0.5, 1]
    fastinterp.interpolate(models[0], models[1], alphas, tmp_path / "cpu", device="cpu", integers=models[0])
    fastinterp.interpolate(models[0], models[1], alphas, tmp_path / "gpu", device="cuda", integers=models[0])
    assert tree(tmp_path / "cpu") == tree(tmp_path / "gpu")
    assert fake.calls("launch")


BOTH: dict[str, Any] = {"weights": [0.5, 0.5]}
METHODS: dict[str, Any] = {
    "slerp": {"parameters": {"t": 0.3}},
    "karcher": {},
    "nuslerp": {**BOTH, "parameters": {"nuslerp_row_wise": True}},
    "model_stock": {"parameters": {"filter_wise": True}},
    "ties": {**BOTH, "parameters": {"density": 0.4}},
    "breadcrumbs": {**BOTH, "parameters": {"density": 0.5, "gamma": 0.1}},
    "sce": {"parameters": {"select_topk": 0.5}},
    "dare_linear": {**BOTH, "parameters": {"density": 0.4}},
    "dare_ties": {**BOTH, "parameters": {"density": 0.4}},
    "della": {**BOTH, "parameters": {"density": 0.5, "epsilon": 0.2}},
    "arcee_fusion": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_ask(tmp_path, fake, method):
    """On two devices; what has no kernel is the processor's."""
    left_out = ["one", "scale", *(f"patterns.{d}" for d in MERGING)]
    finite = [{n: t for n, t in m.items() if n.removeprefix("model.") not in left_out} for m in family(3)]
    paths = saved(tmp_path, finite)
    models = paths[1 : 2 if method in ("slerp", "arcee_fusion") else 3]
    asked = recipe(method, models, base_model=paths[0], **METHODS[method])
    if method == "karcher":
        asked = recipe(method, paths)
    fastinterp.merge(asked, tmp_path / "cpu", device="cpu")
    fastinterp.merge(asked, tmp_path / "gpu", device="cuda:0,1")
    assert tree(tmp_path / "cpu") == tree(tmp_path / "gpu")


def test_a_kernel_that_fails_costs_the_device(tmp_path, models, fake):
    """The rest is done by the other one, from the start of each batch."""
    asked = recipe("linear", models, **ASKED["linear"])
    fastinterp.merge(asked, tmp_path / "cpu", device="cpu")
    fake.fail("launch", fake.LAUNCH_FAILURE, 2)
    report = fastinterp.merge(asked, tmp_path / "gpu", device="cuda:0,1")
    assert tree(tmp_path / "cpu") == tree(tmp_path / "gpu")
    assert [w for w in report.warnings if "a device failed" in w]
    assert fake.used(0) == fake.used(1) == 0


def test_a_device_without_memory_is_given_up(tmp_path, models, fake):
    fake.reset(fake.THREADS, devices=1, limit_bytes=1000)
    with pytest.raises(BackendError, match=r"no device is left to merge on: cuda:0 Emulated device 0: .*bytes"):
        fastinterp.merge(recipe("linear", models, **ASKED["linear"]), tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()


def test_no_driver_is_said(tmp_path, models, fake, monkeypatch):
    monkeypatch.setenv("FASTINTERP_GPU", "cuda")
    fake.fail("cudaGetDeviceCount", fake.INSUFFICIENT_DRIVER)
    with pytest.raises(BackendError, match=r"device 'cuda' cannot be used: cuda: .*driver"):
        fastinterp.merge(recipe("linear", models, **ASKED["linear"]), tmp_path / "out", device="cuda")
    with pytest.raises(BackendError, match=r"there is no device 2. There are cuda:0, cuda:1"):
        fastinterp.merge(recipe("linear", models, **ASKED["linear"]), tmp_path / "out", device="cuda:2")
