"""Lengths that are part of the numeric contract (docs/NUMERICS.md). A leaf: imports nothing.

The same numbers stand in csrc/ops.h and csrc/steps/histogram.h; a test compares them.
"""

CHUNK = 16384  # elements that are summed first, before chunks fold; statistics are sampled by it
LANES = 256  # partial sums of a chunk
STRIP = 512  # elements that a sample takes or skips together
BLOCK_ROWS = 64  # rows that a column sums before its blocks fold
