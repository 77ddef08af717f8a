"""Adds adapters to the tensors of a model: its tensors are then W + s*B*A, made where they are read.

Nothing is stored: an adapted tensor is a StoredInput with a LowRankInput.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace as dataclass_replace

import msgspec
from msgspec.structs import replace

from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.lora import LoraAdapter, LowRankModule, parse
from fastinterp.checkpoint.names import listing, quote
from fastinterp.checkpoint.open import Checkpoint, open_checkpoint
from fastinterp.checkpoint.pytorch.remedies import one_after_the_other, refuse_converted
from fastinterp.checkpoint.sidecar_files import CONFIG, json_or_empty
from fastinterp.errors import CheckpointError, ShapeError
from fastinterp.messages import closest
from fastinterp.ops.dtypes import F32
from fastinterp.plan.adapted_experts import parts_of, products_of
from fastinterp.plan.adapted_ties import untie
from fastinterp.plan.adapter_names import places
from fastinterp.plan.inputs import StoredInput, TensorInput
from fastinterp.plan.low_rank import FactorInput, LowRankInput, ProductInput, RowsInput
from fastinterp.recipe.references import AdapterRef, ModelRef

# Models of transformers with layers that store weights as [in, out] (Conv1D).
CONV1D_MODELS = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"))


class Adapted(msgspec.Struct, frozen=True):
    """The tensors of a model with its adapters, its checkpoint with theirs, and warnings."""

    tensors: dict[str, TensorInput]
    checkpoint: Checkpoint
    warnings: tuple[str, ...]


def with_adapters(tensors: Mapping[str, TensorInput], checkpoint: Checkpoint, ref: ModelRef) -> Adapted:
    """The tensors of a checkpoint with the adapters of `ref` added, in their order.

    Raises: CheckpointError and ShapeError, if one does not fit, or if a tensor of one has no place in it.
    """
    tensors = dict(tensors)
    opened, warnings = [], []
    for one in ref.adapters:
        adapter = parse(open_checkpoint(one.name))
        adding = _Adding(checkpoint, tensors, adapter, one)
        adding.add()
        if adding.added:
            warnings.append(
                f"{adapter.checkpoint.name} has {listing(adding.added)}, which {ref.name} has not: they are in the "
                f"output, but its {CONFIG} is that of {ref.name}, and does not say so"
            )
        opened.append(adapter.checkpoint)
        warnings += _other_base(adapter, ref)
    return Adapted(tensors, dataclass_replace(checkpoint, name=str(ref), adapters=tuple(opened)), tuple(warnings))


class _Adding:
    """Adds one adapter to the tensors of a model."""

    def __init__(self, base: Checkpoint, tensors: dict[str, TensorInput], adapter: LoraAdapter, ref: AdapterRef):
        self.base, self.tensors, self.adapter, self.ref = base.name, tensors, adapter, ref
        self.checkpoint = adapter.checkpoint
        self.label = os.path.basename(os.path.normpath(ref.path)) or ref.path
        self.config = json_or_empty(base.root / CONFIG)
        self.model_type = str(self.config.get("model_type"))
        self.places = places(adapter, tensors)
        self.transposed: bool | None = None
        self.added: list[str] = []

    def add(self) -> None:
        """Raises: CheckpointError and ShapeError."""
        self.adapter = untie(self.adapter, self.places, self.tensors, self.config, self.base)
        self._refuse_unknown()
        for name, entry in self.adapter.replaced.items():
            if (place := self.places[name]) in self.tensors:
                self._replace(place, entry)
            else:
                self.tensors[place] = replace(self._input(entry), name=place, whole_of=self.label)
                self.added.append(place)
        for module in self.adapter.modules:
            self._add(module)
        for rows in self.adapter.rows:
            self._replace_rows(self.places[f"{rows.module}.weight"], rows.tokens, rows.rows)

    # --- which tensors ------------------------------------------------------------------------------------------------

    def _refuse_unknown(self) -> None:
        """Raises: CheckpointError, naming them, if the base lacks tensors that the adapter changes."""
        needed = [m.weight for m in self.adapter.modules if not m.parameters]
        needed += [f"{m.module}.bias" for m in self.adapter.modules if m.bias is not None]
        needed += [name for name in self.adapter.replaced if not self._is_new(name)]
        needed += [f"{rows.module}.weight" for rows in self.adapter.rows]
        missing = [name for name in needed if self.places[name] not in self.tensors]
        if not missing:
            return
        close = closest(missing[0], list(self.tensors))
        hint = f" {quote(close)} is there." if close else ""
        what = "none" if len(missing) == len(needed) else f"not {len(missing)} of {len(needed)}"
        raise CheckpointError(
            f"{self.base} has {what} of the tensors that the adapter changes: {listing(missing)}.{hint} Is it an "
            f"adapter of another model? {self._trained_on()}".rstrip(),
            file=self.checkpoint.name,
            tensor=missing[0],
        )

    def _is_new(self, name: str) -> bool:
        """Whether a tensor is that of a module which was trained whole, and which the base has nothing of: the head of
        a task.
        """
        place = self.places[name]
        module, heads = place.rpartition(".")[0], self.adapter.config.get("modules_to_save")
        named = isinstance(heads, list) and any(f".{module}.".find(f".{head}.") >= 0 for head in heads)
        return named and place not in self.tensors and not any(t.startswith(f"{module}.") for t in self.tensors)

    def _trained_on(self) -> str:
        base = self.adapter.config.get("base_model_name_or_path")
        return f"It says that it was trained on {quote(base)}" if isinstance(base, str) and base else ""

    def _stored(self, name: str) -> StoredInput:
        """The tensor of the base, to be changed. Raises: CheckpointError, if nothing can be added to it."""
        tensor = self.tensors[name]
        stored = tensor.stored
        if tensor.converted_from == "with strides":
            file = str(tensor.files[0])
            raise CheckpointError(
                f"the adapter changes {quote(name)}, whose elements do not lie one after the other in {self.base}, and "
                f"they have to for that. {one_after_the_other(file)}",
                file=file,
                tensor=name,
            )
        if stored is None or not tensor.merges or tensor.dtype.is_complex:
            kind = tensor.quantised or str(tensor.dtype)
            more = ""
            if tensor.converted_from is not None:  # its numbers would have to be made first
                kind += f" ({tensor.converted_from})"
                more = ". Merge the base alone first, which writes its numbers as they are read; then name the output"
            raise CheckpointError(
                f"the adapter changes {quote(name)}, which is {kind} in {self.base}: nothing can be added to that"
                f"{more}",
                file=self.checkpoint.name,
                tensor=name,
            )
        return stored

    def _input(self, entry: Entry) -> StoredInput:
        """The input that reads a tensor of the adapter. Raises: CheckpointError, if it has to be converted first."""
        refuse_converted(self.checkpoint.files, [entry])
        return StoredInput(
            entry.name, entry.dtype, entry.shape, entry.nbytes, self.checkpoint.files[entry.file], entry.start
        )

    # --- what is done with them ---------------------------------------------------------------------------------------

    def _replace(self, name: str, entry: Entry) -> None:
        """The tensor `name` is that of the adapter."""
        old = self.tensors[name]
        if old.shape != entry.shape:
            resized = len(old.shape) == 2 and old.shape[1:] == entry.shape[1:]
            why = ". Its vocabulary was resized: resize that of the base first" if resized else ""
            raise self._misfit(f"{quote(entry.name)} is {list(entry.shape)}", name, old.shape, why)
        new = self._input(entry)
        self.tensors[name] = replace(new, name=name, kept=old.kept_dtype, whole_of=self.label)

    def _replace_rows(self, name: str, tokens: tuple[int, ...], entry: Entry) -> None:
        old = self._stored(name)
        if len(old.shape) != 2 or entry.shape[1] != old.shape[1] or max(tokens, default=0) >= old.shape[0]:
            what = f"{quote(entry.name)} is {list(entry.shape)}, for tokens up to {max(tokens, default=0)}"
            raise self._misfit(what, name, old.shape)
        if tokens:
            self._change(name, old, _as_rows(old.shape), RowsInput(self._input(entry), tokens, self.label))

    def _add(self, module: LowRankModule) -> None:
        if module.parameters:
            self._add_parameter(module)
            return
        name = self.places[module.weight]
        old = self._stored(name)
        a, b, r = self._input(module.a), self._input(module.b), module.rank
        out, into = module.b.shape[0], module.a.shape[1]
        if module.kind == "convolution":
            if any(side != 1 for side in module.b.shape[2:]) or old.shape != (out, *module.a.shape[1:]):
                raise self._factors_misfit(module, name, old.shape)
            into = math.prod(module.a.shape[1:])
            turned = False
        elif old.shape == (out, into, *old.shape[2:]) and math.prod(old.shape[2:]) == 1 and module.kind == "linear":
            turned = old.shape == (into, out) and self._is_transposed(module)
        elif old.shape == (into, out):
            turned = True
        else:
            raise self._factors_misfit(module, name, old.shape)
        if turned:
            shape = (1, into, out)
            left, right = FactorInput(a, by_index=1, by_rank=into), FactorInput(b, by_index=r, by_rank=1)
        else:
            shape = (1, out, into)
            left, right = FactorInput(b, by_index=r, by_rank=1), FactorInput(a, by_index=1, by_rank=into)
        magnitude = None
        if module.magnitude is not None:
            magnitude = self._input(module.magnitude)
            if magnitude.numel != out:
                what = f"{quote(module.magnitude.name)} has {magnitude.numel} lengths for {out} outputs"
                raise self._misfit(what, name, old.shape)
        scale = module.scale * self.ref.scale
        self._change(name, old, shape, ProductInput(left, right, r, scale, magnitude, not turned, self.label))
        if module.bias is not None:
            self._add_bias(module, scale)

    def _add_bias(self, module: LowRankModule, scale: float) -> None:
        assert module.bias is not None
        name = self.places[f"{module.module}.bias"]
        old, added = self._stored(name), self._input(module.bias)
        if old.numel != added.numel:
            raise self._misfit(f"{quote(added.name)} is {list(added.shape)}", name, old.shape)
        left, right = FactorInput(None), FactorInput(added, by_index=1)
        shape = (1, 1, old.numel)
        self._change(name, old, shape, ProductInput(left, right, 1, scale, None, True, self.label))

    def _add_parameter(self, module: LowRankModule) -> None:
        """A product for each expert, of experts that are fused in the base or not."""
        for parameter in module.parameters:
            name = self.places[f"{module.module}.{parameter}"]
            parts = parts_of(name, self.tensors)
            products = products_of(module, parts, self.tensors, self._input, self.model_type)
            if products is not None:
                for part, (shape, left, right) in products.items():
                    scale = module.scale * self.ref.scale
                    change = ProductInput(left, right, module.rank, scale, None, True, self.label)
                    self._change(part, self._stored(part), shape, change)
                return
        a, b = module.a, module.b
        having = {name: list(self.tensors[name].shape) for name in parts if name in self.tensors}
        what = "no such parameter is there" if not having else listing(f"{n} is {s}" for n, s in having.items())
        raise ShapeError(
            f"{quote(a.name)} is {list(a.shape)} and {quote(b.name)} {list(b.shape)}, of rank {module.rank} for each "
            f"expert of {quote(module.module)} ({' or '.join(module.parameters)}), but in {self.base} {what}",
            file=self.checkpoint.name,
            tensor=a.name,
        )

    def _change(
        self, name: str, old: StoredInput, shape: tuple[int, int, int], change: ProductInput | RowsInput
    ) -> None:  # fmt: skip
        before = old.low_rank or LowRankInput(old.dtype, shape, ())
        if before.shape != shape:
            raise CheckpointError(
                f"adapters change {quote(name)} in two ways that do not go together: as {before.shape}, and as {shape}",
                file=self.checkpoint.name,
                tensor=name,
            )
        added = replace(before, changes=(*before.changes, change))
        nbytes = old.nbytes + sum(tensor.nbytes for tensor in change.tensors)
        if isinstance(change, ProductInput) and change.magnitude is not None:  # the lengths are measured first
            nbytes += old.nbytes if old.encoding is not None else before.stored.nbytes(old.numel) or 0
        self.tensors[name] = replace(old, dtype=F32, kept=old.kept_dtype, nbytes=nbytes, low_rank=added)

    # --- transposed weights -------------------------------------------------------------------------------------------

    def _is_transposed(self, module: LowRankModule) -> bool:
        """Whether a square weight is stored as [in, out]: as the others of its base are that are not square."""
        if self.transposed is None:
            self.transposed = self.adapter.fan_in_fan_out or self.model_type in CONV1D_MODELS or self._others_are()
        return self.transposed and module.module.rpartition(".")[2] not in ("lm_head", "score")

    def _others_are(self) -> bool:
        for module in self.adapter.modules:
            if module.kind == "linear" and not module.parameters:
                shape = self.tensors[self.places[module.weight]].shape
                out, into = module.b.shape[0], module.a.shape[1]
                if out != into and shape == (into, out):
                    return True
        return False

    # --- errors -------------------------------------------------------------------------------------------------------

    def _factors_misfit(self, module: LowRankModule, name: str, shape: tuple[int, ...]) -> ShapeError:
        a, b = module.a, module.b
        return self._misfit(f"{quote(a.name)} is {list(a.shape)} and {quote(b.name)} {list(b.shape)}", name, shape)

    def _misfit(self, what: str, name: str, shape: tuple[int, ...], why: str = "") -> ShapeError:
        end = why or f": an adapter of another model? {self._trained_on()}".rstrip()
        return ShapeError(
            f"{what}, but {quote(name)} of {self.base} is {list(shape)}{end}", file=self.checkpoint.name, tensor=name
        )


def _as_rows(shape: Sequence[int]) -> tuple[int, int, int]:
    """One matrix: all but the last dimension are rows."""
    columns = shape[-1] if shape else 1
    return 1, math.prod(shape[:-1]) if columns else 0, columns


def _other_base(adapter: LoraAdapter, ref: ModelRef) -> list[str]:
    """A warning, if the adapter says that it was trained on another model than that which it is added to."""
    said = adapter.config.get("base_model_name_or_path")
    if not isinstance(said, str) or not said or _same_model(said, ref):
        return []
    return [f"{adapter.checkpoint.name} was trained on {quote(said)}, and is added to {ref.name} here"]


def _same_model(said: str, ref: ModelRef) -> bool:
    """Whether two names are of one model, as far as names tell: a copy of it in a folder has its last part."""
    a, b = os.path.normpath(said), os.path.normpath(ref.path)
    return os.path.basename(a) == os.path.basename(b) or os.path.realpath(a) == os.path.realpath(b)
