"""Tensors that are not averaged: whose is taken, what is said, once, and how; and sums of complex numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import fastinterp
from fastinterp.cli import commands
from fastinterp.errors import ShapeError
from fastinterp.ops.dtypes import BF16, DTYPES, F16, F32
from tests.support.checkpoints import Tensor, assert_same, floats, integers, read, recipe, tensor, weights, write

IDS = "scheduler.steps"
C64 = DTYPES["C64"]


def save(folder: Path, model: dict[str, Tensor]) -> str:
    return str(write(folder, model))


def kinds(folder: Path) -> list[str]:
    """Two models of which one has integers where the other has floats, as older mergers left them."""
    ids = np.arange(7)[None]
    return [
        save(folder / "a", {IDS: integers(ids, "I64"), "w": weights(0, F16, (8, 4))}),
        save(folder / "b", {IDS: tensor(ids + 1, F16), "w": weights(1, F16, (8, 4))}),
    ]


def complex_tensor(seed: int, shape: tuple[int, ...]) -> Tensor:
    x = weights(seed, F32, (*shape, 2))
    return Tensor(C64, shape, x.raw)


def run(*args: str) -> Any:
    return CliRunner().invoke(commands, list(args))


# --- integers of one side --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", [0, 1], ids="ab")
@pytest.mark.parametrize("order", [1, -1], ids=["ab", "ba"])
def test_integers_of_one_side(tmp_path, whose, order):
    """Refused with the key, once; with it, that model's tensor is copied with its dtype, whatever else is asked for."""
    paths = kinds(tmp_path)
    how = recipe("linear", paths[::order], weights=[1.0, 1.0], dtype="float32")
    with pytest.raises(ShapeError) as caught:
        fastinterp.merge(how, tmp_path / "none")
    said = str(caught.value)
    first, other = ("I64", "F16")[::order]
    assert said == (
        f"{IDS} is {first} in {paths[::order][0]} but {other} in {paths[::order][1]}. Only F64, F32, F16, BF16 and F8 "
        "tensors merge. Say whose to take: `integers: MODEL`"
    )
    assert [e.message for e in fastinterp.check(how).errors] == [said]
    key, _, _ = re.findall(r"`(.*?)`", said)[-1].partition(": ")
    fastinterp.merge({**how, key: paths[whose]}, tmp_path / "out")
    merged = read(tmp_path / "out")
    assert_same({IDS: merged[IDS]}, {IDS: read(tmp_path / "ab"[whose])[IDS]})
    assert merged["w"].dtype == F32
    assert not fastinterp.check({**how, key: paths[whose]}).errors


@pytest.mark.parametrize("whose", "ab")
def test_positions_of_the_model_that_is_named(tmp_path, whose):
    """Buffers that software makes anew come from the base, unless the recipe says whose to take."""
    ids, name = np.arange(7)[None], "text_model.embeddings.position_ids"
    a = save(tmp_path / "a", {name: integers(ids, "I64"), "w": weights(0, F16, (4,))})
    b = save(tmp_path / "b", {name: tensor(ids, F16), "w": weights(1, F16, (4,))})
    for out, pair in (("ab", (a, b)), ("ba", (b, a))):
        fastinterp.interpolate(*pair, 0.5, tmp_path / out)
        assert_same({name: read(tmp_path / out)[name]}, {name: read(tmp_path / out[0])[name]})
        fastinterp.interpolate(*pair, 0.5, tmp_path / f"{out}i", integers=tmp_path / whose)
        assert_same({name: read(tmp_path / f"{out}i")[name]}, {name: read(tmp_path / whose)[name]})


def test_integers_of_different_widths(tmp_path):
    a = save(tmp_path / "a", {IDS: integers([1, 2], "I64")})
    b = save(tmp_path / "b", {IDS: integers([1, 2], "I32")})
    how = recipe("linear", [a, b], weights=[1.0, 1.0])
    with pytest.raises(ShapeError, match=r"is I64 in .* but I32 in .*`integers: MODEL`"):
        fastinterp.merge(how, tmp_path / "none")
    fastinterp.merge({**how, "integers": b}, tmp_path / "out")
    assert_same(read(tmp_path / "out"), read(tmp_path / "b"))


def test_the_chosen_model_is_not_among_those_of_a_slice(tmp_path):
    """Then nobody has said whose to take."""
    paths = []
    for name, ids in (("a", integers([1], "I64")), ("b", tensor([1.0], F16)), ("c", integers([1], "I64"))):
        layer = {"ids": ids, "mlp.weight": weights(0, F16, (4, 4)), "norm.weight": weights(1, F16, (4,))}
        model = {f"model.layers.{i}.{rest}": t for i in range(2) for rest, t in layer.items()}
        paths.append(save(tmp_path / name, model))
    sources = [{"model": path, "layer_range": [0, 2]} for path in paths[:2]]
    last = [{"model": paths[2], "layer_range": [0, 1]}]
    how = {
        "merge_method": "linear", "slices": [{"sources": sources}, {"sources": last}], "integers": paths[2],
        "parameters": {"weight": 1.0},
    }  # fmt: skip
    with pytest.raises(ShapeError, match="is I64 in"):
        fastinterp.merge(how, tmp_path / "none")
    fastinterp.merge({**how, "integers": paths[0]}, tmp_path / "out")
    assert {t.dtype.name for n, t in read(tmp_path / "out").items() if n.endswith("ids")} == {"I64"}


# --- the remedy, once, in the words of the command -------------------------------------------------------------------


def counters(folder: Path) -> list[str]:
    """Two models of BatchNorm layers that were trained for other numbers of batches."""
    return [
        save(
            folder / name,
            {"w": weights(0, BF16, (4,))}
            | {f"bn.{i}.num_batches_tracked": integers(steps + i, "I64") for i in range(9)},
        )
        for name, steps in (("a", 100), ("b", 250))
    ]  # fmt: skip


def test_many_that_differ_are_told_once(tmp_path):
    """By a merge, which stops at the first, as by check; the remedy works."""
    paths = counters(tmp_path)
    how = recipe("linear", paths, weights=[1.0, 1.0])
    with pytest.raises(ShapeError) as caught:
        fastinterp.merge(how, tmp_path / "none")
    said = str(caught.value)
    assert re.fullmatch(
        r"(bn\.\d\.num_batches_tracked \(I64\), ){4}bn\.\d\.num_batches_tracked \(I64\) and 4 more are not averaged, "
        rf"and differ between {paths[0]} and {paths[1]}\. Say whose to take: `integers: MODEL`", said
    )  # fmt: skip
    [found] = fastinterp.check(how).errors
    assert found.message.endswith("and 4 more " + said.partition("and 4 more ")[2])
    fastinterp.merge({**how, "integers": paths[1]}, tmp_path / "out")
    assert_same(read(tmp_path / "out"), read(tmp_path / "b"))


@pytest.mark.parametrize("make", [kinds, counters])
@pytest.mark.parametrize("command", ["interpolate", "sweep"])
def test_commands_name_their_option(tmp_path, make, command):
    a, b = make(tmp_path)
    args = [command, a, b, "--alpha" if command == "interpolate" else "--alphas", "0.5", "-o", str(tmp_path / "out")]
    failed = run(*args)
    assert failed.exit_code == 3 and failed.output.count("Say whose to take") == 1
    option, _, model = re.findall("`(.*?)`", failed.output)[-1].partition(" ")
    assert (option, model) == ("--integers", "MODEL")
    assert run(*args, option, b).exit_code == 0
    folder = tmp_path / "out" if command == "interpolate" else tmp_path / "out" / "alpha_0.5"
    copied = {n: t for n, t in read(tmp_path / "b").items() if n != "w"}
    assert_same({n: read(folder)[n] for n in copied}, copied)


@pytest.mark.parametrize("make", [kinds, counters])
@pytest.mark.parametrize("function", ["interpolate", "sweep"])
def test_functions_name_their_argument(tmp_path, make, function):
    a, b = make(tmp_path)
    call = getattr(fastinterp, function)
    with pytest.raises(ShapeError) as caught:
        call(a, b, [0.5], tmp_path / "out")
    name, _, model = re.findall("`(.*?)`", str(caught.value))[-1].partition("=")
    assert (name, model) == ("integers", "MODEL")
    call(a, b, [0.5], tmp_path / "out", **{name: b})


def test_a_merge_names_the_key(tmp_path):
    """A command with a recipe has it there."""
    paths = counters(tmp_path)
    (tmp_path / "r.yml").write_text(json.dumps(recipe("linear", paths, weights=[1.0, 1.0])))
    assert "`integers: MODEL`" in run("merge", str(tmp_path / "r.yml"), str(tmp_path / "out")).output


# --- complex numbers -------------------------------------------------------------------------------------------------


def freqs(folder: Path, count: int = 2) -> list[str]:
    return [
        save(folder / "abc"[i], {"fourier.filter": complex_tensor(i, (5, 3)), "w": weights(i, BF16, (8, 4))})
        for i in range(count)
    ]


def parts(t: Tensor) -> np.ndarray:
    return np.frombuffer(t.raw.tobytes(), np.float32)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_complex_numbers_are_summed(tmp_path, method):
    """As the float32 numbers of which they are pairs, to the same bytes; the dtype stays, and that is told."""
    paths = freqs(tmp_path, 3)
    pairs = [
        save(tmp_path / f"{n}p", {"fourier.filter": Tensor(F32, (5, 3, 2), read(tmp_path / n)["fourier.filter"].raw)})
        for n in "abc"
    ]  # fmt: skip
    given = {"weights": [0.3, 0.4, 0.3]} if method == "linear" else {"weights": [0.5, 0.25], "base": True}

    def how(models: list[str]) -> dict[str, Any]:
        if "base" in given:
            return {
                **recipe(method, models[1:], weights=given["weights"]),
                "base_model": models[0],
                "dtype": "bfloat16",
            }
        return recipe(method, models, weights=given["weights"], dtype="bfloat16")

    report = fastinterp.merge(how(paths), tmp_path / "out")
    fastinterp.merge({**how(pairs), "dtype": "float32"}, tmp_path / "outp")
    got, wanted = read(tmp_path / "out")["fourier.filter"], read(tmp_path / "outp")["fourier.filter"]
    assert (got.dtype, got.shape) == (C64, (5, 3)) and np.array_equal(got.raw, wanted.raw)
    assert not np.array_equal(got.raw, read(tmp_path / "a")["fourier.filter"].raw)
    # They are no integers: those of one model are not taken where a sum is defined.
    fastinterp.merge({**how(paths), "integers": paths[0]}, tmp_path / "named")
    assert np.array_equal(read(tmp_path / "named")["fourier.filter"].raw, wanted.raw)
    assert "1 tensor of complex numbers, fourier.filter: C64, not BF16" in report.remarks
    assert not fastinterp.check(how(paths)).errors
    assert "C64 -> C64, in float32" in str(fastinterp.explain(how(paths)))


def test_complex_numbers_between_two(tmp_path):
    a, b = freqs(tmp_path)
    fastinterp.interpolate(a, b, 0.5, tmp_path / "out")
    x, y, out = (parts(read(tmp_path / n)["fourier.filter"]) for n in ("a", "b", "out"))
    assert np.allclose(out, (x + y) / 2, rtol=1e-6, atol=1e-9)
    torch = pytest.importorskip("torch")
    loaded = fastinterp.load(recipe("linear", [a, b], weights=[1.0, 1.0]))
    assert loaded["fourier.filter"].dtype == torch.complex64
    assert np.array_equal(torch.view_as_real(loaded["fourier.filter"]).numpy().ravel(), out)


def test_complex_numbers_through_documents(tmp_path):
    a, b, c = freqs(tmp_path, 3)
    above = {**recipe("linear", [a, b], weights=[1.0, 1.0]), "name": "first"}
    last = recipe("linear", ["first", c], weights=[1.0, 1.0])
    fastinterp.merge([above, last], tmp_path / "out")
    x, y, z, out = (parts(read(tmp_path / n)["fourier.filter"]) for n in ("a", "b", "c", "out"))
    assert np.allclose(out, (x + y) / 4 + z / 2, rtol=1e-6, atol=1e-9)
    above["out_dtype"] = "float32"  # stored in between
    fastinterp.merge([above, last], tmp_path / "stored")
    assert np.allclose(parts(read(tmp_path / "stored")["fourier.filter"]), out, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "slerp"])
def test_complex_numbers_and_other_methods(tmp_path, method):
    """What is more than a sum is refused, with what helps; equal ones are copied by any method."""
    a, b, c = freqs(tmp_path, 3)
    given = {"t": 0.5} if method == "slerp" else {"density": 0.5, "weight": 1.0}
    models = [a, b] if method == "slerp" else [b, c]
    how = {
        "merge_method": method, "base_model": a, "models": [{"model": m} for m in models], "parameters": given,
    }  # fmt: skip
    with pytest.raises(ShapeError) as caught:
        fastinterp.merge(how, tmp_path / "none")
    assert f"{method} does more than weigh" in str(caught.value) and "`integers: MODEL`" in str(caught.value)
    assert [e.message for e in fastinterp.check(how).errors] == [str(caught.value)]
    fastinterp.merge({**how, "integers": b}, tmp_path / "out")
    assert_same(
        {"fourier.filter": read(tmp_path / "out")["fourier.filter"]},
        {"fourier.filter": read(tmp_path / "b")["fourier.filter"]},
    )
    same = complex_tensor(7, (5, 3))
    for name in "abc":
        write(tmp_path / name, {**read(tmp_path / name), "fourier.filter": same})
    fastinterp.merge(how, tmp_path / "equal")
    assert_same({"x": read(tmp_path / "equal")["fourier.filter"]}, {"x": same})


def test_complex_numbers_that_are_equal_are_copied(tmp_path):
    """Whatever the weights sum to: as before sums of them were possible."""
    same = complex_tensor(7, (5, 3))
    paths = [save(tmp_path / n, {"f": same, "w": weights(i, BF16, (4,))}) for i, n in enumerate("ab")]
    how = {**recipe("linear", paths, weights=[1.0, 1.0]), "parameters": {"normalize": False}}
    fastinterp.merge(how, tmp_path / "out")
    out = read(tmp_path / "out")
    assert_same({"f": out["f"]}, {"f": same})
    total = floats(read(tmp_path / "a")["w"]) + floats(read(tmp_path / "b")["w"])
    assert_same({"w": out["w"]}, {"w": tensor(total, BF16)})


def test_complex_and_real_numbers_do_not_fit(tmp_path):
    a = save(tmp_path / "a", {"f": complex_tensor(0, (4,))})
    b = save(tmp_path / "b", {"f": weights(0, F32, (4,))})
    with pytest.raises(ShapeError, match=r"f is C64 in .* but F32 in .*`integers: MODEL`"):
        fastinterp.merge(recipe("linear", [a, b], weights=[1.0, 1.0]), tmp_path / "none")
