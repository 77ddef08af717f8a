"""A check that a module still holds the tensors that it had: before every change of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

from fastinterp.torch_models.module_tensors import Weight, addresses_of, identity_of, tensors_of


class TensorWatch:
    """Remembers where the weights of a module are: in which modules, and at which addresses.

    To make a state dict takes milliseconds, as long as a device takes to change a model. So `gone` first looks at each
    submodule and tensor where it was, and makes a state dict only if one of them is not there.
    """

    def __init__(self, module: Any, weights: Sequence[Weight]):
        self._module = module
        self._identities = [(w.name, identity_of(w.tensor)) for w in weights if w.nbytes]
        self._submodules = [(m._modules, name, child) for m in module.modules() for name, child in m._modules.items()]
        slots = {}
        for prefix, part in module.named_modules(remove_duplicate=False):
            for held in (part._parameters, part._buffers):
                slots.update({f"{prefix}.{name}".lstrip("."): (held, name, x) for name, x in held.items()})
        names = [name for w in weights if w.nbytes for name in w.names]
        # A name that a module's own state_dict has made up is in no slot.
        named = [slots.get(name) for name in names]
        found = [slot for slot in named if slot is not None and slot[2] is not None]
        self._slots = [held for held, _, _ in found], [name for _, name, _ in found]
        self._tensors = [x for _, _, x in found]
        self._addresses = addresses_of(self._tensors)
        self._quick = len(found) == len(names)

    def gone(self) -> list[str]:
        """Names of the weights that the module no longer holds, or at another address."""
        if (
            self._quick
            and all(map(is_, map(dict.get, *self._slots), self._tensors))
            and addresses_of(self._tensors) == self._addresses
            and all(children.get(name) is child for children, name, child in self._submodules)
        ):
            return []
        there = {identity_of(tensor) for _, tensor in tensors_of(self._module)}
        return [name for name, identity in self._identities if identity not in there]
