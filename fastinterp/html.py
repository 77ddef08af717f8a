"""Reports as HTML, for notebooks: tables, lists, text. All text is escaped, since names come from files."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def heading(text: str) -> str:
    return f"<p><b>{escape(text)}</b></p>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers. Empty header: none."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(_cell(i, cell) for i, cell in enumerate(row))}</tr>" for row in rows)
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if header else ''}<tbody>{body}</tbody></table>"


def notes(lines: Sequence[str]) -> str:
    """Lines as a list; nothing, if there are none."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def text(content: str) -> str:
    """Text with its line breaks and columns."""
    return f'<pre style="white-space: pre-wrap">{escape(content)}</pre>'


def _cell(column: int, content: str) -> str:
    return f'<td style="text-align: {"right" if column else "left"}">{escape(content)}</td>'
