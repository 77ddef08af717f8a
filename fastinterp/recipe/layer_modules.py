"""Names of modules in what a configuration says of quantised weights, for layers that were cut and stacked anew:
`modules_to_not_convert: [model.layers.0.mlp.gate]`, `ignore`, `exclude_modules`, and mappings from such names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastinterp.recipe.targets import LayerCount

_ANYTHING = re.compile(r"^(re:)?[\^.*]*")  # the start of a pattern that fits whatever comes before a name


def with_layers(value: Any, counts: Sequence[LayerCount]) -> Any:
    """A part of a configuration in which names of layers are those that these have in the output.

    A layer is described as the origin's layer of the same number as its source is, whose format it keeps.
    counts  the stacks with other layers
    """
    if isinstance(value, Mapping):
        return {new: with_layers(item, counts) for name, item in value.items() for new in _names(name, counts)}
    if isinstance(value, list):
        every = [name for item in value for name in (_names(item, counts) if isinstance(item, str) else [item])]
        strings = all(isinstance(item, str) for item in every)
        return list(dict.fromkeys(every)) if strings else [with_layers(item, counts) for item in every]
    return value


def _names(name: str, counts: Sequence[LayerCount]) -> list[str]:
    """The names in the output of what has this one; none, if the output does not have the layer."""
    for count in counts:
        stack = count.prefix.rpartition(".")[2]
        for found in re.finditer(rf"(?<!\w){re.escape(stack)}\\?\.([0-9]+)(?!\w)", name):
            start = name[: found.start()] + stack
            own = "." + _ANYTHING.sub("", start).replace("\\", "")
            if own.endswith(f".{count.prefix}") or f".{count.prefix}".endswith(own):
                before, after = name[: found.start(1)], name[found.end(1) :]
                return [f"{before}{i}{after}" for i, layer in enumerate(count.layers) if layer == int(found[1])]
    return [name]
