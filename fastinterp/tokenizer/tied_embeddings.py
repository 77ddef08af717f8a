"""Tied copies: tensors without values of their own, because they are another one: an output layer that is the input
embedding, the embeddings of an encoder and a decoder that are `shared.weight`. Found from names, and bytes where both
are stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from fastinterp.checkpoint.strict_json import parse_object
from fastinterp.errors import CheckpointError
from fastinterp.tokenizer.embedding_rows import HasShape

# The last part but one of a name, in the order in which they are looked for. `output` counts as `output.weight` only.
_OUT = ("lm_head", "embed_out", "output", "proj_out", "vocab_projector", "lm_loss", "generator_lm_head", "decoder")
_IN = (
    "shared", "embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "word_embedding",
)  # fmt: skip
_HEADS_OF_TOP = ("output.weight", "proj_out.weight")  # parts of layers have these names, too
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of `shared.weight`
_BIASES = ("predictions.decoder.bias", "lm_head.decoder.bias")  # of the same without `decoder.`
# How names of biases of output layers end, which are stored even where the weight is the input embedding, and how those
# of the weights end.
_HEADS_OF_BIASES = {
    "predictions.bias": "predictions.decoder.weight",
    "lm_head.bias": "lm_head.weight",
    "vocab_projector.bias": "vocab_projector.weight",
    "lm_loss.bias": "lm_loss.weight",
    "generator_lm_head.bias": "generator_lm_head.weight",
}
# How classes of transformers end that have an output layer with a row for each token.
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")
_TEXT = ("text_config", "llm_config", "language_config")  # where models of several parts describe their language model

# Values of `model_type`, and what an absent `tie_word_embeddings` means there in transformers. Others: not known.
_TIED_BY_DEFAULT = frozenset((
    "albert", "bart", "bert", "blenderbot", "bloom", "camembert", "cohere", "cohere2", "deberta", "deberta-v2",
    "distilbert", "electra", "falcon", "falcon_mamba", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n",
    "gemma3n_text", "gpt2", "gpt_bigcode", "gpt_neo", "led", "longformer", "longt5", "m2m_100", "mamba", "marian",
    "mbart", "mobilebert", "modernbert", "mpnet", "mpt", "mt5", "opt", "pegasus", "recurrent_gemma", "roberta",
    "smollm3", "speech_to_text", "starcoder2", "switch_transformers", "t5", "umt5", "whisper", "xglm", "xlm-roberta",
    "xlnet",
))  # fmt: skip
_UNTIED_BY_DEFAULT = frozenset((
    "codegen", "deepseek_v2", "deepseek_v3", "glm", "glm4", "gpt_neox", "gptj", "llama", "mistral", "mixtral",
    "nemotron", "olmo", "olmo2", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "stablelm",
))  # fmt: skip


class Ties(msgspec.Struct, frozen=True):
    """Copies that some models store and others do not, and output layers that are no copies though they should be.

    aliases  per model: tensors that it does not have, and what to read instead
    dropped  copies that some models store, and others do not: the output has none of them
    trained  (model, output layer): its configuration does not say untied, but what it stores is not its embedding
    guessed  (model, output layer): the model has none, its configuration does not say whether it is tied; it counts as
             tied, although another model has an output layer of its own
    absent   (model, output layer): the model has none although its configuration says untied, and others have one
    """

    aliases: tuple[Mapping[str, str], ...]
    dropped: tuple[str, ...] = ()
    trained: tuple[tuple[int, str], ...] = ()
    guessed: tuple[tuple[int, str], ...] = ()
    absent: tuple[tuple[int, str], ...] = ()


def ties(
    models: Sequence[Iterable[str]],
    says_tied: Sequence[bool | None],
    equal: Callable[[int, str, str], bool] = lambda model, a, b: True,
) -> Ties:
    """Which tensors stand for absent copies, and which copies the output does without.

    models     the names of each model's tensors
    says_tied  whether its config.json sets `tie_word_embeddings`; None: it does not say
    equal      whether two tensors of a model have the same bytes

    The output has an output layer of its own if any model does: one whose configuration says untied, or which is not
    its input embedding. A model without one gives its input embedding for it, if its configuration does not say untied.
    A copy that all store is merged as it is; one that some store is dropped. With several input embeddings the one is
    taken whose name starts most like the output layer's.
    """
    names: list[dict[str, None]] = [dict.fromkeys(m) for m in models]
    union = dict.fromkeys(n for m in names for n in m)
    copies = [n for n in union if _is_copy(n)]
    aliases: list[dict[str, str]] = [{} for _ in names]
    for i, mine in enumerate(names):  # where the copy is stored, and what it is a copy of is not
        for copy in (c for c in copies if c in mine and says_tied[i] is not False):
            source = _source(copy, mine)
            original = _source(copy, union) if source is None else None
            if original is not None and original not in aliases[i]:
                aliases[i][original] = copy
    dropped: list[str] = []
    trained: list[tuple[int, str]] = []
    guessed: list[tuple[int, str]] = []
    absent: list[tuple[int, str]] = []

    def is_own(i: int, copy: str) -> bool:
        """Whether a copy that is stored has values of its own."""
        source = _source(copy, [*names[i], *aliases[i]])
        if source is None or (is_head(copy) and says_tied[i] is False):
            return True
        return aliases[i].get(source) != copy and not equal(i, copy, source)

    for copy in copies:
        stored = [i for i, mine in enumerate(names) if copy in mine]
        lacking = [i for i in range(len(names)) if i not in stored]
        head = is_head(copy)
        own = [i for i in stored if (lacking or head) and is_own(i, copy)]
        trained += [(i, copy) for i in own if head and says_tied[i] is not False and _source(copy, names[i])]
        if not lacking:
            continue
        untied = [i for i in lacking if head and says_tied[i] is False and _source(copy, names[i])]
        if not own and not untied:
            dropped.append(copy)
            continue
        absent += [(i, copy) for i in untied]
        for i in (i for i in lacking if i not in untied):
            source = _source(copy, [*names[i], *aliases[i]])
            if source is not None:
                aliases[i][copy] = source
                guessed += [(i, copy)] if head and says_tied[i] is None else []
    return Ties(tuple(aliases), tuple(dropped), tuple(trained), tuple(guessed), tuple(absent))


def says_tied(config: Mapping[str, Any]) -> bool | None:
    """`tie_word_embeddings` of a config.json: at the top, by which transformers goes, else of the language model; where
    it is in neither, what that means for models of its type. None, if that is not known.
    """
    for part in (config, *(config.get(k) for k in _TEXT)):
        value = part.get("tie_word_embeddings") if isinstance(part, Mapping) else None
        if isinstance(value, bool):
            return value
    kind = str(config.get("model_type"))
    return True if kind in _TIED_BY_DEFAULT else False if kind in _UNTIED_BY_DEFAULT else None


def is_tied(names: Iterable[str]) -> bool:
    """Whether a model has an input embedding, and no output layer of its own."""
    every = list(names)
    return any(_module(n) in _IN and n.endswith(".weight") for n in every) and not any(map(is_head, every))


def lacks_head(tensors: Mapping[str, HasShape]) -> bool:
    """Whether a model has an input embedding, and outside of its layers no other matrix with a row or a column for each
    token, so no output layer of any name.
    """
    embeddings = {n for n in tensors if _module(n) in _IN and n.endswith(".weight")}
    rows = {tensors[n].shape[0] for n in embeddings if tensors[n].shape}
    outside = [n for n in tensors if n not in embeddings and not any(p.isdecimal() for p in n.split(".")[:-2])]
    return is_tied(tensors) and not any(
        len(tensors[n].shape) > 1 and not rows.isdisjoint(tensors[n].shape) for n in outside
    )


def config_changes(
    config: Mapping[str, Any], *, vocab_size: int | None = None, tied: bool | None = None,
    special: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The keys of a config.json that have to change, nested as there; {} if none does.

    vocab_size  rows of the output's embeddings; None: unchanged
    tied        whether the output has no output layer of its own; None: unchanged
    special     config.json of the model whose vocabulary the output has, if that is another: its `..._token_id` and
                `..._token_index` take the place of those that are there

    A key is set where it is: at the top, in text_config (llm_config, language_config), or in both. `vocab_size` that is
    nowhere is set at the top; `tie_word_embeddings` goes to both, because it depends on the model what its absence
    means.
    """
    changes: dict[str, Any] = {}
    nested = {k: config[k] for k in _TEXT if isinstance(config.get(k), dict)}
    wanted = {} if vocab_size is None else {"vocab_size": vocab_size}
    anywhere = any("vocab_size" in part for part in (config, *nested.values()))
    for name, part in (("", config), *nested.items()):
        new = {k: v for k, v in wanted.items() if k in part or (not anywhere and not name)}
        if tied is not None:
            new["tie_word_embeddings"] = tied
        other = (special or {}).get(name, {}) if name else special or {}
        if isinstance(other, Mapping):
            new |= {k: other[k] for k in part if k.endswith(("_token_id", "_token_index")) and k in other}
        new = {k: v for k, v in new.items() if k not in part or part[k] != v}
        if new and name:
            changes[name] = new
        else:
            changes |= new
    return changes


def with_changes(config: bytes, changes: Mapping[str, Any], file: str = "config.json") -> bytes:
    """`config` with the changes in it; the bytes come back untouched if there are none."""
    if not changes:
        return config
    table = parse_object(config.lstrip(), "the model configuration", file)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(table.get(key), dict):
            table[key].update(value)
        else:
            table[key] = value
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()


def vocab_size_of(config: Mapping[str, Any], file: str) -> int | None:
    """`vocab_size` at the top or of the language model, or None.

    Raises: CheckpointError, if it is no number of tokens.
    """
    for part in (config, *(config.get(k) for k in _TEXT)):
        size = part.get("vocab_size") if isinstance(part, Mapping) else None
        if size is not None:
            if type(size) is not int or size < 1:
                raise CheckpointError(f"`vocab_size` is {size!r}, expected a whole number above 0", file=file)
            return size
    return None


def is_head(name: str) -> bool:
    """Whether the name is that of an output layer's weight, which may be the input embedding."""
    kind = _module(name)
    if kind not in _OUT or not name.endswith(".weight"):
        return False
    if kind == "decoder":  # of BERT, RoBERTa and ModernBERT: others have whole stacks of this name
        return name.endswith(("predictions.decoder.weight", "lm_head.decoder.weight")) or name == "decoder.weight"
    return kind not in ("output", "proj_out") or name in _HEADS_OF_TOP


def embedding_of(head: str, names: Iterable[str]) -> str | None:
    """The input embedding that an output layer may be, of the tensors called `names`; None, if there is none."""
    return _source(head, names) if is_head(head) else None


def head_of(embedding: str, names: Collection[str], architectures: Sequence[str]) -> str | None:
    """What the output layer is called of a model that stores none, because it is the input embedding.

    architectures  of its config.json
    Returns: None, if the model is of a class without one; the empty string, if the class has one of an unknown name
    """
    for name in names:
        for bias, weight in _HEADS_OF_BIASES.items():
            if name == bias or name.endswith(f".{bias}"):
                stem = name.removesuffix(bias)
                dense = f"{stem}lm_head.dense.weight" in names  # of RoBERTa: a layer more
                return f"{stem}lm_head.decoder.weight" if dense and bias == "lm_head.bias" else stem + weight
    if "decoder.bias" in names and "head.dense.weight" in names:  # ModernBERT
        return "decoder.weight"
    if not any(name.endswith(_LANGUAGE_MODELS) for name in architectures):
        return None
    if any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in architectures):
        return ""
    if any(name.startswith("Whisper") for name in architectures):
        return "proj_out.weight"
    inside = embedding.startswith("language_model.")  # a language model in one of several parts, as older files have it
    return "language_model.lm_head.weight" if inside else "lm_head.weight"


def bias_of_head(head: str, names: Collection[str]) -> tuple[str, str] | None:
    """(bias of an output layer, the tensor that it is a copy of while the weight is one), if the model has such one."""
    bias = head.removesuffix(".weight") + ".bias"
    source = _source(bias, names) if bias.endswith(_BIASES) and bias not in names else None
    return None if source is None else (bias, source)


def copied_from(name: str, names: Collection[str]) -> str | None:
    """The tensor of those called `names` that one is a copy of by its name; None, if there is none."""
    return _source(name, names) if _is_copy(name) else None


def is_input_embedding(name: str) -> bool:
    """Whether the name is that of an input embedding's weight, which may be the output layer, too."""
    return _module(name) in _IN and name.endswith(".weight")


def is_shared(name: str) -> bool:
    """Whether the name is that of an embedding which is those of an encoder and a decoder, too."""
    return _module(name) == "shared" and name.endswith(".weight")


def _is_copy(name: str) -> bool:
    """Whether the name is that of a tensor that may be a copy of another."""
    return is_head(name) or name.endswith(_COPIES) or name.endswith(_BIASES)


def _source(copy: str, names: Iterable[str]) -> str | None:
    """The tensor of those called `names` that a copy is of; None, if it is not among them."""
    if copy.endswith(_BIASES):
        source = copy.removesuffix(".decoder.bias") + ".bias"
        return source if source in names else None
    if copy.endswith(_COPIES):
        stem = next(copy.removesuffix(end) for end in _COPIES if copy.endswith(end))
        source = f"{stem}shared.weight"
        return source if source in names else None
    inputs = [n for kind in _IN for n in names if _module(n) == kind and n.endswith(".weight")]
    return max(inputs, key=partial(_common, copy)) if inputs else None


def _module(name: str) -> str:
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else ""


def _common(a: str, b: str) -> int:
    """Leading parts of two names that agree."""
    count = 0
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        count += 1
    return count
