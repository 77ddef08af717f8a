"""Weighted combinations of LoRA adapters of PEFT, in place: `add_weighted_adapter` by this package's kernels.

from fastinterp.integrations.peft import add_weighted_adapter

add_weighted_adapter(model, ["a", "b"], [0.7, 0.3], "both", combination_type="cat")
model.set_adapter("both")
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from fastinterp.errors import ShapeError, UsageError
from fastinterp.in_memory.arrays import TorchTensors
from fastinterp.in_memory.many_sums import WeightedSum, run_sums
from fastinterp.in_memory.merge import merge_state_dicts
from fastinterp.lora.algebra import singular
from fastinterp.messages import suggestion
from fastinterp.ops.combine import Combine

_OF_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_OF_DELTAS = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
COMBINATION_TYPES = (*_OF_FACTORS, "cat", *_OF_DELTAS)
_DROPPING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
# Fields of a LoraConfig that make more of an adapter than two factors.
_VARIANTS = ("use_dora", "lora_bias", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config",
             "kasa_config", "monteclora_config", "velora_config", "trainable_token_indices", "target_parameters",
             "layer_replication")  # fmt: skip


def add_weighted_adapter(
    model: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
    *,
    seed: int = 0,
    threads: int | None = None,
) -> None:
    """Add to a model the adapter that is a weighted combination of others, as PEFT's method of this name.

    model             a PeftModel with LoRA adapters, or its LoraModel
    adapters, weights names, and a number for each, of any sign; the adapter's own scaling is part of its weight
    combination_type  cat: the sum of the deltas B*A, exactly, of a rank that is the sum of all ranks
                      svd: the best approximation of that sum of rank `svd_rank` (None: the largest of the adapters)
                      linear: sums of A and of B, by the roots of the weights. Their product has terms B_i*A_j across
                      adapters: no approximation of the sum of the deltas, unless these are alike
                      ties, dare_linear, dare_ties, magnitude_prune: those methods on A and on B; with _svd on the
                      deltas B*A
    svd_clamp         quantile at which the factors are clamped, as PEFT does it
    svd_full_matrices changes nothing: the vectors that it adds are not used
    svd_driver        of torch.linalg.svd on CUDA
    density           fraction of the elements that stay; needed by ties, dare_linear, dare_ties and magnitude_prune
    majority_sign_method   total: the sign of the sum; frequency: the sign that more adapters have
    seed              of the random masks of dare: which elements stay depends on it and the layer's name alone
    threads           of the CPU; None: one per CPU, at most 32

    The results are PEFT's, but for rounding, which is once from float32 here; random masks; and where PEFT's are not
    what was asked for: adapters with rank-stabilised scaling keep their scale, and what `modules_to_save` of one
    adapter trained is taken over. `svd` decomposes the small product of the factors, not the whole delta.
    Raises: UsageError, ShapeError; MethodError, if the method does not take the weights. The model is unchanged then.
    """
    lora = _lora_of(model)
    adapters = [*adapters]
    _check(lora, adapters, weights, adapter_name, combination_type, density, majority_sign_method)
    kind = "linear" if len(adapters) == 1 else combination_type
    layers = [_Layer.of(name, layer, adapters, weights) for name, layer in _layers(lora) if _has(layer, adapters)]
    if not layers:
        raise UsageError(f"no layer of the model has any of the adapters {', '.join(adapters)}")
    ranks = [_largest_rank(lora.peft_config[adapter]) for adapter in adapters]
    rank = {"cat": sum(ranks)}.get(kind, (svd_rank or max(ranks)) if kind in _OF_DELTAS else ranks[0])
    if kind in _OF_FACTORS and len(set(ranks)) > 1:
        raise UsageError(
            f"`{kind}` sums the factors of adapters of one rank, got ranks {', '.join(map(str, ranks))}. Use `cat` or "
            "`svd`"
        )
    how = _How(kind.removesuffix("_svd"), density, majority_sign_method, seed, threads)
    if kind == "cat":
        factors = _concatenated(layers, rank, threads)
    elif kind in _OF_FACTORS:
        factors = _of_factors(layers, how)
    elif kind == "svd" and svd_clamp is None:
        factors = [_best_of_rank(layer, rank) for layer in layers]
    else:
        factors = [_of_delta(layer, rank, how, svd_clamp, svd_driver) for layer in layers]
    _add(lora, adapters, adapter_name, rank)
    for layer, (a, b) in zip(layers, factors, strict=True):
        layer.set(adapter_name, a, b)
    _take_over_saved_modules(lora, adapters, adapter_name)


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """A layer and the factors of those adapters that it has.

    a, b     [r, ...] and [..., r] of each adapter; the delta is b.flatten(1) @ a.flatten(1)
    weights  of each adapter, as given
    scales   of each adapter: its alpha divided by its rank, or by the root of that
    """

    name: str
    module: Any
    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    weights: tuple[float, ...]
    scales: tuple[float, ...]

    @property
    def scaled(self) -> tuple[float, ...]:
        return tuple(w * scale for w, scale in zip(self.weights, self.scales, strict=True))

    @staticmethod
    def of(name: str, module: Any, adapters: Sequence[str], weights: Sequence[float]) -> _Layer:
        own = [(adapter, float(w)) for adapter, w in zip(adapters, weights, strict=True) if _has(module, [adapter])]
        pairs = [_factors(module, adapter) for adapter, _ in own]
        for (adapter, _), (a, b) in zip(own, pairs, strict=True):
            if a.shape[0] != b.flatten(1).shape[1] or a.shape[1:] != pairs[0][0].shape[1:]:
                shapes = f"{list(b.shape)} and {list(a.shape)}"
                raise ShapeError(f"{name}: the factors of {adapter} have shapes {shapes}, whose product is no delta")
        return _Layer(
            name, module, tuple(a for a, _ in pairs), tuple(b for _, b in pairs),
            tuple(w for _, w in own), tuple(float(module.scaling[adapter]) for adapter, _ in own),
        )  # fmt: skip

    def set(self, adapter: str, a: Tensor, b: Tensor) -> None:
        """Give the layer these factors as those of an adapter that it has."""
        new_a, new_b = (torch.nn.Parameter(x, requires_grad=False) for x in (a, b))
        if adapter in self.module.lora_embedding_A:
            self.module.lora_embedding_A[adapter], self.module.lora_embedding_B[adapter] = new_a, new_b
        else:
            self.module.lora_A[adapter].weight, self.module.lora_B[adapter].weight = new_a, new_b


def _lora_of(model: Any) -> Any:
    """Raises: UsageError."""
    lora = model if isinstance(model, LoraModel) else getattr(model, "base_model", None)
    if not isinstance(lora, LoraModel):
        raise UsageError(f"`model` must be a PeftModel with LoRA adapters, got {type(model).__name__}")
    return lora


def _layers(lora: Any) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in lora.model.named_modules() if isinstance(module, LoraLayer))


def _has(layer: Any, adapters: Sequence[str]) -> bool:
    return any(adapter in layer.lora_A or adapter in layer.lora_embedding_A for adapter in adapters)


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    return layer.lora_embedding_A[adapter].detach(), layer.lora_embedding_B[adapter].detach()


def _check(
    lora: Any, adapters: Sequence[str], weights: Sequence[float], name: str, kind: str, density: float | None, sign: str
) -> None:
    """Raises: UsageError."""
    known = list(lora.peft_config)
    for adapter in adapters:
        if adapter not in known:
            raise UsageError(f"the model has no adapter {adapter!r}{suggestion(str(adapter), known)}")
        variants = [field for field in _VARIANTS if getattr(lora.peft_config[adapter], field, None)]
        if variants:
            raise UsageError(
                f"adapter {adapter!r} has `{variants[0]}`: it is more than two factors, which is all that is combined"
            )
    if name in known:
        raise UsageError(f"the model has an adapter {name!r} already: model.delete_adapter({name!r}), or another name")
    if not adapters or len(adapters) != len(weights):
        raise UsageError(f"each adapter needs a weight, got {len(adapters)} adapters and {len(weights)} weights")
    if not all(math.isfinite(w) for w in weights):
        raise UsageError(f"weights must be finite numbers, got {list(weights)}")
    if kind not in COMBINATION_TYPES:
        raise UsageError(f"unknown combination_type {kind!r}{suggestion(str(kind), COMBINATION_TYPES)}")
    if kind.removesuffix("_svd") in _DROPPING and (density is None or not 0 < density <= 1):
        raise UsageError(f"`{kind}` needs a `density` above 0 and at most 1, got {density}")
    if sign not in ("total", "frequency"):
        raise UsageError(f"majority_sign_method must be total or frequency, got {sign!r}")
    kinds = {type(lora.peft_config[adapter].target_modules) for adapter in adapters}
    if len(kinds) > 1 or not kinds <= {str, set}:
        raise UsageError("the `target_modules` of all adapters must be sets of names, or all must be patterns")
    for path, module in lora.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and sum(a in module.modules_to_save for a in adapters) > 1:
            raise UsageError(
                f"{path} was trained as a whole by several of the adapters (`modules_to_save`), which is no low rank "
                "to combine. Leave it out of all but one"
            )


def _largest_rank(config: Any) -> int:
    return max(int(r) for r in (config.r, *(config.rank_pattern or {}).values()))


def _add(lora: Any, adapters: Sequence[str], name: str, rank: int) -> None:
    """Add an adapter without values, of scaling 1, wherever one of the adapters is."""
    configs = [lora.peft_config[adapter] for adapter in adapters]
    targets: Any = [config.target_modules for config in configs]
    targets = "|".join(f"({one})" for one in targets) if isinstance(targets[0], str) else set().union(*targets)
    saved = {module for config in configs for module in config.modules_to_save or ()}
    layers = [config.layers_to_transform for config in configs]
    lora.peft_config[name] = replace(
        configs[0], r=rank, lora_alpha=rank, target_modules=targets, alpha_pattern={}, rank_pattern={},
        modules_to_save=sorted(saved) or None, use_rslora=False, init_lora_weights=True,
        layers_to_transform=layers[0] if all(one == layers[0] for one in layers) else None,
    )  # fmt: skip
    lora.inject_adapter(lora.model, name, low_cpu_mem_usage=True)


def _take_over_saved_modules(lora: Any, adapters: Sequence[str], name: str) -> None:
    for module in lora.model.modules():
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            for adapter in adapters:
                if adapter in module.modules_to_save:
                    own = module.modules_to_save[name].to_empty(device=_device(module.modules_to_save[adapter]))
                    own.load_state_dict(module.modules_to_save[adapter].state_dict())
                    own.requires_grad_(False)


def _device(module: Any) -> torch.device:
    return cast(torch.device, next(module.parameters()).device)


# --- the factors ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _How:
    """method: a combination type without `_svd`. The others are arguments of add_weighted_adapter."""

    method: str
    density: float | None
    sign: str
    seed: int
    threads: int | None


def _concatenated(layers: Sequence[_Layer], rank: int, threads: int | None) -> list[tuple[Tensor, Tensor]]:
    """A of all adapters below each other, each times its weight; B beside each other."""
    made = []
    sums: dict[Any, list[WeightedSum]] = {}  # by device
    for layer in layers:
        ranks = [a.shape[0] for a in layer.a]
        new = torch.empty if sum(ranks) == rank else torch.zeros
        a = new(rank, *layer.a[0].shape[1:], dtype=layer.a[0].dtype, device=layer.a[0].device)
        b = new(layer.b[0].shape[0], rank, *layer.b[0].shape[2:], dtype=layer.b[0].dtype, device=layer.b[0].device)
        first = 0
        for own_a, own_b, weight, count in zip(layer.a, layer.b, layer.scaled, ranks, strict=True):
            into = a[first : first + count]
            view, out = TorchTensors.view(own_a.contiguous(), layer.name), TorchTensors.view(into, layer.name)
            if weight:
                sums.setdefault(TorchTensors.device(a), []).append(WeightedSum((view,), Combine((weight,)).row(), out))
            else:
                into.zero_()
            b[:, first : first + count].copy_(own_b)
            first += count
        made.append((a, b))
    for device, of_device in sums.items():
        run_sums(of_device, device, threads)
    return made


def _of_factors(layers: Sequence[_Layer], how: _How) -> list[tuple[Tensor, Tensor]]:
    """A and B are combined each for itself, by the roots of the weights; A has the sign."""
    groups: dict[Any, list[_Layer]] = {}
    for layer in layers:
        if len({a.shape for a in layer.a}) > 1:
            shapes = ", ".join(str(list(a.shape)) for a in layer.a)
            raise ShapeError(f"{layer.name}: factors of shapes {shapes} have no sum. Use `cat` or `svd`")
        groups.setdefault((layer.scaled, layer.a[0].device), []).append(layer)
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for (weights, _), group in groups.items():
        roots = [math.sqrt(abs(w)) for w in weights]
        signed = [math.copysign(root, w) for root, w in zip(roots, weights, strict=True)]
        a = _combined({layer.name: layer.a for layer in group}, signed, how)
        b = _combined({layer.name: layer.b for layer in group}, roots, how)
        for layer in group:
            made[layer.name] = a[layer.name], b[layer.name].to(a[layer.name].dtype)
    return [made[layer.name] for layer in layers]


def _combined(tensors: dict[str, tuple[Tensor, ...]], weights: Sequence[float], how: _How) -> dict[str, Tensor]:
    """Tensors of each adapter, by name, as one each, of the first one's dtype."""
    count = len(weights)
    first = {name: every[0] for name, every in tensors.items()}
    if not any(weights):
        return {name: torch.zeros_like(x) for name, x in first.items()}
    if how.method == "ties" and how.sign == "frequency":
        return {name: _by_frequency(every, weights, how) for name, every in tensors.items()}
    if how.method == "dare_ties" and how.sign == "frequency":
        return {name: _by_frequency(every, weights, how, name) for name, every in tensors.items()}
    dicts = [{name: every[k].contiguous() for name, every in tensors.items()} for k in range(count)]
    return _merged(how.method, dicts, weights, how)


def _merged(method: str, dicts: Sequence[dict[str, Tensor]], weights: Sequence[float], how: _How) -> dict[str, Tensor]:
    """The merge of task vectors, tensors by name, by a method of PEFT."""
    parameters: dict[str, Any] = {"weight": [*weights]}
    if method in ("linear", "svd"):
        return merge_state_dicts(dicts, "linear", parameters=parameters | {"normalize": False}, threads=how.threads)
    parameters["density"] = how.density
    if method == "magnitude_prune":
        method, parameters["gamma"] = "breadcrumbs", 0.0
    else:
        parameters["preset"] = "peft"
    base = {name: torch.zeros_like(x) for name, x in dicts[0].items()}
    return merge_state_dicts(dicts, method, base=base, parameters=parameters, seed=how.seed, threads=how.threads)


def _by_frequency(every: Sequence[Tensor], weights: Sequence[float], how: _How, name: str = "tensor") -> Tensor:
    """The mean over the adapters whose sign more adapters have, as many: plus. Each is thinned out for itself."""
    thin = "magnitude_prune" if how.method == "ties" else "dare_linear"
    ones = [1.0]
    kept = torch.stack([
        _merged(thin, [{f"{name}.{k}": x.float().contiguous()}], ones, how)[f"{name}.{k}"] for k, x in enumerate(every)
    ])  # fmt: skip
    signs = kept.sign()
    takes_part = signs == torch.where(signs.sum(dim=0) >= 0, 1, -1)
    weighted = kept * torch.tensor(weights, device=kept.device).view(-1, *[1] * every[0].dim())
    mean = (weighted * takes_part).sum(dim=0) / takes_part.sum(dim=0).clamp(min=1)
    return mean.to(every[0].dtype)


def _best_of_rank(layer: _Layer, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of the sum of the deltas: by the singular values of a matrix as small as all ranks."""
    b = torch.cat([x.flatten(1).double() * w for x, w in zip(layer.b, layer.scaled, strict=True)], dim=1)
    a = torch.cat([x.flatten(1).double() for x in layer.a])
    u, s, v = singular(b, a, torch.linalg)
    return _shaped(layer, rank, u, s, v)


def _of_delta(layer: _Layer, rank: int, how: _How, clamp: float | None, driver: str | None) -> tuple[Tensor, Tensor]:
    """The deltas, combined, as the product of factors."""
    deltas = [
        b.flatten(1).float() @ a.flatten(1).float() * scale
        for a, b, scale in zip(layer.a, layer.b, layer.scales, strict=True)
    ]
    delta = _combined({layer.name: tuple(deltas)}, layer.weights, how)[layer.name]
    u, s, v = torch.linalg.svd(delta, full_matrices=False, driver=driver)
    return _shaped(layer, rank, u, s, v, clamp)


def _shaped(
    layer: _Layer, rank: int, u: Tensor, s: Tensor, v: Tensor, clamp: float | None = None
) -> tuple[Tensor, Tensor]:
    """The first `rank` singular values and vectors as factors of the layer: A the right ones, B the left ones."""
    b, a = u[:, :rank] * s[:rank], v[:rank]
    if clamp is not None:
        most = torch.quantile(torch.cat([b.flatten(), a.flatten()]), clamp)
        b, a = b.clamp(-most, most), a.clamp(-most, most)
    missing = rank - a.shape[0]
    if missing > 0:
        a, b = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
    first_a, first_b = layer.a[0], layer.b[0]
    return (
        a.reshape(rank, *first_a.shape[1:]).to(first_a.dtype).contiguous(),
        b.reshape(first_b.shape[0], rank, *first_b.shape[2:]).to(first_b.dtype).contiguous(),
    )
