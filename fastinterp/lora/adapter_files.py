"""The files of an adapter that is written: its weights, adapter_config.json and the model card."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastinterp._version import __version__
from fastinterp.backends.cpu import checksum
from fastinterp.checkpoint.checksum import KEY, UNKNOWN, checksum_text
from fastinterp.checkpoint.header import MAX_HEADER
from fastinterp.checkpoint.regular_file import close, write_all
from fastinterp.errors import CheckpointError, OutputError
from fastinterp.lora.algebra import Array
from fastinterp.lora.peft_rules import patterns
from fastinterp.ops.dtypes import DType
from fastinterp.output.folder import OutFolder
from fastinterp.output.layout import ALIGN
from fastinterp.output.model_card import front_matter
from fastinterp.reference.combine import narrow, widen

WEIGHTS_FILE = "adapter_model.safetensors"  # as peft names it
PREFIX = "base_model.model."  # of names in it
_WRITE = 8 << 20  # elements that are narrowed and written at a time

Described = tuple[str, DType, tuple[int, ...]]  # name, dtype and shape of a tensor


class AdapterWriter:
    """A safetensors file that is written tensor by tensor, of shapes that are known only then.

    path      exists, and is empty
    largest   every tensor that may come, as large as it may be: room is left for a header of all of them
    metadata  goes into the header

    A context manager: leaving it without an error writes the header, which states the checksum of the data. Raises:
    OutputError, from every method.
    """

    def __init__(self, path: Path, shown: str, largest: Sequence[Described], metadata: Mapping[str, str]):
        self.path, self._shown, self._metadata = path, shown, {**metadata, KEY: UNKNOWN}
        end = sum((dtype.nbytes(math.prod(shape)) or 0) for _, dtype, shape in largest)
        room = len(self._header({name: _entry(dtype, shape, (end, end)) for name, dtype, shape in largest}))
        self._start = -(-(8 + room) // ALIGN) * ALIGN
        if self._start > MAX_HEADER:
            raise OutputError(f"{shown}: the adapter has too many tensors for the header of one file: {len(largest)}")
        self._table: dict[str, dict[str, Any]] = {}
        self._end = 0
        self.fd = -1

    def __enter__(self) -> AdapterWriter:
        try:
            self.fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise self._error(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self._metadata[KEY] = checksum_text(self._checksum())
                text = self._header(self._table)
                size = self._start - 8
                self._write(size.to_bytes(8, "little") + text.ljust(size), 0)
        finally:
            close(self.fd, self.path)

    @property
    def nbytes(self) -> int:
        """Of all tensors so far."""
        return self._end

    def place(self, name: str, dtype: DType, shape: tuple[int, ...]) -> int:
        """Add a tensor: the byte offset in the file, where it is to be written."""
        nbytes = dtype.nbytes(math.prod(shape)) or 0
        self._table[name] = _entry(dtype, shape, (self._end, self._end + nbytes))
        self._end += nbytes
        return self._start + self._end - nbytes

    def add(self, name: str, dtype: DType, values: Array) -> None:
        """Add a tensor of these values (f32 or f64), rounded to `dtype` to nearest even."""
        offset, flat = self.place(name, dtype, values.shape), np.ascontiguousarray(values).reshape(-1)
        for i in range(0, flat.size, _WRITE):
            self._write(_stored(flat[i : i + _WRITE], dtype).tobytes(), offset + i * dtype.bits // 8)

    def _write(self, data: bytes, offset: int) -> None:
        try:
            write_all(self.fd, data, offset)
        except OSError as error:
            raise self._error(error) from error

    def _checksum(self) -> int:
        """Of the data, which is read again: an adapter is small, and in the page cache."""
        try:
            return sum(checksum(self.fd, self._start, self._start + self._end)) % 2**64
        except OSError as error:
            raise self._error(error) from error
        except ValueError as error:  # it ends before that
            raise OutputError(f"{self._shown}: it cannot be written: {error}") from error

    def _header(self, table: Mapping[str, Any]) -> bytes:
        every = {"__metadata__": self._metadata, **table}
        return json.dumps(every, ensure_ascii=False, separators=(",", ":")).encode()

    def _error(self, error: OSError) -> OutputError:
        return OutputError(f"{self._shown}: it cannot be written: {error.strerror}")


def rounded(x: Array, dtype: DType) -> Array:
    """The values (f32 or f64) as they are stored; `x` itself, if that changes none."""
    if dtype.in_numpy and x.dtype == np.dtype(dtype.library_name):
        return x
    wide = _stored(np.ascontiguousarray(x).reshape(-1), dtype)
    values = (wide if dtype.in_numpy else widen(wide.view(np.uint8), dtype)).reshape(x.shape)
    return x if np.array_equal(values, x) else values.astype(np.promote_types(values.dtype, np.float32))


def _stored(flat: Array, dtype: DType) -> Array:
    """Values, rounded once to nearest even: as numpy has the dtype, else as codes. Raises: CheckpointError."""
    with np.errstate(over="ignore"):
        stored: Array = flat.astype(dtype.library_name, copy=False) if dtype.in_numpy else narrow(flat, dtype)
    if dtype.in_numpy and not np.isfinite(stored).all() and np.isfinite(flat).all():
        raise CheckpointError(
            f"factors have numbers beyond the range of {dtype}, up to {np.abs(flat).max():g}. Store them as float32: "
            "`--dtype float32` (in Python dtype='float32')"
        )
    return stored


def _entry(dtype: DType, shape: tuple[int, ...], offsets: tuple[int, int]) -> dict[str, Any]:
    return {"dtype": dtype.name, "shape": shape, "data_offsets": offsets}


def adapter_config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    targets: Sequence[str] | str,
    *,
    base: str | None,
    task: str | None,
    saved: Sequence[str] = (),
    fan_in_fan_out: bool = False,
    bias: str = "none",
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """adapter_config.json of a LoRA.

    ranks, alphas  of each module; what most have is `r` and `lora_alpha`, others are in `rank_pattern`, `alpha_pattern`
    targets        `target_modules`
    saved          `modules_to_save`
    more           further keys
    """
    rank, alpha = _most(ranks.values()), _most(alphas.values())
    names = [*ranks]
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "rank_pattern": patterns({name: r for name, r in ranks.items() if r != rank}, names),
        "alpha_pattern": patterns({name: _whole(a) for name, a in alphas.items() if a != alpha}, names),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "modules_to_save": sorted(saved) or None,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": bias,
        "init_lora_weights": True,
        **(more or {}),
    }


def _most(values: Any) -> Any:
    """The value that occurs most, the first of several; 1 of none."""
    every = [*values]
    return max(dict.fromkeys(every), key=every.count) if every else 1


def _whole(value: float) -> Any:
    return int(value) if value == int(value) else value


def write_small_files(folder: OutFolder, config: Mapping[str, Any], card: str) -> None:
    """adapter_config.json and README.md. Nothing, if the output is one file."""
    if not folder.file:
        folder.write("adapter_config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
        folder.write("README.md", card.encode())


def model_card(base: str | None, how: str, *, merged: bool = False) -> str:
    """README.md. base: a Hub id, or None; how: text that says how the adapter was made; merged: of others"""
    front: dict[str, Any] = {"library_name": "peft"}
    front |= {"base_model": [base], "base_model_relation": "adapter"} if base else {}
    front["tags"] = ["lora", *(["merge"] if merged else []), "fastinterp"]
    return f"{front_matter(front)}\n\n# LoRA adapter\n\nMade with fastinterp {__version__}.\n\n{how}\n"
