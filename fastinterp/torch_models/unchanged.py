"""A quick look whether a module's tensors are where they were: before every change of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastinterp.torch_models.module_tensors import Weight, place_of, tensors_of


class Standing:
    """Where the weights of a module were.

    A state dict takes milliseconds to make, as long as a device takes to change a model. So first parts and tensors
    are looked at, one by one, in the places that they had.
    """

    def __init__(self, module: Any, weights: Sequence[Weight]):
        self._module = module
        self._places = [(w.name, place_of(w.tensor)) for w in weights if w.nbytes]
        self._parts = [(p._modules, name, part) for p in module.modules() for name, part in p._modules.items()]
        own = {}
        for prefix, part in module.named_modules(remove_duplicate=False):
            for held in (part._parameters, part._buffers):
                own.update({f"{prefix}.{name}".lstrip("."): (held, name, x) for name, x in held.items()})
        names = [name for w in weights if w.nbytes for name in w.names]
        # What a module's own state_dict calls otherwise is not found.
        found = [own.get(name) for name in names]
        self._tensors = [(*f, f[2].data_ptr()) for f in found if f is not None and f[2] is not None]
        self._quick = len(self._tensors) == len(names)

    def gone(self) -> list[str]:
        """Names of tensors that the module holds no more, or elsewhere."""
        if (
            self._quick
            and all(held.get(name) is x and x.data_ptr() == at for held, name, x, at in self._tensors)
            and all(parts.get(name) is part for parts, name, part in self._parts)
        ):
            return []
        found = {place_of(tensor) for _, tensor in tensors_of(self._module)}
        return [name for name, place in self._places if place not in found]
