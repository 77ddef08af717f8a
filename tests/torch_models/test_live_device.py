"""Live on a device: the CPU's bytes, one launch and no wait per point, and streams in order."""

from __future__ import annotations

import copy
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fastinterp
from fastinterp.backends import torch_device as resident_devices
from fastinterp.errors import BackendError, ShapeError, UsageError
from fastinterp.execute.device import streamed
from tests.support.devices.on_host import (
    HostDevice,
    OnHost,
    OnHost1,
    Streams,
    bits,
    device,
    moved,
    moved_module,
    streams,
)
from tests.support.modules import llama, saved

__all__ = ["device", "streams"]  # fixtures


class Mixed(torch.nn.Module):
    """Several dtypes, a tied tensor, a scalar, an empty one, and a buffer that stays as it is."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.inner = torch.nn.Linear(40, 17).bfloat16()
        self.head = torch.nn.Linear(40, 17, bias=False)
        self.head.weight = self.inner.weight
        self.norm = torch.nn.LayerNorm(40)
        self.scale = torch.nn.Parameter(torch.randn(()).half())
        self.none = torch.nn.Parameter(torch.empty(0, 3))
        self.register_buffer("ids", torch.arange(5))
        self.register_buffer("mean", torch.randn(7, dtype=torch.float64))


def held(module: torch.nn.Module) -> dict[str, bytes]:
    return {name: bits(x) for name, x in module.state_dict().items()}


def copied(module: torch.nn.Module, convert: Any = torch.clone) -> dict[str, torch.Tensor]:
    return {name: convert(x.detach()) for name, x in module.state_dict().items()}


def after_each(module: torch.nn.Module, points: list[dict[str, float]], **ends: Any) -> list[dict[str, bytes]]:
    """What a module on the CPU holds at each point."""
    with fastinterp.Live(module, **ends) as live:
        found = []
        for point in points:
            live.set(point)
            found.append(held(module))
    return found


POINTS = [{"p": 0.7, "f": -0.2}, {"p": 1.0, "f": 0.0}, {"p": 0.0, "f": 0.0}, {"p": 0.3, "f": 2.0}]


@pytest.mark.parametrize("where", ["host", "device", "mixed"])
@pytest.mark.parametrize("own", [False, True])
def test_set_and_restore(device: HostDevice, where: str, own: bool):
    """One launch for all tensors, which is not waited for; the module's own weights again at the end."""
    there, here = moved_module(Mixed(7)), Mixed(7)
    before = held(there)
    assert before == held(here)
    ends = [copied(Mixed(seed)) for seed in range(3)]
    keys: dict[str, Any] = {"directions": {"p": ends[1], "f": ends[2]}, **({} if own else {"base": ends[0]})}
    want = after_each(here, POINTS, **keys)
    convert = {"host": lambda x, i: x, "device": lambda x, i: moved(x), "mixed": lambda x, i: moved(x) if i else x}[
        where
    ]
    moved_ends = [{n: convert(x, i) for i, (n, x) in enumerate(end.items())} for end in ends]
    keys["directions"] = {"p": moved_ends[1], "f": moved_ends[2]}
    if not own:
        keys["base"] = moved_ends[0]
    with fastinterp.Live(there, **keys) as live:
        assert held(there) == before
        waits, runs = device.waits, device.runs
        for point, expected in zip(POINTS, want, strict=True):
            live.set(point)
            device.finish()
            assert held(there) == expected and live.alphas == point
        assert device.runs - runs == len(POINTS) and device.waits == waits
        live.restore()
        device.finish()
        assert held(there) == before and live.alphas is None
        live.set(POINTS[0])
    assert held(there) == before  # the end is waited for


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("room", [0, 1 << 40])
@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints(
    device: HostDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: bool, room: int, tied: bool
):
    """In the device's memory; in pinned memory, with a warning, where there is no room; read in parts at every set."""
    device.room = room
    monkeypatch.setattr(streamed, "_SLOT_BYTES", 300_000)
    a, b = (saved(llama(seed, tied=tied, dtype=torch.float32), tmp_path / str(seed)) for seed in range(2))
    here, there = llama(7, tied=tied), moved_module(llama(7, tied=tied))
    before = held(there)
    want = after_each(here, [{"alpha": 0.3}, {"alpha": -1.0}], a=a, b=b)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        live = fastinterp.Live(there, a=a, b=b, resident=resident)
    texts = [str(w.message) for w in caught if "no room" in str(w.message)]
    assert len(texts) == (0 if room else 1 + resident)
    assert all("held in pinned memory of the host" in text for text in texts)
    waits = device.waits
    for alpha, expected in ((0.3, want[0]), (-1.0, want[1])):
        live.set(alpha)
        device.finish()
        assert held(there) == expected
    assert (device.waits > waits) == (not resident)
    live.close()
    assert held(there) == before


def test_layers(device: HostDevice):
    here, there = Mixed(7), moved_module(Mixed(7))
    ends: dict[str, Any] = {"a": copied(Mixed(1)), "b": copied(Mixed(2))}
    want = after_each(here, [{"alpha": 0.5}], layers=["norm.*", "scale"], **ends)
    pieces = len(device.pieces)
    with fastinterp.Live(there, layers=["norm.*", "scale"], **ends) as live:
        live.set(0.5)
        device.finish()
        assert held(there) == want[0]
    assert set(device.pieces[pieces:]) == {"combine"}


def test_streams_keep_the_order(device: HostDevice, streams: Streams):
    """What steps have put into other streams comes before a change, and steps in other streams come after it."""
    module = moved_module(torch.nn.Linear(3, 4))
    live = fastinterp.Live(module, a=copied(torch.nn.Linear(3, 4)), b=copied(torch.nn.Linear(3, 4)))
    device.orders.clear()
    live.set(0.5)
    assert not device.orders  # one stream has an order of its own
    with streams.on(5):
        module(moved(torch.ones(2, 3)))
    assert device.orders == [(0, 5)]
    live.set(0.25)
    assert device.orders == [(0, 5), (5, 0)]
    with streams.on(6):
        live.set(0.75)
    assert device.orders == [(0, 5), (5, 0), (0, 6)]
    with live.step():
        pass
    assert device.orders == [(0, 5), (5, 0), (0, 6), (6, 0)]
    streams.captured = True
    with streams.on(7), live.step():
        pass
    assert len(device.orders) == 4  # a graph waits for nothing outside of it
    streams.captured = False
    live.close()


def test_set_waits_for_steps_of_other_threads(device: HostDevice):
    module = moved_module(Mixed(7))
    live = fastinterp.Live(module, a=copied(Mixed(1)), b=copied(Mixed(2)))
    inside, leave = threading.Event(), threading.Event()

    def step() -> None:
        with live.step():
            inside.set()
            leave.wait(10)

    stepping, setting = threading.Thread(target=step), threading.Thread(target=lambda: live.set(0.5))
    stepping.start()
    inside.wait(10)
    runs = device.runs
    setting.start()
    setting.join(0.2)
    assert setting.is_alive() and device.runs == runs
    leave.set()
    setting.join(10)
    stepping.join(10)
    assert live.alphas == {"alpha": 0.5} and device.runs == runs + 1
    live.close()


def test_own_weights_come_back_after_a_failure(device: HostDevice, monkeypatch: pytest.MonkeyPatch):
    module = moved_module(Mixed(7))
    before = held(module)
    live = fastinterp.Live(module, a=copied(Mixed(1)), b=copied(Mixed(2)))
    live.set(0.5)
    real = type(device.queue(0)).run
    failed: list[bool] = []

    def once(self: Any, pieces: Any) -> Any:
        if not failed:
            failed.append(True)
            raise BackendError("cudaLaunchKernel on cuda:0: invalid argument")
        return real(self, pieces)

    monkeypatch.setattr(type(device.queue(0)), "run", once)
    with pytest.raises(BackendError, match="invalid argument"):
        live.set(0.25)
    device.finish()
    assert held(module) == before and live.alphas is None
    live.close()


def test_refused(device: HostDevice, monkeypatch: pytest.MonkeyPatch):
    module = moved_module(Mixed(7))
    ends = [copied(Mixed(seed)) for seed in range(2)]
    far = {n: x.as_subclass(OnHost1) for n, x in copied(Mixed(1)).items()}
    with pytest.raises(BackendError, match=r"of b is on cuda:1, the module on cuda:0. Move it: .to\('cuda:0'\)"):
        fastinterp.Live(module, a=ends[0], b=far)
    with pytest.raises(BackendError, match=r"of b is on cuda:0, the module on cpu. Move it: .to\('cpu'\)"):
        fastinterp.Live(Mixed(7), a=ends[0], b={n: moved(x) for n, x in ends[1].items()})
    untied = {n: moved(x) for n, x in ends[1].items()} | {"head.weight": moved(ends[0]["head.weight"])}
    with pytest.raises(ShapeError, match=r"inner.weight and head.weight are one tensor in the module, but differ"):
        fastinterp.Live(module, a=ends[0], b=untied)
    device.room = 0
    monkeypatch.setattr(resident_devices, "_bytes", nothing)
    with pytest.warns(UserWarning, match="not at all"), pytest.raises(BackendError, match="own weights cannot be had"):
        fastinterp.Live(module, a=ends[0], b=ends[1])
    assert held(module) == held(Mixed(7))


def nothing(nbytes: int, where: Any) -> Any:
    raise RuntimeError("cudaHostAlloc: out of memory")


def test_module_that_moved_away(device: HostDevice):
    module = moved_module(Mixed(7))
    live = fastinterp.Live(module, a=copied(Mixed(1)), b=copied(Mixed(2)))
    module.scale = torch.nn.Parameter(torch.zeros(()).half())
    with pytest.raises(UsageError, match="scale is not where it was"):
        live.set(0.5)
    with pytest.raises(UsageError, match="scale is not where it was"):
        live.close()


@pytest.mark.parametrize("how", ["whole", "layers"])
def test_load_into(device: HostDevice, tmp_path: Path, how: str):
    a, b = (saved(llama(seed, tied=True), tmp_path / str(seed)) for seed in range(2))
    recipe = {"merge_method": "slerp", "base_model": str(a), "models": [{"model": str(b)}], "parameters": {"t": 0.3}}
    here = llama(7, tied=True, dtype=torch.float32)
    there = moved_module(copy.deepcopy(here))
    layers = None if how == "whole" else "model.layers.1.*"
    fastinterp.load_into(here, recipe, layers=layers)
    fastinterp.load_into(there, recipe, layers=layers)
    assert held(there) == held(here) != held(llama(7, tied=True, dtype=torch.float32))
    assert all(isinstance(x, OnHost) for x in there.state_dict().values())
