"""Some rows of an encoded tensor as a tensor of its own: codes and scales that lie behind each other."""

from __future__ import annotations

from msgspec.structs import replace

from fastinterp.plan.inputs import Encoding, StoredInput

_SCALE_BYTES = (4, 2, 2, 1)  # by the first parameter of the decoders of scaled codes
_TILE_ROWS = 128
_GROUPS = {"mxfp4": 32, "nvfp4": 16}  # numbers that have one scale of a byte


def rows_of(tensor: StoredInput, first: int, count: int, name: str = "") -> StoredInput | None:
    """Rows [first, first + count) of an encoded tensor, all dimensions but the last taken as one: [count, columns].

    None, if they are not stored behind each other: they begin within blocks of rows that have one scale, or are packed
    together, or products of an adapter are added to them.
    """
    encoding = tensor.encoding
    if encoding is None or tensor.low_rank is not None or not tensor.numel:
        return None
    columns = tensor.shape[-1] if len(tensor.shape) > 1 else tensor.numel
    rows = tensor.numel // columns
    codes = tensor.nbytes - sum(companion.nbytes for companion in encoding.companions)
    whole = (first, count) == (0, rows)
    if codes % rows and not whole:
        return None
    if whole:
        return replace(tensor, name=name or tensor.name, shape=(count, columns))
    companions = list(encoding.companions)
    parameters = list(encoding.parameters)
    if is_tiled(encoding):
        if first % _TILE_ROWS:
            return None
        group = int(parameters[2]) if encoding.decoder.startswith("scaled_") else _GROUPS[encoding.decoder]
        strip = _TILE_ROWS * -(-(columns // group) // 4) * 4  # bytes of a row of tiles
        companions[0] = _part(companions[0], first // _TILE_ROWS * strip, -(-count // _TILE_ROWS) * strip)
        if encoding.decoder.startswith("scaled_"):
            parameters[3] = count
    elif encoding.decoder.startswith("scaled_"):
        cut = _scales(parameters, columns, first, count)
        if cut is None:
            return None
        start, length, parameters[3] = cut
        size = _SCALE_BYTES[int(parameters[0])]
        companions[0] = _part(companions[0], start * size, length * size)
    elif encoding.decoder in _GROUPS:
        each = columns // _GROUPS[encoding.decoder]
        companions[0] = _part(companions[0], first * each, count * each)
        if encoding.decoder == "nvfp4" and parameters[1] > 1:
            each = rows // int(parameters[1])
            if first % each + count > each:
                return None
            companions[1] = _part(companions[1], first // each * 4, 4)
            parameters[1] = 1
    elif companions or parameters:
        return None
    per_row = codes // rows
    nbytes = count * per_row + sum(companion.nbytes for companion in companions)
    return replace(
        tensor, name=name or tensor.name, shape=(count, columns), nbytes=nbytes, start=tensor.start + first * per_row,
        encoding=replace(encoding, companions=tuple(companions), parameters=tuple(parameters)),
    )  # fmt: skip


def is_tiled(encoding: Encoding) -> bool:
    """Whether scales of 128 rows and 4 columns lie in tiles."""
    last = encoding.parameters[4:] if encoding.decoder.startswith("scaled_") else encoding.parameters[3:]
    return any(last)


def _scales(parameters: list[float], columns: int, first: int, count: int) -> tuple[int, int, int] | None:
    """(first scale, number of scales, rows of a matrix) of some rows of scaled codes; None, if they cut a block."""
    block_rows, block_columns, rows = (int(p) for p in parameters[1:4])
    per_row = -(-columns // block_columns)
    per_matrix = -(-rows // block_rows) * per_row
    matrix, row = divmod(first, rows)
    if row + count > rows:  # of several matrices: whole ones
        return (matrix * per_matrix, count // rows * per_matrix, rows) if row == count % rows == 0 else None
    if row % block_rows and row // block_rows != (row + count - 1) // block_rows:
        return None
    start = matrix * per_matrix + row // block_rows * per_row
    return start, -(-count // block_rows) * per_row, count


def _part(companion: StoredInput, start: int, nbytes: int) -> StoredInput:
    """Some bytes of a companion, whose dtype alone still counts."""
    numel = nbytes * 8 // companion.dtype.bits
    return replace(companion, shape=(numel,), start=companion.start + start, nbytes=nbytes)


def aligned(tensor: StoredInput, first: int, count: int) -> tuple[int, int]:
    """(first, count) of the least rows of an encoded tensor that hold these, and that lie behind each other."""
    columns = tensor.shape[-1] if len(tensor.shape) > 1 else tensor.numel
    every = tensor.numel // columns
    block, rows = 1, every
    encoding = tensor.encoding
    if encoding is not None and is_tiled(encoding):
        block = _TILE_ROWS
    elif encoding is not None and encoding.decoder.startswith("scaled_"):
        block, rows = int(encoding.parameters[1]), int(encoding.parameters[3])
    end = first + count
    if first // rows != (end - 1) // rows:
        start, end = first // rows * rows, -(-end // rows) * rows
    else:
        matrix = first // rows * rows
        start = matrix + (first - matrix) // block * block
        end = min(matrix + -(-(end - matrix) // block) * block, matrix + rows)
    return (start, end - start) if rows_of(tensor, start, end - start) is not None else (0, every)
