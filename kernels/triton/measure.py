"""Gram matrices, L1 norms and counts: rule 7 of docs/NUMERICS.md.

Sums are of rows of COLUMNS elements; a tensor that is measured as a whole is one row. A program sums a chunk of one row
in 256 lanes, which fold in pairs; or a column each in its lanes, over 64 rows. What chunks and blocks of rows come to
is folded later.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastinterp._triton.numbers import fold, load_codes, widen
from fastinterp._triton.table import COLUMNS, COUNT, HEADER, NUMBERS, row_of
from fastinterp.ops import contract

LANES = tl.constexpr(contract.LANES)
CHUNK = tl.constexpr(contract.CHUNK)
BLOCK_ROWS = tl.constexpr(contract.BLOCK_ROWS)


@triton.jit
def _no_sums(COUNT: tl.constexpr, TILES: tl.constexpr, kind: tl.constexpr):
    none = ()
    for _ in tl.static_range(COUNT):
        none = none + (tl.zeros([TILES, LANES], kind),)
    return none


@triton.jit
def _addresses(row, N: tl.constexpr):
    found = ()
    for i in tl.static_range(N):
        found = found + (tl.load(row + HEADER + i),)
    return found


@triton.jit
def _codes(inputs, offs, apart, end, mask, DT: tl.constexpr, AHEAD: tl.constexpr, ALIGN: tl.constexpr):
    """Of AHEAD steps, which are so far apart and end there: the codes of all inputs, step by step."""
    codes = ()
    for step in tl.static_range(AHEAD):
        at = offs + step * apart
        for i in tl.static_range(len(DT)):
            codes = codes + (load_codes(inputs[i], at, mask & (at < end), DT[i], ALIGN),)
    return codes


@triton.jit
def _vectors(codes, step: tl.constexpr, DT: tl.constexpr, WIDE: tl.constexpr, DELTAS: tl.constexpr):
    """The inputs at a step, or the first and the others' deltas from it: in the compute type."""
    x0 = widen(codes[step * len(DT)], DT[0], WIDE)
    vectors = (x0,)
    for i in tl.static_range(1, len(DT)):
        x = widen(codes[step * len(DT) + i], DT[i], WIDE)
        vectors = vectors + ((x - x0 if DELTAS else x),)
    return vectors


@triton.jit
def _add(sums, counts, vectors, PAIRS: tl.constexpr, ALONE: tl.constexpr):
    wide = ()
    for k in tl.static_range(len(vectors)):
        wide = wide + (vectors[k].to(tl.float64),)
    more = ()
    for k in tl.static_range(len(PAIRS)):
        more = more + (tl.fma(wide[PAIRS[k][0]], wide[PAIRS[k][1]], sums[k]),)
    for k in tl.static_range(len(ALONE)):
        more = more + (sums[len(PAIRS) + k] + tl.abs(wide[ALONE[k]]),)
    counted = ()
    for k in tl.static_range(len(ALONE)):
        counted = counted + (counts[k] + tl.where(vectors[ALONE[k]] != 0, 1, 0),)
    return more, counted


@triton.jit(do_not_specialize=["pieces"])
def measure_kernel(
    table,  # i64: see table.py; NUMBERS is the place of the first answer
    found,  # f64[answers, WIDTH]
    counted,  # i32[answers, COUNTS]: elements that are not 0
    pieces,
    DT: tl.constexpr,  # dtype codes of the inputs
    WIDE: tl.constexpr,
    DELTAS: tl.constexpr,
    PAIRS: tl.constexpr,  # ((i, j), ...): vectors whose products are summed
    ALONE: tl.constexpr,  # (i, ...): vectors whose magnitudes are summed, and which are counted
    PLACES: tl.constexpr,  # of these sums, and then of these counts, in an answer
    WIDTH: tl.constexpr,
    COUNTS: tl.constexpr,
    ALIGN: tl.constexpr,
    AHEAD: tl.constexpr,  # steps whose elements are loaded while as many are added: a divisor of 64
    TILES: tl.constexpr,  # chunks of a program, that it sums at the same time
    STEPS: tl.constexpr,
):
    """Chunks of rows: answers are [rows, chunks]."""
    program = tl.program_id(0)
    row = row_of(table, pieces, program, HEADER + len(DT), STEPS)
    inputs = _addresses(row, len(DT))
    columns = tl.load(row + COLUMNS)
    rows = tl.load(row + COUNT) // columns
    if ALIGN == 16:
        columns = tl.multiple_of(columns, 16)
    chunks = (columns + CHUNK - 1) // CHUNK
    chunk = (program - tl.load(row)) * TILES + tl.arange(0, TILES)
    here = chunk < rows * chunks
    of = chunk // chunks
    begin = of * columns + (chunk % chunks) * CHUNK
    end = tl.where(here, tl.minimum(begin + CHUNK, (of + 1) * columns), begin)
    if ALIGN == 16:
        begin = tl.multiple_of(begin, 16)
        end = tl.multiple_of(end, 16)
    lanes = begin[:, None] + tl.arange(0, LANES)[None, :]
    sums = _no_sums(len(PAIRS) + len(ALONE), TILES, tl.float64)
    counts = _no_sums(len(ALONE), TILES, tl.int32)
    codes = _codes(inputs, lanes, LANES, end[:, None], here[:, None], DT, AHEAD, ALIGN)
    for start in range(0, tl.minimum(columns, CHUNK), LANES * AHEAD):
        # On their way while these are added: else bytes in flight would be few.
        offs = lanes + start + LANES * AHEAD
        more = _codes(inputs, offs, LANES, end[:, None], here[:, None], DT, AHEAD, ALIGN)
        for step in tl.static_range(AHEAD):
            sums, counts = _add(sums, counts, _vectors(codes, step, DT, WIDE, DELTAS), PAIRS, ALONE)
        codes = more
    answer = tl.load(row + NUMBERS) + chunk
    for k in tl.static_range(len(PAIRS) + len(ALONE)):
        tl.store(found + answer * WIDTH + PLACES[k], fold(sums[k], TILES, LANES, 8), mask=here)
    for k in tl.static_range(len(ALONE)):
        at = PLACES[len(PAIRS) + len(ALONE) + k]
        tl.store(counted + answer * COUNTS + at, fold(counts[k], TILES, LANES, 8), mask=here)


@triton.jit(do_not_specialize=["pieces"])
def measure_columns_kernel(
    table,
    found,  # f64[answers, WIDTH, columns], at NUMBERS * WIDTH * columns for a piece
    counted,  # i32[answers, COUNTS, columns]
    pieces,
    DT: tl.constexpr,
    WIDE: tl.constexpr,
    DELTAS: tl.constexpr,
    PAIRS: tl.constexpr,
    ALONE: tl.constexpr,
    PLACES: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNTS: tl.constexpr,
    ALIGN: tl.constexpr,
    AHEAD: tl.constexpr,
    TILES: tl.constexpr,  # of a program: blocks of rows and LANES columns
    STEPS: tl.constexpr,
):
    """Blocks of rows: answers are [blocks]. As measure_kernel, but each column has sums of its own."""
    program = tl.program_id(0)
    row = row_of(table, pieces, program, HEADER + len(DT), STEPS)
    columns = tl.load(row + COLUMNS)
    rows = tl.load(row + COUNT) // columns
    if ALIGN == 16:
        columns = tl.multiple_of(columns, 16)
    inputs = _addresses(row, len(DT))
    groups = (columns + LANES - 1) // LANES
    tile = (program - tl.load(row)) * TILES + tl.arange(0, TILES)
    block = (tile // groups)[:, None]
    column = ((tile % groups) * LANES)[:, None] + tl.arange(0, LANES)[None, :]
    mask = (column < columns) & (block * BLOCK_ROWS < rows)
    sums = _no_sums(len(PAIRS) + len(ALONE), TILES, tl.float64)
    counts = _no_sums(len(ALONE), TILES, tl.int32)
    offs = block * BLOCK_ROWS * columns + column
    end = tl.minimum(block * BLOCK_ROWS + BLOCK_ROWS, rows) * columns
    codes = _codes(inputs, offs, columns, end, mask, DT, AHEAD, ALIGN)
    for _ in range(0, tl.minimum(rows, BLOCK_ROWS), AHEAD):
        offs += columns * AHEAD
        more = _codes(inputs, offs, columns, end, mask, DT, AHEAD, ALIGN)
        for step in tl.static_range(AHEAD):
            sums, counts = _add(sums, counts, _vectors(codes, step, DT, WIDE, DELTAS), PAIRS, ALONE)
        codes = more
    first = tl.load(row + NUMBERS)
    for k in tl.static_range(len(PAIRS) + len(ALONE)):
        tl.store(found + first * WIDTH + (block * WIDTH + PLACES[k]) * columns + column, sums[k], mask=mask)
    for k in tl.static_range(len(ALONE)):
        at = block * COUNTS + PLACES[len(PAIRS) + len(ALONE) + k]
        tl.store(counted + first * COUNTS + at * columns + column, counts[k], mask=mask)
