"""Merges of tensors that lie on a device: the CPU's bytes, nothing waited for in vain, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import fastinterp
from fastinterp.errors import BackendError, ShapeError, UsageError
from fastinterp.in_memory.merge import merge_measured
from tests.in_memory.test_merge_tensors import WAYS
from tests.support.devices.on_host import HostDevice, OnHost, OnHost1, Streams, bits, device, moved, streams

__all__ = ["device", "streams"]  # fixtures

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
RNG = torch.Generator().manual_seed(3)
BASE = torch.randn(33, 65, generator=RNG)
TUNES = [BASE + 0.05 * torch.randn(33, 65, generator=RNG) for _ in range(3)]
ASKS_NOTHING = {"linear", "task_arithmetic", "nearswap", "ram"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum(device: HostDevice, dtype: Any):
    """Put in without waiting; written when the device comes to it."""
    xs = [x.to(dtype) for x in TUNES]
    every: list[dict[str, Any]] = [{}, {"pivot": BASE.half()}, {"dtype": "float32"}]
    for keys in every:
        there = {k: moved(v) if isinstance(v, torch.Tensor) else v for k, v in keys.items()}
        got = fastinterp.weighted_sum([moved(x) for x in xs], [0.5, 0.0, -1.25], **there)
        assert isinstance(got, OnHost) and not device.waits
        device.finish()
        want = fastinterp.weighted_sum(xs, [0.5, 0.0, -1.25], **keys)
        assert got.dtype == want.dtype and bits(got) == bits(want)
    assert device.runs == 3


def test_out_is_written_in_place_and_in_order(device: HostDevice, streams: Streams):
    xs, out = [moved(x) for x in TUNES], moved(torch.zeros(33, 65, dtype=torch.bfloat16))
    with streams.on(77):
        assert fastinterp.weighted_sum(xs[:2], [0.5, 0.5], out=out) is out
        again = fastinterp.weighted_sum([xs[2]], [0.25], pivot=out)
    assert bits(out) == bytes(33 * 65 * 2) and device.waits == 0
    device.queue(77).finish()
    first = fastinterp.weighted_sum(TUNES[:2], [0.5, 0.5], out=torch.zeros(33, 65, dtype=torch.bfloat16))
    assert bits(out) == bits(first)
    assert bits(again) == bits(fastinterp.weighted_sum(TUNES[2:], [0.25], pivot=first))


def test_nothing_is_launched_for_empty_tensors(device: HostDevice):
    got = fastinterp.weighted_sum([moved(torch.empty(0, 3))] * 2, [1, 2])
    assert got.shape == (0, 3) and device.runs == 0


@pytest.mark.parametrize("way", WAYS)
def test_any_method_on_tensors(device: HostDevice, way: str):
    based, count, parameters = WAYS[way]
    keys: dict[str, Any] = {"parameters": parameters, "name": "w", "seed": 11, "rounding": "stochastic"}
    xs, base = [x.bfloat16() for x in TUNES[:count]], BASE.half() if based else None
    got = fastinterp.merge_tensors(
        [moved(x) for x in xs], way, base=None if base is None else moved(base), dtype="bfloat16", **keys
    )
    assert isinstance(got, OnHost)
    assert (device.waits == 0) == (way in ASKS_NOTHING)
    device.finish()
    assert bits(got) == bits(fastinterp.merge_tensors(xs, way, base=base, dtype="bfloat16", **keys))


def dicts(count: int) -> list[dict[str, torch.Tensor]]:
    shapes = {"layers.0.w": (17, 40), "layers.1.w": (3, 5, 8), "norm": (40,), "scale": (), "none": (0, 4)}
    rng = torch.Generator().manual_seed(9)
    base = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    tunes = [{n: (x + 0.1 * torch.randn(x.shape, generator=rng)).bfloat16() for n, x in base.items()} for _ in "abc"]
    return [{**x, "ids": torch.arange(7)} for x in (base, *tunes)][:count]


@pytest.mark.parametrize("way", ["linear", "slerp", "ties", "dare_ties", "task_arithmetic", "ram"])
def test_any_method_on_state_dicts(device: HostDevice, way: str):
    base, *models = dicts(2 if way == "slerp" else 4)
    given = {"slerp": {"t": 0.3}, "ram": {}, "ties": {"weight": 0.6, "density": 0.3}}
    keys: dict[str, Any] = {"parameters": given.get(way, {"weight": 0.6})}
    if way.startswith("dare"):
        keys["parameters"] |= {"density": 0.4}
    if way == "linear":
        models, origin = [base, *models], None
    else:
        origin = base
    there = [{n: moved(x) for n, x in model.items()} for model in models]
    got = fastinterp.merge_state_dicts(
        there, way, base=None if origin is None else {n: moved(x) for n, x in origin.items()}, **keys
    )
    assert (device.waits == 0) == (way in ASKS_NOTHING)
    if way in ASKS_NOTHING:
        assert device.runs == 1 and len(device.pieces) == 4  # all tensors are launched together
    device.finish()
    want = fastinterp.merge_state_dicts(models, way, base=origin, **keys)
    assert {n: bits(x) for n, x in got.items()} == {n: bits(x) for n, x in want.items()}
    assert got["ids"].data_ptr() != there[0]["ids"].data_ptr()


def test_sums_go_on_while_the_host_thinks(device: HostDevice, monkeypatch: pytest.MonkeyPatch):
    """What a round asks is put in before what it writes, so that only the questions are waited for."""
    from fastinterp.execute.device.resident import ResidentExecutor

    monkeypatch.setattr(ResidentExecutor, "round_bytes", 1)
    models = [{n: moved(x) for n, x in model.items()} for model in dicts(3)]
    got = fastinterp.merge_state_dicts(models[1:2], "slerp", base=models[0], parameters={"t": 0.3})
    assert device.pieces == ["measure", *["measure", "combine"] * 3, "combine"]
    assert device.waits == 4
    device.finish()
    want = fastinterp.merge_state_dicts(dicts(2)[1:], "slerp", base=dicts(1)[0], parameters={"t": 0.3})
    assert {n: bits(x) for n, x in got.items()} == {n: bits(x) for n, x in want.items()}


def test_effects_are_measured(device: HostDevice):
    base, one, _ = dicts(3)
    got, effects = merge_measured([{n: moved(x) for n, x in d.items()} for d in (base, one)], "linear",
                                  parameters={"weight": [0.9, 0.1]}, dtype="bfloat16")  # fmt: skip
    want, expected = merge_measured([base, one], "linear", parameters={"weight": [0.9, 0.1]}, dtype="bfloat16")
    assert device.waits == 1
    assert effects == expected and effects["norm"].sampled == 40
    assert {n: bits(x) for n, x in got.items()} == {n: bits(x) for n, x in want.items()}


# --- arrays of other libraries


class Foreign:
    """An array of a library that has DLPack and nothing else."""

    def __init__(self, x: torch.Tensor):
        self.x = x
        self.dtype, self.shape = x.dtype, x.shape

    def __dlpack__(self, **keys: Any) -> Any:
        return self.x.__dlpack__(**keys)

    def __dlpack_device__(self) -> Any:
        return self.x.__dlpack_device__()

    def __array_namespace__(self) -> Any:
        return Library


class Library:
    @staticmethod
    def from_dlpack(x: torch.Tensor) -> Foreign:
        return Foreign(torch.from_dlpack(x))


def test_arrays_with_dlpack():
    xs = [x.bfloat16() for x in TUNES]
    got = fastinterp.weighted_sum([Foreign(x) for x in xs], [1, 2, 3], pivot=Foreign(BASE))
    assert isinstance(got, Foreign)
    assert bits(got.x) == bits(fastinterp.weighted_sum(xs, [1, 2, 3], pivot=BASE))
    out = Foreign(torch.zeros(33, 65))
    assert fastinterp.weighted_sum([Foreign(x) for x in xs], [1, 2, 3], out=out) is out
    assert bits(out.x) == bits(fastinterp.weighted_sum(xs, [1, 2, 3], dtype="float32"))
    merged = fastinterp.merge_tensors([Foreign(x) for x in xs], "ties", base=Foreign(BASE), parameters={"weight": 1.0})
    assert isinstance(merged, Foreign)
    assert bits(merged.x) == bits(fastinterp.merge_tensors(xs, "ties", base=BASE, parameters={"weight": 1.0}))


def test_the_library_of_out_comes_after_the_sum(device: HostDevice, streams: Streams, monkeypatch: pytest.MonkeyPatch):
    """Its next work waits for torch's stream: by an exchange that orders the streams, else on the host."""
    given: list[Any] = []

    class OnDevice(Foreign):
        def __dlpack__(self, **keys: Any) -> Any:
            return self.x

    monkeypatch.setattr(torch, "from_dlpack", lambda x: x.__dlpack__())
    monkeypatch.setattr(Library, "from_dlpack", staticmethod(given.append))
    xs, out = [OnDevice(moved(x)) for x in TUNES], OnDevice(moved(torch.zeros(33, 65)))
    assert fastinterp.weighted_sum(xs, [1, 2, 3], out=out) is out
    assert given == [out.x] and device.waits == 0
    with streams.on(77):
        monkeypatch.delattr(Library, "from_dlpack")
        fastinterp.weighted_sum(xs, [1, 2, 3], out=out)
    assert given == [out.x] and device.waits == 1
    assert bits(out.x) == bits(fastinterp.weighted_sum(TUNES, [1, 2, 3]))
    with pytest.raises(UsageError, match=r"has no from_dlpack\. Give `out`, or torch tensors"):
        fastinterp.weighted_sum(xs, [1, 2, 3])


def test_arrays_that_dlpack_does_not_give():
    class Broken(Foreign):
        def __dlpack__(self, **keys: Any) -> Any:
            raise BufferError("no such dtype")

    with pytest.raises(UsageError, match="torch does not take this Broken by DLPack: no such dtype"):
        fastinterp.weighted_sum([Broken(BASE)], [1])
    with pytest.raises(UsageError, match="got list, which has no __dlpack__"):
        fastinterp.weighted_sum([Foreign(BASE), [1.0]], [1, 1])
    with pytest.raises(UsageError, match="array 1 must be a numpy array like the first, got Foreign"):
        fastinterp.weighted_sum([np.ones(3), Foreign(torch.ones(3))], [1, 1])
    assert fastinterp.weighted_sum([np.ones(3, ml_dtypes.bfloat16)], [2])[0] == 2  # numpy has DLPack, too


# --- what is refused


def test_all_on_one_device(device: HostDevice):
    there, other = moved(BASE), BASE.clone().as_subclass(OnHost1)
    with pytest.raises(UsageError, match=r"array 0 is on cuda:0, but array 1 on cuda:1. .* Use .to\('cuda:0'\)"):
        fastinterp.weighted_sum([there, other], [1, 1])
    with pytest.raises(UsageError, match="array 0 is on cuda:0, but out on cpu"):
        fastinterp.weighted_sum([there], [1], out=BASE.clone())
    with pytest.raises(UsageError, match="base is on cpu, but tensor 0 on cuda:0"):
        fastinterp.merge_tensors([there], "slerp", base=BASE, parameters={"t": 0.5})
    with pytest.raises(UsageError, match="a of state dict 0 is on cuda:0, but b of state dict 1 on cuda:1"):
        models = [{"a": there, "b": there}, {"a": there, "b": other}]
        fastinterp.merge_state_dicts(models, "linear", parameters={"weight": 1})
    assert device.runs == 0


def test_steps_that_have_no_kernel(device: HostDevice):
    device._refused = {"masked_sum": "random masks by rank"}
    message = "w cannot be merged on cuda:0, whose backend is cuda: random masks by rank. Move the tensors to the CPU"
    with pytest.raises(BackendError, match=message):
        fastinterp.merge_tensors(
            [moved(TUNES[0])], "della", base=moved(BASE), name="w", parameters={"weight": 1.0, "density": 0.5}
        )


def test_graphs_hold_what_asks_nothing(device: HostDevice, streams: Streams):
    streams.captured = True
    fastinterp.weighted_sum([moved(x) for x in TUNES], [1, 2, 3])
    fastinterp.merge_tensors([moved(x) for x in TUNES], "linear", parameters={"weight": 1})
    with pytest.raises(BackendError, match="w needs answers from cuda:0 before it is merged, which a CUDA graph"):
        fastinterp.merge_tensors([moved(TUNES[0])], "slerp", base=moved(BASE), name="w", parameters={"t": 0.5})
    assert device.waits == 0 and device.pieces == ["combine"] * 2


def test_errors_of_the_device_pass(device: HostDevice, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> Any:
        raise BackendError("cudaMallocAsync on cuda:0, 1024 bytes: out of memory")

    monkeypatch.setattr(type(device.queue(0)), "run", full)
    for call in (
        lambda: fastinterp.weighted_sum([moved(BASE)], [2]),
        lambda: fastinterp.merge_tensors([moved(BASE)] * 2, "linear", parameters={"weight": 1}),
    ):
        with pytest.raises(BackendError, match="1024 bytes: out of memory"):
            call()


def test_shapes_and_dtypes_are_checked_as_on_the_cpu(device: HostDevice):
    with pytest.raises(ShapeError, match=r"\[33, 65\] and, for array 1, \[33, 64\]"):
        fastinterp.weighted_sum([moved(BASE), moved(BASE[:, :64].contiguous())], [1, 1])
    with pytest.raises(UsageError, match="array 0 is not contiguous"):
        fastinterp.weighted_sum([moved(BASE).t()], [1])
    with pytest.raises(UsageError, match="out overlaps array 0"):
        fastinterp.weighted_sum([x := moved(BASE)], [1], out=x)


def test_paths_of_state_dicts(device: HostDevice):
    """Points are made where the ends lie, and put into a module there."""
    here = [{n: x for n, x in model.items() if n != "ids"} for model in dicts(2)]
    there = [{n: moved(x) for n, x in model.items()} for model in here]
    want = fastinterp.path(*here).weights(0.3)
    got = fastinterp.path(*there).weights(0.3)
    device.finish()
    assert {n: bits(x) for n, x in got.items()} == {n: bits(x) for n, x in want.items()}
    with pytest.raises(UsageError, match=r"is on cuda:0, but .* on cpu"):
        fastinterp.path(there[0], here[1]).weights(0.3)


def test_paths_of_files_and_tensors_on_a_device(device: HostDevice, tmp_path: Path):
    from safetensors.torch import save_file

    here = [{n: x for n, x in model.items() if n != "ids"} for model in dicts(2)]
    save_file(here[0], tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"is on cpu, but .* on cuda:0. All must be on one device"):
        fastinterp.path(tmp_path, {n: moved(x) for n, x in here[1].items()}).weights(0.3)
