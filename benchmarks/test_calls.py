"""What a call costs where the arrays are small, beside the least that numpy and torch take for one: an addition.

pytest benchmarks/test_calls.py    a minute
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import fastinterp

torch = pytest.importorskip("torch")

_LENGTH = 64  # elements: arithmetic takes some nanoseconds
_TENSORS = 300  # of a module, as of a model of 1 B parameters


def _calls() -> dict[str, Callable[[], object]]:
    x, y, out = (np.ones(_LENGTH, np.float32) for _ in range(3))
    s, t, u = (torch.ones(_LENGTH) for _ in range(3))
    weights = {"weight": [0.25, 0.75]}
    return {
        "numpy-add": lambda: np.add(x, y, out=out),
        "numpy-weighted_sum": lambda: fastinterp.weighted_sum([x, y], [0.25, 0.75], out=out),
        "numpy-weighted_sum-new": lambda: fastinterp.weighted_sum([x, y], [0.25, 0.75]),
        "numpy-merge_tensors": lambda: fastinterp.merge_tensors([x, y], "linear", parameters=weights),
        "torch-add": lambda: torch.add(s, t, out=u),
        "torch-weighted_sum": lambda: fastinterp.weighted_sum([s, t], [0.25, 0.75], out=u),
        "torch-weighted_sum-new": lambda: fastinterp.weighted_sum([s, t], [0.25, 0.75]),
        "torch-merge_tensors": lambda: fastinterp.merge_tensors([s, t], "linear", parameters=weights),
    }


@pytest.mark.parametrize("name", _calls())
def test_call(benchmark, name: str):
    benchmark.group = "call"
    benchmark(_calls()[name])


@pytest.mark.parametrize("ends", ["files", "state-dicts"])
def test_live_set(benchmark, tmp_path, ends: str):
    module = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(_LENGTH)) for _ in range(_TENSORS))
    models = [{name: x + k for name, x in module.state_dict().items()} for k in (1, 2)]
    if ends == "files":
        from safetensors.torch import save_file

        for k, model in enumerate(models):
            save_file(model, tmp_path / f"{k}.safetensors")
        models = [tmp_path / f"{k}.safetensors" for k in range(2)]
    benchmark.group = f"{_TENSORS} tensors"
    with fastinterp.Live(module, a=models[0], b=models[1]) as live:
        benchmark(live.set, 0.25)


def test_foreach_lerp(benchmark):
    a, b = ([torch.ones(_LENGTH) for _ in range(_TENSORS)] for _ in range(2))
    benchmark.group = f"{_TENSORS} tensors"
    benchmark(torch._foreach_lerp, a, b, 0.25)
