"""Output layers that are the input embedding, where an adapter changes one of the two, or both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.lora import LoraAdapter
from fastinterp.checkpoint.names import listing, quote
from fastinterp.checkpoint.same_bytes import same_bytes
from fastinterp.errors import CheckpointError
from fastinterp.plan.inputs import TensorInput
from fastinterp.tokenizer.tied_embeddings import (
    bias_of_head,
    copied_from,
    embedding_of,
    head_of,
    is_input_embedding,
    is_shared,
    is_tied,
)


def untie(
    adapter: LoraAdapter,
    places: Mapping[str, str],
    tensors: dict[str, TensorInput],
    config: Mapping[str, Any],
    base: str,
) -> LoraAdapter:
    """Give the base an output layer of its own, if it has none and the adapter changes one of the two: attached, it
    changes just that one. Rows of tokens are changed in both.

    places   the base's name of each tensor that the adapter changes
    tensors  of the base, to which the output layer is added
    config   its config.json
    base     its name, for messages
    Returns: the adapter without tensors that are copies of others, which the base does not have.
    Raises: CheckpointError, if that changes what the model does with it, or if it is not known what it is called.
    """
    untying = _Untying(adapter, places, tensors, config, base)
    untying.untie()
    return untying.adapter


class _Untying:
    """The arguments of `untie`; `adapter` is what it returns."""

    def __init__(
        self,
        adapter: LoraAdapter,
        places: Mapping[str, str],
        tensors: dict[str, TensorInput],
        config: Mapping[str, Any],
        base: str,
    ):
        self.adapter, self.places, self.tensors = adapter, places, tensors
        self.config, self.base, self.checkpoint = config, base, adapter.checkpoint

    def untie(self) -> None:
        """Raises: CheckpointError."""
        if self.adapter.config.get("ensure_weight_tying"):
            self._without_copies()
            return
        if self._are_copies():
            return
        changed = [m.weight for m in self.adapter.modules if not m.parameters] + [*self.adapter.replaced]
        absent = [place for name in changed if (place := self.places[name]) not in self.tensors]
        heads = [place for place in absent if embedding_of(place, self.tensors)]
        own = [*heads]
        inputs = [place for name in changed if is_input_embedding(place := self.places[name])]
        if not heads and inputs and is_tied(self.tensors):
            head = head_of(inputs[0], self.tensors, self._architectures())
            heads = [] if head is None else [head]
        if not heads:
            self._one_bias()
            return
        rows = [
            place for rows in self.adapter.rows if is_input_embedding(place := self.places[f"{rows.module}.weight"])
        ]
        if rows or "" in heads or any(is_shared(name) for name in self.tensors):
            kind = quote(str(self.config.get("model_type")))
            what = "rows of tokens of one are rows of both" if rows else f"a model of the type {kind} needs them alike"
            raise CheckpointError(
                f"the adapter changes {listing([*own, *inputs, *rows])}, but the input embedding of {self.base} is its "
                f"output layer, too, and {what}: one cannot be changed alone",
                file=self.checkpoint.name,
            )
        for head in heads:
            embedding = embedding_of(head, self.tensors)
            assert embedding is not None
            if bias := bias_of_head(head, self.tensors):
                self.tensors[bias[0]] = replace(self.tensors[bias[1]], name=bias[0])
            self.tensors[head] = replace(self.tensors[embedding], name=head)

    def _are_copies(self) -> bool:
        """Leave out tensors that replace copies of an embedding, if they are copies of what replaces that, too: then
        the model stays tied. Returns: whether they are.
        """
        given = {self.places[name]: (name, entry) for name, entry in self.adapter.replaced.items()}
        sources = {place: copied_from(place, self.tensors) for place in given if place not in self.tensors}
        copies = {place: given[source][1] for place, source in sources.items() if source in given}
        equal = all(self._same(given[place][1], entry) for place, entry in copies.items())
        if not equal or not any(place.endswith(".weight") for place in copies):
            return False
        left = {name: entry for place, (name, entry) in given.items() if place not in copies}
        self.adapter = replace(self.adapter, replaced=left)
        return True

    def _same(self, a: Entry, b: Entry) -> bool:
        """Whether two tensors of the adapter are equal."""
        first, second = ((self.checkpoint.files[x.file], x.start, x.nbytes) for x in (a, b))
        return (a.dtype, a.shape, a.conversion) == (b.dtype, b.shape, b.conversion) and same_bytes(first, second)

    def _one_bias(self) -> None:
        """Leave out the bias of an output layer that is a copy of another, which the adapter replaces, too."""
        places = {self.places[name] for name in self.adapter.replaced}

        def copied(place: str) -> bool:
            bias = bias_of_head(f"{place.removesuffix('.bias')}.weight", self.tensors)
            return bias is not None and bias[0] == place and bias[1] in places

        replaced = {name: entry for name, entry in self.adapter.replaced.items() if not copied(self.places[name])}
        self.adapter = replace(self.adapter, replaced=replaced)

    def _without_copies(self) -> None:
        """Leave out what the adapter has for an output layer that is the input embedding, if peft kept them tied: it is
        a copy of what it has for that.
        """

        def copied(name: str) -> bool:
            place = self.places[name]
            return place not in self.tensors and embedding_of(place, self.tensors) is not None

        modules = tuple(m for m in self.adapter.modules if m.parameters or not copied(m.weight))
        replaced = {name: entry for name, entry in self.adapter.replaced.items() if not copied(name)}
        self.adapter = replace(self.adapter, modules=modules, replaced=replaced)

    def _architectures(self) -> list[str]:
        """Of the base's config.json."""
        architectures = self.config.get("architectures")
        names = architectures if isinstance(architectures, list) else []
        return [name for name in names if isinstance(name, str)]
