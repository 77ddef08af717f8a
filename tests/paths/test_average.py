"""`average`: checkpoints of a run in the order of their steps, weights with a name, and the command."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import fastinterp
from fastinterp.cli import commands
from fastinterp.errors import ShapeError, UsageError
from fastinterp.methods._weights import shares
from fastinterp.ops.combine import Combine
from fastinterp.paths.average import average_of, weights_of
from fastinterp.paths.steps import by_step
from tests.support import tokens
from tests.support.checkpoints import assert_same, expected, family, integers, read, write
from tests.support.models import save

STEPS = (500, 1000, 1500, 10500)  # as text, 10500 comes first


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The models of run/checkpoint-500 and so on, oldest first, with what a trainer leaves beside the weights."""
    models = family(len(STEPS))
    for step, model in zip(STEPS, models, strict=True):
        model["bn.num_batches_tracked"] = integers(step, "I64")  # differs at each step
        folder = write(tmp_path / "run" / f"checkpoint-{step}", model)
        (folder / "config.json").write_text(json.dumps({"step": step}))
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            (folder / name).write_bytes(b"\x80\x02.")
        (folder / "trainer_state.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return models


def command(*args: str, code: int = 0) -> str:
    done = CliRunner().invoke(commands, ["average", *args], prog_name="fastinterp")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stderr if code else done.stdout


def given() -> list[str]:
    """As a shell lists them."""
    return sorted(str(p) for p in Path("run").iterdir())


def left(name: str, s: float) -> float:
    return {"linear": 1 - s, "cosine": (1 + math.cos(math.pi * s)) / 2, "1-sqrt": 1 - math.sqrt(s)}[name]


# Oldest first, from the definitions: what a checkpoint adds to the steps before it is what the rate drops there.
WEIGHTS = {
    "uniform": [0.25] * 4,
    "ema": [0.9**age / (1 + 0.9 + 0.9**2 + 0.9**3) for age in (3, 2, 1, 0)],
    **{
        name: [left(name, i / 4) - left(name, (i + 1) / 4) for i in range(4)] for name in ("linear", "cosine", "1-sqrt")
    },
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weighted_sum_of_all(run, name):
    fastinterp.average("run/checkpoint-*", "out", weights=name)
    floating = [{n: t for n, t in model.items() if n != "bn.num_batches_tracked"} for model in run]
    want = expected(floating, Combine(shares(WEIGHTS[name]), sums_to_one=True))  # as `linear` rounds them
    got = read(Path("out"))
    counter = got.pop("bn.num_batches_tracked")
    assert counter.raw.tobytes() == (10500).to_bytes(8, "little")  # the newest checkpoint's
    assert json.loads(Path("out/config.json").read_text()) == {"step": 10500}
    assert_same(want, got)


def test_command_in_order_of_steps_with_weights_and_recipe(run):
    text = command(*given(), "-o", "out", "--weights", "ema", "--decay", "0.5", "--last", "3")
    assert text.endswith(
        "weights, oldest first:\n  0.1429  run/checkpoint-1000\n  0.2857  run/checkpoint-1500\n"
        "  0.5714  run/checkpoint-10500\n"
    )
    floating = [{n: t for n, t in model.items() if n != "bn.num_batches_tracked"} for model in run[1:]]
    got = read(Path("out"))
    del got["bn.num_batches_tracked"]
    assert_same(expected(floating, Combine(shares([1 / 7, 2 / 7, 4 / 7]), sums_to_one=True)), got)
    recipe = Path("out/README.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    fastinterp.merge(recipe, "again")  # which the model card has
    assert Path("again/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()


def test_json(run):
    found = json.loads(command(*given(), "-o", "out", "--json"))
    assert [row["checkpoint"] for row in found["weights"]] == [f"run/checkpoint-{step}" for step in STEPS]
    assert [row["weight"] for row in found["weights"]] == [0.25] * 4


def test_decay_0_reads_only_the_newest(run):
    fastinterp.average("run/checkpoint-*", "out", weights="ema", decay=0)
    assert_same(run[-1], read(Path("out")))


@pytest.mark.parametrize("decay", [None, 0.5, 0.99])
@pytest.mark.parametrize("n", [2, 4, 64])
def test_ema_is_the_moving_average_with_the_correction_of_its_start(n, decay):
    """Of values that grow: as the update e = b*e + (1-b)*x from 0, over 1 - b^n. The newest counts most."""
    b, e = 0.9 if decay is None else decay, 0.0
    for i in range(n):
        e = b * e + (1 - b) * i**2
    found = weights_of(n, "ema", decay)
    assert math.isclose(sum(w * i**2 for i, w in enumerate(found)), e / (1 - b**n), rel_tol=1e-9)
    assert sorted(set(found)) == [*found]


def test_which_counts_most_is_as_the_help_says():
    assert weights_of(4, "1-sqrt")[0] == max(weights_of(4, "1-sqrt"))
    assert weights_of(4, "cosine")[1] == pytest.approx(max(weights_of(4, "cosine")))
    assert weights_of(4, "linear") == pytest.approx(weights_of(4, "uniform"))
    assert weights_of(4, "ema")[-1] == max(weights_of(4, "ema"))


def test_patterns_in_the_command(run):
    """As a shell would expand them; a name with such characters that exists is that."""
    command("run/checkpoint-*", "-o", "out")
    fastinterp.average(given(), "want")
    assert Path("out/model.safetensors").read_bytes() == Path("want/model.safetensors").read_bytes()
    command("run/checkpoint-5*", "run/checkpoint-1?00", "-o", "three")
    fastinterp.average([f"run/checkpoint-{step}" for step in STEPS[:3]], "want3")
    assert Path("three/model.safetensors").read_bytes() == Path("want3/model.safetensors").read_bytes()
    assert "nothing matches 'run/step-*'" in command("run/step-*", "-o", "none", code=2)
    Path("run").rename("run[1]")
    command("run[1]/checkpoint-500", "run[1]/checkpoint-1000", "-o", "odd")


def test_vocabularies_of_different_sizes(tmp_path, monkeypatch):
    """Every remedy of the message, as printed, in the command and in Python."""
    monkeypatch.chdir(tmp_path)
    rows = [np.arange(2 * n, dtype=np.float32).reshape(n, 2) for n in (2, 3)]
    for i, words in enumerate((["<unk>", "cat"], ["<unk>", "cat", "dog"])):
        save(Path(f"c-{i}"), {"model.embed_tokens.weight": rows[i], "model.norm.weight": np.ones(2, np.float32)})
        Path(f"c-{i}/config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(words)}))
        tokens.words(Path(f"c-{i}"), words)
    message = command("c-0", "c-1", "-o", "out", code=3)
    assert "`--tokenizer-source union` or `--tokenizer-source base`. Or `--missing base` copies" in message
    for words in re.findall(r"`(--[a-z-]+ \w+)`", message):
        command("c-*", "-o", "out", *words.split(), "--force")
    with pytest.raises(ShapeError) as caught:
        fastinterp.average("c-*", "out2")
    assert "`tokenizer_source='union'` or `tokenizer_source='base'`. Or `missing='base'` copies" in str(caught.value)
    fastinterp.average("c-*", "out2", missing="base")
    for source in ("base", "c-1", "union"):
        fastinterp.average("c-*", "out2", tokenizer_source=source, force=True)
        got = np.frombuffer(read(Path("out2"))["model.embed_tokens.weight"].raw.tobytes(), np.float32).reshape(-1, 2)
        assert np.array_equal(got, np.vstack([(rows[0] + rows[1][:2]) / 2, rows[1][2:]]))
    fastinterp.average("c-*", "out2", tokenizer_source="c-0", force=True)
    assert read(Path("out2"))["model.embed_tokens.weight"].shape == (2, 2)


@pytest.mark.parametrize(
    ("paths", "ordered"),
    [
        (["r/checkpoint-1000", "r/checkpoint-900/"], ["r/checkpoint-900/", "r/checkpoint-1000"]),
        (["e2-s5/w.safetensors", "e1-s9/w.safetensors"], ["e1-s9/w.safetensors", "e2-s5/w.safetensors"]),
        (["run-2/step_0100", "run-2/step_20"], ["run-2/step_20", "run-2/step_0100"]),
        (["a"], ["a"]),
        (["p/alpha_0.6", "p/alpha_0.55"], ["p/alpha_0.55", "p/alpha_0.6"]),
        (
            ["alpha_1", "alpha_0.1", "alpha_0", "alpha_-0.25", "alpha_-0.5", "alpha_1e-05"],
            ["alpha_-0.5", "alpha_-0.25", "alpha_0", "alpha_1e-05", "alpha_0.1", "alpha_1"],
        ),
        (
            ["m_alpha_1.5.safetensors", "m_alpha_1.25.safetensors"],
            ["m_alpha_1.25.safetensors", "m_alpha_1.5.safetensors"],
        ),
        (["t-0.50", "t-0.45", "t-1.00"], ["t-0.45", "t-0.50", "t-1.00"]),
        (["c-1.5", "c-1.05"], ["c-1.05", "c-1.5"]),
        (["v1.10", "v1.9", "v1.1"], ["v1.1", "v1.9", "v1.10"]),
        (["ours-version-1.11", "ours-version-1.9"], ["ours-version-1.9", "ours-version-1.11"]),
        (["r-1.10.0", "r-1.9.2", "r-1.9"], ["r-1.9", "r-1.9.2", "r-1.10.0"]),
        (["v1.10/checkpoint-20", "v1.10/checkpoint-3"], ["v1.10/checkpoint-3", "v1.10/checkpoint-20"]),
        (["step-2-loss=1.23", "step-1-loss=1.5"], ["step-1-loss=1.5", "step-2-loss=1.23"]),
    ],
)
def test_order(paths, ordered):
    assert by_step(paths) == ordered


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (["step-1.9", "step-1.10"], "as decimals 1.10 is less than 1.9, as versions it comes after that"),
        (["step-1.9", "step-1.11"], "as decimals 1.11 is less than 1.9, as versions it comes after that"),
        (["s-0.9", "s-0.10"], "as decimals 0.10 is less than 0.9, as versions it comes after that"),
        (["step-1.1", "step-1.10"], "as decimals they are equal, as versions not"),
    ],
)
def test_numbers_that_may_be_versions(paths, said):
    """Their order is asked for, and --in-order takes it."""
    for order in (paths, paths[::-1]):
        with pytest.raises(UsageError) as caught:
            by_step(order)
        message = str(caught.value)
        assert said in message and message.endswith("with --in-order (in Python in_order=True)"), message
        assert average_of(order, "uniform", None, None, in_order=True).checkpoints == tuple(order)


def test_points_of_interpolate(run):
    """The folders that it writes, by a pattern: the last is the newest."""
    first, last = "run/checkpoint-500", "run/checkpoint-1500"
    fastinterp.interpolate(first, last, [i / 10 for i in range(11)], "path", integers=last)
    found = average_of("path/alpha_*", "ema", None, None)
    names = [f"path/alpha_{x}" for x in ("0", *(f"0.{i}" for i in range(1, 10)), "1")]
    assert list(found.checkpoints) == names and found.weights[-1] == max(found.weights)
    command("path/alpha_*", "-o", "out")


def test_in_order_takes_any_names(run):
    Path("run/checkpoint-500").rename("run/first")
    text = command("run/first", "run/checkpoint-1500", "run/checkpoint-1000", "-o", "out", "--in-order")
    shown = [line.split()[1] for line in text.splitlines()[-3:]]
    assert shown == ["run/first", "run/checkpoint-1500", "run/checkpoint-1000"]


def test_weights_sum_to_1():
    for name in WEIGHTS:
        for n in (2, 7, 64):
            assert math.isclose(math.fsum(weights_of(n, name)), 1.0, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("checkpoints", "arguments", "message"),
    [
        ([], {}, "`checkpoints` is empty"),
        ({}, {}, "`checkpoints` must be paths in a list, or a pattern, got dict"),
        ("nothing-*", {}, "nothing matches 'nothing-*'"),
        (["c-1"], {}, "needs two checkpoints or more, got 'c-1' alone"),
        (["c-1", "c-2", "final"], {}, "the order of 'final' is not known"),
        (["c-1", "c-01"], {}, "'c-1' and 'c-01' have the same step number"),
        (["c-1", "c-1"], {}, "'c-1' is named twice"),
        (["c-1", "c-2"], {"last": 3}, "there are 2 checkpoints, but the last 3 are asked for"),
        (["c-1", "c-2"], {"last": 1}, "`last` must be a whole number, 2 or more, got 1"),
        (["c-1", "c-2"], {"weights": "cosin"}, "unknown weights 'cosin', did you mean `cosine`?"),
        (["c-1", "c-2"], {"decay": 0.5}, "`decay` belongs to weights 'ema', got 0.5 with 'uniform'"),
        (["c-1", "c-2"], {"weights": "ema", "decay": 1.0}, "`decay` must be a number from 0"),
        ([f"c-{i}" for i in range(65)], {}, "at most 64 checkpoints can be averaged at a time, got 65"),
    ],
)
def test_refused(checkpoints, arguments, message):
    settings = {"weights": "uniform", "decay": None, "last": None} | arguments
    with pytest.raises(UsageError) as caught:
        average_of(checkpoints, **settings)
    assert message in str(caught.value)


def test_remedies_work_as_printed(run):
    """The folder of the run, one name that has no step, and too many checkpoints."""
    message = command("run", "-o", "out", code=2)
    assert message.strip().endswith("got 'run' alone. For the 4 in it: run/checkpoint-*")
    fastinterp.average("run/checkpoint-*", "out")
    Path("run/checkpoint-500").rename("run/first")
    names = ["run/first", "run/checkpoint-1000", "run/checkpoint-1500"]
    assert "with --in-order" in command(*names, "-o", "o2", code=2)
    command(*names, "-o", "o2", "--in-order")
    many = [str(write(Path("many") / f"step-{i}", run[0])) for i in range(65)]
    message = command(*many, "-o", "o3", code=2)
    assert message.strip().endswith("or `last` (--last 64)")
    command(*many, "-o", "o3", "--last", "64")


def test_what_is_wrong_with_a_checkpoint_is_said_by_its_name(run):
    Path("run/checkpoint-1000/model.safetensors").write_bytes(b"cut short")
    assert "run/checkpoint-1000" in command(*given(), "-o", "out", code=3)
    assert not Path("out").exists()


def test_a_failure_says_what_it_is_about(run):
    """There is no file of a recipe, so the command is named, with its models."""
    args = ["average", "run/checkpoint-500", "./nowhere", "--in-order", "-o", "out", "--json"]
    done = CliRunner().invoke(commands, args, prog_name="fastinterp")
    found = json.loads(done.stdout)
    assert (done.exit_code, found["recipe"]) == (3, "fastinterp average of run/checkpoint-500, ./nowhere")
