"""End points that are stored as codes: Live, paths and loading see the numbers that they are decoded to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastinterp
from fastinterp.ops.dtypes import BF16, F32
from tests.execute.test_quantised_inputs import matrix, saved
from tests.support.checkpoints import recipe, tensor
from tests.support.encodings import COLUMNS, ENCODINGS, ROWS

torch = pytest.importorskip("torch")
FORMS = ["fp8 blocks", "fp8, ComfyUI", "int8 rows", "nvfp4, ModelOpt", "mxfp4, compressed-tensors"]


def module(dtype: Any = torch.float32) -> Any:
    return torch.nn.Sequential(torch.nn.Linear(COLUMNS, ROWS)).to(dtype)


def pair(folder: Path, name: str) -> dict[str, list[str]]:
    made: dict[str, list[str]] = {"codes": [], "numbers": []}
    for seed in range(2):
        one = ENCODINGS[name].encode(matrix(seed))
        bias = {"0.bias": tensor(np.arange(ROWS) * 0.01 * seed, BF16)}
        codes = {f"0.{end}": t for end, t in one.tensors.items()} | bias
        made["codes"].append(saved(folder / f"codes{seed}", codes, ENCODINGS[name]))
        made["numbers"].append(saved(folder / f"numbers{seed}", {"0.weight": tensor(one.numbers, F32)} | bias))
    return made


def assert_equal(x: Any, y: Any) -> None:
    assert x.keys() == y.keys()
    for name, value in x.items():
        assert torch.equal(value.float(), y[name].float()), name


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("name", FORMS)
def test_live(tmp_path: Path, name: str, resident: bool) -> None:
    """At every point the module has the weights that end points in numbers give."""
    states = {}
    for kind, (a, b) in pair(tmp_path, name).items():
        own = module()
        torch.nn.init.zeros_(own[0].weight)
        with fastinterp.Live(own, a=a, b=b, resident=resident) as live:
            for alpha in (0.0, 0.3, 1.0):
                live.set(alpha)
                states[kind, alpha] = {n: x.clone() for n, x in own.state_dict().items()}
    for alpha in (0.0, 0.3, 1.0):
        assert_equal(states["codes", alpha], states["numbers", alpha])
    assert not torch.equal(states["codes", 0.0]["0.weight"], states["codes", 1.0]["0.weight"])


@pytest.mark.parametrize("name", FORMS)
def test_path(tmp_path: Path, name: str) -> None:
    seen: dict[str, list[Any]] = {"codes": [], "numbers": []}
    for kind, (a, b) in pair(tmp_path, name).items():

        def measured(weights: Any, alpha: float, seed: int, kind: str = kind) -> dict[str, float]:
            seen[kind].append({n: x.clone() for n, x in weights.items()})
            return {"zero": 0.0}

        fastinterp.path(a, b).evaluate(measured, [0.0, 0.4, 1.0])
    for codes, numbers in zip(seen["codes"], seen["numbers"], strict=True):
        assert_equal(codes, numbers)


@pytest.mark.parametrize("name", FORMS)
def test_load(tmp_path: Path, name: str) -> None:
    """Tensors in memory, in BF16 by default."""
    loaded = {}
    for kind, paths in pair(tmp_path, name).items():
        loaded[kind] = fastinterp.load(recipe("linear", paths, weights=[0.5, 0.5], dtype="bfloat16"))
    assert_equal(dict(loaded["codes"]), dict(loaded["numbers"]))
    kept = fastinterp.load(recipe("linear", pair(tmp_path / "more", name)["codes"], weights=[0.5, 0.5]))
    assert {x.dtype for x in dict(kept).values()} == {torch.bfloat16}
