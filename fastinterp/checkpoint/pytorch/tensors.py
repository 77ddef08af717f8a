"""What the pickle of torch.save says of tensors: storages, and views of them. Other objects are names, or refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec

from fastinterp.checkpoint.header import MAX_NUMEL
from fastinterp.checkpoint.names import quote
from fastinterp.checkpoint.pytorch.pickle_machine import Foreign, Named
from fastinterp.errors import CheckpointError
from fastinterp.ops.dtypes import DTYPES, DType

_DTYPES = {f"torch.{d.library_name}": d for d in DTYPES.values() if d.library_name}
_STORAGES = {
    f"torch.{name}Storage": _DTYPES[f"torch.{dtype}"]
    for name, dtype in (
        ("Double", "float64"), ("Float", "float32"), ("Half", "float16"), ("BFloat16", "bfloat16"), ("Long", "int64"),
        ("Int", "int32"), ("Short", "int16"), ("Char", "int8"), ("Byte", "uint8"), ("Bool", "bool"),
        ("ComplexFloat", "complex64"),
    )
}  # fmt: skip
_UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")
_OTHER_DTYPES = re.compile(
    r"torch\.(?:complex\d+|u?int\d+|bits\d\w*|qu?int\d\w*|float\d\w*|per_(?:tensor|channel)_\w+)"
)
_OTHER_STORAGES = re.compile(r"torch\.(ComplexDouble|QInt8|QUInt8|QInt32|QUInt4x2|QUInt2x4)Storage")

# Functions that make tensors which are not read, and what these are.
_REFUSED = {
    "torch._utils._rebuild_qtensor": "a quantised tensor of torch",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without data, of torch's meta device",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a class of its own",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of a device of its own",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of a device of its own",
}

# Further names that torch.load admits as well, none of which makes a tensor.
_OF_TORCH = re.compile(
    r"torch\.(?:device|strided|sparse_\w+|Tensor)|torch\.serialization\._get_layout|torch\.storage\.TypedStorage"
    r"|torch\.nn\.parameter\.(?:Parameter|Buffer)|collections\.Counter|_codecs\.encode"
    r"|(?:builtins|__builtin__)\.(?:set|bytearray|complex)"
)
# What training programs save beside weights. Never made: a name stands for it, which is no weight.
_VALUES = re.compile(
    r"argparse\.Namespace|collections\.(?:defaultdict|deque)|(?:copyreg|copy_reg)\._reconstructor"
    r"|(?:builtins|__builtin__)\.(?:frozenset|bytes|slice|x?range|object|list|dict|tuple|int|long|float|str|unicode|bool)"
    r"|datetime\.(?:date|datetime|time|timedelta|timezone)|pathlib\.(?:Pure)?(?:Posix|Windows)?Path"
    r"|typing\.(?:Any|Union|Optional|List|Dict|Tuple)|numpy\.(?:ndarray|dtype|bool_|float\d+|u?int\d+)"
    r"|numpy\._?core\.multiarray\.(?:_reconstruct|scalar)"
)
# Classes of their settings and callbacks: no functions.
_CLASSES = re.compile(
    r"(?:omegaconf|pytorch_lightning|lightning|lightning_fabric|torchmetrics|yacs|easydict|transformers|accelerate"
    r"|deepspeed|fairseq)\.(?:\w+\.)*[A-Z]\w*"
)


_MAX_DIMENSIONS = 64  # of torch
_MAX_PAIRS = 4_000_000  # of all OrderedDicts that are made of lists: a list may be named again and again


class Storage(msgspec.Struct, frozen=True):
    """The bytes of one or more tensors.

    key     names its entry in the zip file, `data/KEY`
    dtype   of its elements; U8, if it has none
    unread  the kind of a storage of another dtype: what is in it is not read
    nbytes  of all of it
    """

    key: str
    dtype: DType
    unread: str
    nbytes: int


class Tensor(msgspec.Struct, frozen=True):
    """A view of a storage. offset, strides: in elements."""

    storage: Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Unread(msgspec.Struct, frozen=True):
    """A tensor that is not read: `what` it is, for messages."""

    what: str


class TensorCalls:
    """What names and calls are in a pickle of torch.save (`pickle_reader.Calls`)

    file     for messages
    foreign  the names of what was passed over, `argparse.Namespace`
    """

    def __init__(self, file: str):
        self._file = file
        self._storages: dict[str, Storage] = {}
        self._pairs = 0
        self.foreign: dict[str, None] = {}

    def fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"its pickle is not read: {what}", file=self._file)

    def named(self, name: str) -> Named:
        if name in _CALLS or name in _REFUSED or name in _STORAGES or name in _DTYPES or name in _UNTYPED:
            return Named(name)
        if _OTHER_DTYPES.fullmatch(name) or _OTHER_STORAGES.fullmatch(name) or _OF_TORCH.fullmatch(name):
            return Named(name)
        if _VALUES.fullmatch(name) or _CLASSES.fullmatch(name):
            self.foreign[name] = None
            return Named(name)
        raise CheckpointError(_refusal(name), file=self._file)

    def call(self, function: Any, args: tuple[Any, ...]) -> Any:
        if type(function) is Foreign:
            return function
        if type(function) is not Named:
            self.fail("a call of what is no function")
        name = function.name
        if make := _CALLS.get(name):
            return make(self, args)
        if name in _REFUSED:
            return Unread(_REFUSED[name])
        return Foreign(name)

    def persistent(self, reference: Any) -> Storage:
        if type(reference) is not tuple or len(reference) != 5 or reference[0] != "storage":
            self.fail("a reference that is none to a storage")
        _, kind, key, _, count = reference
        if type(kind) is not Named or type(key) is not str or type(count) is not int or not 0 <= count <= MAX_NUMEL:
            self.fail("a reference to a storage without kind, key or size")
        dtype, other = _STORAGES.get(kind.name), _OTHER_STORAGES.fullmatch(kind.name)
        if dtype is None and other is None and kind.name not in _UNTYPED:
            self.fail(f"a storage of the kind {quote(kind.name)}")
        dtype = dtype or _DTYPES["torch.uint8"]
        storage = Storage(key, dtype, other[1] if other else "", 0 if other else count * dtype.bits // 8)
        if self._storages.setdefault(key, storage) != storage:
            self.fail(f"the storage {quote(key)} is of two kinds or sizes")
        return self._storages[key]

    # --- calls

    def tensor(self, args: tuple[Any, ...]) -> Any:
        """(storage, offset, shape, strides, requires_grad, hooks, metadata)"""
        if not 4 <= len(args) <= 7:
            self.fail(f"a tensor of {len(args)} arguments")
        storage, metadata = args[0], args[6:]
        if type(storage) is not Storage:
            self.fail("a tensor without a storage")
        if storage.unread:
            return Unread(f"of the dtype of {storage.unread}Storage")
        return self._view(storage, storage.dtype, args[1], args[2], args[3], metadata[0] if metadata else None)

    def tensor_of_dtype(self, args: tuple[Any, ...]) -> Any:
        """(storage, offset, shape, strides, requires_grad, hooks, dtype, metadata): of what has no storage by name."""
        if not 7 <= len(args) <= 8 or type(args[0]) is not Storage or type(args[6]) is not Named:
            self.fail("a tensor without storage or dtype")
        dtype = _DTYPES.get(args[6].name)
        if dtype is None:
            return Unread(f"of the dtype {args[6].name}")
        return self._view(args[0], dtype, args[1], args[2], args[3], args[7] if len(args) == 8 else None)

    def _view(self, storage: Storage, dtype: DType, offset: Any, shape: Any, strides: Any, metadata: Any) -> Any:
        if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
            self.fail("a tensor without shape or strides")
        if len(shape) > _MAX_DIMENSIONS:
            self.fail(f"a tensor of {len(shape)} dimensions")
        for number in (offset, *shape, *strides):
            if type(number) is not int or not 0 <= number <= MAX_NUMEL:
                what = quote(number) if type(number) is int else type(number).__name__
                self.fail(f"a tensor whose place is no number from 0 up, {what}")
        if metadata:  # conj, neg: the numbers are not those that are stored
            return Unread("a conjugate or negative view of another")
        return Tensor(storage, dtype, offset, shape, strides)

    def parameter(self, args: tuple[Any, ...]) -> Any:
        """(tensor, requires_grad, hooks, state)"""
        if not args or type(args[0]) not in (Tensor, Unread):
            self.fail("a parameter without a tensor")
        return args[0]

    def of_class(self, args: tuple[Any, ...]) -> Any:
        """(function, class, its arguments, state): a tensor with attributes, or of a class that is torch's own."""
        if len(args) != 4 or type(args[0]) is not Named or type(args[1]) is not Named or type(args[2]) is not tuple:
            self.fail("a tensor of a class, without function, class or arguments")
        if args[0].name not in _MAKE_TENSORS:
            self.fail(f"a tensor that {quote(args[0].name)} makes")
        if args[1].name not in ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"):
            return Unread(f"of the class {args[1].name}")
        return self.call(args[0], args[2])

    def mapping(self, args: tuple[Any, ...]) -> Any:
        """An OrderedDict: of nothing, or of a list of pairs, as Python 2 wrote it."""
        pairs = args[0] if args else []
        self._pairs += len(pairs) if type(pairs) is list else 0
        if self._pairs > _MAX_PAIRS:
            self.fail(f"more than the allowed {_MAX_PAIRS:,} pairs for OrderedDicts")
        if type(pairs) is not list or any(type(p) not in (list, tuple) or len(p) != 2 for p in pairs):
            self.fail("an OrderedDict that is none of pairs")
        if any(type(key) is not str for key, _ in pairs):
            self.fail("an OrderedDict whose keys are no strings")
        return dict(pairs)

    def size(self, args: tuple[Any, ...]) -> Any:
        """torch.Size: a tuple"""
        return args[0] if len(args) == 1 and type(args[0]) is tuple else self.fail("a shape that is no tuple")


_MAKE_TENSORS = {
    "torch._utils._rebuild_tensor": TensorCalls.tensor,
    "torch._utils._rebuild_tensor_v2": TensorCalls.tensor,
    "torch._utils._rebuild_tensor_v3": TensorCalls.tensor_of_dtype,
    "torch._utils._rebuild_parameter": TensorCalls.parameter,
    "torch._utils._rebuild_parameter_with_state": TensorCalls.parameter,
}
_CALLS: dict[str, Callable[[TensorCalls, tuple[Any, ...]], Any]] = {
    **_MAKE_TENSORS,
    "torch._tensor._rebuild_from_type_v2": TensorCalls.of_class,
    "collections.OrderedDict": TensorCalls.mapping,
    "torch.Size": TensorCalls.size,
}


def _refusal(name: str) -> str:
    return (
        f"its pickle is not read: it names {quote(name)}, and weights need no code. Tensors, containers and numbers "
        "are read, and nothing is executed. If it holds a whole module or other objects, save the weights alone, where "
        'it was made: `torch.save(model.state_dict(), "NEW.pt")`; then name that'
    )
