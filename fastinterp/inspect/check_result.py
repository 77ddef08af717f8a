"""The result of `check`: errors and warnings with their places in the recipe, as text and as plain values."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastinterp.messages import WIDTH, counted, plain

_TITLE = 9  # columns of `error` or `warning`


@dataclass(frozen=True)
class Finding:
    """An error or a warning.

    kind       name of the error that the merge would end with; "" for a warning
    path       where it is in the recipe, `$.models[0]`; None: in the models
    line       1-based, in the recipe's file
    exit_code  that of the error; 0 for a warning
    """

    message: str
    kind: str = ""
    path: str | None = None
    line: int | None = None
    exit_code: int = 0

    @property
    def where(self) -> str:
        return f"line {self.line}" if self.line else self.path or ""


@dataclass(frozen=True)
class CheckResult:
    """The errors and warnings about a recipe and its models, in the order of the recipe's lines. print() shows it.

    errors     the merge would end with one of them. Each has message, path (`$.models[0]`), line, kind and exit_code
    warnings   about what is allowed, but probably not intended
    name       of the recipe's file
    method     of the document that is written; None if the recipe could not be read
    models     number of models that it merges
    tensors    number of tensors of the output; 0 if it is not known
    sampled    number of tensors of which samples were read, those of earlier documents included
    exit_code  as `merge` would end: that of the first error that it meets, or 0
    remarks    what the merge decides without being asked: files and tensors that it leaves out, names that it aligns
    """

    errors: tuple[Finding, ...]
    warnings: tuple[Finding, ...]
    name: str = "recipe"
    method: str | None = None
    models: int = 0
    tensors: int = 0
    sampled: int = 0
    exit_code: int = 0
    remarks: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """The errors, by their key in the output of --json."""
        return self.errors

    @property
    def odd(self) -> tuple[Finding, ...]:
        """The warnings, by their key in the output of --json."""
        return self.warnings

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as --json prints them."""
        return {
            "recipe": self.name,
            "ok": self.ok,
            "wrong": [vars(f) for f in self.errors],
            "odd": [{k: v for k, v in vars(f).items() if k not in ("kind", "exit_code")} for f in self.warnings],
            "remarks": list(self.remarks),
            **{k: getattr(self, k) for k in ("method", "models", "tensors", "sampled")},
        }

    def _counts(self) -> str:
        if not self.errors and not self.warnings:
            return "no errors, no warnings"
        counts = [counted(len(self.errors), "error")] if self.errors else []
        return ", ".join([*counts, counted(len(self.warnings), "warning")] if self.warnings else counts)

    def __repr__(self) -> str:
        return f"<CheckResult of {plain(self.name)}: {self._counts()}>"

    def _repr_html_(self) -> str:
        """For notebooks."""
        from fastinterp import html

        return html.text(str(self))

    def __str__(self) -> str:
        lines = [f"{plain(self.name)}: {self._counts()}"]
        lines += _lines("error", self.errors) + _lines("warning", self.warnings)
        lines += _lines("note", [Finding(remark) for remark in self.remarks])
        if self.tensors:
            merge = f"{self.method} of {counted(self.models, 'model')}, {counted(self.tensors, 'tensor')}"
            lines.append(f"  checked: {merge}; samples of {self.sampled:,}")
        elif self.method is None and any(f.path for f in self.errors):
            lines.append("  not checked: the tensors of the models. Correct the recipe first")
        return "\n".join(lines)


# In a message: stays on one line, so that it can be copied
_COMMAND = re.compile(r"`(?:python|mlx_lm.convert|rm|head) [^`]*`")


def _lines(title: str, findings: Sequence[Finding]) -> list[str]:
    lines = []
    for finding in findings:
        where = f"{finding.where}: " if finding.where else ""
        message = _COMMAND.sub(lambda command: command[0].replace(" ", "\0"), plain(where + finding.message))
        lines += textwrap.wrap(
            message, WIDTH, initial_indent=f"  {title:{_TITLE}}",
            subsequent_indent=" " * (2 + _TITLE), break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return [line.replace("\0", " ") for line in lines]
