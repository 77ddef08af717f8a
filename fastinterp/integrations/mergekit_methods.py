"""The engine in place of what the built-in methods of mergekit's registry compute.

`MergeMethod._execute_resolved` of mergekit is what every way to a method goes through: its `merge_tensors` and
`merge_state_dicts`, a call of the method itself, mergekit-pytorch and the graph behind `run_merge`. By then inputs are
checked and parameters are bound. mergekit's contracts stay: the base by index or key, inputs of any strides, results in
the dtype asked for, else in that which torch promotes the inputs' to.

Arithmetic is float32 as everywhere here, so float64 stays with mergekit. So do gradients through masks and through
angles by row, tensors that are no plain ones on the CPU or a CUDA device (meta, fake, subclasses), and what a method
here does not accept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mergekit import merge_methods
from mergekit.merge_methods.base import MergeMethod, PerInputValues, TensorGroup
from mergekit.merge_methods.dtype import align_dtype, promoted_dtype

from fastinterp.errors import CheckpointError, UsageError
from fastinterp.in_memory.merge import merge_tensors
from fastinterp.methods import Method, find, names

LOG = logging.getLogger(__name__)

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # of results; float64 would be computed in float32
_DEVICES = ("cpu", "cuda")

_theirs: Callable[..., tuple[torch.Tensor, ...]] = MergeMethod._execute_resolved
_ours: dict[int, Method] = {}  # by the id of mergekit's method, which its registry keeps alive
_said: set[str] = set()  # reasons that were logged


def install() -> None:
    """Replace what the built-in methods compute, in this process."""
    for method in merge_methods.registered_methods():
        if _is_built_in(method) and method.spec.name in names() and method.spec.name != "passthrough":
            _ours[id(method)] = find(method.spec.name)
    MergeMethod._execute_resolved = _execute_resolved


def uninstall() -> None:
    """Give mergekit's methods back what they compute."""
    MergeMethod._execute_resolved = _theirs
    _ours.clear()
    _said.clear()


def _is_built_in(method: MergeMethod) -> bool:
    """Whether mergekit brings the method along: others of the same name are their authors'."""
    of = getattr(method, "implementation", type(method))
    return str(of.__module__).startswith("mergekit.merge_methods.")


def _execute_resolved(
    self: MergeMethod,
    groups: Sequence[TensorGroup],
    parameters: list[dict[str, Any]],
    *,
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    batch_options: Any = None,
) -> tuple[torch.Tensor, ...]:
    """One tensor for each group, as mergekit's; by mergekit where `_refusal` has a reason."""
    method = _ours.get(id(self))
    if any(t is not None and not getattr(t, "is_floating_point", False) for t in (dtype, out_dtype)):
        method = None  # mergekit refuses it
    results: list[torch.Tensor] = []
    for group, values in zip(groups, parameters, strict=True):
        why = "" if method is None else _refusal(method, group, dtype, out_dtype)
        result = None
        if method is not None and not why:
            try:
                aligned = group if dtype is None else align_dtype(group, dtype)
                result = _merged(method, aligned, values, dtype or promoted_dtype(group), out_dtype)
            except (UsageError, CheckpointError) as error:
                why = str(error)
        if result is None:
            # All of them together: mergekit looks at every group before it computes any.
            _say(self.spec.name, why)
            return _theirs(
                self, groups, parameters, dtype=dtype, out_dtype=out_dtype, batch_options=batch_options
            )  # fmt: skip
        results.append(result)
    return tuple(results)


def _refusal(method: Method, group: TensorGroup, dtype: Any, out_dtype: Any) -> str:
    """Why a group stays with mergekit; "" if it does not."""
    tensors = group.tensors
    low, high = method.models
    if not low <= len(tensors) <= high:
        return f"fastinterp takes {low} to {high} tensors, not {len(tensors)}"
    if any(type(t) not in (torch.Tensor, torch.nn.Parameter) or t.layout != torch.strided for t in tensors):
        return "only plain tensors are merged by fastinterp"
    if tensors[0].device.type not in _DEVICES:
        return f"fastinterp does not merge on {tensors[0].device.type}"
    kept = dtype or promoted_dtype(group)
    return "" if kept in _FLOATS else f"fastinterp computes in float32, not in {kept}"


def _merged(
    method: Method, group: TensorGroup, values: dict[str, Any], dtype: torch.dtype, out_dtype: torch.dtype | None
) -> torch.Tensor:
    """The merge of one group by a method here, in `out_dtype`, else in `dtype`.

    Raises: UsageError, CheckpointError.
    """
    stored = out_dtype if out_dtype in _FLOATS else dtype  # of the sum; rounded once
    base = group.base if method.base != "none" else None
    entries = group.entries if base is None else group.non_base
    known = {p.name for p in method.parameters}
    given = {
        name: value.values_for(entries) if isinstance(value, PerInputValues) else value
        for name, value in values.items()
        if name in known
    }
    # As in mergekit, torch's generator decides: the same seed gives the same masks, and no two calls the same ones.
    seed = int(torch.randint(2**62, ()).item()) if method.draws else 0
    result: torch.Tensor = merge_tensors(
        [entry.tensor.contiguous() for entry in entries],
        method,
        base=None if base is None else base.tensor.contiguous(),
        parameters=given,
        name=group.metadata.name or "tensor",
        dtype=str(stored).removeprefix("torch."),
        seed=seed,
    )
    return result if out_dtype is None else result.to(out_dtype)


def _say(name: str, why: str) -> None:
    """Log a reason, once."""
    message = f"`{name}` computed by mergekit, not by fastinterp: {why}"
    if why and message not in _said:
        _said.add(message)
        LOG.warning(message)
