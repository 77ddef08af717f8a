"""What every backend does with tensors on its device, compared with the CPU. Run by tests with a backend each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fastinterp
from tests.devices.test_resident import BASE, TUNES, dicts
from tests.in_memory.test_merge_tensors import WAYS
from tests.support.devices.on_host import OnHost, bits, moved, moved_module
from tests.torch_models.test_live_device import Mixed, copied, held

REFUSED = {"della", "arcee_fusion"}  # masks by rank, and divergences, have no kernels


def sums(finish: Callable[[], None]) -> None:
    """Of one tensor into memory that is there, and of the tensors of a model, rounded at random."""
    xs, out = [x.bfloat16() for x in TUNES], moved(torch.zeros(33, 65))
    assert fastinterp.weighted_sum([moved(x) for x in xs], [0.5, 0.0, -1.25], out=out) is out
    keys: dict[str, Any] = {"parameters": {"weight": [1, 2, 3, 4]}, "rounding": "stochastic", "dtype": "bfloat16"}
    got = fastinterp.merge_state_dicts([{n: moved(x) for n, x in d.items()} for d in dicts(4)], "linear", **keys)
    finish()
    assert bits(out) == bits(fastinterp.weighted_sum(xs, [0.5, 0.0, -1.25], dtype="float32"))
    want = fastinterp.merge_state_dicts(dicts(4), "linear", **keys)
    assert {n: bits(x) for n, x in got.items()} == {n: bits(x) for n, x in want.items()}


def method(way: str, finish: Callable[[], None]) -> None:
    based, count, parameters = WAYS[way]
    keys: dict[str, Any] = {"parameters": parameters, "name": "w", "seed": 11, "rounding": "stochastic"}
    xs, base = [x.bfloat16() for x in TUNES[:count]], BASE.half() if based else None
    there = None if base is None else moved(base)
    got = fastinterp.merge_tensors([moved(x) for x in xs], way, base=there, dtype="bfloat16", **keys)
    assert isinstance(got, OnHost)
    finish()
    assert bits(got) == bits(fastinterp.merge_tensors(xs, way, base=base, dtype="bfloat16", **keys))


def live(finish: Callable[[], None]) -> None:
    """From one end point that was read into the device's memory, and one that is there."""
    here, there = Mixed(7), moved_module(Mixed(7))
    before = held(there)
    a, b = copied(Mixed(1)), copied(Mixed(2))
    with fastinterp.Live(here, a=a, b=b) as live:
        live.set(0.3)
        want = held(here)
    with fastinterp.Live(there, a=a, b={n: moved(x) for n, x in b.items()}) as live:
        live.set(0.3)
        finish()
        assert held(there) == want
    assert held(there) == before
