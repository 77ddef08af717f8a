"""What methods declare of themselves: it is true of every method, and all that the rest of the program goes by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastinterp
from fastinterp.inspect.explain import Explanation
from fastinterp.methods import Each, Method, Unit, find, method, names
from fastinterp.methods._deltas import at_random, l1_ratios, summed
from fastinterp.ops.combine import Combine, Tensor
from fastinterp.ops.dtypes import F8_E4M3, F32
from fastinterp.ops.requests import GroupCombine, MaskedCombine, Steps, Sum
from fastinterp.recipe import schema
from tests.methods.test_metamorphic import cases
from tests.support.checkpoints import assert_same, bell, floats, read, tensor, weights, write


def sums(name: str, based: bool | None = None) -> list[Sum]:
    """What a method asks for in the end, over all that its parameters' declarations suggest."""
    return [case.asks()[-1] for case in cases() if case.m.name == name and based in (None, case.based)]


def drops(total: Sum) -> bool:
    return isinstance(total, MaskedCombine) and (
        total.score is not None or any(not mask.keeps_all for mask in total.masks or ())
    )


@pytest.mark.parametrize("name", names())
def test_declarations_are_true(name):
    """Of the sums that the method asks for, by several values of each parameter."""
    m, asked = find(name), sums(name)
    masked = [total for total in asked if isinstance(total, MaskedCombine)]
    assert m.drops == any(map(drops, asked))
    assert m.draws == any(mask.is_random for total in masked for mask in total.masks or ())
    assert m.elects == any(total.sign_weights is not None for total in masked)
    if m.base != "none":
        kinds = [total for total in sums(name, True) if isinstance(total, (Combine, GroupCombine))]
        assert m.sums_deltas == all(total.base == 0 for total in kinds)
    else:
        assert not m.sums_deltas
    walks = [case for case in cases() if case.m.name == name and case.m.walks]
    assert bool(walks) == m.walks
    for case in walks:
        a, b = case.draw()
        assert (case.merge([a, b], t=0.0) == a).all() and (case.merge([a, b], t=1.0) == b).all()


@pytest.mark.parametrize("name", names())
def test_weights_that_are_divided_by_their_sum(name):
    """Twice the weights make the same tensor where the recipe's warnings take that for granted, and only there."""
    for case in (case for case in cases() if case.m.name == name and "weight" in case.parameters):
        inputs, weight = case.draw(), case.parameters["weight"]
        same = np.allclose(case.merge(inputs), case.merge(inputs, weight=tuple(2 * w for w in weight)), rtol=1e-6)
        given = {p.name: case.parameters.get(p.name, p.default) for p in case.m.parameters}
        divides = [given[key] for key in ("normalize", "normalize_weights") if key in given]
        assert same == (
            case.m.relative
            or (divides == [True] and (not case.m.elects or given.get("preset", "mergekit") == "mergekit"))
        )


@pytest.mark.parametrize("name", names())
def test_what_is_for_more_models_exists(name):
    words = find(name).for_more.split("`")[1::2]
    assert {word for word in words if word != "slices"} <= set(names())


@method(base="required", models=(2, 64), sums_deltas=True, drops=True, draws=True)
def coin_flip(
    n: int, tensor: Tensor, *, weight: Each[float], density: Each[Unit] = (1.0,), rescale: bool = True
) -> Steps:
    """A random-drop method whose name says nothing.     out = x0 + sum_i w_i*s_i*m_i*(x_i - x0)"""
    masks = at_random(weight, density)
    scales = yield from l1_ratios(tensor, masks, rescale)
    return summed(weight, masks, scales, 1.0)


@method(base="required", models=(2, 64), sums_deltas=True)
def dare_nothing(n: int, *, weight: Each[float], density: Each[Unit] = (1.0,)) -> Combine:
    """A plain sum whose name is that of a random-drop method.     out = x0 + sum_i w_i*(x_i - x0)"""
    return Combine((0.0, *weight), base=0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base/, a/ and b/ in the current folder; recipes find the two methods above by their names."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("base", "a", "b")):
        write(tmp_path / name, {f"layers.{k}.mlp.w": weights(10 * i + k, F32, (64, 48)) for k in range(2)})
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "x", "num_hidden_layers": 2}))
    foreign: dict[str, Method] = {"coin_flip": coin_flip, "dare_nothing": dare_nothing}

    def found(name: str) -> Method:
        return foreign.get(name) or find(name)

    monkeypatch.setattr(schema, "find", found)
    return tmp_path


def recipe(name: str, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": name,
        "base_model": "base",
        "models": [{"model": m, "parameters": {"weight": 0.5}} for m in ("a", "b")],
        "parameters": parameters,
        "seed": 7,
    }


def warned(**keys: Any) -> list[str]:
    return [finding.message for finding in fastinterp.check(keys).warnings]


def test_the_check_goes_by_declarations(folder):
    assert warned(**recipe("coin_flip", density=0.5)) == warned(**recipe("dare_linear", density=0.5)) == []
    assert warned(**recipe("coin_flip", density=1)) == [
        "`density` 1 drops nothing, and dropping is what coin_flip is for"
    ]
    assert warned(**recipe("coin_flip")) == ["without a `density`, coin_flip drops nothing: its default is 1"]
    unused = ["`seed` changes nothing: dare_nothing draws nothing, and rounding is to nearest"]
    assert warned(**recipe("dare_nothing", density=1)) == warned(**recipe("dare_nothing")) == unused
    assert warned(**recipe("task_arithmetic")) == [unused[0].replace("dare_nothing", "task_arithmetic")]


def explained(explanation: Explanation, key: str) -> Any:
    return explanation.as_dict()[key]


def test_explain_goes_by_declarations(folder):
    plan = fastinterp.explain(recipe("coin_flip", density=0.5))
    assert "elements are dropped at random, seed 7" in str(plan)
    assert explained(plan, "draws") is True
    assert {p["parameter"]: p["cases"][0]["value"] for p in explained(plan, "given")["parameters"]}["density"] == 0.5
    plan = fastinterp.explain(recipe("dare_nothing", density=0.5))
    assert "seed" not in str(plan)
    assert explained(plan, "draws") is False


def test_the_merge_draws_what_the_method_asks_for(folder):
    """The bytes of dare_linear; other elements by another seed; half of each model."""
    for out, keys in (("out", {}), ("dare", {"merge_method": "dare_linear"}), ("other", {"seed": 8})):
        fastinterp.merge(recipe("coin_flip", density=0.5) | keys, out)
    merged, base = read(folder / "out"), read(folder / "base")
    assert_same(merged, read(folder / "dare"))
    for name, t in merged.items():
        assert (t.raw != read(folder / "other")[name].raw).any()
        untouched = (floats(t) == floats(base[name])).mean()  # of both models: one in four
        assert 0.2 < untouched < 0.3


def test_deltas_that_are_rounding_noise_are_told_where_deltas_are_summed(folder):
    """Not of slerp, which has a base and sums no deltas."""
    exact = bell(1, 16384)
    for name, size in (("base", 0.0), ("a", 5e-3)):
        write(folder / name, {"w": tensor(exact + size * bell(2, 16384), F8_E4M3)})
    common = {"base_model": "base", "models": [{"model": "a"}]}
    summed_deltas = {"merge_method": "task_arithmetic", "parameters": {"weight": 0.5}, **common}
    assert sum("mostly rounding noise" in message for message in warned(**summed_deltas)) == 1
    assert warned(**{"merge_method": "slerp", "parameters": {"t": 0.5}, **common}) == []
