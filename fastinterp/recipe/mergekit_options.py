"""Options of mergekit's commands, and what to do instead here: in a recipe, or on the command line. Its other files."""

from __future__ import annotations

# Without the dashes -> (key or option here, empty if none is needed; why, or how it differs).
_OPTIONS = {
    "allow_crimes": ("", "`missing` says what becomes of tensors that not all models have"),
    "async_write": ("", "reading, computing and writing always overlap"),
    "clone_tensors": ("", "a layer may be stacked several times"),
    "copy_tokenizer": ("", "the tokenizer is always copied"),
    "cuda": ("--device cuda", ""),
    "device": ("--device", ""),
    "gpu_rich": ("--device cuda", ""),
    "lazy_unpickle": ("", "tensors are always read in pieces"),
    "lora_merge_cache": ("", "adapters are added while their models are read"),
    "lora_merge_dtype": ("", "adapters are added while their models are read"),
    "low_cpu_memory": ("--max-memory", "models are never held in memory as a whole"),
    "multi_gpu": ("--device cuda", "which takes all GPUs"),
    "num_threads": ("--threads", ""),
    "out_shard_size": ("--max-shard-size", "in bytes: 5GB"),
    "quiet": ("--quiet", ""),
    "random_seed": ("--seed", ""),
    "read_to_gpu": ("--device cuda", ""),
    "safe_serialization": ("", "the output is always safetensors"),
    "transformers_cache": ("", "models are found in the cache that HF_HOME names"),
    "trust_remote_code": ("", "code of a model is never run"),
    "unsafe_truncate_embeddings": ("", "`truncate_embeddings: true` in the recipe does the same"),
    "verbose": ("", "`fastinterp explain` says more"),
    "verbosity": ("", "`fastinterp explain` says more"),
    "write_model_card": ("", "the model card is always written"),
    "write_threads": ("--threads", ""),
}
# Keys that mergekit has, or had, in recipes.
_KEYS = {
    "unsafe_truncate_embeddings": "the key is `truncate_embeddings` here",
    "random_seed": "the key is `seed` here",
    "embed_slerp": "embeddings are merged by the method of the recipe, as all other tensors. Remove it; for spherical "
    "interpolation of all tensors write `merge_method: slerp`",
}

_MOE = (
    "this is a file of mergekit-moe, which builds a mixture of experts from dense models: not a recipe, and not done"
    " here. Run `mergekit-moe` with it. What it writes is a model, which a recipe can merge"
)
_EVOLVE = (
    "this is a file of mergekit-evolve, which searches for parameters by evaluating merges: not a recipe, and not done"
    " here. Run `mergekit-evolve` with it, and give the best_config.yaml that it writes to `fastinterp merge`"
)
_BAKLLAMA = (
    "this is a file of bakllama, an old command of mergekit: not a recipe. Write its `layer_slices` as `slices` of"
    " `merge_method: passthrough`"
)
# Keys of a document without `merge_method` -> of which program it is the file, and what to do.
_OTHER_FILES = {
    "gate_mode": _MOE,
    "experts": _MOE,
    "experts_per_token": _MOE,
    "shared_experts": _MOE,
    "genome": _EVOLVE,
    "layer_slices": _BAKLLAMA,
}


def other_file(document: object) -> tuple[str, str] | None:
    """(a key of it, what it is) of a document that is the file of another program of mergekit; None, if it is not."""
    if not isinstance(document, dict) or "merge_method" in document:
        return None
    return next(((key, what) for key, what in _OTHER_FILES.items() if key in document), None)


def instead_of_key(key: str) -> str:
    """What to do instead of a key of a recipe that is mergekit's; empty, if it is not."""
    key = key.replace("-", "_")
    if key in _KEYS or key not in _OPTIONS:
        return _KEYS.get(key, "")
    option, why = _OPTIONS[key]
    if not option:
        return f"it is not needed: {why}. Remove it"
    return f"it is an option of the command here: `{option}`{f' ({why})' if why else ''}"


def instead_of_option(name: str) -> str:
    """What to do instead of an option of mergekit's, such as `--cuda`; empty, if it is none."""
    key = name.lstrip("-").removeprefix("no-").replace("-", "_")
    if key not in _OPTIONS or not name.startswith("--"):
        return ""
    option, why = _OPTIONS[key]
    return f"Omit it: {why}." if not option else f"Use {option}{f', {why}' if why else ''}."
