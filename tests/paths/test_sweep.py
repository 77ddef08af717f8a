"""Many points of a path from one read: the same bytes as one merge for each."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

import fastinterp
from fastinterp.cli import commands
from fastinterp.errors import MethodError, OutputError, UsageError
from fastinterp.execute import to_files
from fastinterp.output.folder import OutFolder
from fastinterp.torch_models.load import allocate
from tests.support.checkpoints import Tensor, assert_same, family, read, saved, write
from tests.support.written import tree

sweep: Any = fastinterp.sweep
ALPHAS = [round(-0.5 + 0.1 * k, 10) for k in range(21)]


def finite(count):
    """As family(count), without NaN, Inf and lone elements, which methods that measure refuse."""
    left_out = [n for n, t in family(1)[0].items() if n.startswith("patterns") or t.raw.size * 8 == t.dtype.bits]
    return [{n: t for n, t in m.items() if n not in left_out} for m in family(count)]


@pytest.fixture
def ends(tmp_path):
    return saved(tmp_path, finite(3))


def read_bytes(count):
    """What one read of `count` models of finite() takes: integers are compared in all of them."""
    return sum(t.raw.size for m in finite(count) for t in m.values())


def command(*args, code=0):
    done = CliRunner().invoke(commands, list(map(str, args)), prog_name="fastinterp")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stderr if code and "--json" not in args else done.stdout


def test_line(ends, tmp_path):
    """21 points, more than one pass once held: the bytes of 21 merges, and every input byte read once."""
    a, b, _ = ends
    points = sweep(a, b, ALPHAS, tmp_path / "path", threads=2)
    assert [p.at for p in points] == [{"alpha": alpha} for alpha in ALPHAS]
    assert [p.name for p in points][:3] == ["alpha_-0.5", "alpha_-0.4", "alpha_-0.3"]
    assert {p.report.bytes_read for p in points} == {read_bytes(2)}
    for point in points:
        assert point.path == tmp_path / "path" / point.name
        fastinterp.interpolate(a, b, point.at["alpha"], tmp_path / "one", force=True)
        assert tree(tmp_path / "one") == tree(point.path)
        assert_same(read(tmp_path / "one"), dict(arrays(fastinterp.load(point, framework="numpy"), point)))


def arrays(tensors, point):
    """What `load` returns, as tests/support/checkpoints.py has tensors."""
    there = read(point.path)
    for name, x in tensors.items():
        yield name, Tensor(there[name].dtype, x.shape, np.frombuffer(x.tobytes(), np.uint8))


def test_sums_of_steps_reach_the_ends(ends, tmp_path):
    """numpy.arange(-0.5, 1.55, 0.1) has neither 0 nor 1; what is made there are the ends, under their names."""
    a, b, _ = ends
    alphas = np.arange(-0.5, 1.55, 0.1)
    assert 0 not in alphas and 1 not in alphas
    points = sweep(a, b, alphas, tmp_path / "path")
    assert [p.name for p in points] == [f"alpha_{alpha:g}" for alpha in ALPHAS]
    for at, name in ((5, a), (15, b)):
        assert points[at].at == {"alpha": float(at == 15)} and not points[at].report.tensors
        assert_same(read(points[at].path), read(Path(name)))
    reports = fastinterp.interpolate(a, b, list(alphas), tmp_path / "again")
    assert [not r.tensors for r in reports] == [not p.report.tensors for p in points]
    grid = {"b": np.arange(-1, 1.05, 0.1)}
    found = sweep(base=a, add={"b": b}, grid=grid, in_memory=lambda p, t: p.name, framework="numpy")
    assert (found[10].result, found[20].result) == ("b_0", "b_1") and found[20].at == {"b": 1.0}


def test_line_with_a_base(ends, tmp_path):
    a, b, base = ends
    (point,) = sweep(a, b, [0.3], tmp_path / "path", base=base, dtype="float32", seed=3)
    fastinterp.interpolate(a, b, 0.3, tmp_path / "one", base=base, dtype="float32", seed=3)
    assert_same(read(tmp_path / "one"), read(point.path))


def test_grid(ends, tmp_path):
    base, p, f = ends
    points = sweep(
        base=base, add={"pos": p, "formal": f}, grid={"formal": [-1, 0.5], "pos": np.arange(3) / 2},
        out=tmp_path / "grid",
    )  # fmt: skip
    assert [point.name for point in points] == [f"pos_{x}_formal_{y}" for x in ("0", "0.5", "1") for y in ("-1", "0.5")]
    assert points[3].at == {"pos": 0.5, "formal": 0.5}
    assert {point.report.bytes_read for point in points} == {read_bytes(3)}
    for point in points:
        models = [{"model": m, "parameters": {"weight": w}} for m, w in ((p, point.at["pos"]), (f, point.at["formal"]))]
        asked = {"merge_method": "task_arithmetic", "base_model": base, "models": models}
        fastinterp.merge(asked, tmp_path / "one", force=True)
        assert_same(read(tmp_path / "one"), read(point.path))


@pytest.mark.parametrize("method", ["slerp", "ties", "dare_ties"])
def test_methods_measure_once(ends, tmp_path, method):
    """Each point has the bytes of a merge of its own, and all of them cost the reads of one."""
    base, a, b = ends
    if method == "slerp":
        how = {"a": base, "b": a, "alphas": [0.1, 0.25, 0.5, 0.75]}
    else:
        how = {"base": base, "add": {"a": a, "b": b}, "grid": {"a": [0.5, 1], "b": [-1, 0.25, 1]}}
        how["parameters"] = {"density": 0.4}
    points = sweep(out=tmp_path / "path", method=method, seed=5, **how)
    costs = set()
    for point in points:
        report = fastinterp.merge(point.recipe, tmp_path / "one", force=True)
        assert_same(read(tmp_path / "one"), read(point.path))
        costs.add(report.bytes_read)
    assert {p.report.bytes_read for p in points} == {max(costs)}


def test_nuslerp_walks_by_weights(ends, tmp_path):
    a, b, _ = ends
    points = sweep(a, b, [0, 0.5, 1], tmp_path / "path", method="nuslerp")
    assert_same(dict(finite(1)[0]), read(points[0].path))


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"method": "slerp", "alphas": [1e39]}, UsageError, "alpha must be in"),
        ({"method": "model_stock"}, UsageError, "`model_stock` has no parameter that leads from A to B"),
        ({"method": "ties"}, UsageError, "`ties` needs a base"),
        ({"method": "slurp"}, MethodError, "unknown merge method `slurp`, did you mean `slerp`"),
        ({"alphas": []}, UsageError, "`alphas` is empty"),
        ({"alphas": [0.5, 0.5]}, UsageError, "alpha_0.5 comes twice"),
        ({"alphas": [float("nan")]}, UsageError, "`alphas` must be finite numbers, got nan"),
        ({"alphas": ["x"]}, UsageError, "alpha must be a number"),
        ({"alphas": range(5000)}, UsageError, "a sweep has at most 4096 points, got 5000"),
        ({"b": None}, UsageError, "a sweep needs A, B and alphas"),
        ({"add": {"x": "y"}}, UsageError, "give either A, B and alphas, or a base"),
        ({"out": None}, UsageError, "the name of the output folder is missing. Give -o DIR"),
        ({"out": "x", "in_memory": print}, UsageError, "`in_memory` writes nothing"),
        ({"out": None, "quantize": "same", "in_memory": print}, UsageError, "weights in memory are numbers"),
        ({"parameters": {"weight": 1}}, UsageError, "the parameter `weight` is what the sweep changes"),
        ({"parameters": 3}, UsageError, "`parameters` must be a mapping"),
        ({"device": "cuda"}, UsageError, "device 'cuda' cannot be used"),
        ({"dtype": "int3"}, UsageError, "unknown dtype 'int3'"),
    ],
)
def test_bad_lines(ends, tmp_path, how, error, message):
    a, b, _ = ends
    with pytest.raises(error, match=message):
        sweep(**({"a": a, "b": b, "alphas": [0.5], "out": tmp_path / "path"} | how))
    assert not (tmp_path / "path").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"grid": {"poss": [1]}}, "unknown direction `poss`, did you mean `pos`"),
        ({"grid": {}}, "direction `pos` has no points"),
        ({"grid": None}, "must both be given"),
        ({"add": None}, "must both be given"),
        ({"base": None}, "directions start from a base"),
        ({"add": {"a/b": "x"}}, "a direction is named with letters"),
        ({"method": "linear"}, "`linear` does not weigh directions from a base"),
    ],
)
def test_bad_grids(ends, tmp_path, how, message):
    base, p, _ = ends
    given = {"base": base, "add": {"pos": p}, "grid": {"pos": [0.5]}, "out": tmp_path / "grid"}
    with pytest.raises(UsageError, match=message):
        sweep(**(given | how))


def test_virtual(ends, tmp_path, monkeypatch):
    """Small recipes that mean the same from every folder, for `load` and `merge`."""
    a, b, _ = ends
    monkeypatch.chdir(tmp_path)
    names = [str(Path(x).relative_to(tmp_path)) for x in (a, b)]
    points = sweep(*names, [0.25, 0.5], "virtual", virtual=True, dtype="float32")
    assert [str(p.path) for p in points] == ["virtual/alpha_0.25.yml", "virtual/alpha_0.5.yml"]
    files = [(tmp_path / p.path) for p in points]
    assert sorted((tmp_path / "virtual").iterdir()) == files
    assert all(f.stat().st_size < 1000 for f in files)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for point, file in zip(points, files, strict=True):
        assert yaml.safe_load(file.read_text()) == point.recipe
        fastinterp.interpolate(a, b, point.at["alpha"], "out", dtype="float32", force=True)
        loaded = fastinterp.load(file, framework="numpy")
        assert {n: t.raw.tobytes() for n, t in read(Path("out")).items()} == {n: x.tobytes() for n, x in loaded.items()}
    before = tree(tmp_path / "virtual")
    with pytest.raises(OutputError, match=r"alpha_0\.5\.yml exists already"):
        sweep(a, b, [0.5], tmp_path / "virtual", virtual=True)
    assert tree(tmp_path / "virtual") == before
    sweep(a, b, [0.5], tmp_path / "virtual", virtual=True, force=True)
    with pytest.raises(UsageError, match="alpha must be in"):
        sweep(a, b, [0.5, 1e39], tmp_path / "more", virtual=True, method="slerp")


def test_in_memory(ends, tmp_path):
    a, b, _ = ends
    sweep(a, b, ALPHAS, tmp_path / "path")
    seen = []

    def visit(point, tensors):
        assert_same(read(tmp_path / "path" / point.name), dict(arrays(tensors, point_at(tmp_path, point))))
        seen.append(point.name)
        return len(tensors)

    points = sweep(a, b, ALPHAS, in_memory=visit, framework="numpy")
    assert seen == [p.name for p in points] == [f"alpha_{alpha:g}" for alpha in ALPHAS]
    assert {p.result for p in points} == {len(finite(1)[0])}
    assert {p.report.bytes_read for p in points} == {read_bytes(2)}
    assert points[8].acts_as is not None and points[8].path is None


def point_at(folder, point):
    return type(point)(point.name, point.at, point.recipe, folder / "path" / point.name)


def test_in_memory_as_many_as_fit(ends, monkeypatch):
    """A bound on memory takes further reads, and never more models at a time."""
    a, b, _ = ends
    made = []

    def seen(*args):
        made.append(1)
        return allocate(*args)

    monkeypatch.setattr("fastinterp.paths.sweep_in_memory.allocate", seen)
    size = sum(t.raw.size for t in finite(1)[0].values())
    counts = []
    points = sweep(
        a, b, [0.1, 0.2, 0.3, 0.4, 0.5], in_memory=lambda p, t: counts.append(len(made)), max_memory=2 * size
    )
    assert counts == [2, 2, 4, 4, 5]
    assert [p.report.outputs for p in points] == [2, 2, 2, 2, 1]


def test_callback_that_raises(ends):
    a, b, _ = ends
    seen = []

    def visit(point, tensors):
        seen.append(point.name)
        raise ArithmeticError("mine")

    with pytest.raises(ArithmeticError, match="mine"):
        sweep(a, b, [0.1, 0.2], in_memory=visit)
    assert seen == ["alpha_0.1"]
    with pytest.raises(UsageError, match="must be a function"):
        sweep(a, b, [0.1], in_memory=3)


def test_less_memory_takes_further_reads(ends, tmp_path, monkeypatch):
    """Outputs of several reads appear together, too."""
    a, b, _ = ends
    monkeypatch.setattr("fastinterp.paths.sweep.fitting_outputs", lambda *_: 8)
    told = []
    points = sweep(a, b, ALPHAS, tmp_path / "path", progress=lambda done, total: told.append((done, total)))
    assert {p.report.bytes_read for p in points} == {3 * read_bytes(2)}
    assert told[-1][0] == told[-1][1] and all(one[0] <= other[0] for one, other in pairwise(told))
    sweep(a, b, ALPHAS[:8], tmp_path / "few")
    assert_same(read(tmp_path / "few" / "alpha_0.2"), read(tmp_path / "path" / "alpha_0.2"))


def test_scratch_that_bounds_outputs(ends, tmp_path):
    """By the real window: a bound that holds some outputs, and one that holds none."""
    a, b, _ = ends
    points = sweep(a, b, ALPHAS, tmp_path / "path", max_memory=100_000, threads=1)
    assert points[0].report.bytes_read == 3 * read_bytes(2)
    with pytest.raises(UsageError, match="--max-memory allows 1000"):
        sweep(a, b, ALPHAS, tmp_path / "other", max_memory=1000)


def test_space_for_all_is_seen_to_first(ends, tmp_path, monkeypatch):
    """The first folder asks for the bytes of all outputs, of all reads."""
    a, b, _ = ends
    needed = []
    start = OutFolder.__init__

    def seen(self, *args, **keys):
        needed.append(keys["needed"])
        start(self, *args, **keys)

    monkeypatch.setattr(OutFolder, "__init__", seen)
    monkeypatch.setattr("fastinterp.paths.sweep.fitting_outputs", lambda *_: 2)
    points = sweep(a, b, ALPHAS[:5], tmp_path / "path")
    data = sum((point.path / "model.safetensors").stat().st_size for point in points)
    assert needed[0] == data and max(needed[1:]) < data


def test_failed_finish_names_what_was_finished(ends, tmp_path, monkeypatch):
    a, b, _ = ends
    place, calls = OutFolder.place, []

    def fails(self):
        calls.append(self.name)
        if len(calls) == 3:
            raise OutputError(f"{self.name}: no more")
        place(self)

    monkeypatch.setattr(OutFolder, "place", fails)
    # The first one comes last: its journal says what there is to resume from.
    done = f"{tmp_path / 'path' / 'alpha_0.2'}, {tmp_path / 'path' / 'alpha_0.3'}"
    with pytest.raises(OutputError) as caught:
        sweep(a, b, [0.1, 0.2, 0.3], tmp_path / "path")
    assert str(caught.value).endswith(f"alpha_0.1: no more; finished before that: {done}")
    assert sorted(p.name for p in (tmp_path / "path").iterdir()) == ["alpha_0.2", "alpha_0.3"]
    calls.clear()
    said = command("sweep", a, b, "--alphas", "0.1:0.3:0.1", "-o", tmp_path / "path", "--force", code=4)
    assert said.count("finished before that") == 1 and done in said


def test_failure_leaves_nothing(ends, tmp_path, monkeypatch):
    a, b, _ = ends

    def fails(*_, **__):
        raise OutputError("no more")

    monkeypatch.setattr(to_files, "run", fails)
    with pytest.raises(OutputError, match=r"^no more$"):
        sweep(a, b, [0.1, 0.2], tmp_path / "path")
    assert not (tmp_path / "path").exists()


@pytest.mark.slow
def test_more_points_than_one_read_makes(tmp_path):
    """Both commands make up to the same number."""
    one = {"x": family(1)[0][next(iter(finite(1)[0]))]}
    for name in "ab":
        write(tmp_path / name, one)
    text = command("sweep", tmp_path / "a", tmp_path / "b", "--alphas", "0:1:0.001", "-o", tmp_path / "path")
    assert text.startswith("1,001 outputs: ")
    assert len(list((tmp_path / "path").iterdir())) == 1001
    text = command("interpolate", tmp_path / "a", tmp_path / "b", "--alpha", "0:1:0.0025", "-o", tmp_path / "more")
    assert text.startswith("401 outputs from 2 reads: ")
    assert len(list((tmp_path / "more").iterdir())) == 401
    for name in ("alpha_0", "alpha_0.005", "alpha_0.75", "alpha_1"):
        assert_same(read(tmp_path / "path" / name), read(tmp_path / "more" / name))


def test_torch_is_what_a_callback_gets(ends):
    a, b, _ = ends
    kinds: list[type] = []
    sweep(a, b, [0.5], in_memory=lambda p, t: kinds.extend(map(type, t.values())))
    assert set(kinds) == {torch.Tensor}


def test_models_with_one_tensor(tmp_path):
    """The largest number of outputs of one read."""
    one = {"x": family(1)[0][next(iter(finite(1)[0]))]}
    for name in "ab":
        write(tmp_path / name, one)
    points = sweep(tmp_path / "a", tmp_path / "b", np.arange(256) / 256, tmp_path / "path")
    assert points[0].report.bytes_read == 2 * one["x"].raw.size
    assert len(list((tmp_path / "path").iterdir())) == 256
