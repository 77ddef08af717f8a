"""Merged models for transformers without files between, and callbacks of its Trainer that average weights.

from fastinterp.integrations.transformers import AverageCheckpoints, EMACallback, from_recipe

model = from_recipe("recipe.yml", AutoModelForCausalLM, dtype=torch.bfloat16)
trainer = Trainer(model, args, callbacks=[EMACallback(0.999), AverageCheckpoints(last=5)], ...)
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, TrainerCallback

from fastinterp.api import average
from fastinterp.arguments import size_of
from fastinterp.checkpoint.sidecar_files import CONFIG
from fastinterp.errors import CheckpointError, ShapeError, UsageError
from fastinterp.execute.to_memory import fill
from fastinterp.integrations.sharded_parameters import Parts, unwrapped
from fastinterp.integrations.torch_ops import ema_
from fastinterp.messages import counted, listed
from fastinterp.paths.average import average_of
from fastinterp.paths.points import Point
from fastinterp.plan.plan import Plan
from fastinterp.presence import exists, is_folder
from fastinterp.recipe.document import Source
from fastinterp.torch_models.load import allocate, load, planned

_GENERATION = "generation_config.json"
_SHOWN = 5  # names that a message lists
_EMA = "ema"  # the folder in a checkpoint that has the averaged model
_ADAPTER = "adapter_model.safetensors"


def from_recipe(
    recipe: Source | Point,
    model_class: Any,
    *,
    dtype: Any = None,
    rounding: str | None = None,
    seed: int | None = None,
    threads: int | None = None,
    max_memory: str | int = "512MB",
    strict: bool = True,
    **kwargs: Any,
) -> Any:
    """A merged model as `model_class.from_pretrained` loads it from the output of `merge`, without writing that.

    recipe       as `fastinterp.load` takes it: a file, YAML text, a mapping, a point of a sweep, or a checkpoint
    model_class  AutoModelForCausalLM, another Auto class, or a model's own class
    dtype        of the weights, a torch.dtype or its name: each merged tensor is rounded once, to it. None: as the
                 recipe says
    rounding, seed, threads, max_memory   as of `merge`
    strict       raise, if the class has weights that the merge does not make, or the other way round, as the head of a
                 classifier; False: these are initialised, or left out
    kwargs       of from_pretrained: device_map, attn_implementation, quantization_config, ...

    The merged tensors become the module's parameters, so the model is in memory once (in another dtype than the
    recipe's, too). Names that transformers converts as it loads, fused experts say, are converted.
    Raises: what `fastinterp.load` does; CheckpointError, if the first model has no config.json; ShapeError.
    """
    name = None if dtype is None or dtype == "auto" else str(dtype).removeprefix("torch.")
    plan = planned(recipe, name, rounding, seed)
    with tempfile.TemporaryDirectory() as folder:
        _write_configs(plan, Path(folder))
        config = AutoConfig.from_pretrained(folder)
        generation = GenerationConfig.from_pretrained(folder) if (Path(folder) / _GENERATION).exists() else None
    tensors, places = allocate(plan.tensors, "torch")
    fill(plan, [places], threads=threads, max_memory=size_of(max_memory))
    loaded = _class_of(model_class, config)
    model, info = loaded.from_pretrained(
        None, config=config, state_dict=tensors, dtype=name or "auto", output_loading_info=True, **kwargs
    )
    if strict:
        _refuse_incomplete(info, type(model).__name__)
    if generation is not None and model.can_generate():
        model.generation_config = generation
    model.config.name_or_path = plan.origin.name
    return model


def _write_configs(plan: Plan, root: Path) -> None:
    """Raises: CheckpointError, if there is no config.json."""
    files = plan.small_files(0)
    for name in {CONFIG, _GENERATION} & files.keys():
        content = files[name]
        (root / name).write_bytes(content.read_bytes() if isinstance(content, Path) else content)
    if not (root / CONFIG).exists():
        raise CheckpointError(
            f"it has no {CONFIG}, from which transformers makes the model. Put one there, or use fastinterp.load_into "
            "with a module",
            file=str(plan.origin.root),
        )


def _class_of(model_class: Any, config: Any) -> Any:
    """The model's own class, if `model_class` is one that chooses it by configuration. Raises: UsageError."""
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is not None:
        if type(config) not in mapping:
            raise UsageError(f"{model_class.__name__} has no model for a {type(config).__name__}")
        found = mapping[type(config)]
        return found[0] if isinstance(found, (list, tuple)) else found
    if not hasattr(model_class, "from_pretrained"):
        raise UsageError(f"`model_class` must be a class of transformers, as AutoModelForCausalLM, got {model_class!r}")
    return model_class


def _refuse_incomplete(info: Any, name: str) -> None:
    """Raises: ShapeError."""
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    problems = [
        f"{counted(len(keys), 'tensor')} {what}: {listed(keys, _SHOWN)}"
        for keys, what in (
            (missing, "of the class that the merge does not make"),
            (unexpected, "that it has no place for"),
        )
        if keys
    ]
    if problems:
        raise ShapeError(f"the merge does not fit {name}: {'; '.join(problems)}. To load it anyway: strict=False")


class EMACallback(TrainerCallback):  # type: ignore[misc]
    """Keeps an exponential moving average of the weights that are trained, and saves it with every checkpoint.

    decay   what is kept at each update: average = decay * average + (1 - decay) * weights
    every   so many steps of the optimizer lie between two updates
    device  where the averages are; None: with the weights

    Averages are float32, whatever the weights are. Each checkpoint-N has a folder `ema` with the averaged model, which
    from_pretrained loads; training that resumes from the checkpoint goes on with it. Under FSDP each process averages
    the part of the weights that it holds (`averages` are those parts), and the first one saves the whole; ZeRO stage 3
    is refused.
    """

    def __init__(self, decay: float = 0.999, *, every: int = 1, device: Any = None):
        if not 0 <= decay <= 1:
            raise UsageError(f"decay must be in 0..1, got {decay!r}")
        if every < 1:
            raise UsageError(f"`every` must be 1 or more, got {every!r}")
        self.decay, self.every, self._device = decay, every, device
        self.averages: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The averages begin at the weights, or where the checkpoint that training resumes from has them."""
        parts = Parts(model)
        self.averages = {
            name: p.to(self._device or p.device, torch.float32, copy=True) for name, p in parts.local().items()
        }
        saved = _checkpoint(args, state) / _EMA
        if state.global_step and is_folder(saved):
            self._resume(model, parts, saved)

    def _resume(self, model: Any, parts: Parts, saved: Path) -> None:
        """Go on with the averages of a checkpoint. Raises: CheckpointError, if it does not have all of them."""
        found = _adapter(saved) if exists(saved / _ADAPTER) else load(saved)
        active = getattr(unwrapped(model), "active_adapter", None)  # PEFT's files leave its name out
        for name, average_of_it in self.averages.items():
            stored = name if name in found else name.replace(f".{active}.", ".")
            if stored not in found:
                raise CheckpointError(f"it has no average of {name}. Remove the folder to begin anew", file=str(saved))
            average_of_it.copy_(parts.part_of(name, found[stored]))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self.every:
            return
        on = {name: p.to(self.averages[name].device) for name, p in Parts(model).local().items()}
        ema_([self.averages[name] for name in on], on.values(), self.decay)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.is_world_process_zero or Parts(model).sharded:
            self.save(model, _checkpoint(args, state) / _EMA)

    def save(self, model: Any, folder: str | os.PathLike[str]) -> None:
        """Save the model with the averages in place of its weights, as float32.

        Under FSDP every process calls it, and the first one writes.
        """
        own, parts = unwrapped(model), Parts(model)
        if parts.sharded:
            state = parts.full_state(self.averages)
        else:
            by_weight = {id(p): self.averages[name] for name, p in parts.parameters.items()}  # one of tied weights
            state = {name: by_weight.get(id(x), x) for name, x in own.state_dict(keep_vars=True).items()}
        if state:
            own.save_pretrained(folder, state_dict={name: x.detach() for name, x in state.items()})

    def copy_to(self, model: Any) -> None:
        """Give a model the averages as its weights, each rounded to the dtype that the model has."""
        with torch.no_grad():
            for name, p in Parts(model).local().items():
                p.copy_(self.averages[name])


class AverageCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Averages the last checkpoints of the run at every save, into OUTPUT_DIR/averaged, which each save replaces.

    last     number of checkpoints, 2 to 64; early in a run, as many as there are. The Trainer must keep so many
             (`save_total_limit`)
    weights, decay   as of `fastinterp.average`
    out      the folder, in the run's output_dir unless it is absolute. Not `checkpoint-...`: the Trainer deletes those
    """

    def __init__(self, last: int = 5, *, weights: str = "uniform", decay: float | None = None, out: str = "averaged"):
        average_of([f"checkpoint-{i}" for i in range(2)], weights, decay, None)  # refuses what is wrong before training
        if not 2 <= last <= 64:
            raise UsageError(f"`last` must be in 2..64, got {last!r}")
        if os.path.basename(out).startswith("checkpoint"):
            raise UsageError(f"`out` must not be {out!r}: the Trainer takes it for one of its checkpoints")
        self.last, self.weights, self.decay, self.out = last, weights, decay, out

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        limit = args.save_total_limit
        if limit is not None and limit < self.last:
            raise UsageError(
                f"the Trainer keeps {counted(limit, 'checkpoint')}, but the last {self.last} are to be averaged: set "
                f"save_total_limit={self.last} or more"
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        steps = sorted(
            int(p.name.removeprefix("checkpoint-"))
            for p in Path(args.output_dir).glob("checkpoint-*")
            if p.name.removeprefix("checkpoint-").isdecimal()
            and int(p.name.removeprefix("checkpoint-")) <= state.global_step
        )
        folders = [os.path.join(args.output_dir, f"checkpoint-{step}") for step in steps[-self.last :]]
        if len(folders) > 1:
            out = os.path.join(args.output_dir, self.out)
            average(folders, out, weights=self.weights, decay=self.decay, in_order=True, force=True)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, which is no checkpoint of a model."""
    from peft import load_peft_weights

    return dict(load_peft_weights(str(folder), device="cpu"))
