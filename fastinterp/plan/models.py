"""Models as plans read them: a checkpoint, perhaps with other embeddings, or what a document above makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastinterp.checkpoint.open import Checkpoint, open_checkpoint
from fastinterp.plan.inputs import StoredInput, TensorInput


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A model and its tensors.

    name        as the recipe has it
    root        the folder of its configuration and tokenizer
    tensors     by name, in the order of the checkpoint
    checkpoint  what it was opened from; None: a document above makes it
    """

    name: str
    root: Path
    tensors: Mapping[str, TensorInput]
    checkpoint: Checkpoint | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """Those of the checkpoint; none, if a document above makes it."""
        return () if self.checkpoint is None else self.checkpoint.files

    @property
    def nbytes(self) -> int:
        """Of all tensors of the checkpoint."""
        return 0 if self.checkpoint is None else self.checkpoint.nbytes


def open_model(name: str) -> Model:
    """The model called `name`. Raises: CheckpointError, as open_checkpoint does."""
    return model_of(open_checkpoint(name))


def model_of(checkpoint: Checkpoint) -> Model:
    files = checkpoint.files
    tensors = {
        name: StoredInput(name, entry.dtype, entry.shape, entry.nbytes, files[entry.file], entry.start)
        for name, entry in checkpoint.tensors.items()
    }
    return Model(checkpoint.name, checkpoint.root, tensors, checkpoint)
