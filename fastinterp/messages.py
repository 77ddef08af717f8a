"""Formatting of values, lists, sizes and tables for messages and terminal output, at most 80 columns wide."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

WIDTH = 80
_NAME = 12  # the least width of a first column
_LONGEST = 400  # the most, where it is not cut to fit into a line


_listener: Callable[[str], None] | None = None


def listen(to: Callable[[str], None] | None) -> None:
    """Have `to` called with every line of `tell` from here on, instead of what was called before."""
    global _listener  # noqa: PLW0603 - one per process
    _listener = to


def heard() -> bool:
    """Whether anybody hears what `tell` says."""
    return _listener is not None


def tell(line: str) -> None:
    """Say at once what a run does of its own accord: the command line prints it on stderr; Python hears nothing."""
    if _listener is not None:
        _listener(line)


def size(nbytes: float) -> str:
    """Bytes in powers of 1000, with three digits: `2.20 GB`, `12.1 KB`, `512 B`."""
    if nbytes < 1000:
        return f"{nbytes:.0f} B"
    value, unit = float(nbytes), ""
    for larger in ("KB", "MB", "GB", "TB", "PB", "EB"):
        if value >= 999.5:
            value, unit = value / 1000, larger
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def seconds(wall_s: float) -> str:
    """`12.3 s`, `0.51 s`, `53 ms`, `4.2 ms`."""
    if wall_s >= 0.0995:
        return f"{wall_s:.{2 if wall_s < 9.995 else 1}f} s"
    return f"{wall_s * 1000:.{0 if wall_s >= 0.00995 else 2}{'f' if wall_s >= 0.00995 else 'g'}} ms"


def counted(count: int, noun: str) -> str:
    """`1 file`, `2 files`, `1,000 files`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(items: Iterable[str], limit: int) -> str:
    """`a, b, c and 4 more`: the first `limit` items, and the number of those left out."""
    every = list(items)
    more = f" and {len(every) - limit:,} more" if len(every) > limit else ""
    return ", ".join(every[:limit]) + more


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word most similar to `word`, or None if none is similar."""
    import difflib  # imported only when a message is made: it is not needed on the path of a merge

    close = difflib.get_close_matches(word[:100], list(known), n=1)
    return close[0] if close else None


def suggestion(word: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown word: the known word most similar to it, else all known words."""
    close = closest(word.lower(), known)
    return f", did you mean `{close}`?" if close else f". Known: {', '.join(known) or 'none'}"


def shown(value: object) -> str:
    """The repr of a value, cut after 60 characters; None, True and False as `nothing`, `true` and `false`."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    try:
        return clipped(repr(value))
    except ValueError:  # integers of more than 4300 digits have no repr
        return "a number of thousands of digits"


def clipped(text: str) -> str:
    """`text`, cut after 60 characters."""
    return text if len(text) <= 60 else text[:57] + "..."


def plain(text: str) -> str:
    """`text` on one line, with what does not print escaped, so that names read from files cannot control a terminal:
    control characters, marks of the direction of writing, halves of surrogates.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plain_lines(text: str) -> str:
    """The same of text of several lines."""
    return "\n".join(map(plain, text.split("\n")))


def fit(text: str, width: int) -> str:
    """`text` as `plain` gives it, its middle cut out if it has more than `width` characters."""
    text = plain(text)
    if len(text) <= width:
        return text
    tail = (width - 3) * 2 // 3
    return f"{text[: width - 3 - tail]}...{text[-tail:]}"


_HEAD = re.compile(r" *\S+(?: \S+)? {2,}(?=\S)")  # `memory   `: what follows is in a column of its own


def broken(text: str, width: int) -> str:
    """`text` with lines of more than `width` columns broken between words; what follows is indented by two more, or to
    the second column.
    """
    if width < 20 or all(len(line) <= width for line in text.split("\n")):
        return text
    import textwrap

    lines: list[str] = []
    for line in text.split("\n"):
        head = _HEAD.match(line)
        indent = head.end() if head and head.end() <= width // 3 else len(line) - len(line.lstrip(" ")) + 2
        pieces = textwrap.wrap(
            line, width, subsequent_indent=" " * min(indent, width // 2), break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
        lines += pieces if len(line) > width else [line]
    return "\n".join(lines)


# A key of recipes, or an argument, with a value, and what may follow: where it stands.
_KEY = re.compile(
    r"`(\w+)(?:: |=)([^`]+)`"
    r"(?: \(--[^)]*\)| in the recipe(?: \(--[^)]*\)|, --[^.;]*? of interpolate(?:, average)?(?: and sweep)?)?)?"
)


def with_keys_as(text: str, spell: Callable[[str, str], str | None]) -> str:
    """A message about a recipe, where there is none: with keys as arguments, or as options of a command.

    spell  key, value -> `integers=MODEL`, say; None: it stays a key
    """

    def spelled(found: re.Match[str]) -> str:
        new = spell(found[1], found[2].strip("'"))
        return found[0] if new is None else f"`{new}`"

    return _KEY.sub(spelled, text)


def table(rows: Iterable[Sequence[str]], align: str, indent: int = 2, *, whole: bool = False) -> list[str]:
    """Lines of aligned columns, two spaces apart.

    align   a letter per column: `<` or `>`. The first column is cut in the middle where the line gets too long
    whole   only beyond what names of models have
    """
    cells = [[plain(c) for c in row] for row in rows]
    if not cells:
        return []
    widths = [max(len(row[i]) for row in cells) for i in range(len(align))]
    others = indent + sum(2 + w for w in widths[1:])
    widths[0] = min(widths[0], _LONGEST if whole else max(_NAME, WIDTH - others))
    lines = []
    for row in cells:
        first, *rest = (
            fit(c, w).ljust(w) if a == "<" else fit(c, w).rjust(w) for c, w, a in zip(row, widths, align, strict=True)
        )
        lines.append((" " * indent + "  ".join([first, *rest])).rstrip())
    return lines
