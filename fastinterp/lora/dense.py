"""Changes of a weight merged by a method that is no weighted sum, and factors of what it makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastinterp.in_memory.merge import merge_tensors
from fastinterp.lora.algebra import STREAM, Array, Blocks, balanced, padded, randomised_svd
from fastinterp.lora.plan import AdapterPlan, PlannedProduct
from fastinterp.methods import Parameter
from fastinterp.ops.combine import philox_key

Pairs = list[tuple[Array, Array]]  # (B, A) of each expert


def merged_factors(
    plan: AdapterPlan, product: PlannedProduct, pairs: Sequence[Pairs | None], rank: int, threads: int
) -> tuple[Pairs, float, float]:
    """(factors of each expert, |D|, |D - B A|) of the merged change D.

    pairs  of each input of the product's target; None: it does not change the weight

    Masks are drawn from the weight's name and shape, as in a merge of whole models. Raises: MethodError.
    """
    recipe, target = plan.recipe, product.target
    transposed = product.first.kind in ("embedding", "parameter") or plan.adapters[0].fan_in_fan_out
    scales = [0.0 if p is None else p.scale for p in product.products]
    experts = next(len(pair) for pair in pairs if pair is not None)
    deltas = [_dense(product, pair, scale, experts, transposed) for pair, scale in zip(pairs, scales, strict=True)]
    base = deltas.pop(0) if target.has_base else None
    merged: Array = merge_tensors(
        deltas, recipe.method, base=base, parameters=_parameters(recipe.method.parameters, target.parameters),
        name=product.name, dtype="float32", seed=recipe.seed, threads=threads,
    )  # fmt: skip
    del deltas, base
    made: Pairs = []
    norms, errors = [], []
    for expert in range(experts):
        blocks = Blocks(np.ascontiguousarray(merged.reshape(experts, merged.shape[-2], -1)[expert]), threads)
        u, s, v = randomised_svd(blocks, rank, philox_key(recipe.seed, STREAM, f"{product.name}.{expert}"))
        b, a = padded(*balanced(u, s, v, rank), rank)
        norms.append(blocks.squares())
        errors.append(blocks.residual(b, a))
        made.append((a.T, b.T) if transposed else (b, a))
    return made, math.sqrt(math.fsum(norms)), math.sqrt(math.fsum(errors))


def _dense(product: PlannedProduct, pairs: Pairs | None, scale: float, experts: int, transposed: bool) -> Array:
    """f32: the change of a weight, [rows, columns], or [experts, rows, columns], as the base stores it."""
    rows, columns = product.matrix[::-1] if transposed else product.matrix
    out = np.zeros((experts, rows, columns), np.float32)
    for expert, (b, a) in enumerate(pairs or ()):
        b = (b.astype(np.float64) * scale).astype(np.float32)
        np.matmul(*((a.T, b.T) if transposed else (b, a)), out=out[expert])
    return out[0] if experts == 1 else out


def _parameters(declared: Sequence[Parameter], values: Any) -> dict[str, Any]:
    """Parameters as `merge_tensors` takes them: by their names in recipes, words with their keys."""
    given: dict[str, Any] = {}
    for p in declared:
        value = values[p.keyword]
        if p.key is not None:
            value = [{p.key: one} for one in value] if p.each else {p.key: value}
        given[p.name] = list(value) if p.each else value
    return given
