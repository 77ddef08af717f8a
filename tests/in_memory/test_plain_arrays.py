"""Sums of plain arrays, which the compiled code checks alone: the bytes of the general way, and what is left to it."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch

import fastinterp
from fastinterp.backends.cpu import SumRow
from fastinterp.errors import UsageError
from fastinterp.in_memory import merge, weighted_sum
from fastinterp.in_memory.plain_sums import plain_sum
from fastinterp.ops.combine import Combine, Row
from tests.support import backends

DTYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
SHAPES = [(), (1,), (3, 5), (2, 1, 7), (70_001,)]


def _numpy(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).normal(size=shape)).astype(getattr(ml_dtypes, dtype, dtype))


def _torch(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.from_numpy(_numpy("float64", shape, seed)).to(getattr(torch, dtype))


def _bytes(x: np.ndarray | torch.Tensor) -> bytes:
    return x.tobytes() if isinstance(x, np.ndarray) else x.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("make", [_numpy, _torch])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_of_the_general_way(make, dtype: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    x, y, z = (make(dtype, shape, seed) for seed in range(3))
    wide = make("float32", shape, 3)

    def run() -> list[bytes]:
        out = make(dtype, shape, 4)
        return [
            _bytes(fastinterp.weighted_sum([x, y, z], [0.5, 2, -1.25])),
            _bytes(fastinterp.weighted_sum((x, y), (0.0, 1), pivot=z)),
            _bytes(fastinterp.weighted_sum([x, wide], [0.75, 0.25], pivot=y)),
            _bytes(fastinterp.weighted_sum([x, y], [0.3, 0.7], out=out)) + _bytes(out),
            _bytes(fastinterp.merge_tensors([x, y, z], "linear", parameters={"weight": [1, 2, 3]})),
            _bytes(fastinterp.merge_tensors([x, y], "task_arithmetic", base=z, parameters={"weight": [0.3, -2]})),
        ]

    done: list[bool] = []

    def recorded(*args: object, **options: object) -> object:
        merged = plain_sum(*args, **options)  # type: ignore[arg-type]
        done.append(merged is not None)
        return merged

    for module in (weighted_sum, merge):
        monkeypatch.setattr(module, "plain_sum", recorded)
    got = run()
    assert done == [True] * 6
    for module in (weighted_sum, merge):
        monkeypatch.setattr(module, "plain_sum", lambda *_, **__: None)
    assert got == run()


@pytest.mark.parametrize("make", [_numpy, _torch])
def test_plain_arrays_are_summed_here(make):
    x, y, out = (make("bfloat16", (5, 3), seed) for seed in range(3))
    row = SumRow(Combine((0.5, 0.5)).row(), 2)
    assert plain_sum([x, y], row, out) is out
    assert _bytes(plain_sum([x, y], row)) == _bytes(out)


def _masked() -> list[np.ndarray]:
    return [np.ma.masked_array(np.ones(3, np.float32)), np.ones(3, np.float32)]


def _without_memory() -> list[torch.Tensor]:
    x = torch.ones(3)
    x.untyped_storage().resize_(0)
    return [x, torch.ones(3)]


NOT_PLAIN = {
    "without memory": _without_memory,
    "shapes": lambda: [np.ones(3, np.float32), np.ones((3, 1), np.float32)],
    "empty": lambda: [np.ones(0, np.float32), np.ones(0, np.float32)],
    "strided": lambda: [np.ones((3, 3), np.float32)[:, 1], np.ones(3, np.float32)],
    "swapped": lambda: [np.ones(3, ">f4"), np.ones(3, np.float32)],
    "integers": lambda: [np.ones(3, np.int32), np.ones(3, np.float32)],
    "masked": _masked,
    "two libraries": lambda: [np.ones(3, np.float32), torch.ones(3)],
    "numbers": lambda: [1.0, 2.0],
    "transposed": lambda: [torch.ones(3, 2).T, torch.ones(2, 3)],
    "negated": lambda: [torch.ones(3, dtype=torch.complex64).conj().imag, torch.ones(3)],
    "followed": lambda: [torch.ones(3, requires_grad=True), torch.ones(3)],
    "sparse": lambda: [torch.ones(3).to_sparse(), torch.ones(3)],
    "elsewhere": lambda: [torch.ones(3, device="meta"), torch.ones(3, device="meta")],
    "integer tensors": lambda: [torch.ones(3, dtype=torch.int32), torch.ones(3)],
}


@pytest.mark.parametrize("arrays", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_is_not_plain_is_left_alone(arrays):
    row = SumRow(Combine((0.5, 0.5)).row(), 2)
    for a, b in itertools.permutations(arrays()):
        out = np.full(3, 7, np.float32) if isinstance(b, np.ndarray) else torch.full((3,), 7.0)
        try:
            done = plain_sum([a, b], row, out)
        except UsageError:
            raise AssertionError("whoever calls is to look why") from None
        assert done is None and out.tolist() == [7, 7, 7]


@pytest.mark.parametrize("make", [_numpy, _torch])
def test_outputs_that_cannot_be_written_are_left_alone(make):
    x, y = make("float32", (4,), 0), make("float32", (4,), 1)
    before = _bytes(x)
    row = SumRow(Combine((0.5, 0.5)).row(), 2)
    assert plain_sum([x, y], row, x) is None
    assert plain_sum([x[:3], y[:3]], row, x[1:]) is None
    assert plain_sum([x[:2], y[:2]], row, x[2:]) is not None
    assert _bytes(x)[:8] == before[:8]
    if make is _numpy:
        y.flags.writeable = False
        assert plain_sum([x, x], row, y) is None


def test_parameters_are_plain_where_autograd_does_not_record():
    x, y = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.full((3,), 3.0))
    row = SumRow(Combine((0.5, 0.5)).row(), 2)
    assert plain_sum([x, y], row) is None
    with torch.no_grad():
        merged = plain_sum([x, y], row)
    assert merged.tolist() == [2, 2, 2] and type(merged) is torch.Tensor and not merged.requires_grad


def test_an_instruction_set_that_is_named_is_used(monkeypatch: pytest.MonkeyPatch):
    x = np.ones(3, np.float32)
    monkeypatch.setenv("FASTINTERP_ISA", "no-such")
    with pytest.raises(fastinterp.BackendError, match="FASTINTERP_ISA=no-such"):
        fastinterp.weighted_sum([x, x], [0.5, 0.5])
    monkeypatch.setenv("FASTINTERP_ISA", "scalar")
    assert fastinterp.weighted_sum([x, x], [0.5, 0.5]).tolist() == [1, 1, 1]


@pytest.mark.parametrize("isa", ["", *backends.usable()])
def test_threads_and_instruction_sets_are_plain(isa: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTINTERP_ISA", isa.upper())
    row = SumRow(Combine((0.5, 0.5)).row(), 2)
    x, y = _numpy("bfloat16", (300_000,), 0), _numpy("bfloat16", (300_000,), 1)
    want = fastinterp.weighted_sum([x, y], [0.5, 0.5])
    for threads in (None, 1, 2, 1024):
        assert _bytes(plain_sum([x, y], row, None, threads)) == _bytes(want)
    monkeypatch.setenv("FASTINTERP_ISA", "no-such")
    assert plain_sum([x, y], row) is None


@pytest.mark.parametrize("threads", [0, -1, 1025, True, 2.0, "2"])
@pytest.mark.parametrize("numel", [3, 300_000])
def test_numbers_of_threads_are_checked(threads: object, numel: int):
    x = np.ones(numel, np.float32)
    with pytest.raises(fastinterp.BackendError, match="number of threads"):
        fastinterp.weighted_sum([x, x], [0.5, 0.5], threads=threads)  # type: ignore[arg-type]
    with pytest.raises(fastinterp.BackendError, match="number of threads"):
        fastinterp.merge_tensors([x, x], "linear", threads=threads)  # type: ignore[arg-type]


def test_weights_of_other_types_are_looked_at():
    x = np.ones(3, np.float32)
    assert fastinterp.weighted_sum([x, x], [1.0, 2.0]).tolist() == [3, 3, 3]
    with pytest.raises(UsageError, match="weights must be numbers"):
        fastinterp.weighted_sum([x, x], [True, 2.0])  # equal to weights of before, but none
    with pytest.raises(UsageError, match="every weight is 0"):
        fastinterp.weighted_sum([x, x], [0.0, 0])
    with pytest.raises(UsageError, match="finite"):
        fastinterp.weighted_sum([x, x], [float("nan"), 1.0])


def test_many_threads_share_a_large_sum():
    x, y = _numpy("float32", (1_000_003,), 0), _numpy("float32", (1_000_003,), 1)
    want = x + np.float32(0.5) * (y - x)  # the first is the pivot
    np.testing.assert_array_equal(fastinterp.weighted_sum([x, y], [0.5, 0.5]), want)


def test_a_row_of_other_inputs_is_refused():
    with pytest.raises(ValueError, match="none of the inputs"):
        SumRow(Row(2), 2)
    x = np.ones(3, np.float32)
    assert plain_sum([x, x, x], SumRow(Row(0), 2)) is None
