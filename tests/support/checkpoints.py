"""Checkpoints for tests of whole merges: written and read back with numpy and json alone, nothing of the engine's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastinterp.ops.combine import Combine, Row, philox_key
from fastinterp.ops.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, F64, MERGING, DType
from fastinterp.reference import combine as reference
from tests.support.cases import fill

Raw = NDArray[np.uint8]


@dataclass(frozen=True)
class Tensor:
    """One tensor: its raw bytes, uint8[nbytes]."""

    dtype: DType
    shape: tuple[int, ...]
    raw: Raw


Model = Mapping[str, Tensor]


# --- values ----------------------------------------------------------------------------------------------------------


def words(seed: int, numel: int) -> NDArray[np.uint64]:
    """u64[numel], random to the eye and the same for every version of numpy (SplitMix64, Steele et al. 2014)."""
    z = np.arange(1, numel + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(seed * 0xD1342543DE82EF95 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def bell(seed: int, numel: int) -> NDArray[np.float64]:
    """f64[numel] of mean 0 and deviation 1, nearly normal: sums of four uniform numbers, exact in every numpy."""
    quarters = words(seed, numel).view(np.uint16).reshape(numel, 4).astype(np.int64).sum(axis=1)
    return (quarters - 2 * 65535) / np.float64(37837.0)  # sqrt(4 / 12) * 65536


def tensor(values: Any, dtype: DType, shape: Sequence[int] | None = None) -> Tensor:
    """Values, rounded to nearest, as a tensor."""
    x = np.asarray(values, np.float64)
    codes = reference.narrow(x.ravel(), dtype)
    return Tensor(dtype, x.shape if shape is None else tuple(shape), codes.view(np.uint8))


def weights(seed: int, dtype: DType, shape: Sequence[int]) -> Tensor:
    """Weights as models have them: deviation 0.02, or 1 for fp8. Read only."""
    return _weights(seed, dtype, tuple(shape))


@lru_cache(maxsize=32)  # tests of a module begin with the same checkpoints
def _weights(seed: int, dtype: DType, shape: tuple[int, ...]) -> Tensor:
    made = tensor(bell(seed, int(np.prod(shape))) * (1.0 if dtype.bits == 8 else 0.02), dtype, shape)
    made.raw.flags.writeable = False
    return made


def writable(given: Tensor) -> Tensor:
    """A copy, to be changed."""
    return replace(given, raw=given.raw.copy())


def moved(by: Tensor, seed: int, size: float = 1e-3, dtype: DType | None = None) -> Tensor:
    """A fine-tune: `by` plus changes of this deviation."""
    x = floats(by)
    return tensor(x + bell(seed, x.size) * size, dtype or by.dtype, by.shape)


def patterns(dtype: DType, numel: int, index: int) -> Tensor:
    """Bit patterns of all kinds, NaN, Inf and subnormals among them; another order for each `index`."""
    raw = fill("patterns", dtype, numel, index, np.random.default_rng(index)).view(np.uint8)
    return Tensor(dtype, (numel,), raw)


def integers(values: Any, kind: str) -> Tensor:
    """An integer tensor; kind: `I64`, `U8`, `BOOL`, ..."""
    from fastinterp.ops.dtypes import DTYPES

    numpy_name = {"BOOL": "?", "U8": "u1", "I8": "i1", "I32": "<i4", "I64": "<i8"}[kind]
    x = np.asarray(values).astype(numpy_name)
    return Tensor(DTYPES[kind], x.shape, np.frombuffer(x.tobytes(), np.uint8))


def floats(of: Tensor) -> NDArray[np.float64]:
    """The values, f64[numel]."""
    return reference.widen(of.raw, of.dtype).astype(np.float64)


# --- files -----------------------------------------------------------------------------------------------------------


def write(folder: Path, model: Model, *, order: Sequence[str] | None = None, shards: int = 1, skew: int = 0) -> Path:
    """Write a checkpoint: `order` cut into `shards` files of about as many tensors, with an index if there are several.

    order  names, in the order in which they lie in the files; None: that of `model`
    skew   spaces that make each header longer, so that the data starts at an odd byte, say
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = list(order or model)
    assert sorted(names) == sorted(model)
    groups = [names[len(names) * i // shards : len(names) * (i + 1) // shards] for i in range(shards)]
    files = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    )
    for file, group in zip(files, groups, strict=True):
        write_file(folder / file, {name: model[name] for name in group}, skew)
    if shards > 1:
        where = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def write_file(path: Path, model: Model, skew: int = 0, metadata: Mapping[str, str] | None = None) -> Path:
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, t in model.items():
        table[name] = {"dtype": t.dtype.name, "shape": t.shape, "data_offsets": [end, end + t.raw.size]}
        end += t.raw.size
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8 + skew)
    with open(path, "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for t in model.values():
            stream.write(t.raw.tobytes())
    return path


def write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: DType) -> Path:
    """A file of zeros that takes no room on the disk."""
    table, end = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * dtype.bits // 8
        table[name] = {"dtype": dtype.name, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(table).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + end)
    return path


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header's table, metadata and all, and where the data section starts."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length)), 8 + length


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of all files of a checkpoint."""
    from fastinterp.ops.dtypes import DTYPES

    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        table, start = read_header(path)
        data = np.fromfile(path, np.uint8)[start:]
        table.pop("__metadata__", None)
        for name, entry in table.items():
            assert name not in found
            begin, end = entry["data_offsets"]
            found[name] = Tensor(DTYPES[entry["dtype"]], tuple(entry["shape"]), data[begin:end].copy())
    return found


def receipt(folder: Path) -> dict[str, Any]:
    """What the merge noted of itself, in every file the same."""
    found = {read_header(p)[0]["__metadata__"]["fastinterp"] for p in folder.glob("*.safetensors")}
    assert len(found) == 1
    return json.loads(found.pop())


def digest(model: Model) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(model):
        t = model[name]
        total.update(f"{name} {t.dtype} {list(t.shape)} {t.raw.size}\n".encode())
        total.update(t.raw.tobytes())
    return total.hexdigest()


# --- models to merge -----------------------------------------------------------------------------------------------

FLOATS: dict[str, tuple[DType, tuple[int, ...]]] = {
    "model.embed_tokens.weight": (BF16, (97, 64)),
    "model.layers.0.q.weight": (BF16, (300, 17)),
    "model.layers.0.k.weight": (F32, (65, 3)),
    "model.layers.0.v.weight": (F16, (1, 255)),
    "model.layers.10.q.weight": (F8_E4M3, (129,)),
    "model.layers.10.k.weight": (F8_E5M2, (77, 3)),
    "model.layers.2.v.weight": (F64, (33, 2)),
    "model.scale": (BF16, ()),
    "model.one": (F32, (1,)),
    "model.none": (BF16, (0, 5)),
}


def family(count: int, mixed: bool = False) -> list[dict[str, Tensor]]:
    """`count` fine-tunes of one base, with integers of odd sizes and tensors full of NaN, Inf and subnormals.

    mixed: each model stores a tensor in another dtype than the others
    """
    models: list[dict[str, Tensor]] = []
    for i in range(count):
        model = {"pad": integers(np.arange(13), "U8"), "on": integers([[True, False, True]], "BOOL")}
        for seed, (name, (dtype, shape)) in enumerate(FLOATS.items()):
            own = MERGING[(MERGING.index(dtype) + i) % len(MERGING)] if mixed else dtype
            model[name] = moved(weights(seed, dtype, shape), 100 * i + seed, 0.1 if own.bits == 8 else 1e-3, own)
        model["ids"] = integers(np.arange(-3, 4), "I64")
        for dtype in MERGING:
            model[f"patterns.{dtype}"] = patterns(dtype, 321, i)
        models.append(model)
    return models


def saved(folder: Path, models: list[dict[str, Tensor]]) -> list[str]:
    """The models written each in its own way: other shards, another order of tensors, data at odd offsets."""
    paths = []
    for i, model in enumerate(models):
        names = sorted(model) if i % 2 else list(model)[::-1] if i else list(model)
        paths.append(
            str(write(folder / "abcdef"[i], model, order=names, shards=(1, 4, 3)[i % 3], skew=(0, 1, 3)[i % 3]))
        )
    return paths


def recipe(method: str, paths: list[str], **keys: Any) -> dict[str, Any]:
    """A recipe; `weights=` gives one per model, everything else is a key of the recipe."""
    weights = keys.pop("weights", None)
    models: list[dict[str, object]] = [{"model": p} for p in paths]
    if isinstance(weights, list):
        models = [{"model": p, "parameters": {"weight": w}} for p, w in zip(paths, weights, strict=True)]
    return {"merge_method": method, "models": models, **keys}


# --- what must come out ----------------------------------------------------------------------------------------------


def expected(
    models: Sequence[Model],
    combine: Combine,
    *,
    out: DType | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    fp8_overflow: str = "saturate",
) -> dict[str, Tensor]:
    """The merge of `models` by the numpy reference: floats as `combine` says, the rest as in the first model."""
    row: Row = combine.row()
    merged = {}
    for name, first in models[combine.base or 0].items():
        if not first.dtype.merges:
            merged[name] = models[0][name]
            continue
        dtype = out or first.dtype
        inputs = [m[name] for m in models]
        outputs, _ = reference.combine(
            [t.raw for t in inputs], [t.dtype for t in inputs], [row], dtype,
            rounding=rounding, keys=[philox_key(seed, 0, name)], fp8_overflow=fp8_overflow,
        )  # fmt: skip
        merged[name] = Tensor(dtype, first.shape, outputs[0])
    return merged


def assert_same(want: Model, got: Model) -> None:
    """Fail with the names, and for each the number of elements and the first that differs."""
    assert sorted(want) == sorted(got)
    wrong = []
    for name, t in want.items():
        have = got[name]
        if (t.dtype, t.shape) != (have.dtype, have.shape):
            wrong.append(f"{name} is {have.dtype} {have.shape}, expected {t.dtype} {t.shape}")
        elif not np.array_equal(t.raw, have.raw):
            width = max(1, t.dtype.bits // 8)
            bad = np.flatnonzero((t.raw != have.raw).reshape(-1, width).any(axis=1))
            at = slice(int(bad[0]) * width, (int(bad[0]) + 1) * width)
            wrong.append(
                f"{name}: {bad.size} of {t.raw.size // width} elements, first {bad[0]}: "
                f"{have.raw[at].tobytes().hex()}, expected {t.raw[at].tobytes().hex()} (little-endian)"
            )
    assert not wrong, "; ".join(wrong)
