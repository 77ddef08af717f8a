"""`methods` and `doctor`: the merge methods, and the properties of this machine and installation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from fastinterp.cli import options
from fastinterp.messages import WIDTH

_NEARLY = 95  # columns of a line of a docstring, above which it goes on in the next one

if TYPE_CHECKING:
    from fastinterp.methods import Method, Parameter


@click.command()
@click.argument("name", required=False)
@click.option("--markdown", is_flag=True, help="Print the list as a Markdown table.")
def methods(name: str | None, markdown: bool) -> None:
    """List the merge methods, or describe the method NAME.

    \b
    Example:
      fastinterp methods
      fastinterp methods task_arithmetic
    """
    from fastinterp.methods import find, names, names_of_others

    if name is not None:
        method = find(name)
        options.say("\n".join([*_described(method.doc), "", "Example recipe:", "", example(method)]))
        return
    if markdown:
        options.say(table())
        return
    rows = [(n, *_headline(find(n))) for n in sorted({*names(), *names_of_others()})]
    options.say("\n".join(_listed(rows)))


def _listed(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Lines of at most 80 columns: name, summary and formula of each method."""
    import textwrap

    wide = 2 + max(len(name) for name, _, _ in rows)
    lines: list[str] = []
    for name, does, formula in rows:
        first, *rest = textwrap.wrap(does, WIDTH - wide, break_long_words=False, break_on_hyphens=False)
        rest += textwrap.wrap(formula, WIDTH - wide, subsequent_indent="  ", break_long_words=False)
        lines += [f"{name:{wide}}{first}", *(" " * wide + line for line in rest)]
    return lines


def _described(doc: str) -> list[str]:
    """The docstring of a method in lines of at most 80 columns: summary, formula with its symbols, the rest."""
    first, _, rest = doc.partition("\n")
    summary, _, formula = first.partition("     ")
    lines = [*_wrapped(summary, ""), "", *(_wrapped(f"    {formula}", " " * 8) if formula else [])]
    items: list[tuple[str, str]] = []  # of the rest: text, and the indent of its further lines
    before = ""
    for line in filter(None, rest.split("\n")):
        text = line.strip()
        gap = re.match(r"\S[^.:]{0,24}?(?::)? {2,}(?=\S)", line)
        heading = re.match(r"(Reads|Models|Source|Differs)\b", line)
        if line.startswith(" ") and not items:  # the formula, and its symbols beside it
            lines += [part for cell in re.split(r" {2,}", text) for part in _wrapped(f"    {cell}", " " * 8)]
        elif line.startswith(" ") or (len(before) > _NEARLY and items and not (gap or heading or items[-1][1])):
            items[-1] = f"{items[-1][0]} {text}", items[-1][1]
        else:
            items.append((text, " " * gap.end() if gap else ""))
        before = line
    return [*lines, "", *(part for item in items for part in _wrapped(*item))]


def _wrapped(text: str, indent: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _headline(method: Method) -> tuple[str, str]:
    """Summary and formula of a method, from the first line of its docstring, or from the line with `out =`."""
    lines = method.doc.splitlines()
    summary, _, formula = lines[0].partition("     ")
    if not formula:
        formula = next((line for line in map(str.strip, lines) if line.startswith("out = ")), "")
    return summary, formula.strip().split("  ")[0]


def table() -> str:
    """The methods as a Markdown table: summary, formula, number of models, parameters."""
    from fastinterp.methods import find, names

    lines = ["| method | does | formula | models | parameters |", "|---|---|---|---|---|"]
    for name in names():
        method = find(name)
        summary, formula = (part.replace("|", "\\|") for part in _headline(method))  # a bar would end the cell
        low, high = method.models
        models = f"{low}" if low == high else f"{low} to {high}"
        base = {"required": ", with a base", "optional": ", with or without a base", "none": ""}[method.base]
        parameters = ", ".join(f"`{p.name}`" for p in method.parameters)
        lines.append(f"| `{name}` | {summary} | `{formula}` | {models}{base} | {parameters} |")
    return "\n".join(lines)


def example(method: Method) -> str:
    """A recipe in YAML that the method accepts. It has the required parameters, or if there are none the first that may
    be None (`ema` needs one of those); and the density, whose default drops nothing.
    """
    needed = [p for p in method.parameters if p.required] or [p for p in method.parameters if p.optional][:1]
    needed += [p for p in method.parameters if p.name in ("density", "select_topk") and p not in needed]
    each = [p for p in needed if p.each]
    once = [f"{p.name}: {_sample(p)}" for p in needed if not p.each]
    count = max(method.models[0], min(3 if method.base == "required" else 2, method.models[1]))
    lines = [f"merge_method: {method.name}"]
    if method.base == "required":
        lines.append("base_model: models/base")
        count -= 1
    lines.append("models:")
    for letter in "abcd"[:count]:
        lines.append(f"  - model: models/{letter}")
        if each:
            values = ", ".join(f"{p.name}: {_sample(p, f'models/{letter}-{p.name}')}" for p in each)
            lines.append(f"    parameters: {{{values}}}")
    if once:
        lines.append("parameters: {" + ", ".join(once) + "}")
    return "\n".join(lines)


def _sample(parameter: Parameter, checkpoint: str = "") -> str:
    """A value that the parameter accepts, as YAML."""
    from fastinterp.methods import Sidecar

    if parameter.kind is Sidecar:
        return checkpoint
    if parameter.choices:
        word = parameter.choices[0]
        return f"{{{parameter.key}: {word}}}" if parameter.key else word
    return {bool: "true", int: "10"}.get(parameter.kind, "0.5")


@click.command()
@options.as_json
def doctor(as_json: bool) -> None:
    """Show versions, hardware and speed of this machine.

    Versions, CPU, GPUs, settings, and the bandwidth of memory and files, measured in two seconds.

    \b
    Example:
      fastinterp doctor
    """
    from fastinterp.system import doctor as diagnosis

    values = diagnosis.examine()
    if as_json:
        options.say_json(values)
    else:
        options.say(diagnosis.as_text(values))
