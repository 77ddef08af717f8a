"""Inputs that are mapped: the same bytes and the same errors as with `pread`; SIGBUS of others is left to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastinterp
from benchmarks.methods import CASES, recipe, write_sidecars
from fastinterp.backends.cpu import MappedFile, Pump, PumpOptions
from fastinterp.execute import rounds, sources
from fastinterp.ops.combine import Combine
from fastinterp.ops.dtypes import BF16, F16, F32
from fastinterp.ops.operands import Stored
from fastinterp.ops.steps import CombineStep, Measure
from tests.support import quantised_models
from tests.support.backends import usable
from tests.support.checkpoints import Tensor, integers, weights, write
from tests.support.written import tree

ROOT = Path(__file__).resolve().parents[2]
READS = ("pread", "mapped")


def both(tmp_path: Path, run: Any) -> None:
    """`run(read, out)` writes the same files whichever way inputs are read."""
    for read in READS:
        run(read, tmp_path / read)
    assert tree(tmp_path / "mapped") == tree(tmp_path / "pread")


def odd_model(seed: int) -> dict[str, Tensor]:
    """Many small tensors, some empty, of odd lengths of bytes before others: no data is aligned to its elements."""
    model = {"a": Tensor(integers(1, (3,)).dtype, (3,), integers(1, (3,)).raw)}
    model |= {f"b{i}": weights(seed + i, (BF16, F16, F32)[i % 3], (i % 7, 3)) for i in range(200)}
    return model | {"c": weights(seed + 300, BF16, (700, 1003)), "d": weights(seed + 301, BF16, (0, 4))}
