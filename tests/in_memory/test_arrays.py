"""weighted_sum on numpy arrays and torch CPU tensors: the reference's bytes, no copies, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fastinterp
from fastinterp.errors import ShapeError, UsageError
from fastinterp.ops.combine import Combine, Row
from fastinterp.ops.dtypes import BF16, F8_E5M2, F16, F32, F64, MERGING, DType
from fastinterp.reference import combine as reference
from tests.support import backends
from tests.support.cases import fill
from tests.support.numpy_dtypes import NUMPY

TORCH = {d: getattr(torch, d.library_name) for d in MERGING}
LIBRARIES = ("numpy", "torch")
SHAPE = (7, 331)


def raws(dtypes: list[DType], kind: str = "patterns", numel: int = SHAPE[0] * SHAPE[1]) -> list[np.ndarray]:
    return [fill(kind, d, numel, i, np.random.default_rng(i)).view(np.uint8) for i, d in enumerate(dtypes)]


def array(library: str, raw: np.ndarray, dtype: DType, shape: tuple[int, ...] = SHAPE) -> Any:
    if library == "numpy":
        return raw.copy().view(NUMPY[dtype]).reshape(shape)
    if not raw.size:
        return torch.empty(shape, dtype=TORCH[dtype])
    return torch.from_numpy(raw.copy()).view(TORCH[dtype]).reshape(shape)


def raw_of(x: Any) -> np.ndarray:
    if isinstance(x, np.ndarray):
        return np.frombuffer(x.tobytes(), np.uint8)
    return x.reshape(-1).view(torch.uint8).numpy() if x.numel() else np.empty(0, np.uint8)


def expected(data: list[np.ndarray], dtypes: list[DType], row: Row, out: DType) -> np.ndarray:
    outputs, _ = reference.combine(data, dtypes, [row], out)
    return outputs[0]


@pytest.mark.parametrize("out", MERGING, ids=str)
@pytest.mark.parametrize("dtype", MERGING, ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
def test_sum(library, dtype, out):
    dtypes = [dtype] * 3
    data = raws(dtypes)
    arrays = [array(library, r, dtype) for r in data]
    got = fastinterp.weighted_sum(arrays, [0.5, 0.3, -1.25], dtype=str(out), threads=2)
    assert got.dtype == (NUMPY if library == "numpy" else TORCH)[out]
    assert tuple(got.shape) == SHAPE
    backends.assert_same_bits(expected(data, dtypes, Combine((0.5, 0.3, -1.25)).row(), out), raw_of(got), out, library)
    assert all(np.array_equal(raw_of(x), r) for x, r in zip(arrays, data, strict=True))


@pytest.mark.parametrize("library", LIBRARIES)
def test_mixed_dtypes_keep_the_first(library):
    dtypes = [F16, F8_E5M2, BF16, F32]
    data = raws(dtypes)
    arrays = [array(library, r, d) for r, d in zip(data, dtypes, strict=True)]
    got = fastinterp.weighted_sum(arrays, (1, -1, 0.25, 3))
    backends.assert_same_bits(
        expected(data, dtypes, Combine((1.0, -1.0, 0.25, 3.0)).row(), F16), raw_of(got), F16, "sum"
    )


@pytest.mark.parametrize("library", LIBRARIES)
def test_float64_if_an_array_that_is_read_is(library):
    dtypes = [F32, F64]
    data = raws(dtypes, "normal")
    arrays = [array(library, r, d) for r, d in zip(data, dtypes, strict=True)]
    for weights in ((0.1, 0.9), (0.7, 0.0)):
        got = fastinterp.weighted_sum(arrays, weights, dtype="float64")
        backends.assert_same_bits(expected(data, dtypes, Combine(weights).row(), F64), raw_of(got), F64, str(weights))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("weights", [(0.6, -0.2), (1.0, 0.0), (0.0, 0.0), (1.0, 1.0)])
def test_pivot(library, weights):
    """p + sum_i w_i (x_i - p), in the dtype of p; a lone weight of 1 gives that array's values, none gives p's."""
    dtypes = [BF16, F32, F16]
    data = raws(dtypes)
    pivot, *arrays = (array(library, r, d) for r, d in zip(data, dtypes, strict=True))
    got = fastinterp.weighted_sum(arrays, weights, pivot=pivot)
    row = Combine((0.0, *weights), base=0).row()
    backends.assert_same_bits(expected(data, dtypes, row, BF16), raw_of(got), BF16, str(weights))


@pytest.mark.parametrize("library", LIBRARIES)
def test_out_is_written_in_place_and_nothing_else_is(library):
    """`out` may be a part of a larger array, at any address that its dtype allows."""
    data = raws([BF16, BF16])
    arrays = [array(library, r, BF16) for r in data]
    numel = SHAPE[0] * SHAPE[1]
    around = array(library, np.full((numel + 6) * 4, 0x5B, np.uint8), F32, (numel + 6,))
    out = around[3:-3].reshape(SHAPE)
    address = out.ctypes.data if library == "numpy" else out.data_ptr()
    got = fastinterp.weighted_sum(arrays, [0.25, 0.75], out=out)
    assert got is out
    assert address == (out.ctypes.data if library == "numpy" else out.data_ptr())
    want = expected(data, [BF16, BF16], Combine((0.25, 0.75)).row(), F32)
    backends.assert_same_bits(want, raw_of(around)[12:-12], F32, "out")
    assert (raw_of(around)[:12] == 0x5B).all() and (raw_of(around)[-12:] == 0x5B).all()


def test_odd_addresses():
    """Arrays that numpy calls unaligned, as they are cut out of files."""
    data = raws([F32, F32])
    buffers = [np.concatenate([np.zeros(1 + 2 * i, np.uint8), r]) for i, r in enumerate(data)]
    arrays = [b[1 + 2 * i :].view(np.float32) for i, b in enumerate(buffers)]
    assert not any(x.flags.aligned for x in arrays)
    got = fastinterp.weighted_sum(arrays, [2.0, -1.0])
    backends.assert_same_bits(expected(data, [F32, F32], Combine((2.0, -1.0)).row(), F32), raw_of(got), F32, "odd")


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("isa", backends.usable())
def test_large_arrays_on_any_number_of_threads(isa, threads, monkeypatch):
    monkeypatch.setenv("FASTINTERP_ISA", isa.upper())  # any case will do
    data = raws([BF16, BF16], "close", 16 * 16384 * 2 + 77)
    arrays = [array("numpy", r, BF16, (-1,)) for r in data]
    got = fastinterp.weighted_sum(arrays, [0.7, 0.3], threads=threads)
    want = expected(data, [BF16, BF16], Combine((0.7, 0.3)).row(), BF16)
    backends.assert_same_bits(want, raw_of(got), BF16, f"{isa}, {threads} threads")


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2)])
def test_scalars_and_empty_arrays(library, shape):
    numel = int(np.prod(shape))
    data = raws([F32, F32], "normal", numel)
    got = fastinterp.weighted_sum([array(library, r, F32, shape) for r in data], [0.5, 0.25])
    assert tuple(got.shape) == shape
    backends.assert_same_bits(expected(data, [F32, F32], Combine((0.5, 0.25)).row(), F32), raw_of(got), F32, str(shape))


def test_an_array_of_weight_0_is_not_read():
    """0 * NaN would be NaN. The first array is then not the pivot either."""
    poison = np.full(5, np.nan, np.float32)
    x, y = np.arange(5, dtype=np.float32), np.ones(5, np.float32)
    assert (fastinterp.weighted_sum([poison, x, y], [0, 2, -1]) == 2 * x - 1).all()
    assert np.isnan(fastinterp.weighted_sum([poison, x, y], [1e-30, 2, -1])).all()


@pytest.mark.parametrize("library", LIBRARIES)
def test_rows_of_a_matrix(library):
    """One array of two dimensions is several arrays of one; weights may be an array too."""
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    given: Any = rows if library == "numpy" else torch.from_numpy(rows)
    weights: Any = np.array([1.0, 2.0, -1.0])
    got = fastinterp.weighted_sum(given, weights)
    assert got.tolist() == (rows[0] + 2 * rows[1] - rows[2]).tolist()


def test_64_arrays():
    arrays = [np.full(3, i, np.float32) for i in range(64)]
    assert (fastinterp.weighted_sum(arrays, [1] * 64) == 64 * 63 / 2).all()


def test_torch_tensors_that_need_no_gradient():
    """Parameters are refused where a gradient would be lost, and taken where none is wanted."""
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(UsageError, match=r"array 0 requires grad.*detach.*no_grad.*torch_ops\.weighted_sum"):
        fastinterp.weighted_sum([p], [2.0])
    with torch.no_grad():
        assert fastinterp.weighted_sum([p], [2.0]).tolist() == [2, 2, 2]
        assert fastinterp.weighted_sum([torch.full((3,), 5.0)], [2.0], out=p) is p
    assert p.tolist() == [10, 10, 10]
    assert fastinterp.weighted_sum([p.detach()], [0.5]).tolist() == [5, 5, 5]


X = np.ones((2, 3), np.float32)
T = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arrays", "weights", "options", "kind", "message"),
    [
        ([X, np.ones((3, 2), np.float32)], [1, 1], {}, ShapeError, "[2, 3] and, for array 1, [3, 2]"),
        ([X], [1], {"pivot": np.ones(6, np.float32)}, ShapeError, "arrays differ in shape"),
        ([X], [1], {"out": np.ones(6, np.float32)}, ShapeError, "out has shape [6], the arrays have [2, 3]"),
        ([], [], {}, UsageError, "got 0 arrays and 0 weights"),
        ([X, X], [1], {}, UsageError, "got 2 arrays and 1 weight"),
        ([X] * 65, [1] * 65, {}, UsageError, "at most 64 arrays"),
        ([X] * 64, [1] * 64, {"pivot": X}, UsageError, "at a time, pivot included, got 65"),
        ([X, X], [0, 0.0], {}, UsageError, "every weight is 0"),
        ([X], [float("nan")], {}, UsageError, "weights must be finite"),
        ([X], ["1"], {}, UsageError, "weights must be numbers, got ['1']"),
        ([X], [True], {}, UsageError, "weights must be numbers, got [True]"),
        ([X], [1e39], {}, UsageError, "weights must be finite float32 numbers"),
        ([X], [10**400], {}, UsageError, "weights must be finite float32 numbers"),
        ([X.astype(np.int64)], [1], {}, UsageError, "array 0 has dtype int64"),
        ([X.astype(">f4")], [1], {}, UsageError, "array 0 has dtype >f4"),
        ([X.astype(complex)], [1], {}, UsageError, "complex128"),
        ([np.asfortranarray(X), X], [1, 1], {}, UsageError, "array 0 is not contiguous. Use numpy.ascontiguousarray"),
        ([[1.0, 2.0]], [1], {}, UsageError, "array 0 must be a numpy array"),
        ([X], [1], {"dtype": "int8"}, UsageError, "unknown dtype 'int8'"),
        ([X], [1], {"out": X}, UsageError, "out overlaps array 0"),
        ([X], [1], {"out": np.broadcast_to(np.float32(1), (2, 3))}, UsageError, "out is not contiguous. Give a"),
        ([X], [1], {"out": np.frombuffer(bytes(24), np.float32).reshape(2, 3)}, UsageError, "out is read-only"),
        ([X], [1], {"out": X.copy(), "dtype": "float32"}, UsageError, "either `out` or `dtype`"),
        ([X, T], [1, 1], {}, UsageError, "array 1 must be a numpy array like the first, got Tensor"),
        ([T, X], [1, 1], {}, UsageError, "array 1 must be a torch tensor like the first, got ndarray"),
        ([T], [1], {"out": X.copy()}, UsageError, "out must be a torch tensor like the first"),
        ([T.to(torch.int8)], [1], {}, UsageError, "array 0 has dtype torch.int8"),
        ([T.t()], [1], {}, UsageError, "array 0 is not contiguous. Use .contiguous()"),
        ([T.to("meta")], [1], {}, UsageError, "array 0 is on meta; only tensors on the CPU or on CUDA"),
        ([T], [1], {"out": torch.ones(3, 2).t()}, UsageError, "out is not contiguous. Give a contiguous tensor"),
        ([T], [1], {"out": torch._neg_view(T.clone())}, UsageError, "out is a negated view. Give another tensor"),
        ([T], [1], {"out": T}, UsageError, "out overlaps array 0"),
        ([T], [1], {"out": torch.ones(2, 3, requires_grad=True)}, UsageError, "out requires grad"),
        ([X], [1], {"dtype": np.float32}, UsageError, "unknown dtype <class 'numpy.float32'>. Give a name"),
        ([X, np.ma.masked_less(X, 2)], [1, 1], {}, UsageError, "array 1 is masked, and masks are ignored"),
        ([T, torch._neg_view(T)], [1, 1], {}, UsageError, "array 1 is a negated view. Use .resolve_neg()"),
        ([torch.complex(T, T).conj()], [1], {}, UsageError, "array 0 has dtype torch.complex64"),
        (np.ones((0, 3), np.float32), [], {}, UsageError, "got 0 arrays and 0 weights"),
    ],
)  # fmt: skip
def test_refused(arrays, weights, options, kind, message):
    before = [raw_of(x).copy() for x in arrays if isinstance(x, np.ndarray)]
    with pytest.raises(kind) as caught:
        fastinterp.weighted_sum(arrays, weights, **options)
    assert message in str(caught.value)
    assert all(np.array_equal(b, raw_of(x)) for b, x in zip(before, arrays, strict=False))


def test_tensors_whose_memory_was_let_go():
    freed = T.clone()
    freed.untyped_storage().resize_(0)  # as FSDP does between uses
    for arrays, options in (([T, freed], {}), ([T], {"out": freed}), ([T], {"pivot": freed})):
        with pytest.raises(UsageError, match="has no memory of its own that holds its elements"):
            fastinterp.weighted_sum(arrays, [1] * len(arrays), **options)
    with pytest.raises(UsageError, match="array 0 has no memory of its own"):
        torch.func.vmap(lambda x: fastinterp.weighted_sum([x], [1]))(T)
    with pytest.raises(UsageError, match="state dict 1 has no memory of its own"):
        fastinterp.merge_state_dicts([{"w": T}, {"w": freed}], "linear", parameters={"weight": 1})


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_out_beside_an_input_but_not_over_it(shift, before):
    """Arrays may touch; a single shared element is refused."""
    both = np.ones(20, np.float32)
    low, high = both[:10], both[9 + shift : 19 + shift]
    x, out = (high, low) if before else (low, high)
    if shift < 1:
        with pytest.raises(UsageError, match="out overlaps array 0"):
            fastinterp.weighted_sum([x], [2], out=out)
        assert (both == 1).all()
    else:
        fastinterp.weighted_sum([x], [2], out=out)
        assert (x == 1).all() and (out == 2).all()


def test_unusable_instruction_set(monkeypatch):
    monkeypatch.setenv("FASTINTERP_ISA", "nonsense")
    with pytest.raises(fastinterp.BackendError, match="FASTINTERP_ISA=nonsense"):
        fastinterp.weighted_sum([X], [1])
