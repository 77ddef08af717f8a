"""Warnings about configurations and tokenizers: those of one model are copied, and should suit the others."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastinterp.checkpoint.same_bytes import same_bytes
from fastinterp.checkpoint.sidecar_files import CONFIG, is_tokenizer_file, json_or_empty, read_config
from fastinterp.errors import CheckpointError, UnreadableError
from fastinterp.messages import fit, listed
from fastinterp.output.origin_files import missing_code
from fastinterp.plan.models import Model
from fastinterp.plan.tensor_sets import is_recomputed
from fastinterp.presence import info_of, is_file, names_at
from fastinterp.recipe.tensor_groups import HasShape, grouped, why
from fastinterp.tokenizer.chat_template import template_file
from fastinterp.tokenizer.tied_embeddings import is_head, lacks_head, says_tied

# Classes of transformers with a head that gives a number for each token of the vocabulary.
_WITH_HEAD = re.compile(r"(For(CausalLM|ConditionalGeneration|MaskedLM|PreTraining)|LMHead(Model)?)$")
_MOST = 3  # lines of a kind, and names in a line, before the rest is only counted

# What the weights were trained for. Where a model does not say it, transformers has a default, so only two values that
# differ count. The last two are off unless they are named.
_KEYS = (
    "model_type", "vocab_size", "hidden_size", "hidden_act", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_parameters",
    "sliding_window", "rope_scaling",
)  # fmt: skip
_OFF_IF_ABSENT = ("sliding_window", "rope_scaling")
_AVERAGES = ("model_ema.",)  # moving averages of the weights, beside them in one file: nothing loads them
_SCHEDULER = "scheduler/scheduler_config.json"  # what a denoiser was trained to predict
_COMPONENT_KEYS = (
    *_KEYS, "_class_name", "prediction_type", "beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr",
    "scaling_factor", "shift_factor", "sample_size", "in_channels", "cross_attention_dim",
)  # fmt: skip


def compatibility_warnings(
    checkpoints: Sequence[Model], origin: Model, vocabulary: bool = False, rows: bool = False
) -> tuple[str, ...]:
    """Warnings about the files that are copied from `origin`, each with what to do.

    vocabulary  the recipe says what becomes of it, so tokenizers may differ
    rows        the number of rows that config.json says is the output's, whatever the models have
    Raises: CheckpointError, if the config.json of `origin` is damaged. Those of the others are only compared.
    """
    by_root = {origin.root: origin}
    for checkpoint in checkpoints:
        by_root.setdefault(checkpoint.root, checkpoint)
    _, *others = by_root.values()
    config = read_config(origin.root)
    warnings = [*_missing(origin, others), *([] if vocabulary else _tokenizers(origin, others))]
    if config is not None:
        warnings += _configs(origin, config, others, {"vocab_size"} if vocabulary or rows else set())
    for file, code in missing_code(origin.root).items():
        warnings.append(
            f"{file} of {origin.name} names code (auto_map) that is not in its folder: {listed(code, _MOST)}. Copy it "
            "into the output, or the output cannot be loaded"
        )
    return tuple(warnings)


def head_warnings(origin: Model, tensors: Mapping[str, HasShape], tied: bool | None) -> list[str]:
    """A warning, if software will make the output's language-model head up, because no model stores one.

    tensors  of the output, by name
    tied     what the output's config.json says of it, if that is not what the origin's says
    """
    config = json_or_empty(origin.root / CONFIG)
    classes = config.get("architectures")
    kind = classes[0] if isinstance(classes, list) and classes else None
    if tied or says_tied(config) is not False or not isinstance(kind, str) or not _WITH_HEAD.search(kind):
        return []
    if not lacks_head(tensors):
        return []
    return [
        f"the output has no language-model head (lm_head): config.json of {origin.name} says {fit(kind, 60)}, which "
        "has one that is not tied to the input embedding, but no model stores it, so software makes it up of random "
        "numbers. If it was tied, set `tie_word_embeddings: true` in that config.json; else take models that have it"
    ]


def lost_tensors(origin: Model, own: Mapping[str, HasShape], names: Iterable[str], tied: bool | None) -> list[str]:
    """Those of the tensors which the output lacks that software makes up when it loads the output, because the
    configuration, which is the origin's, describes a model that has them.

    own    the origin's tensors, by the names that the output has
    names  of tensors that are left out
    tied   what the output's config.json says of its output layer, if that is not what the origin's says
    """
    folders = [part.folder for part in (() if origin.source is None else origin.source.components) if part.folder]
    described = {folder: is_file(origin.root / folder / CONFIG) for folder in ("", *folders)}
    tied = says_tied(json_or_empty(origin.root / CONFIG)) if tied is None else tied
    lost = []
    for name in names:
        folder = next((folder for folder in folders if name.startswith(f"{folder}/")), "")
        needed = name in own and not is_recomputed(name, own[name]) and not (tied and is_head(name))
        if described[folder] and needed and not name.startswith(_AVERAGES):
            lost.append(name)
    return lost


def lost_warnings(
    origin: Model, lost: Mapping[str, Collection[str]], made: Collection[str], base: Model
) -> list[str]:  # fmt: skip
    """A warning about tensors that the output lacks and its configuration describes.

    lost  by name, which models lack it
    made  names of all tensors of the output
    base  the model from which `missing: base` copies
    """
    if not lost:
        return []
    reasons = set(map(tuple, lost.values()))
    reason = why(next(iter(reasons)) if len(reasons) == 1 else (), lost)
    it = "it" if len(lost) == 1 else "them"
    remedy = "Take models that have them in one shape"
    if all(name in base.tensors for name in lost):
        remedy = f"`missing: base` (--missing base) copies {it} from {base.name} instead"
    return [
        f"left out, because {reason}: {grouped(lost, made)}. {CONFIG}, copied from {origin.name}, describes a model "
        f"that has {it}, so software that loads the output puts random numbers there. {remedy}"
    ]


def template_warnings(models: Sequence[Model], origin: Model) -> list[str]:
    """A warning, if `origin`, whose tokenizer the output has, has no chat template, and a model that is merged has."""
    if _template(origin.root):
        return []
    having = [(model, file) for model in models if (file := _template(model.root))]
    if not having:
        return []
    model, file = having[0]
    return [
        f"{model.name} has a chat template ({file}), but the output has the tokenizer of {origin.name}, which has none"
        ". Write `chat_template: auto` into the recipe to have it; without a recipe, copy "
        + ("the file into the output" if file != "tokenizer_config.json" else "the key `chat_template` of that file")
    ]


def _template(root: Path) -> str | None:
    """The file in a model's folder that has a chat template, or None."""
    try:
        return template_file(root)
    except UnreadableError:
        raise
    except CheckpointError:
        return None


def component_warnings(models: Sequence[Model], origin: Model) -> list[str]:
    """Warnings about the configurations of components, which are copied from `origin`, and should suit the others."""
    parts = () if origin.source is None else origin.source.components
    files = [f"{part.folder}/{CONFIG}" for part in parts if part.folder] + ([_SCHEDULER] if parts else [])
    groups: dict[str, list[str]] = {}
    for file in files:
        ours = json_or_empty(origin.root / file)
        for model in models:
            if ours and model.root != origin.root and (theirs := json_or_empty(model.root / file)):
                keys = [f"{k} {fit(str(ours[k]), 40)} and {fit(str(theirs[k]), 40)}" for k in _COMPONENT_KEYS
                        if k in ours and k in theirs and ours[k] != theirs[k]]  # fmt: skip
                if keys:
                    groups.setdefault(f"{file}: {listed(keys, _MOST)}", []).append(model.name)
    return _few(
        f"{what}: these differ in {origin.name} and {listed(names, _MOST)}; the output gets {origin.name}'s. See that "
        "the models belong together"
        for what, names in groups.items()
    )


def path_warnings(checkpoints: Sequence[Model]) -> tuple[str, ...]:
    """Warnings about the models of a path, where no file is copied: tokenizers that differ from the first's."""
    first, *others = {c.root: c for c in checkpoints}.values()
    return tuple(_tokenizers(first, others, copied=False))


def _missing(origin: Model, others: Sequence[Model]) -> list[str]:
    """Files that the origin lacks and another model has. What no model has, the output need not have."""
    missing = []
    for what, names in ((CONFIG, lambda c: {CONFIG} & set(names_at(c.root))), ("tokenizer", _tokenizer_files)):
        having = [] if names(origin) else [c for c in others if names(c)]
        if having:
            missing.append(
                f"{origin.name} has no {what}, so the output has none. Copy that of {having[0].name}, if it fits"
            )
    return missing


def _tokenizers(origin: Model, others: Sequence[Model], copied: bool = True) -> list[str]:
    copied_files = _tokenizer_files(origin)
    groups: dict[str, list[str]] = {}
    for other in others:
        shared = sorted(copied_files & _tokenizer_files(other))
        differing = [n for n in shared if not _same_bytes(origin.root / n, other.root / n)]
        if differing:
            groups.setdefault(listed(differing, _MOST), []).append(other.name)
    whose = f"; the output gets {origin.name}'s" if copied else ""
    return _few(
        f"{files} of {origin.name} and of {listed(names, _MOST)} differ{whose}. "
        "See that every token has the same id in all models"
        for files, names in groups.items()
    )


def _configs(origin: Model, config: dict[str, Any], others: Sequence[Model], may_differ: set[str]) -> list[str]:
    groups: dict[str, list[str]] = {}
    unreadable = []
    for other in others:
        try:
            other_config = read_config(other.root)
            differing = [] if other_config is None else _differences(config, other_config, may_differ)
        except UnreadableError:
            raise
        except (CheckpointError, RecursionError):
            unreadable.append(f"{CONFIG} of {other.name} cannot be read, so it is not known whether that model fits")
            continue
        if differing:
            groups.setdefault(listed(differing, _MOST), []).append(other.name)
    return _few(unreadable) + _few(
        f"{CONFIG} of {origin.name} and of {listed(names, _MOST)} differ: {keys}; the output gets {origin.name}'s. "
        "See that the models belong together"
        for keys, names in groups.items()
    )


def _differences(ours: dict[str, Any], theirs: dict[str, Any], may_differ: set[str]) -> list[str]:
    """`vocab_size 32000 and 32016` for each key, at the top and in text_config."""
    differences = []
    for prefix in ("", "text_config."):
        a, b = (t.get("text_config") if prefix else t for t in (ours, theirs))
        if not isinstance(a, dict) or not isinstance(b, dict):
            continue
        for key in _KEYS:
            x, y = a.get(key), b.get(key)
            if x != y and key not in may_differ and ((x is not None and y is not None) or key in _OFF_IF_ABSENT):
                differences.append(f"{prefix}{key} {fit(str(x), 40)} and {fit(str(y), 40)}")
    return differences


def _tokenizer_files(checkpoint: Model) -> set[str]:
    return {n for n in names_at(checkpoint.root) if is_tokenizer_file(n)}


def _same_bytes(a: Path, b: Path) -> bool:
    """Sizes first: most files that differ need not be read."""
    x, y = info_of(a), info_of(b)
    if x is None or y is None:  # a link that leads nowhere
        return False
    try:
        return os.path.samestat(x, y) or same_bytes((a, 0, x.st_size), (b, 0, y.st_size))
    except UnreadableError:
        raise
    except CheckpointError:  # no regular file, or one that changes meanwhile
        return False


def _few(lines: Iterable[str]) -> list[str]:
    every = list(lines)
    more = [f"and {len(every) - _MOST} more like the last"] if len(every) > _MOST else []
    return every[:_MOST] + more
