"""A plan in words and as plain values: what will be read, computed, written and held. Touches no tensor data."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Any

from fastinterp.backends.registry import cpu_threads, maybe_devices
from fastinterp.checkpoint.layout import OutFile, parse_size
from fastinterp.checkpoint.sidecar_files import copy_sidecars
from fastinterp.execute.device_choice import choose
from fastinterp.execute.run import Window, make_window
from fastinterp.inspect.explain_parameters import as_lines, given, layer_lines, presets_in_force, symbols
from fastinterp.messages import WIDTH, counted, fit, plain, seconds, size, table
from fastinterp.plan.inputs import PlannedTensor, TensorInput
from fastinterp.plan.plan import Plan
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.references import ModelRef

# Page cache to page cache, about what one machine of today does: the least time that a merge of these files can take.
_READ_GB_S, _WRITE_GB_S = 10.0, 3.0
_SHOWN = 8  # of one kind, before the rest is only counted


class Explained(Plan):
    """A plan that print() shows as `fastinterp explain` does."""

    def __str__(self) -> str:
        return as_text(self, make_window(self, cpu_threads(), parse_size("512MB")))


def as_dict(plan: Plan, window: Window) -> dict[str, Any]:
    """Plain values, as --json prints them. The plan must have one output."""
    choice = choose([plan], window.threads, window.most) if maybe_devices() else None
    (recipe,), (layout,) = plan.recipes, plan.layouts
    letters = _letters(plan, recipe)
    copied = copy_sidecars(plan.origin.root, recipe.out_dtype or recipe.dtype)
    sidecars = [*sorted(plan.aligned.sidecars(copied)), "README.md"]
    return {
        "method": recipe.method.name,
        "formula": _formula(plan),
        "symbols": [] if recipe.coefficients is not None else [_lettered(s, letters) for s in symbols(recipe)],
        "presets": [_lettered(s, letters) for s in presets_in_force(recipe)],
        "given": given(recipe, [m.tensors for m in plan.aligned.models], letters),
        "rounding": recipe.rounding,
        "seed": recipe.seed,
        "draws": recipe.method.draws,
        "models": [_model(plan, i) for i, c in enumerate(plan.checkpoints) if c.files],
        "made": _made(plan),
        "origin": plan.origin.name,
        "vocabulary": plan.aligned.source,
        "moved": [t.name for t in plan.tensors if any(e.moves_rows for e in t.inputs)],
        "steps": _steps(plan),
        "must_agree": [t.name for t in plan.tensors if not t.merged and len(t.inputs) > 1],
        "integers_from": None if recipe.integers is None else str(recipe.integers),
        "dtypes": _dtypes(plan),
        "files": [{"name": f.name, "bytes": f.size, "tensors": len(f.places)} for f in layout.files],
        "index": layout.index_name if layout.index is not None else None,
        "sidecars": sidecars,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "disk_bytes": plan.disk_bytes,
        "window": {name: getattr(window, name) for name in (*Window.__dataclass_fields__, "bytes")},
        "floor": {
            "seconds": plan.bytes_read / _READ_GB_S / 1e9 + plan.disk_bytes / _WRITE_GB_S / 1e9,
            "read_gb_per_s": _READ_GB_S,
            "write_gb_per_s": _WRITE_GB_S,
        },
        "auto": None if choice is None else choice.as_dict(),
        "warnings": list(plan.warnings),
        "tensors": [_tensor(plan, t, place) for t, place in _placed(plan, layout.files)],
    }


def as_text(plan: Plan, window: Window) -> str:
    """The same for people, at most 100 columns wide where names allow."""
    found = as_dict(plan, window)
    lines = [f"{found['method']} of {counted(len(found['models']), 'model')}", ""]
    for preset in found["presets"]:
        lines += _wrapped(preset, "  ", " " * 8)
    lines += ["  in the formula of preset mergekit:"] if found["presets"] else []
    lines += [*_formula_lines(found["formula"], found["symbols"]), ""]
    lines += _given(found["given"])
    lines += _reads(found) + _computes(found) + _writes(found)
    floor = found["floor"]
    lines += [
        _held(found["window"]),
        f"floor    {seconds(floor['seconds'])}, if files are read at {floor['read_gb_per_s']:g} GB/s and written at "
        f"{floor['write_gb_per_s']:g} GB/s, as a warm page cache allows",
        *(_wrapped(found["auto"]["why"], "device   ", " " * 9) if found["auto"] else []),
        *(line for w in found["warnings"] for line in _wrapped(plain(w), "warning  ", " " * 9)),
    ]
    return "\n".join(lines)


def _held(w: dict[str, Any]) -> str:
    most = f"held     at most {size(w['bytes'])} of scratch: "
    if w["asks"]:
        return f"{most}{counted(w['threads'], 'thread')}, fewer where they need more than that for statistics"
    return (
        f"{most}{counted(w['threads'], 'thread')} x ({w['inputs']} x {w['read_bytes'] >> 10} KiB in + "
        f"{w['outputs']} x {w['write_bytes'] >> 10} KiB out)"
    )


def _model(plan: Plan, i: int) -> dict[str, Any]:
    checkpoint = plan.checkpoints[i]
    reads = [
        (t.name, t.inputs[at].nbytes)
        for t in _all(plan)
        for _, inputs in t.reads
        for at in inputs
        if t.checkpoints[at] == i
    ]
    return {
        "symbol": f"x{i}",
        "name": checkpoint.name,
        "files": [str(p) for p in checkpoint.files],
        "bytes": checkpoint.nbytes,
        "tensors_read": len({name for name, _ in reads}),
        "bytes_read": sum(nbytes for _, nbytes in reads),
    }


def _all(plan: Plan) -> list[PlannedTensor]:
    """The tensors of the output, each after those that have to be made before it."""
    return [stage for t in plan.tensors for stage in t.stages]


def _made(plan: Plan) -> list[dict[str, Any]]:
    """The documents above of which tensors have to be stored until they are read."""
    found: dict[int, dict[Hashable, TensorInput]] = {}
    for tensor in _all(plan):
        for i, entry in tensor.pairs:
            if entry.stages:
                found.setdefault(i, {})[entry.key] = entry
    return [
        {
            "symbol": f"x{i}",
            "name": plan.checkpoints[i].name,
            "dtypes": sorted({t.dtype.name for t in tensors.values()}),
            "tensors": len(tensors),
            "bytes": sum(t.nbytes for t in tensors.values()),
        }
        for i, tensors in sorted(found.items())
    ]


def _steps(plan: Plan) -> list[dict[str, Any]]:
    """The kernels' view: tensors grouped by what is computed for them, coefficients as they are used."""
    groups: dict[tuple[str, tuple[str, ...]], list[PlannedTensor]] = {}
    for tensor in _all(plan):
        groups.setdefault((_expression(plan, tensor), tuple(what for what, _ in tensor.reads)), []).append(tensor)
    steps = []
    for (expression, reads), tensors in groups.items():
        first = tensors[0]
        row = first.rows[0] if first.rows else None
        steps.append(
            {
                "out": expression,
                "pivot": None if row is None else plan.checkpoints[first.checkpoints[row.pivot]].name,
                "total": None if row is None else row.total,
                "terms": []
                if row is None
                else [{"model": plan.checkpoints[first.checkpoints[i]].name, "coefficient": c} for i, c in row.terms],
                "copies": all(_copies(t) for t in tensors),
                "reads": list(reads),
                "tensors": len(tensors),
                "bytes_read": sum(t.bytes_read for t in tensors),
                "bytes_written": sum(_out_bytes(t) for t in tensors),
            }
        )
    return steps


def _expression(plan: Plan, tensor: PlannedTensor) -> str:
    """`x0 + 0.5*(x1 - x0)`: what is computed, with the pivot in front. `slerp(x0, x1)`, where the data decides."""
    if tensor.program is not None:
        return f"{tensor.program.method}({', '.join(f'x{i}' for i in tensor.checkpoints)})"
    if not tensor.rows:
        return f"x{tensor.checkpoints[0]}"
    row = tensor.rows[0]
    pivot = f"x{tensor.checkpoints[row.pivot]}"
    text = pivot if row.total == 1.0 else f"{row.total:.9g}*{pivot}"
    for i, c in row.terms:
        text += f" {'-' if c < 0 else '+'} {abs(c):.9g}*(x{tensor.checkpoints[i]} - {pivot})"
    return text


def _formula(plan: Plan) -> str:
    """The recipe's formula and legend, with the side-cars behind the models. Those of documents above follow."""
    models = len(plan.models)
    beside = [f"x{i} = {c.name}" for i, c in enumerate(plan.checkpoints) if i >= models and c.files]
    if not plan.above:
        return "\n".join([plan.recipes[0].formula(), *beside])
    names = _names(plan)
    formulas = []
    for recipe in (plan.recipes[0], *reversed(plan.above)):
        first = recipe.formula().partition("\n")[0].removeprefix("out = ")
        told = _lettered(first, _letters(plan, recipe))
        name = f"x{names.index(recipe.name)}" if recipe.name in names else "out"
        formulas.append(f"{name} = {told}" if name == "out" else f"{name} = {told}, {recipe.name}")
    return "\n".join([*formulas, *(f"x{i} = {name}" for i, name in enumerate(plan.models)), *beside])


def _names(plan: Plan) -> list[str]:
    return [*plan.models, *(c.name for c in plan.checkpoints[len(plan.models) :])]


def _letters(plan: Plan, recipe: Recipe) -> list[str]:
    """What the models of a document are called: x and the number of the checkpoint."""
    if not plan.above:
        return [f"x{i}" for i in range(len(recipe.models))]
    known = [ModelRef.of(name) for name in _names(plan)]
    return [f"x{known.index(model)}" for model in recipe.models]


def _lettered(text: str, letters: Sequence[str]) -> str:
    """A method's own words, in which its first model is x0."""
    return re.sub(
        r"\bx(\d+)\b", lambda found: letters[int(found[1])] if int(found[1]) < len(letters) else found[0], text
    )


def _copies(tensor: PlannedTensor) -> bool:
    """Whether the output has the input's bytes."""
    return not tensor.merged or (
        bool(tensor.rows) and tensor.rows[0].is_copy and tensor.dtype == tensor.inputs[0].dtype
    )


def _out_bytes(tensor: PlannedTensor) -> int:
    return tensor.dtype.nbytes(tensor.numel) or 0


def _dtypes(plan: Plan) -> list[dict[str, Any]]:
    counts: dict[tuple[tuple[str, ...], str, str | None], list[int]] = {}
    for tensor in plan.tensors:
        found = tuple(dict.fromkeys(e.dtype.name for e in tensor.inputs))
        arithmetic = None if _copies(tensor) else "float64" if "F64" in found else "float32"
        entry = counts.setdefault((found, tensor.dtype.name, arithmetic), [0, 0])
        entry[0] += 1
        entry[1] += tensor.numel
    return [
        {"in": list(i), "out": o, "arithmetic": a, "tensors": n, "elements": e} for (i, o, a), (n, e) in counts.items()
    ]


def _placed(plan: Plan, files: tuple[OutFile, ...]) -> list[tuple[PlannedTensor, str]]:
    homes = {name: f.name for f in files for name in f.places}
    return [(t, homes[t.name]) for t in plan.tensors]


def _tensor(plan: Plan, tensor: PlannedTensor, file: str) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype.name,
        "shape": list(tensor.shape),
        "reads": [plan.checkpoints[i].name for i in tensor.checkpoints],
        "out": _expression(plan, tensor),
        "file": file,
    }


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


def _given(found: dict[str, Any]) -> list[str]:
    """The parameters that are in force, and how layers are put together."""
    lines = []
    for title, some in (("given", as_lines(found)), ("layers", layer_lines(found))):
        for line in some:
            first = f"{title:9}" if line is some[0] else " " * 9
            lines += _wrapped(plain(line), first, " " * 11)
    return lines


def _reads(found: dict[str, Any]) -> list[str]:
    read = [m for m in found["models"] if m["bytes_read"]]
    lines = [f"read     {size(found['bytes_read'])} of {counted(len(read), 'model')}, {_times(found)}"]
    rows = [
        [m["name"], size(m["bytes_read"]), counted(len(m["files"]), "file"), counted(m["tensors_read"], "tensor")]
        if m["bytes_read"]
        else [m["name"], "-", "", "not read: it has no part in the sum"]
        for m in found["models"]
    ]
    lines += table(rows, "<>><", indent=9)
    for made in found["made"]:
        dtypes = " and ".join(made["dtypes"])
        what = f"{made['symbol']} = {fit(plain(made['name']), 40)}: {counted(made['tensors'], 'tensor')} in {dtypes}"
        lines.append(f"made     {what}, {size(made['bytes'])}, kept in a temporary file until they are read")
    return lines


def _times(found: dict[str, Any]) -> str:
    """`each byte once`, or the way that most bytes take: `reads 2x: measure, combine`."""
    most = max(found["steps"], key=lambda step: step["bytes_read"], default=None)
    reads = [] if most is None else most["reads"]
    return "each byte once" if len(reads) < 2 else f"reads {len(reads)}x: {', '.join(reads)}"


def _computes(found: dict[str, Any]) -> list[str]:
    how = f"stochastic, seed {found['seed']}" if found["rounding"] == "stochastic" else "to nearest even"
    lines = [f"compute  with one rounding, {how}"]
    if found["draws"]:
        lines.append(f"         what is dropped is drawn with seed {found['seed']}")
    for step in found["steps"][:_SHOWN]:
        what = f"copies of {step['out']}" if step["copies"] else f"out = {step['out']}"
        if len(step["reads"]) > 1:
            what += f" in {len(step['reads'])} reads"
        lines.append(fit(f"         {counted(step['tensors'], 'tensor')}: {what}", WIDTH))
    if len(found["steps"]) > _SHOWN:
        lines.append(f"         and {len(found['steps']) - _SHOWN} more formulas; --json has them all")
    lines += [
        f"         {counted(d['tensors'], 'tensor')} of {d['elements']:,} elements: {' and '.join(d['in'])} "
        f"-> {d['out']}, {'as they are' if d['arithmetic'] is None else 'in ' + d['arithmetic']}"
        for d in found["dtypes"]
    ]
    agree = found["must_agree"]
    if agree:
        lines.append(
            f"         {counted(len(agree), 'tensor')} not averaged, which must be the same in all models: "
            f"{fit(agree[0], 30)}{', ...' if len(agree) > 1 else ''}"
        )
    elif found["integers_from"] is not None:
        lines.append(f"         tensors that are not averaged are those of {plain(found['integers_from'])}")
    return lines


def _writes(found: dict[str, Any]) -> list[str]:
    files = found["files"]
    lines = [
        f"write    {size(found['bytes_written'])}, {size(found['disk_bytes'])} with headers, in "
        f"{counted(len(files), 'file')}"
    ]
    rows = [[f["name"], size(f["bytes"]), counted(f["tensors"], "tensor")] for f in files[:_SHOWN]]
    if len(files) > _SHOWN:
        rows[-1] = [f"... {files[-1]['name']}", size(files[-1]["bytes"]), counted(files[-1]["tensors"], "tensor")]
    lines += table(rows, "<>>", indent=9)
    small = [*found["sidecars"], *([found["index"]] if found["index"] else [])]
    lines.append(f"         {fit(', '.join(small), WIDTH - 9)}")
    origin, vocabulary = plain(found["origin"]), found["vocabulary"]
    if vocabulary is None:
        lines.append(f"         configuration and tokenizer are those of {origin}")
    else:
        lines.append(f"         configuration of {origin}, vocabulary: {plain(vocabulary)}")
    if found["moved"]:
        told = f"{counted(len(found['moved']), 'tensor')} whose rows follow their tokens: {', '.join(found['moved'])}"
        lines.append(fit(f"         {told}", WIDTH))
    return lines
