"""`inspect` of a model with adapters: what they change in it, then the model and the adapters."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fastinterp.inspect.describe import as_dict, as_text
from fastinterp.messages import counted, plain, table
from fastinterp.plan.models import Model


def adapted_as_dict(model: Model) -> dict[str, Any]:
    """Plain values, as --json prints them: those of the model, with `adapted`, `adapters` and `warnings`."""
    assert model.checkpoint is not None
    return {
        **as_dict(model.checkpoint),
        "adapted": [
            {"name": name, "shape": list(tensor.shape), "formula": tensor.formula}
            for name, tensor in model.tensors.items()
            if tensor.formula
        ],
        "adapters": [as_dict(adapter) for adapter in model.checkpoint.adapters],
        "warnings": list(model.warnings),
    }


def adapted_as_text(model: Model, *, every: bool = False) -> str:
    """The same as text."""
    values = adapted_as_dict(model)
    assert model.checkpoint is not None
    kinds = Counter(tensor["formula"] for tensor in values["adapted"])
    lines = [f"{plain(model.name)}: adapters change {counted(len(values['adapted']), 'tensor')}"]
    lines += table([[formula, counted(count, "tensor")] for formula, count in kinds.items()], "<>")
    lines += [f"warning: {plain(warning)}" for warning in model.warnings]
    parts = [as_text(part, every=every) for part in (model.checkpoint, *model.checkpoint.adapters)]
    return "\n\n".join(["\n".join(lines), *parts])
