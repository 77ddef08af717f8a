"""One grammar for the commands: the output last or as -o, --alpha and --alphas, and what is said of other spellings."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from click.testing import CliRunner

from fastinterp.cli import commands
from tests.support.models import layers, load, save

RECIPE = """\
merge_method: linear
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.5}}
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """base/, a/, b/, c.safetensors and recipe.yml in the current folder."""
    for i, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, layers(1, noise=0.1 * i))
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "b" / "model.safetensors").read_bytes())
    (tmp_path / "recipe.yml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str, code: int = 0) -> str:
    """A command's stdout, or for a failure its stderr."""
    done = CliRunner().invoke(commands, shlex.split(line), prog_name="fastinterp")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stderr if code else done.stdout


SPELLINGS = [
    ("merge recipe.yml {}", ""),
    ("merge recipe.yml -o {}", ""),
    ("merge -o {} recipe.yml", ""),
    ("interpolate a b {} --alpha 0.5", ""),
    ("interpolate a b -o {} --alphas 0.5", ""),
    ("interpolate --alpha 0.5 a b {}", ""),
    ("interpolate --alpha=0,0.5 a b {}", "alpha_0.5"),
    ("sweep a b {} --alpha 0,0.5", "alpha_0.5"),
    ("sweep a b -o {} --alphas 0:0.5:0.5", "alpha_0.5"),
    ("sweep {} --base a --add b=b --grid b=0,0.5", "b_0.5"),
    ("sweep -o {} --base a --add b=b --grid b=0,0.5", "b_0.5"),
]


def test_all_spellings_write_the_same(models):
    outs = [models / f"out{i}" / inside / "model.safetensors" for i, (_, inside) in enumerate(SPELLINGS)]
    for i, (line, _) in enumerate(SPELLINGS):
        run(line.format(f"out{i}"))
    first = load(outs[0])
    for out in outs[1:]:
        assert load(out) == first


def test_other_commands_take_the_output_both_ways(models):
    for line in ("extract-lora a {} --base base --rank 1", "extract-lora a -o {} --base base --rank 1"):
        run(line.format(f"lora{len(line)}"))
    named = [p / "adapter_model.safetensors" for p in models.glob("lora*")]
    assert len(named) == 2 and named[0].read_bytes() == named[1].read_bytes()


@pytest.mark.parametrize(
    "line",
    [
        "merge recipe.yml",
        "interpolate a b --alpha 0.5",
        "sweep a b --alphas 0.5",
        "extract-lora a --base base --rank 1",
    ],
)
def test_a_missing_output_is_asked_for(models, line):
    text = run(line, 2)
    assert text.startswith("UsageError: the output is not named. Write it last, `fastinterp ")
    assert text.endswith(" OUT`, or as -o OUT\n")


def test_two_outputs_are_refused(models):
    assert run("merge recipe.yml x -o y", 2) == "UsageError: one output is needed, got 'x' and -o 'y'\n"
    assert "got 'x' and 'y'" in run("interpolate a b x y --alpha 0.5", 2)


@pytest.mark.parametrize(
    ("line", "write"),
    [
        ("interpolate a b out --alpha 0 0.5 1", "--alpha 0,0.5,1"),
        ("interpolate --alpha 0 0.5 1 a b -o out", "--alpha 0,0.5,1"),
        ("interpolate a b -o out --alphas=-0.5 0 1.5", "--alphas -0.5,0,1.5"),
        ("interpolate a b -o out --alpha 0 -0.5", "--alpha 0,-0.5"),
        ("interpolate a b -o out --alpha 0, 0.5, 1", "--alpha 0,0.5,1"),
        ("sweep a b out --alphas 0 1e-1 0.5:1:0.25", "--alphas 0,1e-1,0.5:1:0.25"),
        ("sweep out --base a --add b=b --grid b=0 1", "--grid b=0,1"),
    ],
)
def test_numbers_are_separated_by_commas(models, line, write):
    text = run(line, 2)
    assert f"takes one value, numbers separated by commas. Write {write}\n" in text
    assert not (models / "out").exists()
    option, value = write.split()
    rest = re.sub(rf"{option}[= ].*?(?= a b|$)", "", line)
    run(f"{rest} {option} {value}")


def test_a_folder_that_is_called_like_a_number_is_a_folder(models):
    (models / "b").rename(models / "2")
    run("interpolate --alpha 0.5 a 2 out")


@pytest.mark.parametrize("line", ["merge a b", "merge a b -o mixed", "merge a b mixed", "merge a c.safetensors mixed"])
def test_merge_of_two_checkpoints_says_interpolate(models, line):
    text = run(line, 2)
    assert "merge takes a recipe, a YAML file, and 'a' is a checkpoint. For a point between two checkpoints:" in text
    (instead,) = re.findall(r"`fastinterp ([^`]*)`", text)
    assert instead.startswith("interpolate a ") and ("-o mixed" in instead) == ("mixed" in line and "-o" not in line)
    run(instead)


def test_other_commands_name_what_takes_checkpoints(models):
    (instead,) = re.findall(r"`fastinterp ([^`]*)`", run("merge base a b mixed", 2))
    assert instead == "average base a b --in-order -o mixed"
    run(instead)
    for command in ("check", "explain"):
        (instead,) = re.findall(r"`fastinterp ([^`]*)`", run(f"{command} a", 2))
        assert instead == "inspect a"
        run(instead)


WRONG = """\
merge_method: linear
models:
  - {model: a, parameters: {wieght: 0.5}}
  - {modle: b}
dtype: float61
"""


@pytest.mark.parametrize("command", ["merge {} out", "explain {}"])
def test_all_errors_are_told_at_once_as_check_tells_them(models, command):
    (models / "wrong.yml").write_text(WRONG)
    lines = run(command.format("wrong.yml"), 2).splitlines()
    assert lines == [
        "RecipeError: unknown parameter `wieght` of `linear`, did you mean `weight`? - at $.models[0].parameters "
        "(wrong.yml:3)",
        "RecipeError: unknown key `modle`, did you mean `model`? - at $.models[1] (wrong.yml:4)",
        "RecipeError: unknown dtype `float61`, did you mean `float64`? - at $.dtype (wrong.yml:5)",
    ]
    told = json.loads(_stdout("check wrong.yml --json", 2))
    assert json.loads(_stdout(f"{command.format('wrong.yml')} --json", 2)) == told
    assert [one["message"] for one in told["wrong"]] == [
        line.partition(": ")[2].partition(" - at ")[0] for line in lines
    ]


def _stdout(line: str, code: int) -> str:
    done = CliRunner().invoke(commands, shlex.split(line), prog_name="fastinterp")
    assert (done.exit_code, done.stderr) == (code, "")
    return done.stdout


def test_all_models_that_are_missing_are_told(models):
    (models / "gone.yml").write_text(RECIPE.replace("model: a", "model: ./x").replace("model: b", "model: ./y"))
    for line in ("merge gone.yml out", "interpolate ./x ./y out --alpha 0.5", "sweep ./x ./y out --alpha 0.5",
                 "average ./x ./y --in-order -o out"):  # fmt: skip
        found = run(line, 3).splitlines()
        assert [text.partition(": there is")[0] for text in found] == ["CheckpointError: ./x", "CheckpointError: ./y"]
    assert not (models / "out").exists()


def test_options_count_in_what_is_told(models):
    """With --missing skip the tensor that one model lacks is no error; the other error is told alone."""
    tensors = layers(1, noise=0.3)
    tensors.pop(next(reversed(tensors)))
    save(models / "short", tensors)
    (models / "one.yml").write_text(RECIPE.replace("model: b", "model: short"))
    assert "--missing" in run("merge one.yml out", 3)
    (models / "two.yml").write_text(RECIPE.replace("model: b", "model: short") + "  - {model: ./x}\n")
    method, missing = run("merge two.yml out --missing skip", 2).splitlines()
    assert "'./x' has none" in method and missing.startswith("CheckpointError: ./x: there is no such")


@pytest.mark.parametrize(
    ("line", "code", "kind"),
    [
        ("merge none.yml out", 2, "RecipeError"),
        ("merge recipe.yml a", 4, "OutputError"),
        ("merge recipe.yml out --max-memory 1KB", 2, "UsageError"),
        ("merge recipe.yml out --nothing", 2, "UsageError"),
        ("merge --json", 2, "UsageError"),
        ("interpolate a ./b2 out --alpha 0.5", 3, "CheckpointError"),
        ("interpolate a b out --alpha 0 1", 2, "UsageError"),
        ("inspect ./none", 3, "CheckpointError"),
        ("diff a ./none", 3, "CheckpointError"),
        ("explain none.yml", 2, "RecipeError"),
        ("sweep a b out --alpha half", 2, "UsageError"),
        ("average ./x ./y --in-order -o out", 3, "CheckpointError"),
        ("extract-lora ./x out --base base --rank 1", 3, "CheckpointError"),
        ("bench --dir ./none", 2, "UsageError"),
        ("marge", 2, "UsageError"),
    ],
)
def test_errors_are_json_where_the_result_would_be(models, line, code, kind):
    values = json.loads(_stdout(f"{line} --json", code))
    assert values["ok"] is False
    first = values["wrong"][0]
    assert (first["kind"], first["exit_code"]) == (kind, code) and first["message"]
    assert {"message", "kind", "path", "line", "exit_code"} == first.keys()


def test_other_files_of_mergekit_are_told_as_such(models):
    moe = "base_model: base\ngate_mode: hidden\nexperts: [{source_model: a, positive_prompts: [x]}]\n"
    evolve = "genome: {models: [a, b], merge_method: linear}\ntasks: [{name: x}]\n"
    old = "layer_slices: [{model: a, start: 0, end: 1}]\n"
    for text, what in ((moe, "mergekit-moe"), (evolve, "mergekit-evolve"), (old, "bakllama")):
        (models / "other.yml").write_text(text)
        for command in ("merge other.yml out", "explain other.yml"):
            (line,) = run(command, 2).splitlines()
            assert line.startswith(f"RecipeError: this is a file of {what}, ")
        (only,) = json.loads(_stdout("check other.yml --json", 2))["wrong"]
        assert only["message"].startswith(f"this is a file of {what}, ")
