"""The warning about inputs that Python converts into a temporary file before they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from fastinterp.messages import counted, listed, size
from fastinterp.plan.inputs import TensorInput
from fastinterp.plan.models import Model
from fastinterp.plan.planned import PlannedTensor


def conversion_warnings(tensors: Iterable[PlannedTensor], models: Sequence[Model]) -> list[str]:
    """A warning for each model with inputs of these tensors that are converted first.

    models  those of the document, in its order
    """
    converted: dict[Hashable, tuple[int, TensorInput]] = {}
    for tensor in tensors:
        for model, one in tensor.pairs:
            if one.converted_from is not None:
                converted.setdefault(one.key, (model, one))
    warnings = []
    for model in dict.fromkeys(model for model, _ in converted.values()):
        every = [one for number, one in converted.values() if number == model]
        counts = Counter(one.converted_from for one in every)
        kinds = [f"{count} {kind}" for kind, count in counts.items()]
        are = "is" if len(every) == 1 else "are"
        warnings.append(
            f"{counted(len(every), 'tensor')} of {models[model].name} {are} converted by Python before the merge, "
            f"which takes time and {size(sum(one.nbytes for one in every))} of disk space: {listed(kinds, 8)}"
        )
    return warnings
