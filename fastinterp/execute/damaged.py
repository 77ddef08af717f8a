"""The look at models that fastinterp wrote, before their weights are read."""

from __future__ import annotations

from collections.abc import Iterable

from fastinterp.checkpoint.checksum import KEY
from fastinterp.plan.models import Model


def refuse_damaged(models: Iterable[Model]) -> None:
    """What is done before weights are read: of the models that fastinterp wrote a part is compared with its checksums.

    Raises: CheckpointError, if one is damaged; StorageError, if one cannot be read.
    """
    every = [model.checkpoint for model in models if model.checkpoint is not None]
    every += [adapter for checkpoint in every for adapter in checkpoint.adapters]
    if any(KEY in part.checkpoint.metadata for checkpoint in every for part in checkpoint.parts):
        from fastinterp.execute.torn import refuse_torn

        for checkpoint in every:
            refuse_torn(checkpoint, sampled=1)
