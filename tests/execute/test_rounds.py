"""Methods that ask: what is read and how often, in which rounds, and what comes out, byte for byte."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastinterp
from fastinterp import methods
from fastinterp.backends.cpu import Pump, PumpOptions
from fastinterp.errors import MethodError, UsageError
from fastinterp.execute import rounds
from fastinterp.execute.jobs import adaptive_job
from fastinterp.execute.to_files import write_outputs
from fastinterp.methods import Each, Method, Sidecar, method
from fastinterp.ops.combine import Combine, Tensor
from fastinterp.ops.dtypes import BF16
from fastinterp.ops.requests import Measure, Select, Selected, Steps
from fastinterp.plan.plan import make_plan
from fastinterp.recipe.load import load_recipe
from fastinterp.reference import combine as reference
from tests.support import models as small
from tests.support.checkpoints import assert_same, expected, family, read, recipe, saved, write_sparse
from tests.support.written import tree


@method(base="required", models=(2, 8))
def halfway(n: int, *, weight: Each[float] = (1.0,)) -> Steps:
    """Weights from norms, after two requests.     out = ..."""
    one = yield Measure(deltas=True)
    two = yield Measure(deltas=True)
    assert one == two
    return Combine((0.0, *(w * one.norm(i) / (1.0 + one.norm(i)) for i, w in enumerate(weight, 1))), base=0)


@method(base="none", models=(1, 8))
def calm(n: int, *, weight: Each[float] = (1.0,)) -> Steps:
    """Asks nothing, unless a weight is below 0.     out = ..."""
    if min(weight) < 0:
        yield Measure()
    return Combine(tuple(w / sum(weight) for w in weight), sums_to_one=True)


@method(base="none", models=(2, 2))
def beside(n: int, *, other: Each[Sidecar | None] = (None,)) -> Steps:
    """Measures the models only, and sums a side-car alone.     out = x2"""
    found = yield Measure()
    assert len(found.l1) == n == 2
    return Combine((0.0, 0.0, 1.0))


@method(base="required", models=(2, 2))
def bad(n: int, tensor: Tensor, *, what: float = 0.0) -> Steps:
    """Goes wrong when it knows.     out = ..."""
    found = yield Measure(deltas=True)
    if tensor.name == "w" and what == 0.0:
        raise MethodError("these do not go together")
    return Combine((0.0, what * found.l1[0]), base=0)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The methods of this file are found by their names, like those of the package."""
    own: dict[str, Method] = {m.name: m for m in (halfway, calm, beside, bad)}
    find, names = methods.find, methods.names
    from fastinterp.recipe import schema

    for module in (methods, schema):
        monkeypatch.setattr(module, "find", lambda name: own.get(name) or find(name))
        monkeypatch.setattr(module, "names", lambda: sorted([*names(), *own]))


def floats(models: list[dict[str, Any]]) -> int:
    return sum(t.raw.size for m in models for t in m.values() if t.dtype.merges)


def rest(models: list[dict[str, Any]]) -> int:
    return sum(t.raw.size for m in models for t in m.values() if not t.dtype.merges)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, str]]]:
    """Per round, the kind and the tensor of every step."""
    found: list[list[tuple[str, str]]] = []
    run = rounds.PumpExecutor.run

    def noted(executor: rounds.PumpExecutor, steps: Any) -> Any:
        found.append([(step.native.kind, step.name) for step in steps])
        return run(executor, steps)

    monkeypatch.setattr(rounds.PumpExecutor, "run", noted)
    return found


# --- reads -----------------------------------------------------------------------------------------------------------


READS = {"slerp": (2, {"parameters": {"t": 0.3}}), "model_stock": (2, {}), "halfway": (3, {}), "calm": (1, {})}


@pytest.mark.parametrize("name", READS)
def test_reads_are_those_that_were_foreseen(tmp_path, name):
    """Counted by the pump: as many reads of every float as the plan says; integers are compared once."""
    models = finite(3 if name == "model_stock" else 2)
    paths = saved(tmp_path, models)
    times, keys = READS[name]
    asked = recipe(name, paths, **keys)
    if name != "calm":
        asked = recipe(name, paths[1:], base_model=paths[0], **keys)
    plan = fastinterp.explain(asked)
    report = fastinterp.merge(asked, tmp_path / "out", threads=2)
    assert report.bytes_read == plan.bytes_read == times * floats(models) + rest(models)
    told = "each byte once" if times == 1 else f"reads {times}x: {'measure, ' * (times - 1)}combine"
    assert told in str(plan)


def test_a_method_that_asks_nothing_is_planned_like_one_that_cannot(tmp_path, seen):
    models = finite(2)
    paths = saved(tmp_path, models)
    fastinterp.merge(recipe("calm", paths, weights=[1.0, 3.0]), tmp_path / "out")
    assert_same(expected(models, Combine((0.25, 0.75), sums_to_one=True)), read(tmp_path / "out"))
    assert len(seen) == 1
    ends = fastinterp.merge(recipe("slerp", paths[1:], base_model=paths[0], parameters={"t": 1}), tmp_path / "end")
    assert ends.bytes_read == floats(models[1:]) + rest(models)  # weight 0: not read, and nothing to measure


def test_end_of_the_great_circle_is_the_reference(tmp_path):
    """The answers are those of the kernels: the sum that follows from them is the reference's, byte for byte."""
    models = finite(2)
    paths = saved(tmp_path, models)
    fastinterp.merge(recipe("halfway", paths[1:], base_model=paths[0]), tmp_path / "out")
    got = read(tmp_path / "out")
    for name, t in models[0].items():
        if t.dtype.merges:
            one = {name: t}, {name: models[1][name]}
            sums, _ = reference.measure([m[name].raw for m in one], [m[name].dtype for m in one], True)
            norm = float(np.sqrt(sums[2]))
            assert_same(expected([*one], Combine((0.0, norm / (1.0 + norm)), base=0)), {name: got[name]})


def test_points_of_a_path_share_what_they_ask(tmp_path, seen):
    """Each has the bytes of a merge of its own, from one measure of both models; alpha 0 asks nothing."""
    paths = saved(tmp_path, finite(2))
    asked = [recipe("slerp", paths[1:], base_model=paths[0], parameters={"t": t}) for t in (0.0, 0.25, 0.75)]
    plan = make_plan([load_recipe(one) for one in asked], max_shard_size=10**9)
    outs = [tmp_path / f"out{k}" for k in range(3)]
    keys: dict[str, Any] = {"device": "cpu", "threads": 2, "max_memory": 1 << 29, "force": False, "durable": False}
    reports = write_outputs([plan], [outs], progress=None, **keys)
    assert reports[0].bytes_read == plan.bytes_read == 2 * floats(finite(2)) + rest(finite(2))
    assert len(seen) == 2
    for one, out in zip(asked, outs, strict=True):
        fastinterp.merge(one, tmp_path / "alone", force=True)
        assert_same(read(tmp_path / "alone"), read(out))


def finite(count: int) -> list[dict[str, Any]]:
    """As family(count), without NaN and Inf, which methods that measure refuse, and without lone elements, whose deltas
    may cancel: then less is read than was foreseen."""
    left_out = [n for n, t in family(1)[0].items() if n.startswith("patterns") or t.raw.size * 8 == t.dtype.bits]
    return [{n: t for n, t in m.items() if n not in left_out} for m in family(count)]


# --- rounds ----------------------------------------------------------------------------------------------------------


def test_a_round_sums_what_the_last_one_asked_and_asks_for_what_follows(tmp_path, seen, monkeypatch):
    monkeypatch.setattr(rounds, "ROUND_BYTES", 1)
    for i, name in enumerate("ab"):
        small.save(tmp_path / name, {f"t{k}": np.full(50, i + k + 1, np.float32) for k in range(3)})
    asked = recipe("slerp", [str(tmp_path / "b")], base_model=str(tmp_path / "a"), parameters={"t": 0.5})
    fastinterp.merge(asked, tmp_path / "out")
    assert seen == [
        [("measure", "t0")],
        [("combine", "t0"), ("measure", "t1")],
        [("combine", "t1"), ("measure", "t2")],
        [("combine", "t2")],
    ]


@pytest.mark.parametrize("name", ["slerp", "halfway", "dare_ties", "della", "ties"])
def test_files_are_the_same_for_any_threads_and_windows(tmp_path, name, monkeypatch):
    models = finite(2)
    paths = saved(tmp_path, models)
    ways: dict[str, dict[str, Any]] = {
        "slerp": {"parameters": {"t": 0.3}},
        "halfway": {},
        "dare_ties": {"weights": [1.0], "parameters": {"density": 0.5}},
        "della": {"weights": [1.0], "parameters": {"density": 0.5}},
        "ties": {"weights": [1.0], "parameters": {"density": 0.5}},
    }
    asked = recipe(name, paths[1:], base_model=paths[0], rounding="stochastic", seed=3, **ways[name])
    outputs = set()
    for threads, window, held, masks in ((1, 1 << 28, 1 << 26, 1 << 26), (2, 1, 1 << 26, 0), (7, 20000, 1, 1 << 26)):
        monkeypatch.setattr(rounds, "ROUND_BYTES", window)
        monkeypatch.setattr(rounds, "HELD_BYTES", held)
        monkeypatch.setattr(adaptive_job, "MASK_BYTES", masks)
        fastinterp.merge(asked, tmp_path / f"out{threads}", threads=threads)
        outputs.add(json.dumps(tree(tmp_path / f"out{threads}"), default=lambda b: hashlib.sha256(b).hexdigest()))
    assert len(outputs) == 1


def test_progress_over_all_rounds(tmp_path, monkeypatch):
    """It never falls, and ends at what was read and written."""
    monkeypatch.setattr(rounds, "ROUND_BYTES", 1)
    paths = saved(tmp_path, finite(2))
    told: list[tuple[int, int]] = []
    asked = recipe("halfway", paths[1:], base_model=paths[0])
    report = fastinterp.merge(asked, tmp_path / "out", progress=lambda *now: told.append(now))
    assert told[-1] == (report.bytes_read + report.bytes_written,) * 2
    assert told == sorted(told) and len({total for _, total in told}) == 1


def test_interruption_between_rounds_leaves_nothing(tmp_path, monkeypatch):
    paths = saved(tmp_path, finite(2))
    before = tree(tmp_path)
    run, calls = rounds.PumpExecutor.run, []

    def stopped(executor: rounds.PumpExecutor, steps: Any) -> Any:
        results = run(executor, steps)
        calls.append(executor)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return results

    monkeypatch.setattr(rounds.PumpExecutor, "run", stopped)
    monkeypatch.setattr(rounds, "ROUND_BYTES", 1)
    with pytest.raises(KeyboardInterrupt):
        fastinterp.merge(recipe("halfway", paths[1:], base_model=paths[0]), tmp_path / "out")
    assert len(calls) == 2 and calls[0].bytes_written < floats(finite(1)) // 2
    assert tree(tmp_path) == before


# --- the whole model -------------------------------------------------------------------------------------------------


def test_a_request_about_the_whole_model_sees_all_tensors(tmp_path, monkeypatch):
    """The tenth largest of all tensors together, not of one."""
    answers: dict[str, Selected] = {}

    @method(base="required", models=(2, 2))
    def trimmed(n: int, tensor: Tensor) -> Steps:
        """..."""
        (found,) = yield Select(((1, 10),), whole=True)
        answers[tensor.name] = found
        return Combine((0.0, 1.0), base=0)

    from fastinterp.recipe import schema

    monkeypatch.setattr(schema, "find", lambda name: trimmed)
    values = np.random.default_rng(5).permutation(60).astype(np.float32).reshape(3, 20)
    small.save(tmp_path / "a", {f"t{k}": np.zeros(20, np.float32) for k in range(3)})
    small.save(tmp_path / "b", {f"t{k}": v for k, v in enumerate(values)})
    monkeypatch.setattr(rounds, "HELD_BYTES", 1)
    fastinterp.merge(recipe("trimmed", [str(tmp_path / "b")], base_model=str(tmp_path / "a")), tmp_path / "out")
    assert {n: (s.value, s.count) for n, s in answers.items()} == {f"t{k}": (50.0, 10) for k in range(3)}


# --- side-cars, errors, receipts -------------------------------------------------------------------------------------


def test_sidecars_are_inputs_behind_the_models(tmp_path):
    for i, name in enumerate("abc"):
        small.save(tmp_path / name, {"w": np.full(40, i + 1, np.float32)})
    asked = recipe("beside", [str(tmp_path / "a"), str(tmp_path / "b")])
    asked["models"][1]["parameters"] = {"other": str(tmp_path / "c")}
    plan = fastinterp.explain(asked)
    assert [c.name for c in plan.checkpoints] == [str(tmp_path / x) for x in "abc"]
    report = fastinterp.merge(asked, tmp_path / "out")
    assert report.bytes_read == plan.bytes_read == 160 * 3  # two measured, then one copied
    assert report.copied == ("w",)
    assert read(tmp_path / "out")["w"].raw.view(np.float32)[0] == 3.0


def test_a_sidecar_that_lacks_a_tensor(tmp_path):
    for name in "ab":
        small.save(tmp_path / name, {"w": np.ones(4, np.float32)})
    small.save(tmp_path / "c", {"v": np.ones(4, np.float32)})
    asked = recipe("beside", [str(tmp_path / "a"), str(tmp_path / "b")], parameters={"other": str(tmp_path / "c")})
    with pytest.raises(fastinterp.ShapeError, match=r"w is F32 .*side-car .*c lacks it"):
        fastinterp.explain(asked)


@pytest.mark.parametrize(
    ("value", "what", "message"),
    [(1.0, 0.0, "w: these do not go together"), (3e38, 1e30, "a coefficient of w is beyond float32's 3.4e38")],
)
def test_what_answers_reveal_names_the_tensor(tmp_path, value, what, message):
    """Only then: nothing of it shows in the plan. The output is gone."""
    small.save(tmp_path / "a", {"w": np.full(4, value, np.float32)})
    small.save(tmp_path / "b", {"w": np.zeros(4, np.float32)})
    asked = recipe("bad", [str(tmp_path / "b")], base_model=str(tmp_path / "a"), parameters={"what": what})
    fastinterp.explain(asked)
    with pytest.raises(MethodError, match=message):
        fastinterp.merge(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_receipt_says_that_coefficients_came_from_the_data(tmp_path):
    paths = saved(tmp_path, finite(2))
    fastinterp.merge(recipe("halfway", paths[1:], base_model=paths[0]), tmp_path / "out")
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    found = json.loads(header["__metadata__"]["fastinterp"])
    assert found["method"] == "halfway" and found["coefficients"].startswith("left out")


def test_empty_and_zero_dimensional_tensors(tmp_path):
    for i, name in enumerate("ab"):
        small.save(tmp_path / name, {"e": np.zeros((0, 4), np.float32), "s": np.array(i + 1.0, np.float32)})
    asked = recipe("slerp", [str(tmp_path / "b")], base_model=str(tmp_path / "a"), parameters={"t": 0.5})
    fastinterp.merge(asked, tmp_path / "out")
    got = read(tmp_path / "out")
    assert got["e"].shape == (0, 4) and got["s"].shape == ()
    assert got["s"].raw.view(np.float32)[0] == 1.5


# --- memory ----------------------------------------------------------------------------------------------------------


PROGRAM = """
    import sys, threading
    import fastinterp

    def anonymous():
        with open("/proc/self/status") as stream:
            return next(int(line.split()[1]) for line in stream if line.startswith("RssAnon"))

    seen, over = [anonymous()], threading.Event()
    def watch():
        while not over.wait(0.001):
            seen.append(anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    recipe = {"merge_method": "model_stock", "base_model": sys.argv[1], "models": [{"model": p} for p in sys.argv[2:4]]}
    fastinterp.merge(recipe, sys.argv[4], threads=2)
    over.set()
    watcher.join()
    print(max(seen) - seen[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is in Linux's /proc")
def test_memory_does_not_grow_with_a_tensor_that_is_read_twice(tmp_path):
    """One tensor of 200 MB takes at most 40 MiB, as one of 4 MB does."""
    root = Path(__file__).resolve().parents[2]
    for rows in (1024, 50 * 1024):
        folder = tmp_path / str(rows)
        shape = {"w": (rows, 2048)}
        paths = [write_sparse(folder / n / "model.safetensors", shape, BF16) for n in "abc"]
        command = [sys.executable, "-c", textwrap.dedent(PROGRAM), *map(str, paths), str(folder / "out")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert int(done.stdout) * 1024 <= 40 << 20


# --- memory and threads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["slerp", "ties", "della", "model_stock", "arcee_fusion", "dare_ties", "linear"])
def test_scratch_stays_within_the_bound(tmp_path, name, monkeypatch):
    """Threads are fewer where their scratch would be more than --max-memory, and the bytes are the same."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(700, 800)).astype(np.float32)
    paths = [str(small.save(tmp_path / c, {"w": base + k * rng.normal(size=base.shape).astype(np.float32) * 1e-3}))
             for k, c in enumerate("abc")]  # fmt: skip
    given: dict[str, Any] = {
        "slerp": {"t": 0.5}, "ties": {"weight": 1.0, "density": 0.3}, "dare_ties": {"weight": 1.0, "density": 0.3},
        "della": {"weight": 1.0, "density": 0.5, "epsilon": 0.1}, "linear": {"weight": 1.0},
    }  # fmt: skip
    models = paths[1:2] if name in ("slerp", "arcee_fusion") else paths[1:]
    keys = {} if name == "linear" else {"base_model": paths[0]}
    asked = recipe(name, models, parameters=given.get(name, {}), **keys)
    pumps: list[tuple[int, int]] = []
    made = Pump

    def pump(sources: Any, sinks: Any, steps: Any, options: PumpOptions) -> Any:
        one = made(sources, sinks, steps, options)
        pumps.append((options.threads, one.scratch_bytes))
        return one

    monkeypatch.setattr(rounds, "Pump", pump)
    fastinterp.merge(asked, tmp_path / "free", threads=8)
    answers = {"ties": 8 << 20, "arcee_fusion": 12 << 20}.get(name, 0)  # histograms, held beside the scratch
    most = 3 * max(scratch for _, scratch in pumps) + answers
    pumps.clear()
    fastinterp.merge(asked, tmp_path / "bound", threads=3 if name == "linear" else 8, max_memory=most)
    assert min(threads for threads, _ in pumps) <= 3
    first = {scratch: threads for threads, scratch in pumps}  # the last of a size is the one that ran
    assert all(threads * scratch <= most for scratch, threads in first.items())
    assert_same(read(tmp_path / "free"), read(tmp_path / "bound"))


def test_too_little_memory_for_one_thread(tmp_path):
    small.save(tmp_path / "a", {"w": np.ones(1000, np.float32)})
    small.save(tmp_path / "b", {"w": np.full(1000, 2.0, np.float32)})
    asked = recipe("slerp", [str(tmp_path / "b")], base_model=str(tmp_path / "a"), parameters={"t": 0.5})
    with pytest.raises(UsageError, match=r"one thread needs \d+ bytes for w, but --max-memory allows 400000"):
        fastinterp.merge(asked, tmp_path / "out", threads=1, max_memory=400_000)
    assert not (tmp_path / "out").exists()


def test_the_whole_model_has_the_tensors_that_ask_nothing(tmp_path):
    """ties ranks all elements: those of a tensor that keeps all of them, too, but not those that are copied."""
    rng = np.random.default_rng(3)
    shapes = {
        "model.layers.0.up.weight": (30, 40),
        "model.layers.1.up.weight": (30, 40),
        "model.layers.2.up.weight": (30, 40),
    }
    base = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    tune = {n: x + rng.normal(size=x.shape).astype(np.float32) * (k + 1) for k, (n, x) in enumerate(base.items())}
    a, b = (str(small.save(tmp_path / c, m)) for c, m in (("a", base), ("b", tune)))
    density = [{"filter": "layers.2.", "value": 1.0}, {"value": 0.25}]
    asked = recipe("ties", [b], base_model=a, parameters={"density": density, "weight": 1.0, "preset": "paper"})
    report = fastinterp.merge(asked, tmp_path / "out")
    assert report.bytes_read == fastinterp.explain(asked).bytes_read
    deltas = {n: np.abs(tune[n] - base[n]) for n in base}
    least = np.sort(np.concatenate([d.ravel() for d in deltas.values()]))[::-1][3600 // 4 - 1]
    got = read(tmp_path / "out")
    for name, delta in deltas.items():
        changed = got[name].raw.view(np.float32).reshape(30, 40) != base[name]
        kept = delta >= least if "layers.2" not in name else delta > 0
        assert changed.sum() == kept.sum() and (changed == kept).all()
    stacked = [{"sources": [{"model": m, "layer_range": [0, 2]} for m in (a, b)]},
               {"sources": [{"model": b, "layer_range": [2, 3]}]}]  # fmt: skip
    asked = recipe(
        "ties", [], base_model=a, slices=stacked, parameters={"density": 0.25, "weight": 1.0, "preset": "paper"}
    )
    del asked["models"]
    fastinterp.merge(asked, tmp_path / "part")
    two = np.concatenate([deltas[f"model.layers.{k}.up.weight"].ravel() for k in (0, 1)])
    changed = (
        read(tmp_path / "part")["model.layers.1.up.weight"].raw.view(np.float32).reshape(30, 40)
        != base["model.layers.1.up.weight"]
    )
    assert changed.sum() == (deltas["model.layers.1.up.weight"] >= np.sort(two)[::-1][2400 // 4 - 1]).sum()


def test_densities_of_the_whole_model_share_their_passes(tmp_path, monkeypatch):
    """A gradient has a rank per layer: one pass counts for all, with the bytes that a pass for each gives."""
    rng = np.random.default_rng(4)
    base = {f"model.layers.{k}.up.weight": rng.normal(size=(30, 40)).astype(np.float32) for k in range(6)}
    tunes = [{n: x + rng.normal(size=x.shape).astype(np.float32) for n, x in base.items()} for _ in range(2)]
    a, b, c = (str(small.save(tmp_path / name, m)) for name, m in zip("abc", (base, *tunes), strict=True))
    parameters = {"density": [0.1, 0.9], "weight": 1.0, "preset": "paper"}
    asked = recipe("ties", [b, c], base_model=a, parameters=parameters)
    one = recipe("ties", [b, c], base_model=a, parameters={**parameters, "density": 0.5})
    once = fastinterp.merge(one, tmp_path / "one").bytes_read
    assert fastinterp.merge(asked, tmp_path / "out").bytes_read == once == fastinterp.explain(asked).bytes_read
    monkeypatch.setattr(rounds, "RANK_BYTES", 1 << 60)
    assert fastinterp.merge(asked, tmp_path / "apart").bytes_read > 4 * once
    assert_same(read(tmp_path / "apart"), read(tmp_path / "out"))


def test_what_one_pass_can_answer():
    """Requests that differ in more than ranks are apart, and so are ranks beyond the limit."""
    a, b, c = (Select(((1, k), (2, k)), whole=True) for k in (10, 20, 30))
    other = Select(((1, 0.5),), nonzero=True, whole=True)
    assert rounds.grouped([a, other, b, c], 4) == [[a, b], [other], [c]]
    assert rounds.grouped([a, b], 1) == [[a], [b]]
