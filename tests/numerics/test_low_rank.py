"""Operands with low-rank products added: every step gives what it gives for the float32 tensor of the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastinterp.backends.cpu import Pump, PumpOptions
from fastinterp.ops import steps
from fastinterp.ops.combine import Row
from fastinterp.ops.dtypes import BF16, F16, F32, F64, DType
from fastinterp.ops.operands import Factor, LowRank, Product, ReplacedRows, Stored
from fastinterp.reference import low_rank as reference
from fastinterp.reference.combine import narrow, widen
from tests.numerics.test_decoders import in_memory, kinds, run, told
from tests.support import backends
from tests.support.pumps import code, stored

every_isa = pytest.mark.parametrize("isa", backends.usable())
Raw = NDArray[np.uint8]
# rows, columns, rank: panels that are not whole, rows of more than a chunk, ranks of one and of more than a panel
SHAPES = [(1, 1, 1), (7, 13, 3), (61, 1031, 4), (2, 20011, 2), (67, 64, 33), (5, 96, 16)]
# How W is stored, then A and B.
DTYPES = [(BF16, BF16), (F16, F32), (F32, F16), (F64, BF16)]


class Adapted:
    """A stored tensor with products added, its sources, and what it is in float32."""

    def __init__(self, shape: tuple[int, int, int], dtypes: tuple[DType, DType], seed: int = 0):
        self.rows, self.columns, self.rank = shape
        self.dtype, self.factors = dtypes
        self.rng = np.random.default_rng([*shape, seed])
        self.sources: list[Raw] = []
        w = self.rng.normal(size=(self.rows, self.columns)).astype(np.float32)
        self.source, self.y = self.store(w, self.dtype)
        self.changes: list[Product | ReplacedRows] = []

    def store(self, values: Any, dtype: DType) -> tuple[int, Any]:
        """The number of a new source behind three bytes, and what it holds, as float32."""
        raw = narrow(values.astype(np.float64 if dtype is F64 else np.float32).ravel(), dtype).view(np.uint8)
        self.sources.append(np.concatenate([np.zeros(3, np.uint8), raw]))
        return len(self.sources) - 1, widen(raw, dtype).astype(np.float32).reshape(values.shape)

    def add(self, scale: float = 0.7, turned: bool = False, magnitude: str = "") -> Adapted:
        """turned: the factors are stored the other way round, as for a weight that is stored as [in, out]."""
        a = self.rng.normal(size=(self.rank, self.columns if not turned else self.rows))
        b = self.rng.normal(size=(self.rows if not turned else self.columns, self.rank))
        (a_at, a), (b_at, b) = (self.store(x, self.factors) for x in (a, b))
        across = self.rows if turned else self.columns
        of_a = Factor(a_at, 3, code(self.factors), by_index=1, by_rank=across)
        of_b = Factor(b_at, 3, code(self.factors), by_index=self.rank, by_rank=1)
        lengths, per_row = None, magnitude == "row"
        if magnitude:
            at, m = self.store(self.rng.uniform(0.5, 2, self.rows if per_row else self.columns), self.factors)
            lengths = Factor(at, 3, code(self.factors))
        left, right = (of_a, of_b) if turned else (of_b, of_a)
        self.changes.append(Product(left, right, self.rank, scale, lengths, per_row))
        self.y = reference.add_product(self.y, *((a.T, b.T) if turned else (b, a)), scale)
        if magnitude:
            self.y = reference.with_magnitude(self.y, m, per_row)
        return self

    def replace(self, rows: tuple[int, ...]) -> Adapted:
        at, values = self.store(self.rng.normal(size=(len(rows), self.columns)), self.factors)
        self.changes.append(ReplacedRows(at, 3, code(self.factors), rows))
        self.y = self.y.copy()
        self.y[list(rows)] = values
        return self

    def operand(self, first: int = 0) -> Stored:
        """first: the number of its first source among all."""

        def moved(f: Factor) -> Factor:
            return f if f.source < 0 else Factor(f.source + first, *(getattr(f, n) for n in f.__struct_fields__[1:]))

        changes: list[Any] = []
        for change in self.changes:
            if isinstance(change, Product):
                m = None if change.magnitude is None else moved(change.magnitude)
                product = (moved(change.left), moved(change.right), change.rank, change.scale, m, change.per_row)
                changes.append(Product(*product))
            else:
                changes.append(ReplacedRows(change.source + first, change.offset, change.dtype, change.rows))
        added = LowRank(code(self.dtype), (1, self.rows, self.columns), tuple(changes))
        return Stored(self.source + first, 3, code(F32), None, added)


def floats(one: Adapted) -> Raw:
    return np.ascontiguousarray(one.y).reshape(-1).view(np.uint8)


def copied(one: Adapted, isa: str, **options: Any) -> bytes:
    numel = one.rows * one.columns
    step = steps.Combine(
        inputs=(one.operand(),), numel=numel, columns=one.columns, sinks=(0,), offsets=(3,), out_dtype=code(F32),
        rows=(Row(0),),
    )  # fmt: skip
    (out,), *_ = run(in_memory(one.sources), step, isa=isa, **options)
    return out[3 : 3 + 4 * numel]


@every_isa
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_those_of_the_reference(shape, dtypes, isa):
    """Byte for byte: one product, transposed factors, two, and two with replaced rows before and between."""
    rows = tuple(dict.fromkeys((shape[0] - 1, 0)))
    for one in (
        Adapted(shape, dtypes).add(),
        Adapted(shape, dtypes, 1).add(turned=True, scale=-1.3),
        Adapted(shape, dtypes, 2).add().add(scale=1 / 3),
        Adapted(shape, dtypes, 3).replace(rows).add().replace((shape[0] // 2,)).add(turned=True),
    ):
        assert copied(one, isa) == floats(one).tobytes()
        assert copied(one, isa, threads=7, read_bytes=65536) == floats(one).tobytes()


@every_isa
@pytest.mark.parametrize("shape", [*SHAPES, (130, 300, 4)], ids=str)
@pytest.mark.parametrize("magnitude", ["row", "column"])
def test_lengths_are_those_of_the_reference(shape, magnitude, isa):
    """DoRA: also of a second adapter, which sees what the first one made."""
    dtypes = (BF16, F32)
    assert copied(one := Adapted(shape, dtypes).add(magnitude=magnitude), isa) == floats(one).tobytes()
    one = Adapted(shape, dtypes, 1).add(magnitude=magnitude).add(turned=True).add(magnitude="row", turned=True)
    assert copied(one, isa) == floats(one).tobytes()


@every_isa
@pytest.mark.parametrize("shape", [(7, 13, 3), (61, 1031, 4), (2, 20011, 2)], ids=str)
def test_every_kind_of_step_sees_float32(shape, isa):
    adapted = [Adapted(shape, (BF16, BF16), i).add() for i in range(3)]
    sources: list[Raw] = []
    operands = []
    for one in adapted:
        operands.append(one.operand(len(sources)))
        sources += one.sources
    for kind, step in kinds(shape[:2]).items():
        n = {"copy": 1, "divergence": 2}.get(kind, 3)
        want = run(in_memory([floats(one) for one in adapted]), step(inputs=stored([F32] * n)), isa=isa)
        got = run(in_memory(sources), step(inputs=tuple(operands[:n])), isa=isa)
        assert (got[0], told(got[1]), got[2]) == (want[0], told(want[1]), want[2]), kind


@every_isa
def test_nan_is_one_nan(isa):
    """Whatever made it: a NaN of W, of a factor, infinities that cancel."""
    one = Adapted((5, 40, 2), (F32, F32))
    w = one.y.copy()
    w[0, 0], w[1, 1], w[2, 2] = np.uint32(0xFFC12345).view(np.float32), np.inf, -np.inf
    one.sources[0][3:] = w.reshape(-1).view(np.uint8)
    one.y = w
    one.add(scale=np.inf)
    out = copied(one, isa)
    assert out == floats(one).tobytes()
    nan = np.isnan(one.y)
    assert nan.any() and set(np.frombuffer(out, np.uint32)[nan.ravel()]) == {0x7FC00000}


@every_isa
def test_matrices_have_factors_of_their_own(isa):
    """As peft stores the factors of fused experts: a [r * experts, in], b [out, r * experts]."""
    experts, rows, columns, rank = 3, 10, 37, 4
    one = Adapted((experts * rows, columns, rank), (BF16, BF16))
    a_at, a = one.store(one.rng.normal(size=(rank * experts, columns)), BF16)
    b_at, b = one.store(one.rng.normal(size=(rows, rank * experts)), BF16)
    of_a = Factor(a_at, 3, code(BF16), by_matrix=rank * columns, by_index=1, by_rank=columns)
    of_b = Factor(b_at, 3, code(BF16), by_matrix=1, by_index=rank * experts, by_rank=experts)
    y = one.y.reshape(experts, rows, columns)
    one.y = np.stack([
        reference.add_product(y[e], b.reshape(rows, rank, experts)[:, :, e], a.reshape(experts, rank, columns)[e], 2.0)
        for e in range(experts)
    ])  # fmt: skip
    added = LowRank(code(BF16), (experts, rows, columns), (Product(of_b, of_a, rank, 2.0),))
    step = steps.Combine(
        inputs=(Stored(0, 3, code(F32), None, added),), numel=one.y.size, columns=columns, sinks=(0,), offsets=(3,),
        out_dtype=code(F32), rows=(Row(0),),
    )  # fmt: skip
    (out,), *_ = run(in_memory(one.sources), step, isa=isa)
    assert out[3 : 3 + 4 * one.y.size] == floats(one).tobytes()


def test_factors_are_read_once_and_a_magnitude_reads_the_tensor_once_more():
    one = Adapted((301, 1013, 4), (BF16, F32)).add()
    numel = one.rows * one.columns
    step = steps.Measure(inputs=(one.operand(),), numel=numel)
    *_, pump = run(in_memory(one.sources), step, threads=3)
    every = sum(source.size - 3 for source in one.sources)
    assert pump.bytes_read == every
    one = Adapted((301, 1013, 4), (BF16, F32)).add(magnitude="row")
    *_, pump = run(in_memory(one.sources), steps.Measure(inputs=(one.operand(),), numel=numel), threads=3)
    assert pump.bytes_read == sum(source.size - 3 for source in one.sources) + 2 * numel


_F = Factor(0, 0, 1)


@pytest.mark.parametrize(
    ("added", "words"),
    [
        (LowRank(1, (1, 2, 2), ()), "changes"),
        (LowRank(1, (1, 2, 3), (Product(_F, _F, 1, 1.0),)), "matrices x rows x columns"),
        (LowRank(1, (1, 2, 2), (Product(_F, _F, 0, 1.0),)), "rank of 1 or more"),
        (LowRank(1, (1, 2, 2), (Product(Factor(1, 0, 1), _F, 1, 1.0),)), "none of the sources"),
        (LowRank(1, (1, 2, 2), (Product(_F, Factor(-1, 0, 1), 1, 1.0),)), "none of the sources"),
        (LowRank(1, (1, 2, 2), (Product(Factor(0, 0, 1, -1), _F, 1, 1.0),)), "must not be negative"),
        (LowRank(1, (2, 1, 2), (Product(_F, _F, 1, 1.0, _F),)), "of one matrix"),
        (LowRank(1, (1, 2, 2), (ReplacedRows(0, 0, 1, (2,)),)), "rows of the tensor"),
        (LowRank(1, (1, 2, 2), (ReplacedRows(0, 0, 1, (1, 1)),)), "each once"),
    ],
)
def test_what_is_refused(added, words):
    step = steps.Measure(inputs=(Stored(0, 0, code(F32), None, added),), numel=4)
    with pytest.raises(ValueError, match=words):
        Pump([("memory", 0, 0)], [], [step], PumpOptions())


def test_a_factor_that_ends_too_early_is_an_error():
    one = Adapted((8, 16, 4), (BF16, BF16)).add()
    one.sources[1] = one.sources[1][:-2]
    step = steps.Measure(inputs=(one.operand(),), numel=128)
    pump = Pump(in_memory(one.sources), [], [step], PumpOptions())
    pump.start()
    assert pump.wait(60)
    pump.join()
    error = pump.error()
    assert error is not None and error[:2] == ("read", 1)
