"""A module that takes on the weights of one point after the other, and gets its own back at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from fastinterp.errors import ShapeError, UsageError
from fastinterp.execute.sources import Sources
from fastinterp.in_memory.merge import StoredTensor
from fastinterp.torch_models.module_tensors import Mismatches, place_of, tensors_of, weights_of
from fastinterp.torch_models.path_endpoints import End, opened, same


class Walker:
    """A context manager: inside it `take` puts weights into the module, and the end restores what was there.

    Tied tensors are one, under the first of their names. The module may be on any device.
    Raises: UsageError, if it is no torch module; ShapeError, with all that does not fit.
    """

    def __init__(self, module: Any, ends: Sequence[End]):
        self._module, self._ends = module, ends
        self._weights = weights_of(module, None)
        self._saved: dict[str, Any] = {}
        self._apart: dict[Any, Any] = {}  # copies of what end points have in the module's own memory, by place
        wrong = Mismatches()
        for end in ends:
            wrong.check(self._weights, end.name, end.facts())
        wrong.refuse()
        with opened(ends) as (every, files):
            for end, tensors in zip(ends, every, strict=True):
                self._check_tied(end, tensors, files)

    def __enter__(self) -> Walker:
        self._saved = {w.name: w.tensor.clone() for w in self._weights}
        ours = {w.tensor.untyped_storage().data_ptr() for w in self._weights}
        given = [x for end in self._ends for x in (end.state or {}).values() if hasattr(x, "untyped_storage")]
        self._apart = {place_of(x): x.clone() for x in given if x.untyped_storage().data_ptr() in ours}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        own = dict(tensors_of(self._module))
        converted = [n for n, x in self._saved.items() if n not in own or own[n].dtype != x.dtype]
        self.take({name: x for name, x in self._saved.items() if name in own})
        self._saved, self._apart = {}, {}
        if converted and kind is None:
            raise UsageError(
                f"{converted[0]} was converted or replaced while the path was walked, so the module does not have its "
                "own weights again. Load it anew"
            )

    def named(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Those of an end point that the module has, each once, by the name that `take` knows them by."""
        found = {w.name: tensors[next(n for n in w.names if n in tensors)] for w in self._weights}
        return {
            name: x if isinstance(x, StoredTensor) else self._apart.get(place_of(x), x) for name, x in found.items()
        }

    def take(self, tensors: Mapping[str, Any]) -> None:
        """Write tensors into the module, by the names of `named`. They are of its dtypes."""
        import torch

        own = dict(tensors_of(self._module))  # anew: it may have been moved
        for name, x in tensors.items():
            with torch.inference_mode(own[name].is_inference()), torch.no_grad():
                own[name].copy_(x)

    def _check_tied(self, end: End, tensors: Mapping[str, Any], files: Sources) -> None:
        for weight in self._weights:
            first, *others = [name for name in weight.names if name in tensors]
            for other in others:
                if not same(tensors[first], tensors[other], files):
                    raise ShapeError(
                        f"{first} and {other} are one tensor in the module, but differ in {end.name}. "
                        "Untie them: tie_word_embeddings=False in the module's configuration",
                        tensor=other,
                    )


def dtypes_of(module: Any) -> dict[str, str]:
    """The dtypes of a module's floating tensors that can be merged, by all of their names. Raises: UsageError."""
    return {n: str(w.tensor.dtype) for w in weights_of(module, None) if w.dtype is not None for n in w.names}
