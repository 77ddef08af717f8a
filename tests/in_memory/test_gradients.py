"""Merges that autograd follows: gradients against differences of merges in float64, and what has none."""

from __future__ import annotations

from typing import Any

import pytest

import fastinterp
from fastinterp.errors import UsageError

torch = pytest.importorskip("torch")

# method -> with a base, number of other tensors, parameters
FOLLOWED: dict[str, tuple[bool, int, dict[str, Any]]] = {
    "linear": (False, 3, {"weight": [1.0, 2.0, 3.0]}),
    "linear-sum": (False, 2, {"weight": [0.5, -2.0], "normalize": False}),
    "task_arithmetic": (True, 2, {"weight": [0.3, 0.5], "lambda": 1.5}),
    "passthrough": (False, 1, {"scale": 3.0}),
    "slerp": (True, 1, {"t": 0.3}),
    "slerp-beyond": (True, 1, {"t": 1.3}),
    "slerp-end": (True, 1, {"t": 1.0}),
    "nuslerp": (False, 2, {"weight": [1.0, 2.0]}),
    "nuslerp-base": (True, 2, {"weight": [1.0, 2.0]}),
    "multislerp": (False, 3, {"weight": [1.0, 2.0, 1.0]}),
    "multislerp-base": (True, 3, {"weight": [1.0, 2.0, 1.0]}),
    "karcher": (False, 3, {}),
    "model_stock": (True, 3, {}),
}


def inputs(count, seed=0, shape=(6, 5)):
    rng = torch.Generator().manual_seed(seed)
    common = torch.linspace(0, 1, 30).reshape(shape)
    return [(0.3 * torch.randn(shape, generator=rng) + common).requires_grad_() for _ in range(count)]


def merge(way, tensors, dtype=None):
    based, _, parameters = FOLLOWED[way]
    base = tensors[0] if based else None
    return fastinterp.merge_tensors(
        tensors[based:], way.partition("-")[0], base=base, parameters=parameters, dtype=dtype
    )


@pytest.mark.parametrize("way", FOLLOWED)
def test_gradients_are_those_of_differences(way):
    """Of float64 merges, whose arithmetic is float32: a difference of 2h is off by 2^-23 / h, and h^2."""
    based, count, _ = FOLLOWED[way]
    tensors = inputs(count + based)
    towards = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    (merge(way, tensors) * towards).sum().backward()
    h = 2.0**-6
    for i, tensor in enumerate(tensors):
        for at in [(0, 0), (3, 2), (5, 4)]:
            ends = []
            for step in (h, -h):
                moved = [t.detach().double() for t in tensors]
                moved[i][at] += step
                ends.append((merge(way, moved, "float64") * towards).sum().item())
            assert tensor.grad[at].item() == pytest.approx((ends[0] - ends[1]) / (2 * h), abs=2e-4)


def test_the_result_is_that_without_gradients():
    for way, (based, count, _) in FOLLOWED.items():
        tensors = inputs(count + based)
        followed = merge(way, tensors)
        with torch.no_grad():
            assert torch.equal(merge(way, tensors), followed.detach()) and followed.requires_grad


def test_only_what_is_wanted_gets_a_gradient():
    a, b = inputs(2)
    b.requires_grad_(False)
    merge("slerp", [a, b]).sum().backward()
    assert a.grad is not None and b.grad is None


def test_state_dicts():
    """Each tensor has its own; integers are copied, and dtypes may differ."""
    models = [
        {
            "x": inputs(1, seed)[0],
            "y": inputs(1, seed + 5)[0].detach().bfloat16().requires_grad_(),
            "n": torch.arange(3),
        }
        for seed in (0, 1)
    ]
    out = fastinterp.merge_state_dicts([models[1]], "slerp", base=models[0], parameters={"t": 0.4})
    assert list(out) == ["x", "y", "n"] and torch.equal(out["n"], torch.arange(3)) and out["y"].dtype == torch.bfloat16
    out["x"].sum().backward()
    want = [model["x"].grad.clone() for model in models]
    assert all(model["y"].grad is None for model in models)
    alone = [model["x"].detach().requires_grad_() for model in models]
    fastinterp.merge_tensors(alone[1:], "slerp", base=alone[0], parameters={"t": 0.4}, name="x").sum().backward()
    assert all(torch.equal(w, x.grad) for w, x in zip(want, alone, strict=True))
    out["y"].sum().backward()
    assert all(model["y"].grad.dtype == torch.bfloat16 for model in models)


@pytest.mark.parametrize("shape", [(0,), (0, 3), ()], ids=str)
def test_empty_tensors_and_scalars(shape):
    x, y = (torch.ones(shape, requires_grad=True) for _ in "xy")
    fastinterp.merge_tensors([x, y], "linear", parameters={"weight": 1.0}).sum().backward()
    assert all(t.grad is None or torch.equal(t.grad, torch.full(shape, 0.5)) for t in (x, y))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"weight": 1.0, "density": 0.5}),
        ("dare_linear", {"weight": 1.0, "density": 0.5}),
        ("nuslerp", {"weight": 1.0, "nuslerp_flatten": False}),
        ("model_stock", {"filter_wise": True}),
    ],
    ids=str,
)
def test_what_has_no_gradient_says_so(method, parameters):
    base, *others = inputs(3)
    with pytest.raises(UsageError, match=rf"autograd cannot follow `{method}` here.*torch.no_grad\(\)"):
        fastinterp.merge_tensors(others, method, base=base, parameters=parameters)
    with torch.no_grad():
        fastinterp.merge_tensors(others, method, base=base, parameters=parameters)


def test_there_is_no_second_derivative():
    a, b = inputs(2)
    (first,) = torch.autograd.grad(merge("slerp", [a, b]).sum(), [a], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        first.sum().backward()
