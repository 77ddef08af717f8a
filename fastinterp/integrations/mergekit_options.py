"""The options of mergekit's commands (`MergeOptions`), what each of them is here, and a merge with them.

Does not import mergekit: the command fastinterp-mergekit works without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastinterp.arguments import overridden, size_of
from fastinterp.backends.cpu import Progress
from fastinterp.checkpoint.names import names_file
from fastinterp.checkpoint.sidecar_files import is_tokenizer_file
from fastinterp.errors import UsageError
from fastinterp.execute.report import Report
from fastinterp.execute.to_files import write_outputs
from fastinterp.output.model_card import CARD
from fastinterp.plan.plan import make_plan
from fastinterp.recipe.load import Recipe

CONFIG_COPY = "mergekit_config.yml"  # the recipe beside the weights, as mergekit writes it
_UNLIMITED = 1 << 62  # bytes of a shard


class Option(NamedTuple):
    """One option.

    kind     of its value; `count`: how often it is given; `size`: a number, or one with K, M or B behind it
    default  what mergekit has
    help     for `--help`
    unneeded why it changes nothing here; "" if it is honoured
    refused  what to do instead, where it cannot be honoured; "" if it can
    """

    name: str
    kind: Literal["flag", "text", "number", "count", "size"]
    default: Any
    help: str
    unneeded: str = ""
    refused: str = ""


OPTIONS = (
    Option("allow_crimes", "flag", False, "Mix architectures.", "tensors are matched by name and shape alone"),
    Option(
        "unsafe_truncate_embeddings", "flag", False,
        "Cut embeddings to the rows that all models have, whatever their tokens are.",
    ),
    Option("transformers_cache", "text", None, "Folder for models from the Hub."),
    Option("lora_merge_cache", "text", None, "Folder for models with merged LoRAs.", "no model is written beforehand"),
    Option("lora_merge_dtype", "text", None, "Dtype of models with merged LoRAs.", "no model is written beforehand"),
    Option("cuda", "flag", False, "Compute on a GPU."),
    Option("device", "text", None, "Where to compute: cpu, cuda, cuda:1 or auto."),
    Option("low_cpu_memory", "flag", False, "Keep results on the GPU.", "512 MB of host memory are enough"),
    Option("out_shard_size", "size", 5_000_000_000, "Bytes of tensors in one output file: 5B, 500M."),
    Option("copy_tokenizer", "flag", True, "Copy a tokenizer to the output."),
    Option("clone_tensors", "flag", False, "Copy tensors that are written twice.", "they are always written twice"),
    Option("trust_remote_code", "flag", False, "Run code of models.", "no code of a model is run"),
    Option("random_seed", "number", None, "Seed of random masks. Default: that of the recipe, else 0."),
    Option("lazy_unpickle", "flag", False, "Read pickles in pieces.", "tensors are always read in pieces"),
    Option("write_model_card", "flag", True, f"Write README.md and {CONFIG_COPY}."),
    Option(
        "safe_serialization", "flag", True, "Write safetensors: nothing else can be written.",
        refused="only safetensors are written. Leave the option out, and convert the output if a program needs pickles",
    ),
    Option("verbosity", "count", 0, "Log more; twice: even more."),
    Option("quiet", "flag", False, "Print errors and warnings only."),
    Option("read_to_gpu", "flag", False, "Read directly to the GPU.", "tensors are copied up while others are read"),
    Option("multi_gpu", "flag", False, "Use all GPUs."),
    Option("num_threads", "number", None, "Number of CPU threads. Default: one per CPU, at most 32."),
    Option("gpu_rich", "flag", False, "As --cuda --low-cpu-memory --read-to-gpu --multi-gpu."),
    Option("async_write", "flag", False, "Write in the background.", "reading, computing and writing always overlap"),
    Option("write_threads", "number", 1, "Number of threads that write.", "every thread reads, computes and writes"),
)  # fmt: skip


class Settings(NamedTuple):
    """What becomes of the options.

    device          as that of `fastinterp.merge`
    max_shard_size  bytes
    seed            None: that of the recipe
    truncate        whether embeddings are cut to the rows that all models have
    copy_tokenizer  False: no tokenizer files, unless the recipe makes a tokenizer
    write_card      False: no README.md, and no copy of the recipe
    hub_cache       folder for models from the Hub, None: that of huggingface_hub
    notes           a line for each option that was given and changes nothing, with the reason
    """

    device: str
    threads: int | None
    max_shard_size: int
    seed: int | None
    truncate: bool
    copy_tokenizer: bool
    write_card: bool
    hub_cache: str | None
    notes: tuple[str, ...]


def flag_of(option: Option, value: Any) -> str:
    """How a command line gives the option this value: `--no-copy-tokenizer`."""
    name = option.name.replace("_", "-")
    return f"--no-{name}" if option.kind == "flag" and not value else f"--{name}"


def settings_of(values: Mapping[str, Any], *, default_device: str = "cpu") -> Settings:
    """What the options with these values are here.

    values          by names as in OPTIONS; those that are missing have their defaults
    default_device  where to compute if no option says so
    Raises: UsageError, if one cannot be honoured.
    """
    given = {o.name: values.get(o.name, o.default) for o in OPTIONS}
    notes = []
    for option in OPTIONS:
        value = given[option.name]
        if value != option.default and option.refused:
            raise UsageError(f"{flag_of(option, value)} is not supported: {option.refused}")
        if value != option.default and option.unneeded:
            notes.append(f"{flag_of(option, value)} is not needed: {option.unneeded}")
    device, device_notes = _device(given, default_device)
    shard = given["out_shard_size"]
    return Settings(
        device=device,
        threads=given["num_threads"],
        max_shard_size=shard if shard > 0 else _UNLIMITED,
        seed=given["random_seed"],
        truncate=given["unsafe_truncate_embeddings"],
        copy_tokenizer=given["copy_tokenizer"],
        write_card=given["write_model_card"],
        hub_cache=given["transformers_cache"],
        notes=(*notes, *device_notes),
    )


def _device(given: Mapping[str, Any], default: str) -> tuple[str, list[str]]:
    """(the device, notes about it)"""
    named = given["device"] or ("cuda" if given["cuda"] or given["gpu_rich"] or given["multi_gpu"] else default)
    if named.partition(":")[0] not in ("cpu", "auto", "cuda", "triton"):
        why = "only devices with CUDA or ROCm are used. The result is the same"
        return "cpu", [f"--device {named} is computed on the CPU: {why}"]
    if named == "cuda" and (given["multi_gpu"] or given["gpu_rich"]):
        return _every_gpu(), []
    return named, []


def _every_gpu() -> str:
    """`cuda:0,1` with the numbers of all GPUs; `cuda`, if there is one, or none."""
    try:
        import torch
    except ImportError:
        return "cuda"
    count = torch.cuda.device_count()
    return "cuda:" + ",".join(map(str, range(count))) if count > 1 else "cuda"


def run(
    recipes: Sequence[Recipe],
    text: str,
    out: str | os.PathLike[str],
    settings: Settings,
    progress: Progress | None = None,
) -> Report:
    """Merge into the folder `out`, which may exist, as mergekit's commands do: a checkpoint there is replaced.

    recipes  the documents, the last of which is written
    text     of the copy of the recipe beside the weights
    Raises: what `fastinterp.merge` raises.
    """
    *above, last = recipes
    last = overridden(last, None, None, settings.seed)
    if settings.seed is not None:
        above = [replace(recipe, seed=last.seed) for recipe in above]
    if settings.truncate:
        *above, last = [replace(recipe, truncate_embeddings=True) for recipe in (*above, last)]

    def edit(recipe: Recipe, files: dict[str, bytes | Path]) -> None:
        if settings.write_card:
            files[CONFIG_COPY] = text.encode()
        else:
            files.pop(CARD, None)
        if not settings.copy_tokenizer and recipe.tokenizer is None:
            for name in [n for n in files if n != CARD and is_tokenizer_file(n)]:
                del files[name]

    with _hub_cache(settings.hub_cache):
        plan = make_plan(
            [last], max_shard_size=settings.max_shard_size, above=above, one_file=names_file(os.fspath(out))
        )
        return write_outputs(
            [plan], [[out]], device=settings.device, threads=settings.threads, max_memory=size_of("512MB"),
            force=True, durable=False, progress=progress, edit_files=edit,
        )[0]  # fmt: skip


@contextmanager
def _hub_cache(folder: str | None) -> Iterator[None]:
    """Context manager: models from the Hub are in this folder."""
    if folder is None:
        yield
        return
    from huggingface_hub import constants

    before, constants.HF_HUB_CACHE = constants.HF_HUB_CACHE, folder
    try:
        yield
    finally:
        constants.HF_HUB_CACHE = before
