"""How a launch describes its pieces: rows of i64 in the device's memory, and numbers in f64 behind them.

A row is HEADER numbers and then the addresses of the piece's inputs:

TILE     number of the first tile: program p works on the last row whose TILE is at most p
COUNT    elements
FIRST    index, in the tensor, of the first of them
OUTS     where, in the table, the addresses of its outputs stand, followed by their Philox keys
ROWS     outputs
NUMBERS  where, among the numbers, its own begin
FLAGS    where, among the flags, those of its outputs begin
COLUMNS  length of a row of the tensor
GROUP    row of the tensor that the first of the numbers belong to
GROUPS   groups that have numbers
EXTRA    where, in the table, more of the kernel's own stands
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(0)
COUNT = tl.constexpr(1)
FIRST = tl.constexpr(2)
OUTS = tl.constexpr(3)
ROWS = tl.constexpr(4)
NUMBERS = tl.constexpr(5)
FLAGS = tl.constexpr(6)
COLUMNS = tl.constexpr(7)
GROUP = tl.constexpr(8)
GROUPS = tl.constexpr(9)
EXTRA = tl.constexpr(10)
HEADER = tl.constexpr(11)


@triton.jit
def row_of(table, rows, tile, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """The address of the row that a tile belongs to, by halving `rows` in STEPS."""
    low = 0
    high = rows
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        here = tl.load(table + middle * WIDTH) <= tile
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle)
    return table + low * WIDTH


@triton.jit
def place_of(e0, columns, offs):
    """Row and column of elements e0 + offs of a tensor: i64 each."""
    row = e0 // columns
    column = e0 - row * columns
    left = columns - column
    here = offs < left
    # Short numbers, because long ones are slow to divide. Elements of a tile that lie beyond its row are near.
    beyond = tl.where(here, 0, offs - left).to(tl.uint32)
    length = tl.minimum(columns, 1 << 31).to(tl.uint32)
    rows = tl.where(here, 0, 1 + (beyond // length).to(tl.int64))
    return row + rows, tl.where(here, column + offs, (beyond % length).to(tl.int64))
