"""merge, interpolate, average and explain: the public functions that take recipes and checkpoints on disk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fastinterp.arguments import Checkpoint, numbers, optional_size, overridden, path_of, size_of, without_recipe
from fastinterp.checkpoint import hub, remote
from fastinterp.checkpoint.names import is_plain, names_file
from fastinterp.errors import UsageError
from fastinterp.messages import shown
from fastinterp.methods import Method, given
from fastinterp.ops.combine import MAX_OUTPUTS, MAX_POINTS
from fastinterp.output.address import uploads
from fastinterp.plan.plan import documents, make_plan, plan_documents
from fastinterp.progress import Progress, callback_of
from fastinterp.recipe.document import Source
from fastinterp.recipe.load import Recipe, load_recipes
from fastinterp.urls import is_url, path_of_file

if TYPE_CHECKING:
    from fastinterp.execute.report import Report
    from fastinterp.inspect.explain import Explanation
    from fastinterp.lora.explain import AdapterExplanation
    from fastinterp.lora.report import AdapterReport


def merge(
    recipe: Source,
    out: str | os.PathLike[str],
    *,
    device: str = "auto",
    threads: int | None = None,
    max_shard_size: str | int | None = None,
    max_memory: str | int = "512MB",
    dtype: str | None = None,
    rounding: str | None = None,
    seed: int | None = None,
    missing: str | None = None,
    channels: str | None = None,
    quantize: str | None = None,
    force: bool = False,
    durable: bool = False,
    stream: bool = False,
    read: str = "auto",
    private: bool = False,
    verify_kept: bool = False,
    progress: Progress | bool | None = None,
    methods: Sequence[Method] = (),
    keep_intermediates: str | os.PathLike[str] | None = None,
) -> Report:
    """Merge checkpoints into the folder `out`; or into the one file `out`, if that ends in `.safetensors` or `.gguf`.

    recipe          path of a YAML file, YAML text, or a mapping, in mergekit's schema. Of several documents (or a list
                    of mappings), which may name each other as models, one is written: that without a name, or the last
    device          "cpu"; "cuda", "cuda:1" or "cuda:0,1" (accelerators, several together); "triton" as "cuda"; "auto"
                    takes the one estimated to be faster, and the report says why
    threads         None: one per CPU, at most 32. The output does not depend on it
    max_shard_size  bytes of tensor data in one file, "5GB" or a number. None: one file, if the model from which the
                    configuration comes is one; else 5GB
    max_memory      limit of the scratch memory in bytes; with accelerators, of the host's
    dtype, rounding, seed, missing, channels, quantize   replace those of the recipe (dtype: its out_dtype)
    force           replace a checkpoint in `out`, or the file `out`, but never an input
    durable         sync data before names: the output survives a crash of the machine. So does, in any case, one that
                    replaces an older one
    private         receipt and model card name no model: `replay` is told then where they are
    stream          read models that are on the Hub while they are merged, on the CPU, without storing them
    read            "pread" copies what is read of files into scratch memory. "mapped" lets the CPU's kernels read it
                    where the page cache has it; tensors that are copied, and rows that are moved, are read as before.
                    "auto" is "mapped" for methods that read again what is in the page cache, else "pread"
                    (docs/performance.md, "Mapped reading"). The output does not depend on it
    verify_kept     where a run that was killed is resumed: compare all that it had written with its checksums, not a
                    sample
    progress        True: a line on stderr that shows it; or what is called about ten times a second with
                    (bytes done, total bytes)
    methods         merge methods of your own, which the recipe may name: functions below `fastinterp.methods.method`
    keep_intermediates  a folder: the other documents are written, too, each into a folder of its name there

    The output appears when it is complete, or not at all. After a run that was killed, the same call goes on with
    what is finished: docs/RECIPES.md, "Runs that are stopped".
    Raises: RecipeError, CheckpointError, ShapeError, OutputError, StorageError, BackendError, UsageError.
    """
    with given(methods):
        recipes = documents(recipe, dtype, rounding, seed, missing, channels, quantize, private)
        _refuse_adapters(recipes, "merge_adapters")
        return merge_documents(
            recipes, out, device=device, threads=threads, max_shard_size=max_shard_size, max_memory=max_memory,
            force=force, durable=durable, verify_kept=verify_kept, stream=stream, read=read,
            progress=callback_of(progress), keep_intermediates=keep_intermediates,
        )  # fmt: skip


@uploads
def merge_documents(
    recipes: Sequence[Recipe],
    out: str | os.PathLike[str],
    *,
    device: str,
    threads: int | None,
    max_shard_size: str | int | None,
    max_memory: str | int,
    force: bool,
    durable: bool,
    stream: bool,
    read: str,
    verify_kept: bool,
    progress: Progress | None,
    keep_intermediates: str | os.PathLike[str] | None,
) -> Report:
    """`merge` of the documents of a recipe, which make models."""
    from fastinterp.execute.to_files import write_outputs  # explain does without

    device = _streaming_device(device, stream)
    target = path_of(out, "out")
    outs: list[list[str | os.PathLike[str]]] = [[target]]
    one_file, size = names_file(target), optional_size(max_shard_size)
    with hub.one_run(), remote.streaming(stream):
        if keep_intermediates is None:
            plans = [make_plan(recipes[-1:], max_shard_size=size, above=recipes[:-1], one_file=one_file)]
        else:
            plans = plan_documents(recipes, size, one_file)
            folder = path_of(keep_intermediates, "keep_intermediates")
            folder = path_of_file(folder) or folder
            if is_url(folder):
                raise UsageError(f"`keep_intermediates` must be a folder here, got {folder}")
            outs[:0] = [[os.path.join(folder, _folder_name(one.name))] for one in recipes[:-1]]
        return write_outputs(
            plans, outs, device=device, threads=threads, max_memory=size_of(max_memory), force=force,
            durable=durable, verify_kept=verify_kept, read=read, progress=progress,
        )[-1]  # fmt: skip


def _streaming_device(device: str, stream: bool) -> str:
    """The device of a merge. Raises: UsageError, if it reads what is elsewhere, and is not the CPU."""
    if stream and device not in ("auto", "cpu"):
        raise UsageError(
            f"--stream reads models into the CPU's memory, and cannot go with --device {device} (in Python "
            f"stream=True, device={device!r}). Leave one of the two out"
        )
    return "cpu" if stream else device


def _folder_name(document: str | None) -> str:
    """The folder of a document that is kept. Raises: UsageError, if its name is none."""
    if not is_plain(document or ""):
        raise UsageError(f"the document {shown(document)} has no name for a folder. Name it otherwise to keep it")
    return document or ""


@without_recipe
@uploads
def interpolate(
    a: Checkpoint,
    b: Checkpoint,
    alphas: float | Sequence[float] | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    alpha: float | Sequence[float] | None = None,
    base: Checkpoint | None = None,
    integers: Checkpoint | None = None,
    tokenizer_source: str | os.PathLike[str] | None = None,
    device: str = "auto",
    threads: int | None = None,
    max_shard_size: str | int | None = None,
    max_memory: str | int = "512MB",
    dtype: str | None = None,
    rounding: str | None = None,
    seed: int | None = None,
    missing: str | None = None,
    channels: str | None = None,
    quantize: str | None = None,
    force: bool = False,
    durable: bool = False,
    stream: bool = False,
    read: str = "auto",
    private: bool = False,
    verify_kept: bool = False,
    progress: Progress | bool | None = None,
) -> list[Report]:
    """Interpolate between checkpoints `a` (alpha 0) and `b` (alpha 1), or extrapolate: out = a + alpha * (b - a).

    alphas    finite numbers, at most 4096. One: `out` is the output. Several: `out/alpha_0.3` and so on (of the file
              `x.safetensors`: `x_alpha_0.3.safetensors`), 256 from each read of the inputs. Numbers within rounding of
              0 and 1 become those
    out       is needed
    alpha     the same as `alphas`, in place of it: interpolate(a, b, alpha=0.3, out="mixed")
    base      the task-vector form: out = base + (1 - alpha) * (a - base) + alpha * (b - base)
    integers  the checkpoint whose integer tensors are copied; None: they must be equal
    tokenizer_source  "union", "base" (`base`, else `a`) or a checkpoint: the vocabulary of the outputs
    missing, channels, quantize   as the keys of recipes

    Alpha 0 and 1 give the bytes of `a` and `b`. The other arguments and errors are those of `merge`.
    """
    from fastinterp.execute.to_files import write_outputs  # explain does without
    from fastinterp.paths.points import further_keys, point_name, point_path, point_recipe

    if (alphas is None) == (alpha is None):
        raise UsageError('one of `alphas` and `alpha` is needed: interpolate(a, b, alpha=0.3, out="mixed")')
    points = numbers(alpha if alphas is None else alphas)
    if not points:
        raise UsageError("at least one alpha is needed")
    if len(points) > MAX_POINTS:
        raise UsageError(f"at most {MAX_POINTS} alphas are possible, got {len(points)}")
    names = [point_name(p) for p in points]
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise UsageError(f"alphas must be different, but {twice} is repeated")
    ends = path_of(a, "a"), path_of(b, "b")
    origin = None if base is None else path_of(base, "base")
    whose = None if integers is None else path_of(integers, "integers")
    keys = further_keys(missing, channels, quantize, tokenizer_source)
    recipes = [overridden(point_recipe(*ends, p, origin, whose, keys), dtype, rounding, seed) for p in points]
    recipes = [replace(recipe, private=private) for recipe in recipes]
    groups = [slice(i, i + MAX_OUTPUTS) for i in range(0, len(points), MAX_OUTPUTS)]
    target = path_of(out, "out")
    if not target:
        raise UsageError("the name of the output folder is empty")
    shard, one_file = optional_size(max_shard_size), names_file(target)
    device = _streaming_device(device, stream)
    outs = [target] if len(points) == 1 else [point_path(target, name) for name in names]
    with hub.one_run(), remote.streaming(stream):
        plans = [make_plan(recipes[group], max_shard_size=shard, one_file=one_file) for group in groups]
        reports = write_outputs(
            plans, [outs[group] for group in groups], device=device, threads=threads, max_memory=size_of(max_memory),
            force=force, durable=durable, verify_kept=verify_kept, read=read, progress=callback_of(progress),
        )  # fmt: skip
    if base is not None:
        return reports
    return [replace(r, asked={"alpha": p} if r.asked else {}) for p, r in zip(points, reports, strict=True)]


@without_recipe
def average(
    checkpoints: Checkpoint | Iterable[Checkpoint],
    out: str | os.PathLike[str],
    *,
    weights: str = "uniform",
    decay: float | None = None,
    last: int | None = None,
    in_order: bool = False,
    tokenizer_source: str | os.PathLike[str] | None = None,
    device: str = "auto",
    threads: int | None = None,
    max_shard_size: str | int | None = None,
    max_memory: str | int = "512MB",
    dtype: str | None = None,
    rounding: str | None = None,
    seed: int | None = None,
    missing: str | None = None,
    channels: str | None = None,
    quantize: str | None = None,
    force: bool = False,
    durable: bool = False,
    stream: bool = False,
    read: str = "auto",
    private: bool = False,
    verify_kept: bool = False,
    progress: Progress | bool | None = None,
) -> Report:
    """Average checkpoints of one training run into the folder `out`.

    checkpoints  2 to 64, in a list or as a pattern: "run/checkpoint-*". They are ordered by the numbers in their names
    weights      "uniform": the mean. "ema": an exponential moving average, decay^(n-1-i) / sum_j decay^j for i = 0, the
                 oldest, to n-1: the newest counts most. "linear", "cosine" and "1-sqrt": the weights by which
                 checkpoints of a run at constant learning rate stand for one whose rate decays so (`fastinterp methods
                 ema` has the formulas): of 1-sqrt the oldest counts most, of cosine those in the middle, and linear is
                 uniform
    decay        of "ema": the weight of each checkpoint over that of the next newer. None: 0.9
    last         only so many of the newest
    in_order     take them in the order given, oldest first, whatever their names are
    tokenizer_source  "union", "base" (the newest) or one of the checkpoints: the vocabulary of the output

    It is a `linear` merge, whose recipe is in the output's README.md. Configuration, tokenizer and integer tensors are
    the newest checkpoint's. The other arguments and errors are those of `merge`.
    """
    from fastinterp.paths.average import average_of  # explain does without

    recipe = average_of(checkpoints, weights, decay, last, in_order, tokenizer_source).recipe
    return merge(
        recipe, out, device=device, threads=threads, max_shard_size=max_shard_size, max_memory=max_memory,
        dtype=dtype, rounding=rounding, seed=seed, missing=missing, channels=channels, quantize=quantize,
        force=force, durable=durable, private=private, verify_kept=verify_kept, stream=stream, read=read,
        progress=progress,
    )  # fmt: skip


def explain(
    recipe: Source,
    *,
    max_shard_size: str | int | None = None,
    dtype: str | None = None,
    rounding: str | None = None,
    seed: int | None = None,
    missing: str | None = None,
    channels: str | None = None,
    quantize: str | None = None,
    methods: Sequence[Method] = (),
) -> Explanation:
    """What `merge` would read, compute and write, from headers. print() shows it, `as_dict()` gives plain values.

    Arguments and errors are those of `merge`.
    """
    with given(methods):
        recipes = documents(recipe, dtype, rounding, seed, missing, channels, quantize)
        _refuse_adapters(recipes, "explain_adapters")
        return _explanation(recipes, max_shard_size)


def merge_adapters(
    recipe: Source,
    out: str | os.PathLike[str],
    *,
    threads: int | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    force: bool = False,
    durable: bool = False,
    private: bool = False,
    progress: Progress | bool | None = None,
    methods: Sequence[Method] = (),
) -> AdapterReport:
    """Merge LoRA adapters of one base with each other into an adapter, by a recipe with `out: lora`.

    out  a folder, for adapters of peft; a folder or a .safetensors file, for those of kohya and diffusers
    The other arguments are those of `merge`. docs/RECIPES.md has what becomes of ranks, scales and methods.
    Raises: as `merge`; UsageError, if the recipe has no `out: lora`.
    """
    with given(methods):
        found = _of_adapters(documents(recipe, dtype, None, seed, None, None, None, private))
        shown = callback_of(progress)
        return merge_adapter_document(found, out, threads=threads, force=force, durable=durable, progress=shown)


def merge_adapter_document(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    threads: int | None,
    force: bool,
    durable: bool,
    progress: Progress | None,
) -> AdapterReport:
    """`merge_adapters` of the document of a recipe with `out: lora`."""
    from fastinterp.lora.merge import merge_adapters as write

    return write(recipe, path_of(out, "out"), threads=threads, force=force, durable=durable, progress=progress)


def explain_adapters(recipe: Source, *, methods: Sequence[Method] = ()) -> AdapterExplanation:
    """What `merge_adapters` would read and write, from headers. print() shows it, `as_dict()` gives plain values.

    The arguments and errors are those of `merge_adapters`.
    """
    from fastinterp.lora.explain import AdapterExplanation
    from fastinterp.lora.plan import plan_adapters

    with given(methods), remote.headers_only():
        return AdapterExplanation(plan_adapters(_of_adapters(load_recipes(recipe))))


def merges_adapters(recipes: Sequence[Recipe]) -> bool:
    """Whether the documents of a recipe make an adapter of adapters."""
    return len(recipes) == 1 and recipes[0].out == "lora"


def _refuse_adapters(recipes: Sequence[Recipe], instead: str) -> None:
    if merges_adapters(recipes):
        raise UsageError(f"this recipe merges adapters with each other (`out: lora`): call fastinterp.{instead}")


def _of_adapters(recipes: Sequence[Recipe]) -> Recipe:
    if not merges_adapters(recipes):
        raise UsageError("this recipe makes a model. One that merges adapters is one document, with `out: lora`")
    return recipes[0]


def explanation_of(
    recipes: Sequence[Recipe],
    max_shard_size: str | int | None,
    threads: int | None = None,
    max_memory: int = 512_000_000,
) -> Explanation | AdapterExplanation:
    """The explanation of the documents of a recipe, whatever they make. Arguments and errors as of `merge`."""
    if merges_adapters(recipes):
        from fastinterp.lora.explain import AdapterExplanation
        from fastinterp.lora.plan import plan_adapters

        with remote.headers_only():
            return AdapterExplanation(plan_adapters(recipes[0]))
    return _explanation(recipes, max_shard_size, threads, max_memory)


def _explanation(
    recipes: Sequence[Recipe],
    max_shard_size: str | int | None,
    threads: int | None = None,
    max_memory: int = 512_000_000,
) -> Explanation:
    from fastinterp.inspect.explain import Explanation

    with remote.headers_only():
        plan = make_plan(recipes[-1:], max_shard_size=optional_size(max_shard_size), above=recipes[:-1])
    return Explanation(plan, threads, max_memory)
