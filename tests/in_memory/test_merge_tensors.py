"""Merges in memory: the same bytes as between files, for every library and dtype; and what is refused."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import fastinterp
from fastinterp.errors import MethodError, ShapeError, UsageError
from tests.support import drive
from tests.support import models as small
from tests.support.checkpoints import read

RNG = np.random.default_rng(7)
BASE = RNG.normal(size=(33, 65)).astype(np.float32)
TUNES = [BASE + np.float32(0.05) * RNG.normal(size=BASE.shape).astype(np.float32) for _ in range(3)]

WAYS: dict[str, tuple[bool, int, dict[str, Any]]] = {
    "linear": (False, 3, {"weight": [1, 2, 3.5]}),
    "task_arithmetic": (True, 2, {"weight": 0.5, "lambda": 0.8}),
    "slerp": (True, 1, {"t": 0.3}),
    "model_stock": (True, 3, {"filter_wise": True}),
    "nuslerp": (True, 2, {"weight": [1.0, 2.0], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "karcher": (False, 3, {}),
    "dare_ties": (True, 3, {"weight": 1.0, "density": [0.5, 0.9, 1.0]}),
    "della": (True, 2, {"weight": 1.0, "density": 0.5, "epsilon": 0.1}),
    "ties": (True, 3, {"weight": 1.0, "density": [0.5, 0.9, 0.2]}),
    "breadcrumbs": (True, 2, {"weight": 1.0, "density": 0.5, "gamma": 0.1}),
    "sce": (True, 3, {"select_topk": 0.5}),
    "arcee_fusion": (True, 1, {}),
    "ram": (True, 3, {}),
    "nearswap": (True, 1, {"t": 0.01}),
}


def merged(way: str, convert: Any = np.copy, **keys: Any) -> Any:
    based, count, parameters = WAYS[way]
    base = convert(BASE) if based else None
    return fastinterp.merge_tensors([convert(x) for x in TUNES[:count]], way, base=base, parameters=parameters, **keys)


@pytest.mark.parametrize("way", WAYS)
def test_equals_the_formula(way):
    """Within float32 rounding of what the definitions give in float64."""
    based, count, parameters = WAYS[way]
    got = merged(way)
    want = drive.run(way, TUNES[:count], base=BASE if based else None, parameters=drive_keys(parameters))
    assert got.dtype == np.float32 and got.shape == BASE.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=4 * 2.0**-24 * 8)


def drive_keys(parameters: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in parameters.items()}


@pytest.mark.parametrize("way", WAYS)
def test_same_bytes_as_between_files(tmp_path, way):
    """And in torch; for one thread and for seven."""
    based, count, parameters = WAYS[way]
    for name, x in zip("bcd", TUNES, strict=True):
        small.save(tmp_path / name, {"w.weight": x})
    small.save(tmp_path / "a", {"w.weight": BASE})
    each = {k: v for k, v in parameters.items() if isinstance(v, list)}
    models = [
        {"model": str(tmp_path / name), "parameters": {k: v[i] for k, v in each.items()}}
        for i, name in enumerate("bcd"[:count])
    ]
    recipe: dict[str, Any] = {
        "merge_method": way, "models": models, "parameters": {k: v for k, v in parameters.items() if k not in each},
        "seed": 11, "rounding": "stochastic", "out_dtype": "bfloat16",
    }  # fmt: skip
    if based:
        recipe["base_model"] = str(tmp_path / "a")
    fastinterp.merge(recipe, tmp_path / "out")
    want = read(tmp_path / "out")["w.weight"].raw.tobytes()
    keys: dict[str, Any] = {"name": "w.weight", "dtype": "bfloat16", "seed": 11, "rounding": "stochastic"}
    assert merged(way, threads=1, **keys).tobytes() == want
    found = merged(way, torch.from_numpy, threads=7, **keys)
    assert found.dtype == torch.bfloat16 and found.view(torch.int16).numpy().tobytes() == want


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_dtypes_of_both_libraries(name):
    """The result has the dtype that holds all."""
    plain = {"bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}
    dtype = plain.get(name) or (ml_dtypes.float8_e5m2 if name == "float8_e5m2" else np.dtype(name))
    base, other = np.array([1.0, 2.0, 0.5]).astype(dtype), np.array([2.0, 2.0, 1.0], np.float32)
    wide = np.float64 if name == "float64" else np.float32
    got = fastinterp.merge_tensors([other], "task_arithmetic", base=base, parameters={"weight": 1.0})
    assert got.dtype == wide and got.tolist() == [2.0, 2.0, 1.0]
    got = fastinterp.merge_tensors([other.astype(dtype)], "task_arithmetic", base=base, parameters={"weight": 1.0})
    assert got.dtype == dtype and got.astype(np.float32).tolist() == [2.0, 2.0, 1.0]
    ours = torch.tensor([1.0, 2.0, 0.5]).to(getattr(torch, name))
    found = fastinterp.merge_tensors(
        [torch.from_numpy(other)], "task_arithmetic", base=ours, parameters={"weight": 1.0}
    )
    assert found.dtype == torch.promote_types(
        torch.float32, ours.to(torch.float32 if ours.itemsize == 1 else ours.dtype).dtype
    )
    assert found.tolist() == [2.0, 2.0, 1.0]


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("way", ["slerp", "dare_ties", "linear"])
def test_any_shape(way, shape):
    x, y = np.full(shape, 1.0, np.float32), np.full(shape, 3.0, np.float32)
    base, parameters = (
        (None, {"weight": 1}) if way == "linear" else (x, {"t": 0.5} if way == "slerp" else {"weight": 1})
    )
    got = fastinterp.merge_tensors([y] if base is not None else [x, y], way, base=base, parameters=parameters)
    assert got.shape == shape and got.tolist() == np.full(shape, 3.0 if way == "dare_ties" else 2.0).tolist()


def test_inputs_are_not_written(tmp_path):
    base, tunes = BASE.copy(), [x.copy() for x in TUNES]
    fastinterp.merge_tensors(tunes, "model_stock", base=base)
    assert np.array_equal(base, BASE) and all(np.array_equal(x, y) for x, y in zip(tunes, TUNES, strict=True))


# --- state dicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_state_dicts(convert):
    """Each tensor as merge_tensors has it; integers are copied; the order is that of the base."""
    base = {"z": convert(BASE), "ids": convert(np.arange(5)), "a": convert(BASE[0].copy())}
    other = {"a": convert(TUNES[0][0].copy()), "ids": convert(np.arange(5)), "z": convert(TUNES[0])}
    got = fastinterp.merge_state_dicts([other], "slerp", base=base, parameters={"t": 0.25})
    assert list(got) == ["z", "ids", "a"] and got["ids"] is not base["ids"]
    for name in ("z", "a"):
        want = fastinterp.merge_tensors([other[name]], "slerp", base=base[name], parameters={"t": 0.25}, name=name)
        assert type(got[name]) is type(want) and np.array_equal(got[name], want)
    assert got["ids"].tolist() == [0, 1, 2, 3, 4]


def test_layers_are_found_from_names():
    """`lines` has a coefficient per layer: the first layer takes nothing of the change, the last one all of it."""
    names = [f"model.layers.{i}.mlp.weight" for i in range(3)]
    base, other = {n: np.zeros(4, np.float32) for n in names}, {n: np.ones(4, np.float32) for n in names}
    got = fastinterp.merge_state_dicts([other], "lines", base=base, parameters={"alpha": 0.0, "beta": 1.0})
    assert [float(got[n][0]) for n in names] == [0.0, 0.5, 1.0]


def test_a_module_takes_the_result():
    torch.manual_seed(0)
    one, two = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    got = fastinterp.merge_state_dicts([one.state_dict(), two.state_dict()], "linear", parameters={"weight": [0, 1]})
    one.load_state_dict(got)
    assert torch.equal(one.weight, two.weight) and one.weight.data_ptr() != two.weight.data_ptr()


def test_sidecars_are_arrays():
    one, two = np.array([1.0, 2.0], np.float32), np.array([3.0, 6.0], np.float32)
    importance = [np.array([0.0, 1.0], np.float32), np.array([1.0, 1.0], np.float32)]
    got = fastinterp.merge_tensors([one, two], "fisher", parameters={"fisher": importance})
    np.testing.assert_allclose(got, [3.0, 4.0], rtol=1e-5)
    dicts = [{"w": x} for x in (one, two)]
    same = fastinterp.merge_state_dicts(dicts, "fisher", parameters={"fisher": [{"w": x} for x in importance]})
    assert np.array_equal(same["w"], got)


def test_vectors_and_scalars_of_other_libraries_are_numbers():
    one, two = np.array([1.0, 2.0], np.float32), np.array([3.0, 6.0], np.float32)
    want = fastinterp.merge_tensors([one, two], "linear", parameters={"weight": [0.25, 0.75]})
    every = np.array([0.25, 0.75]), torch.tensor([0.25, 0.75]), list(np.array([0.25, 0.75], np.float32))
    for weight in (*every, [torch.tensor(0.25), np.float64(0.75)]):
        assert np.array_equal(fastinterp.merge_tensors([one, two], "linear", parameters={"weight": weight}), want)
    same = fastinterp.merge_tensors([one, two], "linear", parameters={"weight": np.float32(1.0)})
    assert np.array_equal(same, [2.0, 4.0])


# --- refusals --------------------------------------------------------------------------------------------------------

X: Any = np.ones(4, np.float32)
THREE: Any = 3
LIST: Any = [X]
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "unknown method": (lambda: fastinterp.merge_tensors([X], "slurp"), MethodError, "unknown merge method `slurp`"),
    "no name": (lambda: fastinterp.merge_tensors([X], THREE), UsageError, "`method` must be text, got 3"),
    "surrogate": (
        lambda: fastinterp.merge_tensors([X], "linear", parameters={"weight": 1}, name="\ud800", rounding="stochastic"),
        UsageError, "`name` must be text that UTF-8 can write",
    ),
    "surrogate of a state dict": (
        lambda: fastinterp.merge_state_dicts([{"a": X, "\udfff": X}], "linear", parameters={"weight": 1}),
        UsageError, "the name of a tensor must be text that UTF-8 can write",
    ),
    "no base": (
        lambda: fastinterp.merge_tensors([X], "slerp", parameters={"t": 0.5}), MethodError, "`slerp` needs a base",
    ),
    "a base too much": (
        lambda: fastinterp.merge_tensors([X], "linear", base=X, parameters={"weight": 1}), MethodError, "has no base",
    ),
    "models": (
        lambda: fastinterp.merge_tensors([X, X], "slerp", base=X, parameters={"t": 0.5}), MethodError,
        "takes exactly 2 models, the base included, got 3",
    ),
    "none": (lambda: fastinterp.merge_tensors([], "linear"), UsageError, "`tensors` is empty"),
    "one": (lambda: fastinterp.merge_tensors(X, "linear"), UsageError, "`tensors` must be a list, got ndarray"),
    "parameter": (
        lambda: fastinterp.merge_tensors([X], "linear", parameters={"wieght": 1}), MethodError, "did you mean `weight`",
    ),
    "missing": (lambda: fastinterp.merge_tensors([X], "linear"), MethodError, "`linear` needs the parameter `weight`"),
    "values": (
        lambda: fastinterp.merge_tensors([X], "linear", parameters={"weight": [1, 2]}), MethodError,
        "`weight` has 2 values for 1 models",
    ),
    "range": (
        lambda: fastinterp.merge_tensors([X], "sce", base=X, parameters={"select_topk": 2}), MethodError,
        r"must be in 0\.\.1",
    ),
    "cancel": (
        lambda: fastinterp.merge_tensors([X, X], "linear", parameters={"weight": [1, -1]}), MethodError, "sum to 0",
    ),
    "shapes": (
        lambda: fastinterp.merge_tensors([X, X[:2]], "linear", parameters={"weight": 1}), ShapeError,
        r"\[4\] in tensor 0 but \[2\] in tensor 1",
    ),
    "libraries": (
        lambda: fastinterp.merge_tensors([X, torch.ones(4)], "linear", parameters={"weight": 1}), UsageError,
        "tensor 1 must be a tensor like the first, got Tensor",
    ),
    "lists": (
        lambda: fastinterp.merge_tensors([[1.0], [2.0]], "linear", parameters={"weight": 1}), UsageError,
        "tensor 0 must be a tensor like the first, got list",
    ),
    "contiguous": (
        lambda: fastinterp.merge_tensors([BASE.T], "linear", parameters={"weight": 1}), UsageError,
        "tensor 0 is not contiguous",
    ),
    "gradient": (
        lambda: fastinterp.weighted_sum([torch.ones(2, requires_grad=True)], [1.0]), UsageError, "requires grad",
    ),
    "dtype": (
        lambda: fastinterp.merge_tensors([X], "linear", parameters={"weight": 1}, dtype="int8"), UsageError,
        "unknown dtype 'int8'",
    ),
    "seed": (
        lambda: fastinterp.merge_tensors([X], "linear", parameters={"weight": 1}, seed=-1), UsageError, "the seed must",
    ),
    "rounding": (
        lambda: fastinterp.merge_tensors([X], "linear", parameters={"weight": 1}, rounding="up"), UsageError,
        "rounding must be nearest or stochastic",
    ),
    "NaN": (
        lambda: fastinterp.merge_tensors([X * np.float32("nan")], "slerp", base=X, parameters={"t": 0.5}), MethodError,
        "tensor",
    ),
    "names": (
        lambda: fastinterp.merge_state_dicts([{"a": X}, {"b": X}], "linear", parameters={"weight": 1}), ShapeError,
        "state dict 1 lacks a",
    ),
    "integers": (
        lambda: fastinterp.merge_state_dicts(
            [{"i": np.arange(3)}, {"i": np.arange(1, 4)}], "linear", parameters={"weight": 1}
        ),
        ShapeError, r"i \(int64\) is not averaged, and differs in state dict 1",
    ),
    "kinds": (
        lambda: fastinterp.merge_state_dicts([{"i": np.arange(4)}, {"i": X}], "linear", parameters={"weight": 1}),
        ShapeError, "i is of dtypes int64, float32",
    ),
    "no dict": (
        lambda: fastinterp.merge_state_dicts([{"a": X}, LIST], "linear", parameters={"weight": 1}), UsageError,
        "state dict 1 must be a mapping of names to tensors, got list",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what):
    call, kind, message = REFUSED[what]
    with pytest.raises(kind, match=message):
        call()
