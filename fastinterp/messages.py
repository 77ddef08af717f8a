"""How sizes, counts and tables look to people. Nothing here is wider than 100 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

WIDTH = 100
_NAME = 12  # a first column is never cut to less than this


def size(nbytes: float) -> str:
    """Bytes in powers of 1000, with three digits: `2.20 GB`, `12.1 KB`, `512 B`."""
    if nbytes < 1000:
        return f"{nbytes:.0f} B"
    value, units = float(nbytes), iter(("KB", "MB", "GB", "TB", "PB"))
    unit = ""
    while value >= 999.5:
        value, unit = value / 1000, next(units)
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def seconds(wall_s: float) -> str:
    """`12.3 s`, `0.51 s`, `53 ms`, `4.2 ms`."""
    if wall_s >= 0.0995:
        return f"{wall_s:.{2 if wall_s < 9.995 else 1}f} s"
    return f"{wall_s * 1000:.{0 if wall_s >= 0.00995 else 2}{'f' if wall_s >= 0.00995 else 'g'}} ms"


def counted(count: int, noun: str) -> str:
    """`1 file`, `2 files`, `1,000 files`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def plain(text: str) -> str:
    """`text` on one line, control characters escaped: names from files are shown, never obeyed by the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def fit(text: str, width: int) -> str:
    """`text` as `plain` gives it, its middle cut out if it has more than `width` characters."""
    text = plain(text)
    if len(text) <= width:
        return text
    tail = (width - 3) * 2 // 3
    return f"{text[: width - 3 - tail]}...{text[-tail:]}"


def table(rows: Iterable[Sequence[str]], align: str, indent: int = 2) -> list[str]:
    """Lines of aligned columns, two spaces apart.

    align   a letter per column: `<` or `>`. The first column is cut in the middle where the line gets too long
    """
    cells = [[plain(c) for c in row] for row in rows]
    if not cells:
        return []
    widths = [max(len(row[i]) for row in cells) for i in range(len(align))]
    others = indent + sum(2 + w for w in widths[1:])
    widths[0] = min(widths[0], max(_NAME, WIDTH - others))
    lines = []
    for row in cells:
        first, *rest = (
            fit(c, w).ljust(w) if a == "<" else fit(c, w).rjust(w) for c, w, a in zip(row, widths, align, strict=True)
        )
        lines.append((" " * indent + "  ".join([first, *rest])).rstrip())
    return lines
