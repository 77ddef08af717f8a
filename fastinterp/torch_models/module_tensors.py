"""The tensors of a torch module: their addresses, which of them are tied, and whether a model's tensors fit them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from operator import methodcaller
from typing import Any

from fastinterp.errors import BackendError, ShapeError, UsageError
from fastinterp.messages import plain
from fastinterp.ops.dtypes import DType, parse_dtype

TensorSpec = tuple[DType, tuple[int, ...]]  # dtype, shape
_SHOWN = 50  # mismatches that a message lists before it only counts the others
WHOSE = ". Say whose to take: `integers=`"  # the remedy of paths
_data_ptr = methodcaller("data_ptr")
_NAMED = 3  # the same of tensors named in a line
# Tensors of these dtypes keep their values while floating ones are set.
_UNCHANGED = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter or buffer, or several that share their memory.

    names   as the module's state_dict has them; more than one if they are tied
    tensor  the torch tensor
    dtype   None: it is not merged (integers, booleans, complex numbers)
    """

    names: tuple[str, ...]
    tensor: Any
    dtype: DType | None

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return int(self.tensor.numel() * self.tensor.element_size())

    @property
    def address(self) -> int:
        return int(self.tensor.data_ptr())


def weights_of(module: Any, layers: str | Sequence[str] | None) -> list[Weight]:
    """The tensors of a module's state_dict, each once, of which any name matches any of the patterns `layers`.

    They may be on any device; what get_extra_state returns is not among them.
    Raises: UsageError, if it is no module, nothing matches, a tensor has no memory, or tensors overlap without being
    the same.
    """
    groups: dict[object, tuple[list[str], Any]] = {}  # by identity: names, tensor
    for name, tensor in tensors_of(module):
        _check_memory(name, tensor)
        # Empty tensors have no memory, so no two of them are tied.
        groups.setdefault(identity_of(tensor) if tensor.numel() else name, ([], tensor))[0].append(name)
    weights = [Weight(tuple(names), t.detach(), parse_dtype(str(t.dtype))) for names, t in groups.values()]
    _check_apart(weights)
    chosen = [w for w in weights if layers is None or matches(w.names, layers)]
    if not chosen:
        raise UsageError(f"no tensor of the module matches {layers!r}. They have names like {_example(weights)}")
    return chosen


def tensors_of(module: Any) -> Iterator[tuple[str, Any]]:
    """Name and tensor of everything in a module's state_dict, but for extra state. Raises: UsageError."""
    import torch

    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"`module` must be a torch.nn.Module, got {type(module).__name__}")
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and not is_extra_state(name):
            yield name, tensor


def is_extra_state(name: str) -> bool:
    """Whether a state_dict has under this name what a module's get_extra_state returned: of any type."""
    return name.rpartition(".")[2] == "_extra_state"


def identity_of(tensor: Any) -> tuple[object, ...]:
    """Device, address, dtype and shape: equal for tied tensors, and only for those."""
    return str(tensor.device), address_of(tensor), tensor.dtype, tuple(tensor.shape)


def address_of(tensor: Any) -> int:
    """The address of a tensor's first element; 0, if it has no memory of its own."""
    try:
        return int(tensor.data_ptr())
    except RuntimeError:  # sparse ones, and types that only hold other tensors
        return 0


def addresses_of(tensors: Sequence[Any]) -> list[int]:
    """`address_of` of each, in a fraction of the time."""
    try:
        return [*map(_data_ptr, tensors)]
    except RuntimeError:
        return [*map(address_of, tensors)]


def floating(weights: Sequence[Weight]) -> list[Weight]:
    """Those of a dtype that is merged. Integers and booleans are left out.

    Raises: UsageError, if there are others: complex or quantised ones, or floats that are not merged.
    """
    unknown = [w for w in weights if w.dtype is None and _dtype_name(w) not in _UNCHANGED]
    if unknown:
        listed = ", ".join(f"{w.name} ({_dtype_name(w)})" for w in unknown[:_NAMED])
        more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
        raise UsageError(
            f"{listed}{more}: this dtype cannot be interpolated. Convert the module, or name the other tensors "
            "with `layers`"
        )
    return [w for w in weights if w.dtype is not None]


def device_of_all(weights: Sequence[Weight]) -> Any:
    """The torch.device with CUDA that all weights are on; None for the CPU. weights: at least one.

    Raises: BackendError, if they are on several, or on one that is neither.
    """
    first = min(weights, key=lambda w: w.tensor.device.type != "cpu")  # so that it is named which one was left behind
    for w in weights:
        device = w.tensor.device
        if device.type not in ("cpu", "cuda"):
            raise BackendError(f"{w.name} is on {device}. Move the module to the CPU, or to a device with CUDA")
        if device != first.tensor.device:
            raise BackendError(
                f"{first.name} is on {first.tensor.device}, but {w.name} on {device}. Move the module to one device, "
                "or name the tensors of one with `layers`"
            )
    device = weights[0].tensor.device
    return None if device.type == "cpu" else device


def matches(names: Iterable[str], layers: str | Sequence[str]) -> bool:
    """Whether any name matches any pattern, in which * stands for anything: `model.layers.1?.*`."""
    patterns: list[Any] = [*layers] if isinstance(layers, (list, tuple, set, frozenset)) else [layers]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise UsageError(f"`layers` must be a pattern of names, or several in a list, got {pattern!r}")
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _dtype_name(weight: Weight) -> str:
    return str(weight.tensor.dtype).removeprefix("torch.")


def _check_memory(name: str, tensor: Any) -> None:
    if tensor.device.type == "meta":
        raise UsageError(
            f"{name} has no memory yet (device meta). Load the module first: module.to_empty(device='cpu')"
        )
    if tensor.numel() and not address_of(tensor):
        raise UsageError(
            f"{name} has no memory of its own that could be written ({type(tensor).__name__}, {tensor.layout}). "
            "Load the module with plain tensors: dense, not quantised, not sharded"
        )


def _check_apart(weights: Sequence[Weight]) -> None:
    """Tied tensors are one; those that share some of their memory otherwise cannot be written one by one."""
    dense = (w for w in weights if w.nbytes and w.tensor.is_contiguous())
    by_address = sorted(dense, key=lambda w: (str(w.tensor.device), w.address))
    for one, other in pairwise(by_address):
        if one.tensor.device == other.tensor.device and other.address < one.address + one.nbytes:
            raise UsageError(f"{one.name} and {other.name} share memory without being the same tensor")


def _example(weights: Sequence[Weight]) -> str:
    return weights[len(weights) // 2].name if weights else "none at all: the module has no tensors"


class Mismatches:
    """Collects the differences between a module and models that do not fit it, to be raised as one error.

    mixed   a tensor may be floating in one and not in another
    remedy  what to do where that is so, for the message
    """

    def __init__(self, *, mixed: bool = False, remedy: str = "") -> None:
        self._messages: list[str] = []
        self._mixed, self._remedy = mixed, remedy

    def add(self, message: str) -> None:
        self._messages.append(message)

    def check(self, weights: Sequence[Weight], model: str, specs: Mapping[str, TensorSpec]) -> None:
        """Compare the dtypes and shapes of a model, `specs`, with those of the module. model: what messages call it."""
        known = {name for w in weights for name in w.names}
        for weight in weights:
            names = [name for name in weight.names if name in specs]
            if not names:
                kind = "" if weight.dtype else f" ({weight.tensor.dtype})"
                self.add(f"{weight.name}{kind} {list(weight.shape)} is not in {model}")
            for name in names:
                self._compare(weight, name, model, *specs[name])
        for name in specs:
            if name not in known and not is_extra_state(name):
                self.add(f"{name} of {model} is not in the module")

    def check_contiguous(self, weights: Iterable[Weight]) -> None:
        """Check that tensors to be written are contiguous."""
        for weight in weights:
            if not weight.tensor.is_contiguous():
                self.add(f"{weight.name} is not contiguous in the module: use .contiguous()")

    def _compare(self, weight: Weight, name: str, model: str, dtype: DType, shape: tuple[int, ...]) -> None:
        if weight.shape != shape:
            self.add(f"{name} is {list(weight.shape)} in the module but {list(shape)} in {model}")
        if bool(weight.dtype) != dtype.merges and not self._mixed:
            self.add(f"{name} is {_dtype_name(weight)} in the module but {dtype} in {model}{self._remedy}")

    def refuse(self) -> None:
        """Raises: ShapeError, if there are any, with a line for each."""
        if self._messages:
            messages = list(dict.fromkeys(map(plain, self._messages)))
            lines = [f"the module does not fit, {len(messages)} mismatch{'' if len(messages) == 1 else 'es'}:"]
            lines += messages[:_SHOWN] + ([f"... and {len(messages) - _SHOWN} more"] if len(messages) > _SHOWN else [])
            raise ShapeError("\n  ".join(lines))


def equal_bytes(x: Any, y: Any) -> bool:
    """Whether two torch tensors of one dtype and shape, on any devices, hold the same bytes."""
    import torch

    if (x.device, x.data_ptr(), x.stride(), x.is_neg()) == (y.device, y.data_ptr(), y.stride(), y.is_neg()):
        return True
    x, y = (t.detach().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for t in (x, y))
    return bool(torch.equal(x, y) if x.device == y.device else torch.equal(x.cpu(), y.cpu()))


def tied_error(first: str, other: str, difference: str) -> ShapeError:
    """The error of tensors tied in the module, but not equal in a model. difference: `differ in base/`, say."""
    return ShapeError(
        f"{first} and {other} are one tensor in the module, but {difference}. "
        "Untie them: tie_word_embeddings=False in the module's configuration",
        tensor=other,
    )


def with_versions(weights: Iterable[Weight]) -> list[Any]:
    """The tensors of weights that count their changes: all but those made in inference mode."""
    return [w.tensor for w in weights if not w.tensor.is_inference()]


def increment_versions(tensors: Iterable[Any]) -> None:
    """Increment the versions of tensors that changed in place, so that a backward pass over old values is an error.

    tensors  as `with_versions` lists them
    """
    import torch

    torch.autograd.graph.increment_version(tensors)
