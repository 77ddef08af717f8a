"""Paths in memory: the weights of points, and a model that takes them on."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastinterp
from fastinterp.errors import ShapeError, StorageError, UsageError
from fastinterp.execute.report import RoundingEffect
from fastinterp.in_memory.merge import merge_measured
from tests.support.models import layers, load, save

ALPHAS = [k / 10 for k in range(11)]


def model(*values, dtype=torch.float32):
    return {"w": torch.tensor(values, dtype=dtype)}


def first(weights, alpha, seed):
    return {"w": float(weights["w"][0])}


def logistic(alpha):
    return 1 / (1 + math.exp(-(6 * alpha - 2)))


def report(fn, alphas=ALPHAS, seeds=1, **kwargs):
    """Of metrics that depend on alpha and seed alone."""
    return fastinterp.path(model(0.0), model(1.0)).evaluate(lambda w, a, s: fn(a, s), alphas, seeds, **kwargs)


@pytest.mark.parametrize("base", [None, "c"], ids=["line", "base"])
def test_points_have_the_bytes_of_interpolate(tmp_path, base):
    """Ends, between them and beyond: from checkpoints in memory as between files."""
    for i, name in enumerate("abc"):
        save(tmp_path / name, layers(1, noise=0.1 * i))
    a, b, c = (str(tmp_path / name) for name in "abc")
    origin = c if base else None
    points = [-0.5, 0.0, 0.3, 1.0, 1.5]
    fastinterp.interpolate(a, b, points, tmp_path / "out", base=origin)
    path = fastinterp.path(a, b, base=origin)
    for alpha in points:
        found = {n: t.view(torch.uint16).numpy().tobytes() for n, t in path.weights(alpha).items()}
        wanted = load(tmp_path / "out" / f"alpha_{alpha:g}" / "model.safetensors")
        assert found == {name: raw for name, (_, _, raw) in wanted.items()}


def test_rounding_is_measured_as_by_interpolate(tmp_path):
    for i, name in enumerate("ab"):
        save(tmp_path / name, layers(1, noise=0.004 * i))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    reports = fastinterp.interpolate(a, b, [0.0, 0.3], tmp_path / "out")
    points = fastinterp.path(a, b).evaluate(lambda w, alpha, seed: {"m": 0.0}, [0.0, 0.3]).points
    for point, told in zip(points, reports, strict=True):
        wanted = told.effect.strength, told.effect.changed_fraction, told.effect.relative_change
        assert (point.strength, point.changed_fraction, point.relative_change) == wanted
    assert points[0].strength is None and points[1].strength != 1


def test_directions_add_up_and_those_left_out_are_zero():
    path = fastinterp.path(base=model(1.0, 1.0), directions={"x": model(2.0, 1.0), "y": model(1.0, 3.0)})
    assert path.weights({"x": 2, "y": -1})["w"].tolist() == [3.0, -1.0]
    assert path.weights({"y": 0.5})["w"].tolist() == [1.0, 2.0]
    assert path.weights({})["w"].tolist() == [1.0, 1.0]


def test_numpy_state_dicts_walk_without_torch_tensors():
    a, b = {"w": np.zeros(2, np.float32)}, {"w": np.ones(2, np.float32)}
    assert fastinterp.path(a, b).weights(0.25)["w"].tolist() == [0.25, 0.25]


def test_model_takes_on_each_point_and_gets_its_own_back():
    """Tied tensors by one of their names, dtype and identity of the parameters kept."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    own, parameter = module[0].weight.detach().clone(), module[0].weight
    a, b = {"0.weight": torch.zeros(2, 2)}, {"0.weight": torch.ones(2, 2)}

    def look(given, alpha, seed):
        assert given is module and given[1].weight is parameter
        return {"w": float(given[1].weight[0, 0].detach())}

    found = fastinterp.path(a, b, model=module).evaluate(look, [0.25, 2.0])
    assert [p.mean("w") for p in found.points] == [0.25, 2.0]
    assert torch.equal(module[0].weight, own)


def test_rounding_to_a_models_dtype_is_the_one_that_is_measured():
    module = torch.nn.Linear(64, 64, bias=False).bfloat16()
    a = {"weight": torch.full((64, 64), 1.0)}
    b = {"weight": torch.full((64, 64), 1 + 2**-7)}  # the next number in bf16
    path = fastinterp.path(a, b, model=module)
    found = path.evaluate(lambda given, alpha, seed: {"w": given.weight[0, 0].item()}, [0.25, 0.75])
    assert [p.mean("w") for p in found.points] == [1.0, 1 + 2**-7]
    assert [found.effective_alpha(p) for p in found.points] == [0.0, 1.0]
    arrays = {"weight": np.zeros((64, 64), np.float32)}
    with pytest.raises(UsageError, match="weight of a must be a torch tensor, got ndarray"):
        fastinterp.path(arrays, arrays, model=module).evaluate(first, [0.5])


def test_model_has_its_weights_back_when_the_function_raises():
    module = torch.nn.Linear(1, 1, bias=False)
    own = module.weight.detach().clone()

    def fail(given, alpha, seed):
        assert given.weight.tolist() == [[5.0]]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fastinterp.path({"weight": torch.full((1, 1), 5.0)}, {"weight": torch.zeros(1, 1)}, model=module).evaluate(
            fail, [0.0]
        )
    assert torch.equal(module.weight, own)


def test_all_that_does_not_fit_a_model_is_told_at_once():
    a, b = ({"weight": torch.full((2, 2), x), "more": torch.zeros(1)} for x in (0.0, 1.0))
    module = torch.nn.Linear(1, 1)
    with pytest.raises(ShapeError) as caught:
        fastinterp.path(a, b, model=module).evaluate(first, [0.5])
    said = str(caught.value)
    assert "more of a is not in the module\n" in said and "bias [1] is not in a\n" in said
    assert "weight is [1, 1] in the module but [2, 2] in b\n" in said


def test_checkpoint_that_changes_meanwhile_is_refused(tmp_path):
    for i, name in enumerate("ab"):
        save(tmp_path / name, layers(1, noise=0.1 * i))

    def change(weights, alpha, seed):
        save(tmp_path / "b", layers(2))
        return {"m": 0.0}

    with pytest.raises(StorageError, match=r"model\.safetensors was changed"):
        fastinterp.path(tmp_path / "a", tmp_path / "b").evaluate(change, [0.5])


@pytest.mark.parametrize("do", [lambda p: p.weights(0.5), lambda p: p.evaluate(lambda *_: {"m": 0.0}, [0.5])])
def test_checkpoint_that_was_cut_is_refused_before_it_is_read(tmp_path, do):
    for i, name in enumerate("ab"):
        save(tmp_path / name, layers(1, noise=0.1 * i))
    path = fastinterp.path(tmp_path / "a", tmp_path / "b")
    with open(tmp_path / "a" / "model.safetensors", "r+b") as stream:
        stream.truncate(100)
    with pytest.raises(StorageError, match=r"model\.safetensors was changed"):
        do(path)


CUT = """
import os, sys, threading, torch, fastinterp
from safetensors.torch import save_file
from fastinterp.errors import StorageError

folder, how = sys.argv[1:]
files = [os.path.join(folder, name + ".safetensors") for name in "ab"]
for file in files:
    save_file({"w": torch.rand(8 << 20), "n": torch.arange(1 << 20)}, file)
path = fastinterp.path(*files)

def cut():
    os.truncate(files[1], 1 << 20)

def look(weights, alpha, seed):
    if how == "between":
        cut()
    return {"m": 0.0}

if how == "thread":
    threading.Thread(target=cut).start()
if how == "inside":  # after the file was looked at, before it is read
    from fastinterp.paths import path as module
    merge = module.merge_measured
    module.merge_measured = lambda *a, **k: (cut(), merge(*a, **k))[1]
try:
    path.evaluate(look, [k / 50 for k in range(50)])
except StorageError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["between", "inside", "thread"])
def test_checkpoint_that_is_cut_while_it_is_read_kills_nothing(tmp_path, how):
    command = [sys.executable, "-c", CUT, str(tmp_path), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "b.safetensors was changed while the path was evaluated" in done.stdout


def test_checkpoints_and_state_dicts_may_be_mixed(tmp_path):
    a, b = {"w": torch.zeros(2, 3), "n": torch.arange(3)}, {"w": torch.ones(2, 3), "n": torch.arange(3)}
    save_file(b, tmp_path / "b.safetensors")
    found = fastinterp.path(a, tmp_path / "b.safetensors").weights(0.25)
    assert found["w"].tolist() == [[0.25] * 3] * 2 and found["n"].tolist() == [0, 1, 2]
    other = {"w": np.zeros((2, 3), np.float32), "n": np.arange(3)}
    with pytest.raises(UsageError, match="must be a tensor like the first"):
        fastinterp.path(other, tmp_path / "b.safetensors").weights(0.25)


def test_tokenizers_that_differ_are_told(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
        save_file({"w": torch.ones(1)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "tokenizer.json").write_text("{}" if name < "c" else "{ }")
    a, b, c = (str(tmp_path / name) for name in "abc")
    fastinterp.path(a, b)
    module = torch.nn.Module()
    module.w = torch.nn.Parameter(torch.zeros(1))
    for make in (fastinterp.path, lambda **ends: fastinterp.Live(module, **ends).close()):
        with pytest.warns(UserWarning, match=r"tokenizer.json of .*a and of .*c differ\. See that every") as told:
            make(base=a, directions={"x": b, "y": c})
        assert [w.filename for w in told] == [__file__]


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.head = (torch.nn.Parameter(torch.zeros(64)) for _ in range(2))
        self.head = self.wte


@pytest.mark.parametrize("stored", [False, True], ids=["memory", "file"])
def test_tied_tensors_that_differ_in_an_end_are_refused(tmp_path, stored):
    def end(name, wte, head):
        tensors = {"wte": torch.full((64,), wte), "head": torch.full((64,), head)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
        return str(tmp_path / f"{name}.safetensors") if stored else tensors

    ends = end("a", 0.0, 0.0), end("b", 1.0, 2.0)
    with pytest.raises(ShapeError, match=r"wte and head are one tensor in the module, but differ in .*b"):
        fastinterp.path(*ends, model=Tied()).evaluate(lambda *_: pytest.fail("called"), [0.0])
    path = fastinterp.path(ends[0], end("c", 1.0, 1.0), model=Tied(), rounding="stochastic")
    assert path.evaluate(lambda m, *_: {"w": m.head[0].item()}, [0.5]).points[0].mean("w") == 0.5
    one = {"head": torch.full((64,), 3.0)}  # either of the names will do
    found = fastinterp.path(ends[0], one, model=Tied()).evaluate(lambda m, *_: {"w": m.wte[0].item()}, [1.0])
    assert found.points[0].mean("w") == 3.0


class Mixed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fine = torch.nn.Parameter(torch.zeros(4096))
        self.coarse = torch.nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))


def test_each_tensor_is_rounded_once_to_what_the_module_has():
    """Ends in float16, whose own rounding in between would be another one."""
    rng = np.random.default_rng(0)
    a, b = ({n: torch.from_numpy(rng.normal(1, 1e-3, 4096)).half() for n in ("fine", "coarse")} for _ in range(2))
    module = Mixed()
    alphas = [0.25, 0.5]

    def look(given, alpha, seed):
        wanted = a["coarse"].double() + alpha * (b["coarse"].double() - a["coarse"].double())
        assert torch.equal(given.coarse, wanted.float().bfloat16())
        return {"fine": given.fine.double().sum().item()}

    found = fastinterp.path(a, b, model=module).evaluate(look, alphas)
    stored = {"fine": "float32", "coarse": "bfloat16"}
    for alpha, point in zip(alphas, found.points, strict=True):
        weights, effects = merge_measured([a, b], "linear", parameters={"weight": [1 - alpha, alpha]}, dtype=stored)
        assert point.changed_fraction == RoundingEffect.total(effects.values()).changed_fraction
        changed = sum((weights[n] != a[n].to(weights[n].dtype)).sum().item() for n in stored)
        assert point.changed_fraction == changed / 8192
    with pytest.raises(UsageError, match=r"`dtype` is float32, but `model` has coarse \(torch.bfloat16\)"):
        fastinterp.path(a, b, model=module, dtype="float32")


class Extra(torch.nn.Linear):
    """Its state_dict holds more than tensors."""

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        raise AssertionError("it is left alone")


def test_extra_state_of_a_model_is_left_alone():
    module, ends = Extra(2, 2, bias=False), [Extra(2, 2, bias=False).state_dict() for _ in range(2)]
    found = fastinterp.path(*ends, model=module).evaluate(lambda m, *_: {"w": m.weight[0, 0].item()}, [0.0, 1.0])
    assert [p.mean("w") for p in found.points] == [end["weight"][0, 0].item() for end in ends]


@pytest.mark.parametrize("view", [False, True])
def test_the_model_s_own_weights_may_be_an_end(view):
    """They are copied first, and do not change while the module takes on other weights."""
    module = torch.nn.Linear(2, 1, bias=False)
    own = module.weight.detach().clone()
    a = {"weight": module.weight.detach().view(2).view(1, 2)} if view else module.state_dict()
    b = {"weight": torch.zeros(1, 2)}
    found = fastinterp.path(a, b, model=module).evaluate(lambda m, *_: {"w": m.weight[0, 0].item()}, [1.0, 0.5, 0.0])
    assert [p.mean("w") for p in found.points] == [0.0, own[0, 0].item() / 2, own[0, 0].item()]
    assert torch.equal(module.weight, own)


def test_models_made_in_inference_mode_walk():
    with torch.inference_mode():
        module = torch.nn.Linear(1, 1, bias=False)
    own = module.weight.item()
    ends = {"weight": torch.zeros(1, 1)}, {"weight": torch.ones(1, 1)}
    found = fastinterp.path(*ends, model=module).evaluate(lambda m, *_: {"w": m.weight.item()}, [0.25])
    assert found.points[0].mean("w") == 0.25 and module.weight.item() == own


def test_model_that_is_converted_meanwhile():
    """The points go on in its new dtype; but it cannot have what it had before."""
    module = torch.nn.Linear(1, 1, bias=False)
    seen = []

    def convert(given, alpha, seed):
        seen.append((given.weight.dtype, given.weight.item()))
        given.bfloat16()
        return {"m": 0.0}

    ends = {"weight": torch.zeros(1, 1)}, {"weight": torch.ones(1, 1)}
    with pytest.raises(UsageError, match="weight was converted or replaced while the path was evaluated"):
        fastinterp.path(*ends, model=module).evaluate(convert, [0.25, 0.5])
    assert seen == [(torch.float32, 0.25), (torch.bfloat16, 0.5)]
