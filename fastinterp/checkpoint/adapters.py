"""Adapters: what is trained beside a model and added to its weights. Recognised by the names of their tensors.

Most are factors of a product, and the mean of two products is not the product of the means of their factors: such
tensors are not merged one by one. Those of LoRA are added to their base where that is read: checkpoint/lora/.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from fastinterp.checkpoint.header import MAX_HEADER, Entry, Header
from fastinterp.checkpoint.names import quote
from fastinterp.checkpoint.regular_file import read_regular
from fastinterp.checkpoint.remedies import literal, python, saved_tokenizer
from fastinterp.checkpoint.strict_json import parse_object
from fastinterp.messages import listed
from fastinterp.presence import is_file

ADAPTER_CONFIG = "adapter_config.json"  # as peft saves it, beside adapter_model.safetensors

# The kind of an adapter, by how the name of a tensor ends; then may follow the adapter's name, `weight` or `bias`.
_KINDS = {
    "LoRA": r"lora_(?:[ABabE]|embedding_[AB]|magnitude_vector|up|down|mid)|lora\d?(?:_linear_layer)?\.(?:up|down)|"
    r"dora_scale|ranknum|hira_(?:embedding_)?[AB]|(?:lily|adamss|gralora|peanut|delora)_[AB](?:_general)?",
    "LoHa": r"hada_(?:w[12]_[ab]|t[12])",
    "LoKr": r"lokr_(?:w[12](?:_[ab])?|t[12])",
    "VeRA": r"p?vera_(?:lambda_[bd]|[AB])",
    "IA3": r"ia3_l",
    "BOFT": r"boft_[Rs]",
    "OFT": r"oft_(?:R|embedding_R|blocks|diag)",
    "GLoRA": r"glora_\w+",
    "PEFT": r"hra_u|c3a_kernel|fourierft_spectrum|waveft_spectrum|ln_tuning_layers|miss_block|bone_block|shira_weight|"
    r"randlora_(?:lambda|gamma|[AB])|road_(?:theta|alpha)|trainable_tokens_delta|vblora_\w+|unilora_theta_d|tinylora_v|"
    r"psoft_R|beft_bias|deft_[PR]|frod_lambda_\w+|osf_svd_params|supertuning_values|prompt_embeddings",
}
# What all of those have: looked for first, because checkpoints have up to some 100,000 names.
_HINTS = re.compile(r"lora|lycoris|hada_|lokr_|vera_|ia3_|oft_|ranknum|base_model\.|prompt_embeddings")
_NAME = re.compile(
    r"(?:(?P<module>.+)[._])?(?:"
    + "|".join(f"(?P<{kind}>{pattern})" for kind, pattern in _KINDS.items())
    + r")(?:\.[^.]+)?(?:\.(?:weight|bias))?",
    re.DOTALL,
)
_KOHYA = re.compile(r"(?:lora_(?:unet|te\d?|prior|transformer)|lycoris)_")  # module paths with underscores for dots
_DIFFUSERS = re.compile(r"(?:unet|text_encoder(?:_\d)?|transformer|prior|diffusion_model)\.")
_PEFT = "base_model."

_RANKS = {
    "lora_A": 0,
    "lora_down": 0,
    "lora.down": 0,
    "lora_embedding_A": 0,
    "hada_w1_b": 0,
    "lokr_w1_b": 0,
    "lokr_w2_b": 0,
}

# Of peft, by task_type; each loads the base with the class of transformers of the same name.
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE")
_HEAD = re.compile(r"(?:.*\.)?(?:classifier|score|classifier\.(?:dense|out_proj))\.weight", re.DOTALL)


class Adapter(msgspec.Struct, frozen=True):
    """The adapter that a checkpoint is or, if it is a whole model, that it has built in.

    kind     `LoRA`, ...
    style    whose names it has: `peft`, `kohya`, `diffusers`, or empty
    ranks    of its factors, ascending
    alpha    by which peft or kohya scale it; None, if not known
    whole    the checkpoint has the weights of a model, too
    tensors  names of the adapter's tensors
    config   adapter_config.json, or empty
    """

    kind: str
    style: str
    ranks: tuple[int, ...]
    alpha: str | None
    whole: bool
    tensors: frozenset[str]
    config: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `inspect --json` prints them."""
        return {
            "kind": self.kind,
            "style": self.style or None,
            "ranks": list(self.ranks),
            "alpha": self.alpha,
            "whole": self.whole,
            "tensors": len(self.tensors),
        }

    def describe(self) -> str:
        """`LoRA adapter (kohya), rank 8, alpha 4`."""
        text = f"{self.kind} adapter"
        text += f" ({self.style})" if self.style else ""
        text += f", rank {', '.join(map(str, self.ranks))}" if self.ranks else ""
        return text + (f", alpha {self.alpha}" if self.alpha is not None else "")


def find_adapter(
    tensors: Mapping[str, Header], metadata: Mapping[str, str], config_file: Path | None
) -> Adapter | None:  # fmt: skip
    """The adapter among these tensors, or None.

    metadata     of the files
    config_file  where adapter_config.json is, if there is one; None: the tensors are in no file
    Raises: CheckpointError, if that is damaged.
    """
    if not _HINTS.search("\n".join(tensors)):
        return None
    found = {name: match for name in tensors if (match := _NAME.fullmatch(name))}
    kohya = [name for name in tensors if _KOHYA.match(name)]
    peft = [name for name in tensors if name.startswith(_PEFT)]
    if len(kohya) == len(tensors):
        adapter = frozenset(tensors)
    elif found:
        adapter = frozenset(found) | frozenset(name for name in tensors if name.endswith(".alpha") and kohya)
    else:
        return None
    modules = {str(match["module"]) for match in found.values()}
    of_peft = len(peft) == len(tensors)
    whole = not kohya and _has_weights(tensors, adapter, modules, peft=of_peft)
    if whole and of_peft and config_file is not None and is_file(config_file):
        whole = not _has_embeddings_only(tensors, adapter)
    config = read_adapter_config(config_file) if config_file is not None and not whole and not kohya else {}
    style = "kohya" if kohya else "peft" if len(peft) == len(tensors) or config else ""
    if not style and any(_DIFFUSERS.match(name) for name in found):
        style = "diffusers"
    kinds = [kind for kind in _KINDS if any(match[kind] for match in found.values())]
    ranks = {
        tensors[name].shape[0]
        for name, match in found.items()
        if tensors[name].shape and any(match[kind] in _RANKS for kind in kinds if match[kind])
    }
    alpha = config.get("lora_alpha", metadata.get("ss_network_alpha"))
    return Adapter(
        kinds[0] if kinds else "LyCORIS", style, tuple(sorted(ranks)), None if alpha is None else str(alpha), whole,
        adapter, config,
    )  # fmt: skip


def _has_weights(tensors: Mapping[str, Header], adapter: frozenset[str], modules: set[str], peft: bool) -> bool:
    """Whether these tensors are a model with an adapter built in, not an adapter with a few layers of the model.

    modules  those that the adapter changes
    peft     all names are those of peft's adapters
    """
    # peft saves embeddings beside their adapters.
    layers = {module for module in modules if f"{module}.lora_embedding_A" not in tensors}
    bases = sum(_base_weights(module, tensors) for module in layers)
    if peft or 0 < len(layers) <= 2 * bases:
        return 0 < len(layers) <= 2 * bases
    matrices = sum(len(entry.shape) > 1 for name, entry in tensors.items() if name not in adapter)
    return matrices >= len(modules)


def _has_embeddings_only(tensors: Mapping[str, Header], adapter: frozenset[str]) -> bool:
    """Whether all that is not the adapter's is what peft saves beside one that changes them: the input embedding and
    the output layer of its base.
    """
    others = [name for name in tensors if name not in adapter]
    return len(others) <= 2 and all(name.endswith(".base_layer.weight") for name in others)


def _base_weights(module: str, tensors: Mapping[str, Header]) -> bool:
    """Whether the weight that an adapter changes is there too; `.original`: as torch's parametrizations call it."""
    parent = module.rpartition(".")[0]
    names = (f"{module}.weight", f"{module}.base_layer.weight", f"{parent}.original", f"{module}.linear.weight")
    return any(name in tensors for name in names)


def read_adapter_config(path: Path) -> dict[str, Any]:
    """adapter_config.json; empty, if it is not there. Raises: CheckpointError, if it is damaged."""
    if not is_file(path):
        return {}
    return parse_object(read_regular(str(path), MAX_HEADER).lstrip(), "the adapter's configuration", str(path))


# Keys of adapter_config.json that make something else of an adapter than a sum of products, and what that is.
_OTHER = {
    "layer_replication": "repeats layers of its base (`layer_replication`)",
    "use_qalora": "is QA-LoRA (`use_qalora`), whose factors are of pooled inputs",
    "arrow_config": "routes between several (`arrow_config`)",
    "alora_invocation_tokens": "is aLoRA (`alora_invocation_tokens`), which is off until those tokens come",
    "use_bdlora": "has block-diagonal factors (`use_bdlora`)",
    "kasa_config": "is KaSA (`kasa_config`), which changes the weights of its base",
    "monteclora_config": "is MonteCLoRA (`monteclora_config`), whose weights are drawn at random",
}
_MUTATING = ("pissa", "corda", "olora", "loftq", "lora_ga")  # of init_lora_weights: these change the base


def unmergeable(adapter: Adapter) -> str:
    """Why an adapter is no sum of low-rank products that is added to its base; empty, if it is one."""
    peft_type = str(adapter.config.get("peft_type", "LORA"))
    if peft_type in _PROMPTS or adapter.tensors == {"prompt_embeddings"}:
        return "this is a prompt for its base, which has no place in weights"
    if adapter.kind != "LoRA" or peft_type != "LORA":
        kind = adapter.kind if peft_type == "LORA" else peft_type
        return (
            f"this is {_article(kind)} adapter: only those of LoRA (and DoRA) are added to a model here. Merge it into "
            "its base first, with the program that made it; then name the model that it writes"
        )
    if reason := unmergeable_config(adapter.config):
        return reason
    if not adapter.style:
        return "this adapter has names of no program that is known (peft, kohya, diffusers): its scales are not known"
    return ""


def unmergeable_config(config: Mapping[str, Any]) -> str:
    """The same of a LoraConfig of peft alone."""
    for key, what in _OTHER.items():
        if config.get(key):
            return f"this adapter {what}: it is no sum of products that is added to weights, and is not merged"
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(_MUTATING):
        return (
            f"this adapter was saved with `init_lora_weights` {quote(init)}, which also changed the weights of its "
            "base: it does not fit the base as that is published. Save it with peft's "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`; or, if the base that you name is "
            f"the changed one, set `init_lora_weights` to true in {ADAPTER_CONFIG}"
        )
    return ""


def built_in_refusal(adapter: Adapter) -> str:
    """About a whole model of peft whose adapter is not merged into its weights; empty for other whole models."""
    if not any(tensor.startswith(_PEFT) for tensor in adapter.tensors):
        return ""
    return (
        f"this is a model of peft with {_article(adapter.kind)} adapter that is not merged into its weights "
        f"({quote(min(adapter.tensors))}), and adapters are not merged. Where it was saved, call "
        '`model.merge_and_unload().save_pretrained("NEW")` instead; then name NEW'
    )


def refusal_in_memory(label: str, adapter: Adapter) -> str:
    """The same as both about a state dict, which messages call `label`; empty, if it is none to be refused."""
    names = listed([quote(name) for name in sorted(adapter.tensors)], 2)
    if not adapter.whole:
        what = f"{label} is {_article(adapter.kind)} adapter, not a whole model ({names})"
    elif built_in_refusal(adapter):
        what = f"{label} is a model of peft whose {adapter.kind} adapter is not merged into it ({names})"
    else:
        return ""
    return (
        f"{what}, and adapters are not merged. Merge it into its base first, with peft by `model.merge_and_unload()`, "
        "and give the state dict of what that returns"
    )


def refusal(name: str, root: Path, adapter: Adapter, tensors: Mapping[str, Entry], file: Path) -> str:
    """What it is, that it is not merged, and how it becomes a model."""
    base = adapter.config.get("base_model_name_or_path")
    to = f" to {quote(base)}" if isinstance(base, str) and base else ""
    what = f"this is {_article(adapter.kind)} adapter{to}, not a whole model"
    if not unmergeable(adapter):
        source = name if Path(os.path.expanduser(name)).exists() or not root.is_dir() else str(file)
        owner = base if isinstance(base, str) and base else "BASE"
        if adapter.style == "peft" and not adapter.config:
            what += f". Put its {ADAPTER_CONFIG} beside it first"
        return (
            f"{what}. Name it behind its base: {quote(f'{owner}+{source}', 400)}. Adapters are merged with each other "
            "into an adapter: write `out: lora` in the recipe"
        )
    what += ", and adapters are not merged. "
    if adapter.style == "peft":
        return what + _with_peft(
            name if Path(name).is_dir() or not Path(name).exists() else str(root), adapter, tensors
        )
    if adapter.style == "kohya":
        return (
            f"{what}Merge it into its base first, with `tools/merge.py` of LyCORIS; then name the file that it writes"
        )
    return f"{what}Merge it into its base first, with the program that made it; then name the model that it writes"


def _article(kind: str) -> str:
    return f"{'an' if kind[:1] in ('A', 'I', 'O') else 'a'} {kind or quote(kind)}"


def _with_peft(folder: str, adapter: Adapter, tensors: Mapping[str, Entry]) -> str:
    """How peft merges the adapter in `folder` into its base."""
    config, source = adapter.config, literal(folder)
    if not config:
        return (
            f"Merge it into its base first, with peft, which needs its {ADAPTER_CONFIG}: put that beside it, and see "
            "this message again"
        )
    if config.get("peft_type") in _PROMPTS or adapter.tensors == {"prompt_embeddings"}:
        return "It is a prompt for its base, which has no place in weights"
    auto = _AUTO_CLASSES.get(str(config.get("task_type")))
    if auto is None and config.get("task_type") is None and isinstance(config.get("auto_mapping"), dict):
        auto = "AutoPeftModel"
    save = '.merge_and_unload().save_pretrained("NEW")'
    if auto is None:
        code = f"peft.PeftModel.from_pretrained(model, {source}){save}{_tokenizer(folder)}"
        return f"Merge it into its base first, with peft: `{code}`, where `model` is the base, loaded; then name NEW"
    labels = ""
    if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS"):
        heads = [entry.shape[0] for name, entry in tensors.items() if _HEAD.fullmatch(name) and len(entry.shape) == 2]
        labels = f", num_labels={heads[-1]}" if heads else ""
    command = python(f"import peft; peft.{auto}.from_pretrained({source}{labels}){save}{_tokenizer(folder)}")
    return f"Merge it into its base first, with peft: {command}; then name NEW"


def _tokenizer(folder: str) -> str:
    """What saves the tokenizer that was saved beside the adapter; empty, if there is none, or only that of the base."""
    try:
        present = os.listdir(os.path.expanduser(folder))
    except OSError:
        return ""
    save = saved_tokenizer(folder, present) if "tokenizer_config.json" in present else ""
    return f"; import transformers{save}" if save else ""
