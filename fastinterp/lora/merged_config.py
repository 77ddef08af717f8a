"""adapter_config.json of adapters that were merged with each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastinterp.lora.adapter_files import adapter_config
from fastinterp.lora.plan import AdapterPlan
from fastinterp.lora.report import FactorisedModule

# Keys that make `target_modules` mean something else than the names in it.
_FILTERS = ("layers_to_transform", "layers_pattern", "exclude_modules", "layer_replication")


def merged_config(
    plan: AdapterPlan, modules: Sequence[FactorisedModule], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """The configuration of the output.

    modules  with their ranks
    alphas   by which each is scaled
    """
    configs = [dict(adapter.config) for adapter in plan.adapters]
    ranks = {module.name: module.rank for module in modules}
    parameters = _union(configs, "target_parameters")
    more: dict[str, Any] = {}
    if parameters:
        more["target_parameters"] = parameters
    if plan.tokens is not None:
        more["trainable_token_indices"] = plan.tokens
    if any(config.get("lora_bias") for config in configs):
        more["lora_bias"] = True
    for key in ("revision", "auto_mapping"):
        if value := next((config[key] for config in configs if config.get(key)), None):
            more[key] = value
    of_weights = [p.label for p in plan.products if not p.first.parameters]
    saved = _union(configs, "modules_to_save") if plan.whole else []
    return adapter_config(
        ranks, alphas, _targets(configs, of_weights), base=_first(configs, "base_model_name_or_path"),
        task=_first(configs, "task_type"), saved=saved, fan_in_fan_out=plan.adapters[0].fan_in_fan_out,
        bias=_bias(configs) if any(whole.name.endswith(".bias") for whole in plan.whole) else "none", more=more,
    )  # fmt: skip


def _targets(configs: Sequence[Mapping[str, Any]], modules: Sequence[str]) -> Sequence[str] | str:
    """`target_modules` of the output: those of all adapters, where these say all; else the names of the modules."""
    lists = [config.get("target_modules") or [] for config in configs]
    if any(config.get(key) for config in configs for key in _FILTERS):
        return modules
    if all(isinstance(one, str) for one in lists):
        return str(lists[0]) if len(set(map(str, lists))) == 1 else modules
    if not all(isinstance(one, list) and all(isinstance(name, str) for name in one) for one in lists):
        return modules
    names = _union(configs, "target_modules")
    found = {name: [m for m in modules if m == name or m.endswith(f".{name}")] for name in names}
    return names if all(found.values()) and {m for of in found.values() for m in of} == set(modules) else modules


def _union(configs: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    every = [config.get(key) or [] for config in configs]
    return sorted({name for one in every if isinstance(one, list) for name in one if isinstance(name, str)})


def _first(configs: Sequence[Mapping[str, Any]], key: str) -> str | None:
    return next((config[key] for config in configs if isinstance(config.get(key), str) and config[key]), None)


def _bias(configs: Sequence[Mapping[str, Any]]) -> str:
    kinds = {str(config.get("bias", "none")) for config in configs} - {"none"}
    return kinds.pop() if len(kinds) == 1 else "all" if kinds else "none"
