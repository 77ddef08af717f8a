"""Plans a merge from headers. Of the data only tensors are read that may be copies of each other, as far as they agree:
output layers and input embeddings, codes and scales of quantised weights, small buffers.

A plan holds one or more outputs made from one read of the same inputs (a path of interpolations, say): for every
output tensor which inputs are read, with which coefficients, and where the result goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from fastinterp._version import __version__
from fastinterp.arguments import optional_size, overridden
from fastinterp.checkpoint import hub, remote
from fastinterp.checkpoint.regular_file import CHANGED, Stamp, stamp_of
from fastinterp.checkpoint.sidecar_files import content_of, what_differs
from fastinterp.errors import CheckpointError, UsageError
from fastinterp.messages import counted, listed, size
from fastinterp.ops.combine import MAX_OUTPUTS
from fastinterp.ops.dtypes import DType
from fastinterp.output.layout import Layout
from fastinterp.output.model_card import CARD, model_card
from fastinterp.output.origin_files import OriginFiles
from fastinterp.plan.models import Library, Model, is_gguf
from fastinterp.plan.outputs import RECEIPT_KEY, Outputs, commits_of, receipt
from fastinterp.plan.planned import PlannedTensor
from fastinterp.plan.single import Document, plan_document
from fastinterp.plan.vocabularies import AlignedModels
from fastinterp.presence import is_file
from fastinterp.recipe.document import Source
from fastinterp.recipe.load import Recipe, load_recipes
from fastinterp.recipe.renaming import ShownNames
from fastinterp.recipe.shown_names import shown_names


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first byte of data is read.

    recipes      one per output; they differ in coefficients only
    checkpoints  the models of the recipe, in its order, then side-cars; of several documents, then those that are made
    origin       the checkpoint that configuration and tokenizer come from
    layouts      one per output: equal but for the metadata in their headers
    aligned      what becomes of the files beside the weights, where vocabularies or tied embeddings differ
    warnings     about the files beside the weights: what is copied, and may not fit; and about the recipe
    remarks      what was decided without being asked: files and tensors that were left out, names that were aligned
    models       the names of the first of the checkpoints: the models of all documents
    inputs       files and folders that an output must not touch
    files        what becomes of the files in the origin's folder
    stamps       of the small files that are copied, as they were when the plan was made
    shown        names of models in receipts and model cards
    above        the documents above
    receipts     one per output: the receipt in the headers of its files, JSON
    folders      held as long as the plan is: they have the small files of documents above
    max_shard_size  as it was asked for
    commits      of models from the Hub, by their names
    """

    recipes: tuple[Recipe, ...]
    checkpoints: tuple[Model, ...]
    origin: Model
    tensors: tuple[PlannedTensor, ...]
    layouts: tuple[Layout, ...]
    aligned: AlignedModels
    warnings: tuple[str, ...]
    remarks: tuple[str, ...]
    models: tuple[str, ...]
    inputs: tuple[Path, ...]
    files: OriginFiles
    stamps: Mapping[Path, Stamp | None]
    shown: ShownNames
    above: tuple[Recipe, ...] = ()
    receipts: tuple[str, ...] = ()
    folders: tuple[object, ...] = ()
    max_shard_size: int | None = None
    commits: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Short: the fields hold every tensor and header."""
        return (
            f"<Plan: {self.recipes[0].method.name} of {counted(len(self.checkpoints), 'model')}, "
            f"{size(self.bytes_read)} read, {size(self.bytes_written)} written>"
        )

    @cached_property
    def stages(self) -> Sequence[PlannedTensor]:
        """All tensors that are computed, those of documents above, for each tensor that needs them, among them."""
        if not any(t.before for t in self.tensors):
            return self.tensors
        return [stage for t in self.tensors for stage in t.stages]

    @cached_property
    def bytes_read(self) -> int:
        """An estimate: the answers to a method's requests may lead to more or fewer reads."""
        return sum(stage.bytes_read for stage in self.stages)

    @cached_property
    def reads_again(self) -> bool:
        """Whether the inputs of any tensor are read more than once."""
        return any(len(stage.reads) > 1 for stage in self.stages)

    @cached_property
    def bytes_made(self) -> int:
        """Bytes of tensors of the documents above that are stored until they are read."""
        return 0 if self.stages is self.tensors else sum(stage.nbytes for t in self.tensors for stage in t.before)

    @property
    def bytes_written(self) -> int:
        """Bytes of tensors. Headers and indexes are not counted: disk_bytes has them too."""
        return sum(layout.total_size for layout in self.layouts)

    @property
    def disk_bytes(self) -> int:
        return sum(layout.disk_bytes for layout in self.layouts)

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """The names of models with files that are not on the disk: on the Hub, say."""
        files = ((m.name, (*m.files, *m.adapter_files)) for m in self.checkpoints)
        return tuple(name for name, paths in files if any(remote.find(path) for path in paths))

    @property
    def streamed(self) -> tuple[str, ...]:
        """The names of models with files that are read from elsewhere while they are merged."""
        files = ((m.name, (*m.files, *m.adapter_files)) for m in self.checkpoints)
        return tuple(name for name, paths in files if any(map(remote.is_streamed, paths)))

    def small_files(self, k: int) -> dict[str, bytes | Path]:
        """What is written beside the weights of output k, by name: the path of a file to copy, or content.

        Raises: CheckpointError, if a file that has to change is damaged or cannot be read.
        """
        recipe = self.recipes[k]
        files = self.aligned.sidecars(self.files.contents(recipe.out_dtype or recipe.dtype or self._promoted()))
        return {**files, CARD: self.card(k), **self.layouts[k].indexes}

    def card(self, k: int, kept: Sequence[str] = ()) -> bytes:
        """The model card of output k. kept: how much of the change rounding kept, once that is known, in sentences"""
        from fastinterp.plan.card import told

        recipe = self.recipes[k]
        roots = [self.origin.root, *(model.root for model in self.checkpoints[: len(self.models)])]
        names = [self.shown.model(model) for model in self.models]
        local = [name for name, model in zip(names, self.models, strict=True) if name != model]
        how = told(recipe, self.tensors, self.max_shard_size, kept, names, self.shown.model)
        text = self.shown.recipe(recipe.text)
        commits = {} if recipe.private else self.commits
        return model_card(text, names, recipe.method.name, __version__, roots, local, how, commits).encode()

    def _promoted(self) -> DType | None:
        """That of most elements, where models differ in their dtypes and tensors are stored in one that holds all, or
        where tensors are decoded.
        """
        merged = [t for t in self.tensors if t.merged and t.dtype.merges and t.encoding is None]
        if all(t.dtype == t.inputs[0].kept_dtype and not any(i.decoded for i in t.inputs) for t in merged):
            return None
        elements: dict[DType, int] = {}
        for tensor in merged:
            elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.numel
        return max(elements, key=lambda dtype: elements[dtype])

    @property
    def file_remarks(self) -> tuple[str, ...]:
        """Remarks on the files in the origin's folder, if the output is a folder: which are left out, and why."""
        return (*self.aligned.about_config, *self.files.remarks(self._origin_name, self.remarks))

    @property
    def lone_file_remarks(self) -> tuple[str, ...]:
        """The same, if the output is one file."""
        own = self._own_files
        names = listed(sorted(name for name in self.files.copied if name not in own), 5)
        what = f"the output is one file, so nothing of {self._origin_name} is written beside it: {names}"
        return (f"{what}. Name a folder to have these files",) if names else ()

    @property
    def lone_file_warnings(self) -> tuple[str, ...]:
        """A warning, if the output is one file, about those files that would not be the origin's: which they are."""
        own = [f"{name} ({why})" if why else name for name, why in self._own_files.items()]
        if not own:
            return ()
        return (
            f"the output needs files of its own, and those of {self._origin_name} do not fit it: {listed(own, 8)}. "
            "They are written only into a folder: give the output the name of a folder",
        )

    @cached_property
    def _own_files(self) -> dict[str, str]:
        """The small files of the output that differ from the origin's in more than dtypes, and in what."""
        root = self.origin.root if self.origin.source is None else self.origin.source.root
        rows = "" if self.aligned.rows is None else counted(self.aligned.rows, "row")
        own = {}
        for name, content in self.aligned.sidecars(self.files.contents(None)).items():
            old = content_of(root / name) if is_file(root / name) else b""
            what = what_differs(old, content_of(content))
            if what is not None:
                own[name] = rows if name == "tokenizer.json" else what
        return own

    @property
    def _origin_name(self) -> str:
        return self.origin.name if self.origin.source is None else self.origin.source.name

    def refuse_changed_files(self) -> None:
        """Raises: CheckpointError, if a small file that is copied has changed since the plan was made."""
        for path, stamp in self.stamps.items():
            if stamp_of(path) != stamp:
                raise CheckpointError(CHANGED, file=str(path))


def make_plan(
    recipes: Sequence[Recipe],
    *,
    max_shard_size: int | None = None,
    above: Sequence[Recipe] = (),
    library: Library | None = None,
    one_file: str = "",
    as_numbers: bool = False,
) -> Plan:
    """Open the checkpoints' headers, see that they fit together, and lay out the output.

    recipes         1 to 16, with the same models, dtypes and rounding
    max_shard_size  bytes of tensor data in one file; None: one file where the origin has one, else 5 GB
    above           the documents above, if there are any; then `recipes` is the last document alone
    library         opens the checkpoints, and may have opened some already; None: a new one
    one_file        how the name of every output ends, if it is one file; empty: it is a folder
    as_numbers      every output is in memory: nothing is stored in blocks
    Raises: CheckpointError and ShapeError, if a checkpoint is damaged or does not fit the others; MethodError, if a
    method does not accept its models or parameters; RecipeError, if documents do not fit each other; UsageError.
    """
    with hub.one_run():
        return _make_plan(
            recipes, max_shard_size=max_shard_size, above=above, library=library or Library(), one_file=one_file,
            as_numbers=as_numbers,
        )  # fmt: skip


def _make_plan(
    recipes: Sequence[Recipe], *, max_shard_size: int | None, above: Sequence[Recipe], library: Library, one_file: str,
    as_numbers: bool,
) -> Plan:  # fmt: skip
    first = recipes[0]
    _refuse_adapters([*above, *recipes])
    if len(recipes) > MAX_OUTPUTS:
        raise UsageError(f"one read can make at most {MAX_OUTPUTS} outputs, got {len(recipes)}")
    kept = [(r.models, r.dtype, r.out_dtype, r.quantize) for r in recipes]
    if any(one != kept[0] for one in kept):
        raise UsageError("recipes that share one read must have the same models and dtypes")
    if above:
        from fastinterp.plan.chained import plan_chain

        above = [replace(r, quantize=first.quantize) for r in above]  # their configurations say what the last one needs
        last, checkpoints, names, warnings, remarks, folders = plan_chain(above, first, library)
    else:
        last = plan_document(recipes, library.find)
        checkpoints, names, folders = last.checkpoints, tuple(map(str, first.models)), ()
        warnings, remarks = last.warnings, last.remarks
    tensors = last.tensors
    stacked = any(section.stacked for recipe in (*above, first) for section in recipe.sections)
    if is_gguf(last.origin) and not as_numbers:
        from fastinterp.plan.gguf_output import in_stored_types

        tensors, more = in_stored_types(last.origin, tensors, first)
        remarks = (*remarks, *more)
    elif (asked := first.out_dtype or first.dtype) is not None and asked.block:
        raise UsageError(f"`dtype: {asked.name.lower()}` is a type of GGUF files, and of outputs of GGUF models only")
    elif first.quantize == "same":
        from fastinterp.plan.encoded_output import quantised_as

        tensors, more = quantised_as(last.origin, tensors, checkpoints, stacked=any(s.stacked for s in first.sections))
        remarks = (*remarks, *more)
    outputs = Outputs(last.origin, checkpoints[: len(names)], tensors, stacked)
    commits = commits_of(library.opened)
    shown = shown_names([*above, *recipes])
    receipts = [receipt(recipe, k, tensors, names, shown, max_shard_size, commits) for k, recipe in enumerate(recipes)]
    layouts = tuple(outputs.layout(metadata, max_shard_size, one_file) for metadata in receipts)
    inputs = tuple(dict.fromkeys(path for m in library.opened if m.checkpoint for path in m.checkpoint.inputs))
    return Plan(
        tuple(recipes), checkpoints, last.origin, tensors, layouts, last.aligned, warnings,
        (*remarks, *outputs.remarks), tuple(names), inputs, last.files, _stamps(last), shown, tuple(above),
        tuple(metadata[RECEIPT_KEY] for metadata in receipts), folders, max_shard_size, commits,
    )  # fmt: skip


def _refuse_adapters(recipes: Sequence[Recipe]) -> None:
    """Raises: RecipeError, if one of several documents is an adapter, or something else than `merge` has one."""
    for recipe in recipes:
        if recipe.out == "lora":
            raise recipe.document.error(
                "`out: lora` makes an adapter, which only `fastinterp merge` does, of a recipe of one document", "$.out"
            )


def _stamps(document: Document) -> dict[Path, Stamp | None]:
    copied = [c for c in (document.aligned.tokenizer or {}).values() if isinstance(c, Path)]
    return {**{path: stamp_of(path) for path in copied}, **document.files.stamps}


def plan_recipe(
    recipe: Source, max_shard_size: str | int | None, dtype: object, rounding: object, seed: object,
    missing: object = None, channels: object = None, quantize: object = None, *, one_file: str = "",
    as_numbers: bool = False, private: bool = False,
) -> Plan:  # fmt: skip
    """The plan of one recipe, of one or more documents. Arguments and errors as of `merge` and make_plan."""
    *above, last = documents(recipe, dtype, rounding, seed, missing, channels, quantize, private)
    size = optional_size(max_shard_size)
    return make_plan([last], max_shard_size=size, above=above, one_file=one_file, as_numbers=as_numbers)


def plan_documents(recipes: Sequence[Recipe], max_shard_size: int | None, one_file: str) -> list[Plan]:
    """A plan for each document of a recipe. one_file: of the last, which is written; the others are folders."""
    last = len(recipes) - 1
    return [
        make_plan([one], max_shard_size=max_shard_size, above=recipes[:i], one_file=one_file if i == last else "")
        for i, one in enumerate(recipes)
    ]


def documents(
    recipe: Source, dtype: object, rounding: object, seed: object, missing: object, channels: object, quantize: object,
    private: bool = False,
) -> list[Recipe]:  # fmt: skip
    """The documents of a recipe, with what the arguments replace in them. Arguments and errors as of `merge`."""
    *above, last = load_recipes(recipe)
    changed = overridden(last, dtype, rounding, seed, missing, channels, quantize)
    if above:
        above = [overridden(r, None, None, None, missing, channels) for r in above]
        # They were stored as the last one is, and are; a seed that all have in common is replaced in all.
        if rounding is not None:
            above = [replace(r, rounding=changed.rounding) if r.rounding == last.rounding else r for r in above]
        above = [replace(r, seed=changed.seed) if r.seed == last.seed else r for r in above]
    return [replace(r, private=True) for r in (*above, changed)] if private else [*above, changed]
