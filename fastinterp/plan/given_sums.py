"""Plans with the sums that a receipt has: what methods made of statistics is not computed again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from msgspec import structs

from fastinterp.errors import CheckpointError
from fastinterp.messages import clipped
from fastinterp.ops.plain_sums import sum_of
from fastinterp.ops.requests import Sum
from fastinterp.plan.plan import Plan
from fastinterp.plan.planned import PlannedTensor

Sums = Mapping[str, Sequence[Any]]  # by tensor: plain values, those of the stages of a chain in order, its own last


def with_sums(plan: Plan, sums: Sums, file: str) -> Plan:
    """The plan of one output, whose methods return these sums. Those of tensors that are not named are computed.

    file  the receipt, for messages
    Raises: CheckpointError, if a sum is none of its tensor.
    """
    return replace(plan, tensors=tuple(_given(t, sums[t.name], file) if t.name in sums else t for t in plan.tensors))


def _given(tensor: PlannedTensor, sums: Sequence[Any], file: str) -> PlannedTensor:
    stages = tensor.stages
    if not isinstance(sums, (list, tuple)) or len(sums) != len(stages):
        raise _damaged(tensor, f"expected {len(stages)} sums", file)
    made: dict[int, PlannedTensor] = {}

    def plan_of(stage: PlannedTensor) -> PlannedTensor:
        return made[id(stage)]

    for stage, value in zip(stages, sums, strict=True):
        inputs = tuple(i.made_by(plan_of) for i in stage.inputs) if len(stages) > 1 else stage.inputs
        program = stage.program
        if program is not None and value is not None:
            total = _checked(stage, value, file)
            reads = (("combine", tuple(range(len(stage.inputs)))),)
            program = structs.replace(program, calls=(lambda total=total: total,), reads=reads, whole=False)
        made[id(stage)] = structs.replace(stage, inputs=inputs, program=program)
    return made[id(tensor)]


def _checked(tensor: PlannedTensor, value: Any, file: str) -> Sum:
    shape = tensor.shape
    rows, columns = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (1, tensor.numel)
    try:
        return sum_of(value, len(tensor.inputs), {"row": rows, "column": columns})
    except ValueError as error:
        raise _damaged(tensor, clipped(str(error)), file) from None


def _damaged(tensor: PlannedTensor, what: str, file: str) -> CheckpointError:
    return CheckpointError(
        f"the coefficients of {tensor.name} in the receipt are damaged: {what}", file=file, tensor=tensor.name
    )
