"""What a fine-tune changed: a plan in which its tensors and those of the base are matched, and norms of the changes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from fastinterp.backends.cpu import Progress
from fastinterp.checkpoint.names import quote
from fastinterp.checkpoint.same_bytes import same_bytes
from fastinterp.errors import CheckpointError, ShapeError, UsageError
from fastinterp.lora.parts import HasShape
from fastinterp.lora.tensors import TensorReader
from fastinterp.plan.inputs import TensorInput
from fastinterp.plan.plan import Plan, plan_recipe
from fastinterp.plan.planned import PlannedTensor


def plan_change(base: str, finetune: str) -> Plan:
    """The plan of finetune - base, in which names and shapes are matched. Raises: what plan_recipe does."""
    models: list[dict[str, Any]] = [
        {"model": base, "parameters": {"weight": -1.0}},
        {"model": finetune, "parameters": {"weight": 1.0}},
    ]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"normalize": False}, "integers": finetune}
    if os.path.realpath(base) == os.path.realpath(finetune):
        raise UsageError(f"the fine-tune and its base are the same checkpoint: {quote(base)}")
    try:
        plan = plan_recipe(recipe, None, "float32", None, None)
    except ShapeError as error:  # without the keys of recipes that allow different tensors
        message = error.message.partition(" `missing: ")[0]
        raise ShapeError(
            f"{message} An adapter needs a fine-tune that has the tensors of its base, in the same shapes"
        ) from None
    if plan.origin.source is not None and plan.origin.source.components:
        raise CheckpointError(
            "it consists of several components, each a model of its own. Name the folders of one, in both: "
            f"{quote(f'{base}/{plan.origin.source.components[0].folder}')}, for example",
            file=base,
        )
    return plan


def pair_of(plan: Plan, tensor: PlannedTensor) -> tuple[TensorInput, ...]:
    """The tensor in the base and in the fine-tune."""
    if tensor.merged:
        return tensor.inputs
    models = plan.checkpoints[:2]
    return tuple(model.tensors[tensor.name] if tensor.name in model.tensors else tensor.inputs[0] for model in models)


def shapes_of(plan: Plan) -> dict[str, HasShape]:
    return {t.name: HasShape(t.shape if t.merged else (), t.numel) for t in plan.tensors}


def norms_of_changes(
    plan: Plan, inputs: Mapping[str, Sequence[TensorInput]], reader: TensorReader, progress: Progress | None
) -> dict[str, float]:
    """The Frobenius norm of the change of each tensor that differs; of integers 0.

    Raises: CheckpointError, if there are NaN or Inf, or nothing differs.
    """
    merged = [t.name for t in plan.tensors if t.merged]
    answers = reader.measured([inputs[name] for name in merged], progress)
    norms: dict[str, float] = {}
    for name, (sums, nonzero) in zip(merged, answers, strict=True):
        if not math.isfinite(sums[2]):
            raise CheckpointError(
                f"tensor {quote(name)}: there is NaN or Inf in it, or in that of the base, which no factors can hold",
                file=plan.checkpoints[1].name,
                tensor=name,
            )
        if nonzero[1]:
            norms[name] = math.sqrt(sums[2])
    for name in (t.name for t in plan.tensors if not t.merged):
        places = [(x.plain.path, x.plain.start, x.plain.nbytes) for x in inputs[name] if x.plain is not None]
        if len(places) == 2 and not same_bytes(*places):
            norms[name] = 0.0
    if not any(norms.values()):
        raise CheckpointError(
            f"its numbers are those of the base {quote(plan.checkpoints[0].name)}: there is nothing to extract",
            file=plan.checkpoints[1].name,
        )
    return norms
