"""Models as plans read them: a checkpoint, perhaps with other embeddings, or what a document above makes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from fastinterp.checkpoint.formats import EncodedTensor, encoded_tensors
from fastinterp.checkpoint.formats.activations import about_numbers, about_what_is_not_said, scales_of_activations
from fastinterp.checkpoint.formats.left_over import refuse_left_over
from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.names import quote
from fastinterp.checkpoint.open import Checkpoint, open_checkpoint, refuse_adapter
from fastinterp.checkpoint.quantised import quantised_in
from fastinterp.errors import CheckpointError, StorageError
from fastinterp.ops.dtypes import F32
from fastinterp.plan.inputs import ConvertedInput, Encoding, StoredInput, TensorInput
from fastinterp.recipe.references import ModelRef


class Model(msgspec.Struct, frozen=True, eq=False):
    """A model and its tensors.

    name        as the recipe has it
    root        the folder of its configuration and tokenizer
    tensors     by name, in the order of the checkpoint; encoded ones as what they are decoded
    checkpoint  what it was opened from; None: a document above makes it
    origin      if a document above makes it, the checkpoint from which it has its configuration and the names of files
    left_out    and those of that checkpoint's files which are not in `root`: reason -> names
    warnings    about it and its adapters
    remarks     what was decided about its tensors, for people
    as_numbers  what is true where weights are written as numbers: which were decoded, what is left out with their codes
    beside      tensors that mean nothing where weights are numbers, and belong to no single one: scales of keys
    """

    name: str
    root: Path
    tensors: Mapping[str, TensorInput]
    checkpoint: Checkpoint | None = None
    origin: Checkpoint | None = None
    left_out: Mapping[str, tuple[str, ...]] = {}
    warnings: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    as_numbers: tuple[str, ...] = ()
    beside: tuple[StoredInput, ...] = ()

    @property
    def source(self) -> Checkpoint | None:
        """The checkpoint whose file names and header metadata it has."""
        return self.checkpoint or self.origin

    @property
    def files(self) -> tuple[Path, ...]:
        """Those of the checkpoint; none, if a document above makes it."""
        return () if self.checkpoint is None else self.checkpoint.files

    @property
    def adapter_files(self) -> tuple[Path, ...]:
        """Those of the adapters that are added to it."""
        adapters = () if self.checkpoint is None else self.checkpoint.adapters
        return tuple(path for adapter in adapters for path in adapter.files)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the checkpoint."""
        return 0 if self.checkpoint is None else self.checkpoint.nbytes


def is_gguf(model: Model) -> bool:
    """Whether a model is in GGUF files, or made of such."""
    return model.source is not None and model.source.gguf is not None


class Library:
    """Opens the models of recipes, each once; and raises the same error for one that cannot be opened."""

    def __init__(self) -> None:
        self._opened: dict[ModelRef, Model] = {}
        self._errors: dict[ModelRef, CheckpointError | StorageError] = {}

    def find(self, model: ModelRef) -> Model:
        """Raises: CheckpointError and StorageError, the same one each time."""
        if model in self._errors:
            raise self._errors[model]
        if model not in self._opened:
            try:
                self._opened[model] = open_model(model)
            except (CheckpointError, StorageError) as error:
                self._errors[model] = error
                raise
        return self._opened[model]

    @property
    def opened(self) -> tuple[Model, ...]:
        return tuple(self._opened.values())


def open_model(name: str | ModelRef) -> Model:
    """The model called `name`, with its adapters. Raises: CheckpointError, as open_checkpoint does, for an adapter
    alone, and for one that does not fit.
    """
    ref = ModelRef.of(name) if isinstance(name, str) else name
    checkpoint = open_checkpoint(ref.name)
    if checkpoint.adapter is not None:
        refuse_adapter(checkpoint)
    model = model_of(checkpoint)
    if ref.adapters:
        from fastinterp.plan.adapters import with_adapters  # few recipes have any

        adapted = with_adapters(model.tensors, checkpoint, ref)
        model = Model(str(ref), model.root, adapted.tensors, adapted.checkpoint, warnings=adapted.warnings)
    return model


def model_of(checkpoint: Checkpoint) -> Model:
    """Its tensors decoded, where a reader knows their format; those of other quantised formats are marked.

    Raises: CheckpointError, of a reader.
    """
    every = encoded_tensors(checkpoint)
    activations = scales_of_activations(checkpoint, every)
    beside = {entry.name for encoded in every for entry in encoded.beside} | set(activations)
    encoded_by_codes = {encoded.codes.name: encoded for encoded in every}
    found = quantised_in(checkpoint, encoded_by_codes.keys() | beside)
    formats = {name: q.format for q in found for name in (q.codes, *q.companions)}
    refuse_left_over(checkpoint, every, formats.keys() | beside)
    tensors: dict[str, TensorInput] = {}
    for name, entry in checkpoint.tensors.items():
        if name not in beside:
            encoded = encoded_by_codes.get(name)
            tensor: TensorInput
            if encoded is not None:
                tensor = _decoded(encoded, checkpoint)
            elif entry.conversion is not None:
                tensor = _converted(entry, checkpoint)
            else:
                tensor = _stored(entry, checkpoint, formats.get(name, ""))
            tensors[tensor.name] = tensor
    return Model(
        checkpoint.name, checkpoint.root, tensors, checkpoint, remarks=about_what_is_not_said(checkpoint, every),
        as_numbers=about_numbers(checkpoint, every, activations),
        beside=tuple(_stored(checkpoint.tensors[name], checkpoint) for name in activations),
    )  # fmt: skip


def _decoded(encoded: EncodedTensor, checkpoint: Checkpoint) -> StoredInput:
    for entry in (encoded.codes, *encoded.companions):
        if entry.conversion is not None:
            raise CheckpointError(
                f"{quote(entry.name)} is part of an encoded tensor, and is not stored as elements one after the other: "
                "such codes and scales are not read", file=checkpoint.name, tensor=entry.name,
            )  # fmt: skip
    codes = _stored(encoded.codes, checkpoint)
    if codes.numel == 0:  # nothing to decode: the scale of no element
        return StoredInput(encoded.name, encoded.kept_dtype, encoded.shape, 0, codes.path, codes.start)
    companions = tuple(_stored(entry, checkpoint) for entry in encoded.companions)
    nbytes = codes.nbytes + sum(companion.nbytes for companion in companions)
    encoding = Encoding(
        codes.dtype, encoded.kept_dtype, encoded.decoder, companions, encoded.parameters, codes.name, codes.shape,
        tuple(_stored(entry, checkpoint) for entry in (*encoded.activations, *encoded.left_out)), encoded.format,
        encoded.power_of_two,
    )  # fmt: skip
    return StoredInput(encoded.name, F32, encoded.shape, nbytes, codes.path, codes.start, encoding)


def _converted(entry: Entry, checkpoint: Checkpoint) -> ConvertedInput:
    assert entry.conversion is not None
    path, factor = checkpoint.files[entry.file], _is_factor(entry, checkpoint)
    return ConvertedInput(
        entry.name, entry.dtype, entry.shape, entry.nbytes, path, entry.start, entry.conversion, factor
    )


def _is_factor(entry: Entry, checkpoint: Checkpoint) -> bool:
    return checkpoint.adapter is not None and entry.name in checkpoint.adapter.tensors


def _stored(entry: Entry, checkpoint: Checkpoint, quantised: str = "") -> StoredInput:
    path = checkpoint.files[entry.file]
    factor = _is_factor(entry, checkpoint)
    return StoredInput(
        entry.name, entry.dtype, entry.shape, entry.nbytes, path, entry.start, quantised=quantised, factor=factor
    )
