"""What tests of merges on devices share: models and recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastinterp.ops.dtypes import BF16, F32
from tests.support.checkpoints import Tensor, family, moved, recipe, saved, weights
from tests.support.devices.fake_device import FakeDevice

KB = 1 << 10


SLOT = 256 * KB  # of the tests: the largest tensors take many batches


Use = Callable[..., list[FakeDevice]]


def models(count: int) -> list[dict[str, Tensor]]:
    """Tiny tensors, of which a batch has many, and large ones of odd sizes, which have many batches."""
    left_out = [n for n, t in family(1)[0].items() if n.startswith("patterns") or t.raw.size * 8 == t.dtype.bits]
    every = [{n: t for n, t in m.items() if n not in left_out} for m in family(count)]
    for i, model in enumerate(every):
        for seed, (dtype, shape) in enumerate([(BF16, (321, 1001)), (F32, (260, 515)), (BF16, (200_003,))]):
            first = weights(70 + seed, dtype, shape)
            model[f"large.{seed}"] = moved(first, 1000 * i + seed, 1e-3, dtype)
        for seed in range(40):
            model[f"tiny.{seed}"] = moved(weights(seed, BF16, (2 + seed % 5,)), 100 * i + seed, 1e-3, BF16)
    return every


def names(count: int) -> str:
    return "cuda:" + ",".join(map(str, range(count)))


METHODS: dict[str, Any] = {
    "linear": lambda p: recipe("linear", p, weights=[0.5, 0.3, 0.2]),
    "linear in float32": lambda p: recipe("linear", p, weights=[0.5, 0.3, 0.2], out_dtype="float32"),
    "stochastic": lambda p: recipe("linear", p, weights=[0.5, 0.3, 0.2], rounding="stochastic", seed=5),
    "task_arithmetic": lambda p: recipe("task_arithmetic", p[1:], weights=[0.4, 0.7], base_model=p[0]),
    "slerp": lambda p: recipe("slerp", p[1:2], base_model=p[0], parameters={"t": 0.3}),
    "ties": lambda p: recipe("ties", p[1:], weights=[0.5, 0.5], base_model=p[0], parameters={"density": 0.4}),
    "dare_linear": lambda p: recipe(
        "dare_linear", p[1:], weights=[0.5, 0.5], base_model=p[0], parameters={"density": 0.4, "rescale": True}
    ),
    "della": lambda p: recipe(
        "della", p[1:], weights=[0.5, 0.5], base_model=p[0], parameters={"density": 0.5, "epsilon": 0.2}
    ),
    "model_stock": lambda p: recipe("model_stock", p[1:], base_model=p[0]),
    "filter_wise": lambda p: recipe("model_stock", p[1:], base_model=p[0], parameters={"filter_wise": True}),
    "arcee_fusion": lambda p: recipe("arcee_fusion", p[1:2], base_model=p[0]),
}


def small(tmp_path: Path) -> list[str]:
    """Two models of which every byte can be counted."""
    every = [{f"{n}": t for n, t in m.items() if not n.startswith("large")} for m in models(2)]
    for i, model in enumerate(every):
        model["large"] = moved(weights(1, BF16, (40_001,)), i, 1e-3, BF16)
    return saved(tmp_path, every)
