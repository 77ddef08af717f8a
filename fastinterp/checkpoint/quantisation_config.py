"""What the files beside the weights say of their quantisation: config.json, hf_quant_config.json, params.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastinterp.checkpoint.sidecar_files import CONFIG, json_or_empty

HF_QUANT_CONFIG = "hf_quant_config.json"  # as ModelOpt writes it, beside config.json
MISTRAL_CONFIG = "params.json"  # of Mistral's own checkpoints
# Keys of configurations under which they describe quantised weights.
QUANTISATION = ("quantization_config", "compression_config", "quantization")


def declared_method(root: Path, metadata: Mapping[str, str] | None = None) -> str:
    """How a checkpoint's configuration says that its weights are quantised: `gptq`, `mlx`; empty: it does not.

    A damaged configuration says nothing here.
    """
    table = json_or_empty(root / CONFIG)
    for one in (table, table.get("text_config")):
        if isinstance(one, dict) and (method := _method(one)):
            return method
    if (quantisation := json_or_empty(root / HF_QUANT_CONFIG).get("quantization")) and isinstance(quantisation, dict):
        return "modelopt"
    if isinstance(json_or_empty(root / MISTRAL_CONFIG).get("quantization"), dict):
        return "mistral"
    return (metadata or {}).get("quantization_format", "")


def _method(table: Mapping[str, Any]) -> str:
    for key in QUANTISATION:
        entry = table.get(key)
        if not isinstance(entry, dict) or not entry:
            continue
        method = entry.get("quant_method")
        if isinstance(method, str):
            return method
        if "bits" in entry and "group_size" in entry and "quantization" in table:
            return "mlx"
        if key == "compression_config" or "config_groups" in entry:
            return "compressed-tensors"
        return "no method named"
    return ""


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that does not say that the weights are quantised."""
    changed = {key: value for key, value in config.items() if key not in QUANTISATION or not isinstance(value, dict)}
    return {
        key: without_quantisation(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in changed.items()
    }
