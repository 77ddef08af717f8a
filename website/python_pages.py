"""The pages of the Python interface, made of signatures and docstrings. The source is read, and nothing is run."""

from __future__ import annotations

import ast
import html
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import fastinterp
from website.docstrings import markdown, prose

ROOT = Path(__file__).resolve().parents[1]
_WIDTH = 88  # columns of a signature on one line

# The public names by subject; `public_names` notices those that are missing.
SUBJECTS: dict[str, tuple[str, ...]] = {
    "From checkpoints to checkpoints": (
        "merge", "interpolate", "average", "sweep", "extract_lora", "merge_adapters",
    ),
    "Looking before, and at what is there": ("check", "explain", "explain_adapters", "compare"),
    "Outputs checked, and made again": ("verify", "replay"),
    "Into memory, and into torch modules": ("load", "load_iter", "load_into", "Live"),
    "Arrays and tensors": ("weighted_sum", "merge_tensors", "merge_state_dicts"),
    "Metrics along a path": ("path",),
    "Results": (
        "Report", "RoundingEffect", "Point", "Path", "PathReport", "PathPoint", "CheckResult", "Explanation",
        "Comparison", "Verification", "Replay", "AdapterReport", "AdapterExplanation",
    ),
    "Types of arguments": (
        "Source", "Checkpoint", "Model", "ModelPlaces", "Alpha", "Alphas", "Method", "Progress", "PointCallback",
    ),
    "Errors": (
        "FastinterpError", "UsageError", "RecipeError", "MethodError", "BackendError", "CheckpointError", "ShapeError",
        "StorageError", "OutputError",
    ),
    "Version": ("__version__",),
}  # fmt: skip
INTEGRATIONS: dict[str, tuple[str, ...]] = {
    "torch_ops": (
        "weighted_sum", "ema_", "foreach_lerp_", "get_ema_multi_avg_fn", "get_swa_multi_avg_fn", "get_ema_avg_fn",
        "get_swa_avg_fn",
    ),
    "transformers": ("from_recipe", "EMACallback", "AverageCheckpoints"),
    "peft": ("add_weighted_adapter",),
    "sd_mecha": ("merge", "recipe_of"),
    "mergekit": ("run_merge", "install", "uninstall"),
}  # fmt: skip
OWN_METHODS: dict[str, tuple[str, ...]] = {
    "fastinterp.methods": ("method", "Method", "Each", "Unit", "NotNegative", "Length", "Range", "Keyed", "Sidecar"),
    "fastinterp.ops.combine": ("Tensor", "Combine"),
    "fastinterp.ops.requests": (
        "GroupCombine", "Measure", "Measured", "Mask", "Score", "MaskedCombine", "MeasureMasked", "MeasuredMasked",
        "Select", "Selected", "Divergence", "Steps",
    ),
}  # fmt: skip


def public_names() -> str:
    """The page of all names of `fastinterp.__all__`."""
    links = {name: f"#{_anchor(name)}" for name in fastinterp.__all__}
    listed = [name for names in SUBJECTS.values() for name in names]
    if sorted(listed) != sorted(fastinterp.__all__):
        raise LookupError(f"SUBJECTS and __all__ differ in {sorted({*listed} ^ {*fastinterp.__all__})}")
    made = ["# Python reference", "", *_INTRODUCTION, ""]
    for subject, names in SUBJECTS.items():
        made += [f"## {subject}", ""]
        for name in names:
            module = fastinterp._MODULES.get(name, "fastinterp.errors")
            made += _name(module, name, "fastinterp", links)
    return "\n".join(made)


_INTRODUCTION = (
    "Everything on this page is imported from `fastinterp`. `help(fastinterp)` lists it in Python, and",
    "`help(fastinterp.merge)` shows the text of one name. [Python](python.md) has examples.",
)


def integrations() -> str:
    """The page of the modules of `fastinterp.integrations`."""
    made = ["# Python reference of integrations", ""]
    made += ["Each module is imported by its name; nothing else imports it, or the library that it is for.", ""]
    for module, names in INTEGRATIONS.items():
        path = f"fastinterp.integrations.{module}"
        links = {name: f"#{_anchor(f'{module}.{name}')}" for name in names} | _public_links()
        made += [f"## {path} {{ #{_anchor(module)} }}", "", markdown(_doc(_tree(path)), links), ""]
        for name in names:
            made += _name(path, name, module, links, qualified=True)
    return "\n".join(made)


def own_methods() -> str:
    """The page for methods of one's own: what declares one, and what it may ask for and return."""
    links = _public_links() | {name: f"#{_anchor(name)}" for names in OWN_METHODS.values() for name in names}
    made = ["# Methods of your own", "", "[All methods](methods.md#methods-of-your-own) has an example that works.", ""]
    for path, names in OWN_METHODS.items():
        made += [f"## {path} {{ #{_anchor(path)} }}", "", markdown(_doc(_tree(path)), links), ""]
        for name in names:
            made += _name(path, name, path, links)
    return "\n".join(made)


def _public_links() -> dict[str, str]:
    return {name: f"api.md#{_anchor(name)}" for name in fastinterp.__all__}


def _anchor(name: str) -> str:
    return name.replace(".", "-").strip("_").lower() if name.islower() or "_" in name else name.replace(".", "-")


def _name(module: str, name: str, home: str, links: Mapping[str, str], qualified: bool = False) -> list[str]:
    """A section about one public name: signature, docstring, and the members of a class."""
    shown = f"{home}.{name}" if qualified else name
    made = [f"### {html.escape(shown).replace('__', chr(92) + '_' + chr(92) + '_')} {{ #{_anchor(shown)} }}", ""]
    node = _found(module, name)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        made += ["```python", _signature(node, name), "```", "", *_types(node, links), markdown(_doc(node), links), ""]
    elif isinstance(node, ast.ClassDef):
        made += _class(node, name, links)
    elif isinstance(node, ast.Assign):
        made += _alias(node, module, name, links)
    return made


def _types(node: ast.FunctionDef | ast.AsyncFunctionDef, links: Mapping[str, str]) -> list[str]:
    """A line with links to the types of a signature that are explained."""
    annotations = [a.annotation for a in (*node.args.args, *node.args.kwonlyargs)] + [node.returns]
    words = [n.id for a in annotations if a for n in ast.walk(a) if isinstance(n, ast.Name)]
    named = [f"[`{word}`]({links[word]})" for word in dict.fromkeys(words) if word in links]
    return [f"Types: {', '.join(named)}.", ""] if named else []


def _class(node: ast.ClassDef, name: str, links: Mapping[str, str]) -> list[str]:
    bases = [ast.unparse(base) for base in node.bases if not isinstance(base, ast.Constant)]
    init = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
    error = name.endswith("Error")
    made: list[str] = []
    if init is not None and not error:
        made += ["```python", _signature(init, name, method=True), "```", ""]
    if error and bases:
        made += [markdown(f"A kind of `{bases[0]}`.", links), ""]
    fields = [f"{_unparsed(n.target)}: {_unparsed(n.annotation)}" for n in node.body if isinstance(n, ast.AnnAssign)]
    if fields:
        made += ["```python", *(field for field in fields if not field.startswith("_")), "```", ""]
    made += [markdown(_doc(node), links), ""]
    for member in node.body:
        if not isinstance(member, ast.FunctionDef) or member.name.startswith("_"):
            continue
        doc = ast.get_docstring(member)
        if doc is None:  # what a base class calls, and explains
            continue
        kinds = {ast.unparse(d) for d in member.decorator_list}
        made += [f"#### {name}.{member.name} {{ #{_anchor(name)}-{member.name.lower()} }}".replace("__", "\\_\\_"), ""]
        if kinds & {"property", "cached_property"}:
            kind = f": {ast.unparse(member.returns)}" if member.returns else ""
            made += ["```python", f"{member.name}{kind}", "```", ""]
        else:
            made += ["```python", _signature(member, member.name, method="staticmethod" not in kinds), "```", ""]
        made += [markdown(doc, links), ""]
    return made


def _alias(node: ast.Assign, module: str, name: str, links: Mapping[str, str]) -> list[str]:
    """A type alias, whose explanation is the text in `Annotated[type, text]`; or the comment behind it."""
    value = node.value
    if name == "__version__":
        return ["The version, as text.", ""]
    if isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Tuple) and isinstance(value.value, ast.Name):
        last = value.slice.elts[-1]
        if value.value.id == "Annotated" and isinstance(last, ast.Constant):
            kind = ast.unparse(value.slice.elts[0])
            return ["```python", f"{name} = {kind}", "```", "", markdown(str(last.value), links), ""]
    lines = _text(module).split("\n")
    behind, above = lines[node.lineno - 1].partition("  # ")[2], lines[node.lineno - 2].partition("# ")
    comment = behind or (above[2] if not above[0] else "")
    made = ["```python", f"{name} = {ast.unparse(value)}", "```", ""]
    return [*made, prose(comment[:1].upper() + comment[1:] + ".", links), ""] if comment else made


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str, *, method: bool = False) -> str:
    """The signature as in the source: on one line, or a line for each argument."""
    args = node.args
    plain = [*args.posonlyargs, *args.args]
    defaults: Sequence[ast.expr | None] = [*[None] * (len(plain) - len(args.defaults)), *args.defaults]
    parts = [_argument(a, d) for a, d in zip(plain, defaults, strict=True)][1 if method else 0 :]
    if args.vararg:
        parts.append("*" + _argument(args.vararg, None))
    elif args.kwonlyargs:
        parts.append("*")
    parts += [_argument(a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg:
        parts.append("**" + _argument(args.kwarg, None))
    result = f" -> {_unparsed(node.returns)}" if node.returns and node.name != "__init__" else ""
    line = f"{name}({', '.join(parts)}){result}"
    if len(line) <= _WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){result}"])


def _argument(arg: ast.arg, default: ast.expr | None) -> str:
    kind = f": {_unparsed(arg.annotation)}" if arg.annotation else ""
    if default is None:
        return f"{arg.arg}{kind}"
    return f"{arg.arg}{kind}{' = ' if kind else '='}{_unparsed(default)}"


def _unparsed(node: ast.expr) -> str:
    return ast.unparse(node).replace("'", '"')


def _found(module: str, name: str) -> ast.stmt:
    """The definition of a name: of overloads the last."""
    found = [node for node in _statements(_tree(module).body) if name in _defined(node)]
    if not found and name == "__version__":
        return _found("fastinterp._version", name)
    if not found:
        raise LookupError(f"{module} defines no {name}")
    return found[-1]


def _defined(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    return [t.id for t in node.targets if isinstance(t, ast.Name)] if isinstance(node, ast.Assign) else []


def _statements(body: Iterable[ast.stmt]) -> Iterable[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            yield from _statements(node.body)


def _doc(node: ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    doc = ast.get_docstring(node)
    if not doc:
        raise LookupError(f"{getattr(node, 'name', 'a module')} has no docstring")
    return doc


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_text(module))


@cache
def _text(module: str) -> str:
    path = ROOT / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path.read_text("utf-8")
