"""Who may import whom in the package and in csrc/, read from the sources; and what a merge must not load."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import fastinterp
from tests.support.backends import ISAS

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
# _triton is a link to kernels/triton, which rglob does not follow.
SOURCES = sorted({*(ROOT / "fastinterp").rglob("*.py"), *(ROOT / "fastinterp" / "_triton").glob("*.py")})

# Each part of the package, and the parts it may import beside itself. The most specific name counts: a module of
# ops/ that is not named here belongs to `ops`. Parts that import nothing but themselves are leaves.
LEAVES = {"errors", "messages", "html", "progress", "presence", "urls", "_version"}
CONTRACT = {"ops", "ops.steps"}
PLANNING = LEAVES | CONTRACT | {"arguments", "recipe", "methods", "checkpoint", "output", "tokenizer"}
RUNNING = PLANNING | {"plan", "backends", "execute"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "messages": set(),
    "html": set(),
    "progress": set(),
    "presence": {"errors"},
    "urls": {"errors", "presence"},
    "_version": set(),
    "_C": set(),
    "_cuda": set(),
    "_triton": CONTRACT,
    "ops": {"errors", "ops.steps"},
    "ops.steps": {"ops", "_C"},  # how answers of parts fold
    "reference": CONTRACT,
    "backends": LEAVES | CONTRACT | {"_C", "_cuda", "_triton", "system.available_memory"},
    "methods": LEAVES | CONTRACT,
    "recipe": LEAVES | CONTRACT | {"methods"},
    "checkpoint": LEAVES | CONTRACT,
    "output": LEAVES | CONTRACT | {"checkpoint"},
    "tokenizer": LEAVES | CONTRACT | {"checkpoint"},
    "arguments": LEAVES | CONTRACT | {"checkpoint", "output", "recipe"},
    "plan": PLANNING,
    "execute": PLANNING | {"plan", "backends", "reference"},
    "lora.plan": PLANNING | {"plan"},
    "inspect": RUNNING | {"lora.plan"},
    "verification": RUNNING,
    "in_memory": RUNNING,
    "lora": RUNNING | {"in_memory", "reference", "lora.plan"},
    "system.available_memory": set(),
    # Points are recipes, and what became of them: loading a model takes one in place of a recipe.
    "paths.points": PLANNING | {"execute"},
    "torch_models": RUNNING | {"in_memory", "paths.points"},
    "paths": RUNNING | {"inspect", "in_memory", "torch_models", "paths.points", "system.available_memory"},
}
# May import every part above; nothing but __main__ imports cli.
TOP = {"", "api", "cli", "__main__", "system.doctor", "system", "bench", "integrations"}

# What takes long to load, and which parts of the package a merge from the command line goes through.
HEAVY = {"torch", "numpy", "rich", "huggingface_hub", "transformers", "triton", "safetensors", "pydantic", "asyncio"}
MERGE_PATH = {"", "api", "arguments", "cli", "__main__", "_version", "errors", "messages", "methods", "recipe"}
MERGE_PATH |= {"urls", "ops", "checkpoint", "output", "tokenizer", "plan", "execute"}

# The same for csrc/: a file (or pattern) and the files of csrc/ that it may include.
MAY_INCLUDE: dict[str, set[str]] = {
    "dtypes.h": set(),
    "ops.h": {"dtypes.h"},
    "element.h": {"ops.h", "dtypes.h"},
    "cpu/*": {"ops.h", "dtypes.h", "element.h", "xxh3.h", "cpu/*", "decoders/table.h"},
    "cuda/[!b]*": {"ops.h", "dtypes.h", "element.h", "cuda/*"},
    "cuda/binding/*": {"ops.h", "cuda/*", "binding/parse.h"},
    "range_cache.*": {"range_cache.h"},
    "io.*": {"io.h", "checksum.h", "mapped.h", "range_cache.h"},
    "mapped.*": {"mapped.h"},
    "xxh3.*": {"xxh3.h", "third_party/xxhash.h"},
    "third_party/*": set(),
    "checksum.*": {"checksum.h", "io.h", "xxh3.h"},
    "decoder.*": {"decoder.h", "ops.h"},
    "decoders/*": {"decoder.h", "dtypes.h", "decoders/*.h"},
    "transposed.*": {"transposed.h"},
    "decoding.*": {"decoding.h", "decoder.h", "transposed.h", "io.h", "ops.h"},
    "encoder.*": {"encoder.h", "ops.h"},
    "encoding.*": {"encoding.h", "encoder.h"},
    "low_rank.*": {"low_rank.h", "decoding.h", "io.h", "ops.h"},
    "steps/step.*": {"steps/step.h", "decoding.h", "encoding.h", "io.h", "low_rank.h", "ops.h"},
    "steps/masked.*": {"steps/masked.h", "steps/survey.h", "steps/step.h"},
    "steps/magnitudes.*": {"steps/magnitudes.h", "steps/step.h"},
    "steps/sums.*": {"steps/sums.h", "steps/step.h"},
    "steps/survey.*": {"steps/survey.h", "steps/step.h"},
    "steps/histogram.*": {"steps/histogram.h", "steps/masked.h", "steps/step.h"},
    "pump_encoded.cpp": {"pump.h"},
    "pump.*": {"pump.h", "steps/step.h", "io.h", "mapped.h", "ops.h", "dtypes.h", "cpu/backend.h"},
    "memory.*": {"memory.h", "ops.h", "dtypes.h", "cpu/backend.h"},
    # What both extensions share knows neither the pump nor CUDA.
    "binding/numbers.h": {"ops.h"},
    "binding/parse.*": {"binding/parse.h", "binding/numbers.h"},
    "binding/answers.cpp": {"binding/steps.h", "binding/numbers.h", "steps/*"},
    "binding/steps.*": {"binding/steps.h", "binding/parse.h", "checksum.h", "mapped.h", "range_cache.h", "steps/*"},
    "binding/range_cache.cpp": {"binding/steps.h", "range_cache.h"},
    "binding/files.cpp": {"binding/steps.h", "cpu/backend.h"},
    "binding/sums.*": {"binding/sums.h", "binding/parse.h", "cpu/backend.h", "memory.h"},
    "binding/plain_sums.cpp": {"binding/sums.h", "cpu/backend.h", "memory.h"},
    "binding/module.cpp": {"binding/*", "decoder.h", "steps/histogram.h", "pump.h", "cpu/backend.h"},
}
# What is compiled once per instruction set may share no inline function with the rest: the linker keeps one copy, and
# that may be the one with AVX-512 in it. So: headers of C and of intrinsics, nothing of the C++ library.
PER_ISA = [
    "dtypes.h",
    "ops.h",
    "element.h",
    "decoder.h",
    "decoders/*",
    "xxh3.*",
    "cpu/backend.h",
    "cpu/loops.inc",
    "cpu/encode.inc",
    "cpu/flags.inc",
    "cpu/histogram.inc",
    "cpu/low_rank.inc",
    "cpu/masked_run.inc",
    "cpu/masked_stats.inc",
    "cpu/masked_sum.inc",
    "cpu/masks.inc",
    "cpu/measure.inc",
    "cpu/pairs.inc",
    "cpu/per_group.inc",
    "cpu/ranks.inc",
    "cpu/stats.inc",
    "cpu/stream.inc",
    *(f"cpu/{isa}.cpp" for isa in ISAS),
]
PLAIN_HEADERS = {"cstdint", "cstddef", "cstring", "immintrin.h", "arm_neon.h"}


def module_name(path: Path) -> str:
    """`fastinterp.ops.combine` for fastinterp/ops/combine.py; a package for its __init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}
NATIVE = {"fastinterp._C", "fastinterp._cuda"}  # modules without a source in Python


def part_of(module: str, parts: set[str]) -> str | None:
    """The most specific of `parts` that `fastinterp.module` belongs to, or None."""
    name = module.removeprefix("fastinterp").removeprefix(".")
    found = [p for p in parts if p == name or (p and name.startswith(p + "."))]
    return max(found, key=len, default=None)


def imports(module: str, node: ast.AST) -> list[tuple[int, str]]:
    """(line, full module name) of everything that the code under `node` imports, in functions too."""
    found = []
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for n in ast.walk(node):
        if isinstance(n, ast.Import):
            found += [(n.lineno, a.name) for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            stem = package.split(".")[: len(package.split(".")) - n.level + 1] if n.level else []
            source = ".".join([*stem, *filter(None, [n.module])])
            named = [f"{source}.{a.name}" for a in n.names]
            found += [(n.lineno, name if name in MODULES.keys() | NATIVE else source) for name in named]
    return sorted(set(found))


def own_imports(module: str) -> list[tuple[int, str]]:
    every = imports(module, ast.parse(MODULES[module].read_text("utf-8")))
    return [(line, name) for line, name in every if name.split(".")[0] == "fastinterp"]


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_part_may(module):
    part = part_of(module, TOP | MAY_IMPORT.keys())
    assert part is not None, f"{module} belongs to no part: give it a place in MAY_IMPORT, and in docs/ARCHITECTURE.md"
    wrong = []
    for line, name in own_imports(module):
        target = part_of(name, TOP | MAY_IMPORT.keys())
        if part in TOP:
            allowed = target is not None and (target != "cli" or part in {"cli", "__main__"})
        else:
            allowed = target == part or target in MAY_IMPORT[part]
        if not allowed:
            wrong.append(f"{MODULES[module].relative_to(ROOT)}:{line} imports {name}")
    assert not wrong


def test_no_circles():
    """Not even through imports inside functions."""
    graph = {
        module: {name for _, name in own_imports(module)} - {module} for module in MODULES if module != "fastinterp"
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m, {"methods", "ops"})])
def test_methods_and_leaves_hold_no_arrays(module):
    """Methods are formulas: they are tested without tensors, so they may not touch any, not even in functions."""
    found = imports(module, ast.parse(MODULES[module].read_text("utf-8")))
    assert not [(line, name) for line, name in found if name.split(".")[0] in HEAVY]


@pytest.mark.slow
def test_every_dependency_is_imported():
    """Nothing is installed with the package that it does not import; a rival of the races brings its own packages."""
    table = re.search(
        r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert table is not None
    required = {{"PyYAML": "yaml"}.get(name, name) for name in re.findall(r'^ +"([\w-]+)', table[1], re.MULTILINE)}
    own = {m: ast.parse(path.read_text("utf-8")) for m, path in MODULES.items() if m != "fastinterp.bench.naive"}
    used = {name.split(".")[0] for module, tree in own.items() for _, name in imports(module, tree)}
    assert "numpy" in required and required <= used
    assert "safetensors" not in used


def test_rule_sees_what_it_forbids(tmp_path, monkeypatch):
    """The reader of imports finds relative, nested and conditional ones."""
    source = (
        "import torch.nn\nfrom . import dtypes\nfrom ..checkpoint import header\ndef f():\n    from .. import errors\n"
    )
    path = tmp_path / "x.py"
    path.write_text(source)
    monkeypatch.setitem(MODULES, "fastinterp.ops.x", path)
    expected = ["torch.nn", "fastinterp.ops.dtypes", "fastinterp.checkpoint.header", "fastinterp.errors"]
    assert expected == [name for _, name in imports("fastinterp.ops.x", ast.parse(source))]


def test_merge_path_loads_nothing_heavy():
    """Importing every module that a merge goes through: what each loads at once is what the user waits for."""
    path = [m for m in MODULES if m != "fastinterp.__main__" and part_of(m, MAY_IMPORT.keys() | TOP) in MERGE_PATH]
    assert {"fastinterp.cli", "fastinterp.api"} <= set(path)
    program = f"""
import importlib, sys
heavy = {HEAVY!r}
for name in {path!r}:
    importlib.import_module(name)
    found = heavy & sys.modules.keys()
    if found:
        sys.exit(f"importing {{name}} loads {{sorted(found)}}")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")


KINDS = {"StoredInput", "ConvertedInput", "GatheredInput", "IntermediateInput"}


def asks_for_a_kind(node: ast.AST) -> bool:
    """`isinstance(x, StoredInput)`, `type(x) is StoredInput`, `case StoredInput()`."""
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    asks = isinstance(node, ast.MatchClass) or (
        isinstance(node, (ast.Call, ast.Compare)) and bool(names & {"isinstance", "issubclass", "type"})
    )
    return asks and bool(names & KINDS)


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"fastinterp.plan.inputs", "fastinterp.plan.planned"}))
def test_nobody_asks_for_the_kind_of_an_input(module):
    """Inputs are an interface: what differs between kinds is a method of TensorInput."""
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    assert not [n.lineno for n in ast.walk(tree) if asks_for_a_kind(n) and hasattr(n, "lineno")]


def test_rule_of_kinds_sees_what_it_forbids():
    source = "isinstance(x, StoredInput)\nif type(x) is GatheredInput: pass\nStoredInput(x)\nisinstance(x, str)\n"
    tree = ast.parse(source)
    assert [n.lineno for n in ast.walk(tree) if asks_for_a_kind(n) and hasattr(n, "lineno")] == [1, 2]


@pytest.mark.parametrize("name", fastinterp.__all__)
def test_public_name_resolves(name):
    assert getattr(fastinterp, name) is not None
    assert name in dir(fastinterp)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fastinterp' has no attribute 'marge'"):
        _ = fastinterp.marge


def includes(path: Path) -> list[tuple[bool, str]]:
    """(own, name) of each #include: own files by their path in csrc/, others by the name between < and >."""
    found = []
    for quote, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', path.read_text("utf-8"), re.MULTILINE):
        own = quote == '"'
        beside = (path.parent / name).resolve() if own else Path()
        if own and not beside.exists():
            beside = (CSRC / name).resolve()
        found.append((own, beside.relative_to(CSRC).as_posix() if own else name))
    return found


CXX = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".inc", ".cu", ".cuh"})


@pytest.mark.parametrize("path", CXX, ids=lambda p: p.relative_to(CSRC).as_posix())
def test_source_includes_only_what_it_may(path):
    name = path.relative_to(CSRC).as_posix()
    rules = [allowed for pattern, allowed in MAY_INCLUDE.items() if fnmatch(name, pattern)]
    assert len(rules) == 1, f"csrc/{name} needs exactly one place in MAY_INCLUDE"
    found = includes(path)
    assert not [f for own, f in found if own and not any(fnmatch(f, pattern) for pattern in rules[0])]
    others = {f for own, f in found if not own}
    assert not {f for f in others if f.split("/")[0] in {"torch", "ATen", "c10"}}  # one wheel serves every torch
    assert path.parent.name == "binding" or not {f for f in others if f.startswith("pybind11") or f == "Python.h"}
    if any(fnmatch(name, pattern) for pattern in PER_ISA):
        assert others <= PLAIN_HEADERS
