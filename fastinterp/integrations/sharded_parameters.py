"""Parameters of which each process holds a part, as under torch's FSDP: the parts, and whole tensors of them.

FSDP 2 (`fully_shard`) makes parameters DTensors. FSDP 1 (`FullyShardedDataParallel`, with use_orig_params) makes each
a piece of its elements in row-major order: those of all processes follow one another. What is said to be collective
has to be called in every process.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, distributed

from fastinterp.errors import UsageError

_WRAPPER = "_fsdp_wrapped_module."  # in the names that FSDP 1 gives
_INSTEAD = "Use AverageCheckpoints"


class Parts:
    """The parameters of a model that are trained, each as the part of it that this process holds.

    model       as the training loop has it: wrapped by FullyShardedDataParallel, say
    parameters  by names as in the model's state dict
    Raises: UsageError, if they are held in a way that is not known here.
    """

    def __init__(self, model: Any):
        self._model = model
        named = {name.replace(_WRAPPER, ""): p for name, p in unwrapped(model).named_parameters()}
        self.parameters: dict[str, torch.nn.Parameter] = {name: p for name, p in named.items() if p.requires_grad}
        for name, p in self.parameters.items():
            _refuse(name, p)

    @property
    def sharded(self) -> bool:
        """Whether any parameter is in parts."""
        return any(_is_dtensor(p) or _is_piece(p) for p in self.parameters.values())

    def local(self) -> dict[str, Tensor]:
        """The parts that this process holds: views of the parameters."""
        return {name: _local(p) for name, p in self.parameters.items()}

    def part_of(self, name: str, whole: Tensor) -> Tensor:
        """The part of a whole tensor that this process holds of the parameter. Collective under FSDP 1."""
        p = self.parameters[name]
        if _is_dtensor(p):
            from torch.distributed.tensor import distribute_tensor

            return distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None).to_local()
        if not _is_piece(p):
            return whole
        counts = self._counts[name]
        start = sum(counts[: distributed.get_rank(self._group)]) % max(1, whole.numel())
        return whole.reshape(-1)[start : start + p.numel()]

    def whole(self, name: str, part: Tensor, shape: torch.Size) -> Tensor:
        """The tensor of which every process has a part, in every process. Collective, unless parameters are whole.

        part   as `local` has it, of any dtype
        shape  of the whole
        """
        p = self.parameters[name]
        if _is_dtensor(p):
            from torch.distributed.tensor import DTensor

            part = part.to(p.device)
            made = DTensor.from_local(part, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
            return made.full_tensor()
        if not _is_piece(p):
            return part
        counts = self._counts[name]
        padded = part.new_zeros(max(counts), device=p.device)
        padded[: part.numel()] = part
        pieces = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(pieces, padded, group=self._group)
        every = torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])
        return every[: shape.numel()].reshape(shape)  # without sharding each process has all of it

    def full_state(self, averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's whole state dict on the CPU, with other values for its parameters. Collective.

        averages  parts in place of those of the parameters
        Empty in all processes but the first, which has the tensors.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        # Where all is on the CPU already, torch's FSDP 1 crashes with cpu_offload.
        offload = any(p.device.type != "cpu" for p in self.parameters.values())
        options = StateDictOptions(full_state_dict=True, cpu_offload=offload)
        state = dict(get_model_state_dict(self._model, options=options))
        first = distributed.get_rank() == 0
        shapes = [{name: x.shape for name, x in state.items()}]
        distributed.broadcast_object_list(shapes)
        same = _names_by_parameter(unwrapped(self._model))
        for name, p in self.parameters.items():
            whole = self.whole(name, averages[name], shapes[0][name])
            if first:
                kept = whole.cpu()
                state |= {alias: kept for alias in same[id(p)] if alias in state}
        return state if first else {}

    @cached_property
    def _counts(self) -> dict[str, list[int]]:
        """Of each parameter, how many elements each process has."""
        own = {name: p.numel() for name, p in self.parameters.items()}
        every: list[Any] = [None] * distributed.get_world_size(self._group)
        distributed.all_gather_object(every, own, group=self._group)
        return {name: [counts[name] for counts in every] for name in own}

    @property
    def _group(self) -> Any:
        """The processes that FSDP 1 shares the parameters among."""
        return getattr(self._model, "process_group", None)


def unwrapped(model: Any) -> Any:
    """The model itself, which DistributedDataParallel, DataParallel and FullyShardedDataParallel hold as `module`."""
    wrappers: tuple[Any, ...] = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)
    if distributed.is_available():
        from torch.distributed.fsdp import FullyShardedDataParallel

        wrappers = (*wrappers, FullyShardedDataParallel)
    while isinstance(model, wrappers):
        model = model.module
    return model


def _names_by_parameter(model: Any) -> dict[int, list[str]]:
    """All names of each parameter, by its id: tied weights have several."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name.replace(_WRAPPER, ""))
    return names


def _local(p: Any) -> Tensor:
    local: Tensor = p.detach().to_local() if _is_dtensor(p) else p.detach()
    return local


def _is_dtensor(p: Any) -> bool:
    return hasattr(p, "to_local")


def _is_piece(p: Any) -> bool:
    """Whether FSDP 1 made it a piece of a flat parameter."""
    return bool(getattr(p, "_fsdp_flattened", False))


def _refuse(name: str, p: Any) -> None:
    """Raises: UsageError, if a parameter's part is not known to be one."""
    if hasattr(p, "ds_id"):
        raise UsageError(f"{name} is in parts in several processes (ZeRO stage 3), and has no average here. {_INSTEAD}")
    if name.rpartition(".")[2] == "_flat_param":
        raise UsageError(
            "FSDP has joined the parameters of each module into one, which have no averages here. Set "
            f"use_orig_params to true (fsdp_use_orig_params), take FSDP 2, or {_INSTEAD[0].lower()}{_INSTEAD[1:]}"
        )
