"""Gram matrices, L1 norms and counts: rule 7 of docs/NUMERICS.md.

Sums are of rows of COLUMNS elements; a tensor that is measured as a whole is one row. A program sums a chunk of one row
in 256 lanes, which fold in pairs; or a column each in its lanes, over 64 rows. The sums of chunks and of blocks of rows
are folded later.
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
def no_sums(COUNT: tl.constexpr, TILES: tl.constexpr, kind: tl.constexpr):
    """COUNT zeros for every lane of TILES chunks."""
    none = ()
    for _ in tl.static_range(COUNT):
        none = none + (tl.zeros([TILES, LANES], kind),)
    return none


@triton.jit
def addresses_of(row, N: tl.constexpr):
    """The addresses of a row's inputs."""
    addresses = ()
    for i in tl.static_range(N):
        addresses = addresses + (tl.load(row + HEADER + i),)
    return addresses


@triton.jit
def codes_of(inputs, offs, apart, end, mask, DT: tl.constexpr, AHEAD: tl.constexpr, ALIGN: tl.constexpr):
    """The codes of all inputs at AHEAD steps of `apart` elements up to `end`, step by step."""
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
def _add(sums, counts, vectors, PAIRS: tl.constexpr, NORMS: tl.constexpr):
    wide = ()
    for k in tl.static_range(len(vectors)):
        wide = wide + (vectors[k].to(tl.float64),)
    more = ()
    for k in tl.static_range(len(PAIRS)):
        more = more + (tl.fma(wide[PAIRS[k][0]], wide[PAIRS[k][1]], sums[k]),)
    for k in tl.static_range(len(NORMS)):
        more = more + (sums[len(PAIRS) + k] + tl.abs(wide[NORMS[k]]),)
    counted = ()
    for k in tl.static_range(len(NORMS)):
        counted = counted + (counts[k] + tl.where(vectors[NORMS[k]] != 0, 1, 0),)
    return more, counted


@triton.jit(do_not_specialize=["pieces"])
def measure_kernel(
    table,  # i64: see table.py; NUMBERS is the index of the first answer
    sums_out,  # f64[answers, WIDTH]
    counts_out,  # i32[answers, COUNTS]: elements that are not 0
    pieces,
    DT: tl.constexpr,  # dtype codes of the inputs
    WIDE: tl.constexpr,
    DELTAS: tl.constexpr,
    PAIRS: tl.constexpr,  # ((i, j), ...): vectors whose products are summed
    NORMS: tl.constexpr,  # (i, ...): vectors whose magnitudes are summed, and which are counted
    SUMS: tl.constexpr,  # columns of an answer for the products, the norms and the counts
    WIDTH: tl.constexpr,
    COUNTS: tl.constexpr,
    ALIGN: tl.constexpr,
    AHEAD: tl.constexpr,  # steps whose elements are loaded while as many are added: a divisor of 64
    TILES: tl.constexpr,  # chunks of a program, that it sums at the same time
):
    """Chunks of rows: answers are [rows, chunks]."""
    program = tl.program_id(0)
    row = row_of(table, pieces, program, HEADER + len(DT))
    inputs = addresses_of(row, len(DT))
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
    sums = no_sums(len(PAIRS) + len(NORMS), TILES, tl.float64)
    counts = no_sums(len(NORMS), TILES, tl.int32)
    codes = codes_of(inputs, lanes, LANES, end[:, None], here[:, None], DT, AHEAD, ALIGN)
    for start in range(0, tl.minimum(columns, CHUNK), LANES * AHEAD):
        # Loaded while the current ones are added, to keep many bytes in flight.
        offs = lanes + start + LANES * AHEAD
        more = codes_of(inputs, offs, LANES, end[:, None], here[:, None], DT, AHEAD, ALIGN)
        for step in tl.static_range(AHEAD):
            sums, counts = _add(sums, counts, _vectors(codes, step, DT, WIDE, DELTAS), PAIRS, NORMS)
        codes = more
    answer = tl.load(row + NUMBERS) + chunk
    for k in tl.static_range(len(PAIRS) + len(NORMS)):
        tl.store(sums_out + answer * WIDTH + SUMS[k], fold(sums[k], TILES, LANES, 8), mask=here)
    for k in tl.static_range(len(NORMS)):
        at = SUMS[len(PAIRS) + len(NORMS) + k]
        tl.store(counts_out + answer * COUNTS + at, fold(counts[k], TILES, LANES, 8), mask=here)


@triton.jit(do_not_specialize=["pieces"])
def measure_columns_kernel(
    table,
    sums_out,  # f64[answers, WIDTH, columns], of a piece at NUMBERS * WIDTH; NUMBERS is a multiple of 16
    counts_out,  # i32[answers, COUNTS, columns], of a piece at NUMBERS * COUNTS
    pieces,
    DT: tl.constexpr,
    WIDE: tl.constexpr,
    DELTAS: tl.constexpr,
    PAIRS: tl.constexpr,
    NORMS: tl.constexpr,
    SUMS: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNTS: tl.constexpr,
    ALIGN: tl.constexpr,
    AHEAD: tl.constexpr,
    TILES: tl.constexpr,  # of a program: blocks of rows and LANES columns
):
    """Blocks of rows: answers are [blocks]. As measure_kernel, but with sums for each column."""
    program = tl.program_id(0)
    row = row_of(table, pieces, program, HEADER + len(DT))
    columns = tl.load(row + COLUMNS)
    rows = tl.load(row + COUNT) // columns
    if ALIGN == 16:
        columns = tl.multiple_of(columns, 16)
    inputs = addresses_of(row, len(DT))
    groups = (columns + LANES - 1) // LANES
    tile = (program - tl.load(row)) * TILES + tl.arange(0, TILES)
    block = (tile // groups)[:, None]
    column = ((tile % groups) * LANES)[:, None] + tl.arange(0, LANES)[None, :]
    mask = (column < columns) & (block * BLOCK_ROWS < rows)
    sums = no_sums(len(PAIRS) + len(NORMS), TILES, tl.float64)
    counts = no_sums(len(NORMS), TILES, tl.int32)
    offs = block * BLOCK_ROWS * columns + column
    end = tl.minimum(block * BLOCK_ROWS + BLOCK_ROWS, rows) * columns
    codes = codes_of(inputs, offs, columns, end, mask, DT, AHEAD, ALIGN)
    for _ in range(0, tl.minimum(rows, BLOCK_ROWS), AHEAD):
        offs += columns * AHEAD
        more = codes_of(inputs, offs, columns, end, mask, DT, AHEAD, ALIGN)
        for step in tl.static_range(AHEAD):
            sums, counts = _add(sums, counts, _vectors(codes, step, DT, WIDE, DELTAS), PAIRS, NORMS)
        codes = more
    first = tl.multiple_of(tl.load(row + NUMBERS), 16)
    for k in tl.static_range(len(PAIRS) + len(NORMS)):
        tl.store(sums_out + first * WIDTH + (block * WIDTH + SUMS[k]) * columns + column, sums[k], mask=mask)
    for k in tl.static_range(len(NORMS)):
        at = block * COUNTS + SUMS[len(PAIRS) + len(NORMS) + k]
        tl.store(counts_out + first * COUNTS + at * columns + column, counts[k], mask=mask)
