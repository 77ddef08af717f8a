"""Files for benchmarks/tools.py: models of given shapes, written and compared piece by piece."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_POOL = 1 << 22  # random numbers, which repeat: what they are changes no time


def write_model(file: Path, shapes: Mapping[str, tuple[int, ...]], seed: int) -> int:
    """Write a float16 model. Returns the bytes of its tensors."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": (end, end + size)}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pool = (0.05 * np.random.default_rng(seed).standard_normal(_POOL)).astype(np.float16)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            left = math.prod(shape)
            while left:
                part = min(left, _POOL)
                out.write(pool[:part].tobytes())
                left -= part
    return end


def read(file: Path, name: str) -> np.ndarray[tuple[int], np.dtype[np.float16]]:
    """A tensor of a file, mapped."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        first, end = json.loads(stream.read(size))[name]["data_offsets"]
    return np.memmap(file, np.float16, "r", 8 + size + first, ((end - first) // 2,))


def compare(a: Path, b: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """How far two files differ, in words, from every 50th tensor. Raises: SystemExit, if by more than two spacings."""
    most, different, elements = 0.0, 0, 0
    for name in [*shapes][::50]:
        x, y = (read(file, name).astype(np.float32) for file in (a, b))
        spacing = np.spacing(np.maximum(np.abs(x), np.abs(y)).astype(np.float16)).astype(np.float32)
        apart = np.abs(x - y) / spacing
        most, different, elements = max(most, float(apart.max())), different + int((apart > 0).sum()), elements + x.size
    if most > 2:
        raise SystemExit(f"the results differ by {most:.1f} spacings of float16")
    return f"{different / elements:.3%} of the elements differ, by {most:.0f} spacing"
