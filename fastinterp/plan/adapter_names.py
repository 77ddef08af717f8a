"""Where the modules of an adapter are in its base: by the base's own names of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fastinterp.checkpoint.lora import LoraAdapter
from fastinterp.checkpoint.names import listing, quote
from fastinterp.errors import CheckpointError
from fastinterp.plan.tensor_names import match_names
from fastinterp.recipe.tensor_groups import HasShape

# Prefixes of kohya's names, and the components of a pipeline that they may stand for, as diffusers calls them.
_KOHYA = {
    "lora_unet_": ("unet", "transformer"),
    "lora_transformer_": ("transformer", "unet"),
    "lora_prior_": ("prior",),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3",),
}
# What diffusers' names begin with, likewise; `diffusion_model.` is ComfyUI's.
_DIFFUSERS = {
    "unet": ("unet", "transformer"),
    "transformer": ("transformer", "unet"),
    "prior": ("prior",),
    "diffusion_model": ("transformer", "unet"),
    "text_encoder": ("text_encoder",),
    "text_encoder_2": ("text_encoder_2",),
    "text_encoder_3": ("text_encoder_3",),
}
# Where a single file of a whole model has its components.
_IN_ONE_FILE = {
    "unet": ("model.diffusion_model.", "diffusion_model.", ""),
    "transformer": ("model.diffusion_model.", "diffusion_model.", ""),
    "prior": ("",),
    "text_encoder": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", ""),
    "text_encoder_2": ("conditioner.embedders.1.model.", ""),
    "text_encoder_3": ("text_encoders.t5xxl.transformer.", ""),
}
_TEXT_MODEL = "text_model."


class _Shape(NamedTuple):
    """A shape without its order: factors do not say whether the base stores a weight transposed."""

    shape: tuple[int, ...]


def places(adapter: LoraAdapter, tensors: Mapping[str, HasShape]) -> dict[str, str]:
    """The base's name of each tensor that the adapter changes: of `MODULE.weight`, `MODULE.PARAMETER` and the like, as
    the adapter calls them. Those that the base does not have stay as they are.

    Raises: CheckpointError, if a name stands for several.
    """
    wanted = _wanted(adapter)
    if adapter.style == "kohya":
        return _by_underscores(adapter, wanted, tensors)
    if adapter.style == "diffusers":
        return {name: _of_component(name, tensors) for name in wanted}
    missing = [name for name in wanted if name not in tensors]
    found = {name: name for name in wanted}
    if missing:
        own = {name: _Shape(_ordered(shape)) for name, shape in wanted.items() if shape}
        match = match_names(own, {name: _Shape(_ordered(t.shape)) for name, t in tensors.items()})
        for name in missing:
            images = {} if match is None else match.names
            image = images.get(name, "")
            found[name] = image if image in tensors else _follow(name, images, tensors)
    return found


def _ordered(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(shape))


def _follow(name: str, names: Mapping[str, str], tensors: Mapping[str, HasShape]) -> str:
    """A name whose shape is not known, with the prefix replaced that was replaced in others."""
    for own, other in names.items():
        if own != other and other in tensors:
            a, b = own.split("."), other.split(".")
            while a and b and a[-1] == b[-1]:
                a, b = a[:-1], b[:-1]
            start = "".join(f"{part}." for part in a)
            if name.startswith(start):
                return "".join(f"{part}." for part in b) + name[len(start) :]
    return name


def _wanted(adapter: LoraAdapter) -> dict[str, tuple[int, ...]]:
    """The names of all tensors that the adapter changes, with their shapes; () where that is not known."""
    wanted: dict[str, tuple[int, ...]] = {}
    for module in adapter.modules:
        shape: tuple[int, ...] = (module.b.shape[0], *module.a.shape[1:])
        wanted[module.weight] = () if module.parameters else shape
        for parameter in module.parameters:
            wanted.setdefault(f"{module.module}.{parameter}", ())
        if module.bias is not None:
            wanted[f"{module.module}.bias"] = module.bias.shape
    wanted |= {name: entry.shape for name, entry in adapter.replaced.items()}
    for rows in adapter.rows:
        wanted.setdefault(f"{rows.module}.weight", ())
    return wanted


# --- names of diffusion models ----------------------------------------------------------------------------------------


def _of_component(name: str, tensors: Mapping[str, HasShape]) -> str:
    """diffusers: `unet.MODULE.weight` is `unet/MODULE.weight` of a pipeline, or `MODULE.weight` of its UNet alone."""
    first, _, rest = name.partition(".")
    components = _DIFFUSERS.get(first)
    if components is None:
        return name
    rests = _spellings(rest) if components[0].startswith("text_encoder") else (rest,)
    candidates = [f"{component}/{spelt}" for component in components for spelt in rests]
    candidates += [start + spelt for start in _IN_ONE_FILE[components[0]] for spelt in rests]
    return next((candidate for candidate in candidates if candidate in tensors), name)


def _spellings(path: str) -> tuple[str, str]:
    """The path of a tensor in a text encoder as older and newer versions of transformers have it."""
    short = path.removeprefix(_TEXT_MODEL)
    return path, short if short != path else _TEXT_MODEL + path


def _by_underscores(
    adapter: LoraAdapter, wanted: Iterable[str], tensors: Mapping[str, HasShape]
) -> dict[str, str]:  # fmt: skip
    """kohya: the paths of the base's modules with underscores for dots are the adapter's names."""
    known: dict[str, list[str]] = {}
    for name in tensors:
        folder, slash, path = name.rpartition("/")
        module, dot, last = path.rpartition(".")
        for prefix, components in _KOHYA.items():
            if slash and folder not in components:
                continue
            starts = ("",) if slash else _IN_ONE_FILE[components[0]]
            start = next((start for start in starts if path.startswith(start)), None)
            if start is not None and dot:
                rest = module[len(start) :]
                for spelt in _spellings(rest) if components[0].startswith("text_encoder") else (rest,):
                    known.setdefault(f"{prefix}{spelt.replace('.', '_')}.{last}", []).append(name)
    found = {}
    for name in wanted:
        places = known.get(name, [name])
        if len(places) > 1:
            raise CheckpointError(
                f"{quote(name)} of the adapter stands for {listing(places)} of its base: which of them is changed is "
                "not known",
                file=adapter.checkpoint.name,
                tensor=name,
            )
        found[name] = places[0]
    return found
