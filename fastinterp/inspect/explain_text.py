"""`explain`: the description of a merge as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastinterp.checkpoint.names import GGUF
from fastinterp.checkpoint.sidecar_files import is_sidecar, is_tokenizer_file
from fastinterp.messages import WIDTH, broken, counted, fit, plain, seconds, shown, size, table

_SHOWN = 8  # items of one kind, before the rest is only counted


def as_text(values: dict[str, Any]) -> str:
    """The values of Explanation.as_dict as text, at most 80 columns wide where names allow."""
    lines = [f"{values['method']} of {counted(len(values['models']), 'model')}", ""]
    for preset in values["presets"]:
        lines += _wrapped(preset, "  ", " " * 8)
    lines += ["  in the formula of preset mergekit:"] if values["presets"] else []
    lines += [*_formula_lines(values["formula"], values["symbols"]), *_adapter_lines(values["adapters"]), ""]
    lines += _parameters(values["given"])
    lines += _reads(values) + _computes(values) + _writes(values)
    floor = values["floor"]
    lines += [
        _memory(values["window"]),
        f"time     at least {seconds(floor['seconds'])}, if files are read at {floor['read_gb_per_s']:g} GB/s and "
        f"written at {floor['write_gb_per_s']:g} GB/s (warm page cache)",
        *(_wrapped(values["auto"]["why"], "device   ", " " * 9) if values["auto"] else []),
        *(line for r in values["remarks"] for line in _wrapped(plain(r), "note     ", " " * 9)),
        *(line for w in values["warnings"] for line in _wrapped(plain(w), "warning  ", " " * 9)),
    ]
    return broken("\n".join(lines), WIDTH)


def _memory(w: dict[str, Any]) -> str:
    most = f"memory   at most {size(w['bytes'])} of scratch: "
    if w["asks"]:
        return f"{most}{counted(w['threads'], 'thread')}, or fewer where statistics need more than that"
    return (
        f"{most}{counted(w['threads'], 'thread')} x ({w['inputs']} x {w['read_bytes'] >> 10} KiB in + "
        f"{w['outputs']} x {w['write_bytes'] >> 10} KiB out{' + what encodes them' if w['encodes'] else ''})"
    )


def _wrapped(text: str, first: str, others: str) -> list[str]:
    import textwrap

    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def _formula_lines(formula: str, symbols: list[str]) -> list[str]:
    first, *legend = formula.split("\n")
    lines = _wrapped(first, "  ", " " * 8)
    for symbol in symbols:
        lines += _wrapped(symbol, "  ", " " * 8)
    return [*lines, *(f"  {plain(line)}" for line in legend)]


def _adapter_lines(adapters: list[dict[str, Any]]) -> list[str]:
    """`W of x1 is W + 2*B*A[r=16] (lora) in 112 tensors`."""
    texts = [f"W of {a['symbol']} is {a['formula']} in {counted(a['tensors'], 'tensor')}" for a in adapters[:_SHOWN]]
    if len(adapters) > _SHOWN:
        texts.append(f"and {len(adapters) - _SHOWN} more; --json lists all")
    return [line for text in texts for line in _wrapped(plain(text), "  ", " " * 8)]


def _parameters(values: dict[str, Any]) -> list[str]:
    """The parameters in force, and the layers of the models that the layers of the output are made of."""
    lines = []
    for title, items in (("params", _parameter_lines(values)), ("layers", _layer_lines(values))):
        for line in items:
            first = f"{title:9}" if line is items[0] else " " * 9
            lines += _wrapped(plain(line), first, " " * 11)
    return lines


def _reads(values: dict[str, Any]) -> list[str]:
    read = [m for m in values["models"] if m["bytes_read"]]
    lines = [f"read     {size(values['bytes_read'])} of {counted(len(read), 'model')}, {_times(values)}"]
    rows = [
        [m["name"], size(m["bytes_read"]), counted(len(m["files"]), "file"), counted(m["tensors_read"], "tensor")]
        if m["bytes_read"]
        else [m["name"], "-", "", "not read: the output does not depend on it"]
        for m in values["models"]
    ]
    lines += table(rows, "<>><", indent=9)
    for made in values["made"]:
        dtypes = " and ".join(made["dtypes"])
        what = f"{made['symbol']} = {fit(plain(made['name']), 40)}: {counted(made['tensors'], 'tensor')} in {dtypes}"
        lines.append(f"store    {what}, {size(made['bytes'])}, in a temporary file")
    return lines


def _times(values: dict[str, Any]) -> str:
    """`each byte once`, or the passes over most of the bytes: `reads 2x: measure, combine`."""
    most = max(values["steps"], key=lambda step: step["bytes_read"], default=None)
    reads = [] if most is None else most["reads"]
    return "each byte once" if len(reads) < 2 else f"reads {len(reads)}x: {', '.join(reads)}"


def _computes(values: dict[str, Any]) -> list[str]:
    how = f"stochastic, seed {values['seed']}" if values["rounding"] == "stochastic" else "to nearest even"
    lines = [f"compute  with one rounding, {how}"]
    if values["draws"]:
        lines.append(f"         elements are dropped at random, seed {values['seed']}")
    for step in values["steps"][:_SHOWN]:
        what = f"copies of {step['out']}" if step["copies"] else f"out = {step['out']}"
        if len(step["reads"]) > 1:
            what += f" in {len(step['reads'])} reads"
        lines.append(fit(f"         {counted(step['tensors'], 'tensor')}: {what}", WIDTH))
    if len(values["steps"]) > _SHOWN:
        more = counted(len(values["steps"]) - _SHOWN, "more formula")
        lines.append(f"         and {more}; --json lists all")
    lines += [
        f"         {counted(d['tensors'], 'tensor')} of {d['elements']:,} elements: {' and '.join(d['in'])} "
        f"-> {d['out']}, {'copied' if d['arithmetic'] is None else 'in ' + d['arithmetic']}"
        for d in values["dtypes"]
    ]
    agree = values["must_agree"]
    if agree:
        lines.append(
            f"         {counted(len(agree), 'tensor')} not averaged, which must be equal in all models: "
            f"{fit(agree[0], 30)}{', ...' if len(agree) > 1 else ''}"
        )
    elif values["integers_from"] is not None:
        lines.append(f"         tensors that are not averaged are copied from {plain(values['integers_from'])}")
    return lines


def _writes(values: dict[str, Any]) -> list[str]:
    files = values["files"]
    lines = [
        f"write    {size(values['bytes_written'])}, {size(values['disk_bytes'])} with headers, in "
        f"{counted(len(files), 'file')}"
    ]
    rows = [[f["name"], size(f["bytes"]), counted(f["tensors"], "tensor")] for f in files[:_SHOWN]]
    if len(files) > _SHOWN:
        rows[-1] = [f"... {files[-1]['name']}", size(files[-1]["bytes"]), counted(files[-1]["tensors"], "tensor")]
    lines += table(rows, "<>>", indent=9)
    small = [*values["sidecars"], *values["indexes"]]
    lines.append(f"         {fit(', '.join(small), WIDTH - 9)}")
    origin, vocabulary = plain(values["origin"]), values["vocabulary"]
    if vocabulary is None:
        lines.append(f"         {_origin(files, values['sidecars'], origin)}")
    else:
        lines.append(f"         configuration of {origin}, vocabulary: {plain(vocabulary)}")
    if values["moved"]:
        how = "put together of rows of others" if vocabulary is None else "with rows reordered by token"
        moved = f"{counted(len(values['moved']), 'tensor')} {how}: {', '.join(values['moved'])}"
        lines.append(fit(f"         {moved}", WIDTH))
    return lines


def _origin(files: Sequence[Mapping[str, Any]], small: Sequence[str], origin: str) -> str:
    """What the output has of its origin, beside tensors."""
    names = [name.rpartition("/")[2] for name in small]
    if any(map(is_tokenizer_file, names)) or files[0]["name"].endswith(GGUF):  # in whose metadata they are
        return f"configuration and tokenizer of {origin}"
    if any(map(is_sidecar, names)):
        return f"configuration of {origin}, which has no tokenizer"
    return f"no configuration and no tokenizer: none are beside {origin}"


def _parameter_lines(values: dict[str, Any]) -> list[str]:
    """A line for each parameter, of any length."""
    lines: dict[str, list[str]] = {}
    for entry in values["parameters"]:
        of = f"{entry['of']}: " if entry["of"] else ""
        lines.setdefault(entry["parameter"], []).append(of + ", ".join(map(_case, entry["cases"])))
    wide = max(map(len, lines), default=0)
    text = [f"{name:{wide}}  {_few(cases)}" for name, cases in lines.items()]
    if values["defaults"]:
        text.append("defaults: " + ", ".join(f"{k} {_value(v)}" for k, v in values["defaults"].items()))
    return text


def _layer_lines(values: dict[str, Any]) -> list[str]:
    """A line for each slice and module: its layers in the output, and in the models."""
    lines = []
    for one in values["slices"][:_SHOWN]:
        name = "" if one["module"] is None else f"{one['module'] or 'everything'} "
        whole = f"{_range(one['layers'])} = " if one["layers"] else "= "
        sources = [s["model"] + (f" {_range(s['layers'])}" if s["layers"] else "") for s in one["sources"]]
        how = f"copied from {sources[0]}" if one["copied"] else ", ".join(sources)
        lines.append(f"{name}{whole}{how}")
    if len(values["slices"]) > _SHOWN:
        lines.append(f"and {counted(len(values['slices']) - _SHOWN, 'more slice')}; --json lists all")
    return lines


def _range(layers: Sequence[int]) -> str:
    """`0..7`, of [0, 8]."""
    first, end = layers
    return f"{first}" if end - first == 1 else f"{first}..{end - 1}"


def _case(case: dict[str, Any]) -> str:
    text = _value(case["value"])
    if case["filter"] is not None:
        text = f"{case['filter']} {text}"
    elif case["tensors"] is not None:
        text = f"others {text}"
    return text if case["tensors"] is None else f"{text} ({counted(case['tensors'], 'tensor')})"


def _value(value: Any) -> str:
    if isinstance(value, list):
        numbers = [f"{number:g}" for number in value]
        span = f"{numbers[0]} to {numbers[1]}" if len(numbers) == 2 else f"[{', '.join(numbers)}]"
        return f"{span} over the layers"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else shown(value)


def _few(values: Sequence[str]) -> str:
    more = f"; and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return "; ".join(values[:_SHOWN]) + more
