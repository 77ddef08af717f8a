"""What becomes of each tensor of a fine-tune in its adapter: low-rank factors, or a module that is stored whole."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from fastinterp.lora.peft_rules import saved_with, task_type
from fastinterp.plan.adapters import CONV1D_MODELS
from fastinterp.tokenizer.embedding_rows import embeddings
from fastinterp.tokenizer.tied_embeddings import (
    bias_of_head,
    head_of,
    is_input_embedding,
    is_shared,
    is_tied,
    says_tied,
)

# The last part of the names of modules that are embeddings, or output layers: a row per token, position or label.
_EMBEDDING = re.compile(r"\w*emb(?:ed|eds|edding|eddings)?(?:_\w+)?|wte|wpe|shared|relative_attention_bias")
_HEAD = re.compile(r"lm_head|embed_out|score|classifier|qa_outputs|lm_loss|generator_lm_head|vocab_projector")
_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")  # the last part of the names of layers whose weights are [in, out]
_WITH_HEAD = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
_LARGEST = 0.5  # of all elements: a module with more of them is no part of the model, but nearly all of it


class Parts(msgspec.Struct, frozen=True):
    """What an adapter consists of. Names of tensors are those of the base.

    factors    modules whose weight becomes two factors, in the order of the base
    biases     names of the biases of these modules that are stored, too
    saved      modules that are stored whole: name -> its tensors, name in the adapter -> name in the base
    impossible names of tensors that differ, but are in no module that can be stored
    absorbed   modules that are stored whole because a parameter of a module around them differs
    task       peft's `task_type`
    """

    factors: tuple[str, ...]
    biases: tuple[str, ...]
    saved: Mapping[str, Mapping[str, str]]
    impossible: tuple[str, ...]
    absorbed: tuple[str, ...]
    task: str | None


class HasShape(msgspec.Struct, frozen=True):
    """The shape of a tensor of numbers; an empty one of all others."""

    shape: tuple[int, ...]
    numel: int


def divide(
    tensors: Mapping[str, HasShape], changed: Collection[str], config: Mapping[str, Any], *, whole: bool = True
) -> Parts:
    """Divide the tensors of a fine-tune.

    tensors  of the base, in its order
    changed  names of those that differ in the fine-tune
    config   the base's config.json
    whole    store modules whose tensors differ, and have no factors; else only those that peft needs for the task
    """
    task = task_type(dict(config))
    rows = set(embeddings(tensors, None))
    factors = [
        _owner(name) for name in tensors if name in changed and name not in rows and _has_factors(name, tensors[name])
    ]
    modules = modules_of(tensors)
    lowered = set(factors)
    wanted: dict[str, None] = {}
    impossible: list[str] = []
    for name in (name for name in tensors if name in changed):
        owner, _, leaf = name.rpartition(".")
        if owner in wanted or (owner in lowered and leaf in ("weight", "bias")):
            continue
        if not owner or _is_most(owner, tensors):
            impossible.append(name)
        else:
            wanted[owner] = None
    tied = {copy: owner for owner in wanted for copy in tied_modules(owner, tensors, config, task)} if whole else {}
    saved = _outermost(saved_with(modules, list(wanted) if whole else (), task))
    absorbed = [module for module in factors if any(_is_in(module, owner) for owner in saved)]
    kept = [module for module in factors if module not in absorbed]
    stored = {owner: {name: name for name in tensors if _is_in(name, owner)} for owner in saved}
    for copy, owner in tied.items():
        stored[copy] = {f"{copy}{name.removeprefix(owner)}": name for name in stored.get(owner, {})}
    _add_head(stored, tensors, config)
    biases = [f"{module}.bias" for module in kept if f"{module}.bias" in tensors]
    if not whole or not any(name in changed for name in biases):
        biases = []
    return Parts(tuple(kept), tuple(biases), stored, tuple(impossible), tuple(absorbed), task)


def modules_of(tensors: Iterable[str]) -> list[str]:
    """The modules that have tensors, or modules that do, in the order of the tensors."""
    modules: dict[str, None] = {}
    for name in tensors:
        parts = name.split(".")[:-1]
        modules.update(dict.fromkeys(".".join(parts[:i]) for i in range(1, len(parts) + 1)))
    return list(modules)


def is_transposed(module: str, config: Mapping[str, Any]) -> bool:
    """Whether the weight of a module is [in, out]: of transformers' Conv1D."""
    return config.get("model_type") in CONV1D_MODELS and module.rpartition(".")[2] in _CONV1D


def tied_modules(embedding: str, tensors: Mapping[str, Any], config: Mapping[str, Any], task: str | None) -> list[str]:
    """The modules that transformers ties to an embedding, and of which the checkpoint has no tensor.

    peft gives a module that it saves a copy of its own, so that those tied to it would keep what they had.
    """
    prefix, _, last = embedding.rpartition(".")
    if f"{embedding}.weight" not in tensors or not _EMBEDDING.fullmatch(last):
        return []
    before = f"{prefix}." if prefix else ""
    copies = [f"{before}{part}.embed_tokens" for part in ("encoder", "decoder")] if last == "shared" else []
    if last == "shared" and task in _WITH_HEAD and is_tied(tensors) and says_tied(config) is not False:
        copies.append("lm_head")
    return [copy for copy in copies if f"{copy}.weight" not in tensors]


def _add_head(stored: dict[str, dict[str, str]], tensors: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Store the output layer that is a copy of an input embedding, if that is stored, or a module around the layer."""
    named = config.get("architectures")
    architectures = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    embedding = next((name for name in tensors if is_input_embedding(name) and not is_shared(name)), "")
    if not embedding or not is_tied(tensors) or says_tied(config) is False:
        return
    head = head_of(embedding, tensors, architectures)
    around = next((module for module in stored if head and _is_in(_owner(head), module)), "")
    if not head or not (around or _owner(embedding) in stored):
        return
    copies = {head: embedding} | dict(filter(None, [bias_of_head(head, tensors)]))
    stored[around or _owner(head)] = stored.get(around, {}) | copies


def _has_factors(name: str, tensor: HasShape) -> bool:
    """Whether a tensor is the weight of a linear layer or of a convolution in two dimensions, as its name goes."""
    owner, _, leaf = name.rpartition(".")
    last = owner.rpartition(".")[2]
    if leaf != "weight" or not last or _EMBEDDING.fullmatch(last) or _HEAD.fullmatch(last):
        return False
    return len(tensor.shape) in (2, 4) and min(tensor.shape[:2]) > 1


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _is_most(module: str, tensors: Mapping[str, HasShape]) -> bool:
    inside = [tensor.numel for name, tensor in tensors.items() if _is_in(name, module)]
    return len(inside) > 1 and sum(inside) > _LARGEST * sum(tensor.numel for tensor in tensors.values())


def _outermost(modules: Sequence[str]) -> list[str]:
    """Without those that are in another one."""
    return [one for one in modules if not any(one != other and _is_in(one, other) for other in modules)]
