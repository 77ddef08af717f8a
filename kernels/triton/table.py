"""The table of a launch: a row of i64 per piece in the device's memory, followed by numbers in f64.

A row is HEADER words and then the addresses of the piece's inputs:

TILE     index of the first tile: program p works on the last row whose TILE is at most p
COUNT    number of elements
FIRST    index of the first element in the tensor
OUTS     index in the table of the addresses of its outputs, which their Philox keys follow
ROWS     number of outputs
NUMBERS  index of its first number among the numbers; or of its first answer
FLAGS    index of the flag of its first output
COLUMNS  length of a row of the tensor
GROUP    row of the tensor that its first number belongs to
GROUPS   number of groups that have numbers
EXTRA    index in the table of further words, which depend on the kernel
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
def row_of(table, rows, tile, WIDTH: tl.constexpr):
    """The address of the row that a tile belongs to, by halving `rows`: of one row, nothing is loaded."""
    low = rows * 0
    high = rows
    while high - low > 1:
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
