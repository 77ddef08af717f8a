"""`explain`: what a merge will read, compute, write and hold in memory, as plain values. Reads no tensor data."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from fastinterp.backends.registry import cpu_threads, maybe_devices
from fastinterp.execute.device_choice import choose
from fastinterp.execute.window import Window, make_window
from fastinterp.inspect.explain_parameters import parameters_in_force, presets_in_force, symbols
from fastinterp.inspect.explain_text import as_text
from fastinterp.messages import counted, size
from fastinterp.output.layout import OutFile
from fastinterp.output.receipt import RECEIPT
from fastinterp.plan.inputs import TensorInput
from fastinterp.plan.plan import Plan
from fastinterp.plan.planned import PlannedTensor, stages_of
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.references import ModelRef

# Rates of one machine from page cache to page cache, for a lower bound of the time.
_READ_GB_S, _WRITE_GB_S = 10.0, 3.0


@dataclass(frozen=True)
class Explanation:
    """What `merge` would do: its plan, and the description of it, which print() shows as `fastinterp explain` does.

    plan        of one output. Its attributes are those of the explanation, too: `explain(recipe).bytes_read`
    threads     None: one per CPU, at most 32
    max_memory  bytes of scratch memory
    """

    plan: Plan
    threads: int | None = None
    max_memory: int = 512_000_000

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as --json prints them. Reads headers alone.

        Raises: UsageError, if `threads` workers need more than `max_memory`.
        """
        return _as_dict(self.plan, make_window(self.plan, cpu_threads(self.threads), self.max_memory))

    def __str__(self) -> str:
        return as_text(self.as_dict())

    def __repr__(self) -> str:
        return repr(self.plan)

    def _repr_html_(self) -> str:
        """For notebooks: the formula, tables of models and files, and what is to be noted."""
        from fastinterp import html

        d = self.as_dict()
        formula = "\n".join([*d["presets"], d["formula"], *d["symbols"]])
        models = [(m["symbol"], m["name"], str(m["tensors_read"]), size(m["bytes_read"])) for m in d["models"]]
        files = [(f["name"], str(f["tensors"]), size(f["bytes"])) for f in d["files"]]
        lines = [*d["remarks"], *(f"warning: {w}" for w in d["warnings"])]
        return "".join(
            [
                html.heading(f"{d['method']} of {counted(len(models), 'model')}"),
                html.text(formula),
                html.table(("", "model", "tensors read", "bytes read"), models),
                html.table(("file", "tensors", "bytes"), files),
                html.notes(lines),
            ]
        )

    def __getattr__(self, name: str) -> Any:
        if name == "plan" or name.startswith("__"):  # not there yet while a copy is made of it
            raise AttributeError(name)
        return getattr(self.plan, name)


def _as_dict(plan: Plan, window: Window) -> dict[str, Any]:
    choice = choose([plan], window.threads, window.most) if maybe_devices() else None
    (recipe,), (layout,) = plan.recipes, plan.layouts
    letters = _letters(plan, recipe)
    sidecars = sorted((plan.small_files(0).keys() | {RECEIPT}) - layout.indexes.keys())
    return {
        "method": recipe.method.name,
        "formula": _formula(plan),
        "symbols": [] if recipe.coefficients is not None else [_lettered(s, letters) for s in symbols(recipe)],
        "presets": [_lettered(s, letters) for s in presets_in_force(recipe)],
        "given": parameters_in_force(recipe, [m.tensors for m in plan.aligned.models], letters),
        "rounding": recipe.rounding,
        "seed": recipe.seed,
        "draws": recipe.method.draws,
        "models": _models(plan),
        "adapters": _adapters(plan),
        "made": _made(plan),
        "origin": plan.origin.name,
        "vocabulary": plan.aligned.source,
        "moved": [t.name for t in plan.tensors if any(e.moves_rows for e in t.inputs)],
        "steps": _steps(plan),
        "must_agree": [t.name for t in plan.tensors if not t.merged and len(t.inputs) > 1],
        "integers_from": None if recipe.integers is None else str(recipe.integers),
        "dtypes": _dtypes(plan),
        "files": [{"name": f.name, "bytes": f.size, "tensors": len(f.places)} for f in layout.files],
        "indexes": list(layout.indexes),
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
        "remarks": [*plan.remarks, *plan.file_remarks],
        "left_out": plan.files.left_out,
        "tensors": [_tensor(plan, t, place) for t, place in _with_files(plan, layout.files)],
    }


def _models(plan: Plan) -> list[dict[str, Any]]:
    reads: list[list[tuple[str, int]]] = [[] for _ in plan.checkpoints]
    for t in plan.stages:
        for _, inputs in t.reads:
            for at in inputs:
                reads[t.checkpoints[at]].append((t.name, t.inputs[at].nbytes))
    return [
        {
            "symbol": f"x{i}",
            "name": checkpoint.name,
            "files": [str(p) for p in checkpoint.files],
            "bytes": checkpoint.nbytes,
            "tensors_read": len({name for name, _ in reads[i]}),
            "bytes_read": sum(nbytes for _, nbytes in reads[i]),
        }
        for i, checkpoint in enumerate(plan.checkpoints)
        if checkpoint.files
    ]


def _made(plan: Plan) -> list[dict[str, Any]]:
    """The earlier documents of which tensors are stored in a temporary file until they are read."""
    by_model: dict[int, dict[Hashable, TensorInput]] = {}
    for tensor in plan.stages:
        for i, entry in tensor.pairs:
            if stages_of(entry):
                by_model.setdefault(i, {})[entry.key] = entry
    return [
        {
            "symbol": f"x{i}",
            "name": plan.checkpoints[i].name,
            "dtypes": sorted({t.dtype.name for t in tensors.values()}),
            "tensors": len(tensors),
            "bytes": sum(t.nbytes for t in tensors.values()),
        }
        for i, tensors in sorted(by_model.items())
    ]


def _steps(plan: Plan) -> list[dict[str, Any]]:
    """Tensors grouped by what is computed for them, with the coefficients that the kernels use."""
    groups: dict[tuple[str, tuple[str, ...]], list[PlannedTensor]] = {}
    for tensor in plan.stages:
        groups.setdefault((_expression(tensor), tuple(what for what, _ in tensor.reads)), []).append(tensor)
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


def _expression(tensor: PlannedTensor) -> str:
    """The formula of a tensor, pivot first: `x0 + 0.5*(x1 - x0)`; or `slerp(x0, x1)`, where the data decides."""
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
    """The recipe's formula and the models of its symbols, side-cars last; of several documents, every formula."""
    models = len(plan.models)
    beside = [f"x{i} = {c.name}" for i, c in enumerate(plan.checkpoints) if i >= models and c.files]
    if not plan.above:
        return "\n".join([plan.recipes[0].formula(), *beside])
    names = _names(plan)
    formulas = []
    for recipe in (plan.recipes[0], *reversed(plan.above)):
        first = recipe.formula().partition("\n")[0].removeprefix("out = ")
        formula = _lettered(first, _letters(plan, recipe))
        name = f"x{names.index(recipe.name)}" if recipe.name in names else "out"
        formulas.append(f"{name} = {formula}" if name == "out" else f"{name} = {formula}, {recipe.name}")
    return "\n".join([*formulas, *(f"x{i} = {name}" for i, name in enumerate(plan.models)), *beside])


def _names(plan: Plan) -> list[str]:
    return [*plan.models, *(c.name for c in plan.checkpoints[len(plan.models) :])]


def _letters(plan: Plan, recipe: Recipe) -> list[str]:
    """The symbols of a document's models: x and the index of the checkpoint."""
    if not plan.above:
        return [f"x{i}" for i in range(len(recipe.models))]
    known = [ModelRef.of(name) for name in _names(plan)]
    return [f"x{known.index(model)}" for model in recipe.models]


def _lettered(text: str, letters: Sequence[str]) -> str:
    """The text of a method, in which its models are x0, x1, ..., with their symbols in the plan."""
    return re.sub(r"\bx(\d+)\b", lambda x: letters[int(x[1])] if int(x[1]) < len(letters) else x[0], text)


def _adapters(plan: Plan) -> list[dict[str, Any]]:
    """What adapters make of tensors of the models, each kind once: `W + 2*B*A[r=16] (lora)`."""
    counts: dict[tuple[int, str], dict[Hashable, int]] = {}
    for tensor in plan.stages:
        for i, one in tensor.pairs:
            if formula := one.formula:
                counts.setdefault((i, formula), {})[one.key] = one.numel
    return [
        {"model": plan.checkpoints[i].name, "symbol": f"x{i}", "formula": formula, "tensors": len(keys)}
        for (i, formula), keys in counts.items()
    ]


def _copies(tensor: PlannedTensor) -> bool:
    """Whether the output tensor is a copy of its input's bytes."""
    if tensor.encoding is not None:
        return tensor.copies_codes
    return not tensor.merged or (
        bool(tensor.rows)
        and tensor.rows[0].is_copy
        and tensor.dtype == tensor.inputs[0].dtype
        and not tensor.inputs[0].adapted
    )


def _out_bytes(tensor: PlannedTensor) -> int:
    return tensor.nbytes


def _dtypes(plan: Plan) -> list[dict[str, Any]]:
    counts: dict[tuple[tuple[str, ...], str, str | None], list[int]] = {}
    for tensor in plan.tensors:
        inputs = tuple(dict.fromkeys(e.dtype.name for e in tensor.inputs))
        arithmetic = None if _copies(tensor) else "float64" if "F64" in inputs else "float32"
        entry = counts.setdefault((inputs, tensor.stored_as, arithmetic), [0, 0])
        entry[0] += 1
        entry[1] += tensor.numel
    return [
        {"in": list(i), "out": o, "arithmetic": a, "tensors": n, "elements": e} for (i, o, a), (n, e) in counts.items()
    ]


def _with_files(plan: Plan, files: tuple[OutFile, ...]) -> list[tuple[PlannedTensor, str]]:
    """Each tensor with the name of its output file."""
    file_of = {name: f.name for f in files for name in f.places}
    return [(t, file_of[t.entries[0][0]]) for t in plan.tensors]


def _tensor(plan: Plan, tensor: PlannedTensor, file: str) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.stored_as,
        "shape": list(tensor.shape),
        "reads": [plan.checkpoints[i].name for i in tensor.checkpoints],
        "out": _expression(tensor),
        "file": file,
    }
