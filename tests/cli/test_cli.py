"""The commands, in this process: what they print, what they write, and how they fail."""

from __future__ import annotations

import io
import json
import sys
from unittest.mock import Mock

import click
import numpy as np
import pytest
from click import testing
from click.testing import CliRunner

from fastinterp.checkpoint.journal_file import journal_path
from fastinterp.cli import commands, progress
from fastinterp.cli.info import example
from fastinterp.messages import fit, seconds, size, table
from fastinterp.methods import find, names
from fastinterp.output.journal import begin
from fastinterp.recipe.load import load_recipe
from tests.support.models import bf16, layers, load, save

COMMANDS = commands.list_commands(click.Context(commands))
RECIPE = """\
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0}}
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """base/, a/, b/ and recipe.yml in the current folder."""
    save(tmp_path / "base", layers(1))
    save(tmp_path / "a", layers(1, noise=0.1), {"format": "pt"})
    save(tmp_path / "b", layers(1, noise=-0.2))
    (tmp_path / "recipe.yml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args, code=0):
    """Run a command; its stdout, or for a failure its stderr."""
    done = CliRunner().invoke(commands, args, prog_name="fastinterp")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stderr if code else done.stdout


@pytest.mark.parametrize("args", [[], *([c] for c in COMMANDS)], ids=lambda a: " ".join(a) or "fastinterp")
def test_help_has_an_example_that_names_the_command(args):
    text = run(*args, "--help")
    assert "Example:\n" in text
    assert f"  fastinterp {args[0] if args else 'explain'}" in text.partition("Example:\n")[2]


def test_list_of_commands_cuts_no_sentence():
    assert "..." not in run("--help").partition("Commands:")[2]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["merge", "recipe.yml", "out", "--forse"], 2, "--force"),
        (["marge"], 2, "no such command 'marge'. Did you mean merge?"),
        (
            ["zzz"],
            2,
            "Known: merge, interpolate, average, sweep, extract-lora, upload, verify, replay, check, explain",
        ),
        (["merge", "recipe.yml"], 2, "Write it last, `fastinterp merge RECIPE OUT`, or as -o OUT"),
        (["merge", "none.yml", "out"], 2, "RecipeError: there is no such recipe file - at none.yml"),
        (["merge", "typo.yml", "out"], 2, "did you mean `weight`? - at $.models[0].parameters (typo.yml:4)"),
        (["merge", "recipe.yml", "out", "--device", "gpu7"], 2, "BackendError: device 'gpu7'"),
        (["merge", "recipe.yml", "out", "--threads", "0"], 2, "BackendError: the number of threads"),
        (["merge", "recipe.yml", "out", "--max-memory", "1KB"], 2, "--max-memory allows 1000"),
        (["merge", "recipe.yml", "out", "--max-shard-size", "5XB"], 2, "`5XB` is not a size"),
        (["merge", "recipe.yml", "out", "--dtype", "bf17"], 2, "UsageError: unknown dtype 'bf17'"),
        (["merge", "recipe.yml", "out", "--rounding", "up"], 2, "'nearest', 'stochastic'"),
        (["merge", "recipe.yml", "out", "--seed", "-1"], 2, "UsageError: the seed must be in 0..2**64-1"),
        (["interpolate", "a", "b", "-o", "out"], 2, "Missing option '--alpha'"),
        (["interpolate", "a", "b", "-o", "out", "--alpha", "half"], 2, "'half' is neither a finite number nor a range"),
        (["interpolate", "a", "b", "-o", "out", "--alpha", "0:1"], 2, "'0:1' is neither a finite number nor a range"),
        (["interpolate", "a", "b", "-o", "out", "--alpha", "0:inf:1"], 2, "'0:inf:1' is neither a finite number nor"),
        (["interpolate", "a", "b", "-o", "out", "--alpha", "0:1:0"], 2, "the step of 0:1:0 is 0"),
        (["interpolate", "a", "b", "-o", "out", "--alpha", "0:1:-1"], 2, "the step must be positive here: 0:1:1"),
        (["interpolate", "a", "b", "-o", "out", "--alpha", "1:0:0.1"], 2, "the step must be negative here: 1:0:-0.1"),
        (
            ["interpolate", "a", "b", "-o", "out", "--alpha", "0:1:0.0001"],
            2,
            "10001 points, but at most 4096 are possible. Use 0:1:0.0005",
        ),
        (
            ["interpolate", "a", "b", "-o", "out", "--alpha", "0,half,1"],
            2,
            "'half' in '0,half,1' is neither a finite number",
        ),
        (["interpolate", "a", "b", "-o", "out", "--alpha", "2:-1:-1e-9"], 2, "has 3.00000e+9 points"),
        (["interpolate", "a", "b", "-o", "out", "--alpha", "0:1:0.0004,2:3:0.0004"], 2, "are possible, got 5002"),
        (["interpolate", "a", "./a/", "-o", "out", "--alpha", "0.5"], 2, "A and B are the same checkpoint: 'a'"),
        (["average", "a", "b", "o ut"], 2, "Write it as -o OUT: fastinterp average a b -o 'o ut'"),
        (["average", "a", "."], 2, "the output is not named. Write it as -o OUT: fastinterp average a . -o OUT"),
        (["merge", "--bogus"], 2, "No such option '--bogus'."),
        (["merge", "--threds"], 2, "No such option '--threds'. (Did you mean one of: '--read', '--threads'?)"),
        (["--vers"], 2, "No such option '--vers'. Did you mean '--version'?"),
        (["merge", "recipe.yml", "out", "--cuda"], 2, "No such option: --cuda. Use --device cuda."),
        (["merge", "recipe.yml", "out", "--out-shard-size", "5B"], 2, "Use --max-shard-size, in bytes: 5GB."),
        (["merge", "-", "out"], 2, "RecipeError: the recipe is empty"),
        (["interpolate", "a", "b", "-o", "out", "--alpha", "inf"], 2, "alpha"),
        (["inspect", "./none"], 3, "CheckpointError: ./none: there is no such folder or file"),
        (["diff", "a", "./none"], 3, "CheckpointError: ./none: there is no such folder or file"),
        (["merge", "recipe.yml", "a"], 4, "OutputError: a: the output is the input folder `a`"),
        (["merge", "recipe.yml", "a"], 4, "; nothing was written"),
        (["merge", "recipe.yml", "full"], 4, "Add --force"),
        (["methods", "liner"], 2, "MethodError: unknown merge method `liner`, did you mean `linear`?"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_failure_says_why_in_its_exit_code_and_on_stderr_and_writes_nothing(models, args, code, said):
    (models / "typo.yml").write_text(RECIPE.replace("weight: 0.5", "wieght: 0.5"))
    save(models / "full", {"x": bf16([1.0])})
    before = sorted(models.rglob("*"))
    stderr = run(*args, code=code)
    assert said in " ".join(stderr.replace("│", " ").split())
    assert before == sorted(models.rglob("*"))


def test_damaged_checkpoint_is_exit_code_3(models):
    file = models / "a" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "CheckpointError" in run("merge", "recipe.yml", "out", code=3)


def test_unexpected_exception_is_not_hidden(models, monkeypatch):
    def broken(*args, **settings):
        raise ZeroDivisionError

    monkeypatch.setattr("fastinterp.api.merge_documents", broken)
    with pytest.raises(ZeroDivisionError):
        run("merge", "recipe.yml", "out")


def test_merge_prints_a_summary_and_writes_the_checkpoint(models):
    text = run("merge", "recipe.yml", "out")
    assert text.startswith("out: 1 file, ")
    assert "; rounding kept 100 % of the change\n" in text
    assert set(layers(1)) == set(load(models / "out" / "model.safetensors"))


def test_recipe_from_stdin(models):
    done = CliRunner().invoke(commands, ["merge", "-", "piped"], input=RECIPE)
    assert done.exit_code == 0, done.output
    run("merge", "recipe.yml", "out")
    assert load(models / "piped" / "model.safetensors") == load(models / "out" / "model.safetensors")


def test_merge_json_is_the_report(models):
    found = json.loads(run("merge", "recipe.yml", "out", "--json", "--threads", "1"))
    assert (found["output"], found["files"], found["threads"]) == ("out", ["model.safetensors"], 1)
    assert set(found["tensors"]) == set(layers(1)) and found["effect"]["numel"] == 116
    assert found["bytes_read"] == 2 * 116 * 2  # base and a; b has no weight


def test_json_of_nan_is_json(models):
    """NaN in a model makes NaN sums, for which JSON has no word."""
    bad = layers(1)
    bad["model.embed_tokens.weight"][0, 0] = 0x7FC0
    save(models / "a", bad)
    text = run("merge", "recipe.yml", "out", "--json")
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert found["effect"]["nan_in"] == 1 and found["warnings"]


def test_quiet_prints_warnings_only(models):
    assert run("merge", "recipe.yml", "out", "--quiet") == ""
    done = CliRunner().invoke(commands, ["interpolate", "base", "a", "--alpha", "0.001", "-o", "p", "--quiet"])
    assert (done.exit_code, done.stdout) == (0, "")
    assert "p: warning: rounding to BF16 kept" in done.stderr


def test_force_replaces_a_checkpoint(models):
    run("merge", "recipe.yml", "out", "--max-shard-size", "100")
    assert (models / "out" / "model.safetensors.index.json").exists()
    assert "removed from the replaced checkpoint: " in run("merge", "recipe.yml", "out", "--force")
    assert [p.name for p in (models / "out").glob("model*")] == ["model.safetensors"]


def test_an_interrupt_before_the_output_is_looked_at_tells_what_is_kept(models, monkeypatch):
    """The journal that an earlier run left is as it was."""
    (models / "out").mkdir()
    begin(journal_path(models / "out")).close()
    before = journal_path(models / "out").read_bytes()
    monkeypatch.setattr("fastinterp.api.merge_documents", Mock(side_effect=KeyboardInterrupt))
    done = CliRunner().invoke(commands, ["merge", "recipe.yml", "out"])
    assert "interrupted; nothing was written; the unfinished output of an earlier run is kept" in done.stderr
    assert journal_path(models / "out").read_bytes() == before


def test_force_names_the_files_that_it_replaces(models):
    """In a folder that is no checkpoint: the user's own. Not those that a merge wrote there."""
    (models / "out").mkdir()
    for name in ("README.md", "notes.txt"):
        (models / "out" / name).write_text("mine")
    text = run("merge", "recipe.yml", "out", "--force")
    assert "  replaced, and not of a merge: README.md\n" in text
    assert (models / "out" / "notes.txt").read_text() == "mine"
    assert "replaced, and not" not in run("merge", "recipe.yml", "out", "--force")
    (models / "out" / "README.md").write_text("mine")
    assert json.loads(run("merge", "recipe.yml", "out", "--force", "--json"))["replaced"] == ["README.md"]


def test_inspect_shows_the_whole_of_what_a_receipt_says_in_words(models):
    (models / "ties.yml").write_text(RECIPE.replace("task_arithmetic", "ties").replace("weight: 0}", "weight: 1}"))
    run("merge", "ties.yml", "out")
    whole = json.loads(run("inspect", "out", "--json"))["receipt"]["coefficients"]
    assert whole == "left out: they come from the data, or differ by element. The recipe gives them again"
    words = " ".join(run("inspect", "out").split())
    assert f" coefficients: {whole} dtype: null " in words


def test_options_reach_the_merge(models):
    options = ["--dtype", "float16", "--rounding", "stochastic", "--seed", "7", "--durable", "--device", "cpu"]
    run("merge", "recipe.yml", "out", *options, "--max-memory", "1MB", "--max-shard-size", "100")
    found = json.loads(run("inspect", "out", "--json"))
    assert [d["dtype"] for d in found["dtypes"]] == ["F16"] and len(found["files"]) > 1
    assert (found["receipt"]["rounding"], found["receipt"]["seed"]) == ("stochastic", 7)


def test_interpolate_makes_every_point_of_numbers_and_ranges(models):
    args = ["--alpha", "-0.5", "--alpha", "0:1:0.5", "--alpha=1.5"]
    text = run("interpolate", "a", "b", *args, "-o", "path")
    folders = ["alpha_-0.5", "alpha_0", "alpha_0.5", "alpha_1", "alpha_1.5"]
    assert folders == sorted(p.name for p in (models / "path").iterdir())
    assert "5 outputs from one read" in text and text.count("copy") == 2
    for folder, end in (("alpha_0", "a"), ("alpha_1", "b")):
        expected = load(models / end / "model.safetensors")
        assert expected == load(models / "path" / folder / "model.safetensors")


def test_range_holds_the_decimals_that_were_meant(models):
    found = json.loads(run("interpolate", "a", "b", "--alpha", "0.1:0.5:0.1", "-o", "p", "--json"))
    assert [f["alpha"] for f in found] == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_interpolate_tells_what_an_alpha_acts_as(models):
    """Where b differs from a by one ulp, rounding to nearest makes 0.25 of it 0, and 0.75 of it 1."""
    ones = np.full(4096, 0x3F80, np.uint16)
    save(models / "x", {"w": ones})
    save(models / "y", {"w": ones + 1})
    found = json.loads(run("interpolate", "x", "y", "--alpha", "0.25", "--alpha", "0.75", "-o", "p", "--json"))
    assert [f["acts_as"] for f in found] == [0.0, 1.0]
    text = run("interpolate", "x", "y", "--alpha", "0.25", "--alpha", "0.75", "-o", "q")
    assert text.splitlines()[2].split()[:2] == ["0.25", "0"] and text.splitlines()[3].split()[:2] == ["0.75", "1"]
    assert "alpha 0.75 acts as 1\n" in run("interpolate", "x", "y", "--alpha", "0.75", "-o", "r")


def test_interpolate_with_a_base_adds_task_vectors(models):
    for name, value in (("o", 1.0), ("x", 3.0), ("y", 9.0)):
        save(models / name, {"w": np.full(8, value, np.float32)})
    text = run("interpolate", "x", "y", "--base", "o", "--alpha", "0.5", "-o", "p")
    assert "acts as" not in text
    expected = 1.0 + 0.5 * (3.0 - 1.0) + 0.5 * (9.0 - 1.0)
    assert [expected] * 8 == np.frombuffer(load(models / "p" / "model.safetensors")["w"][2], np.float32).tolist()


def test_interpolate_takes_the_integers_of_the_model_that_is_named(models):
    for name, value in (("x", 1), ("y", 2)):
        save(models / name, {"w": np.full(4, value, np.float32), "steps": np.array([value])})
    args = ["interpolate", "x", "y", "--alpha", "0.5", "--alpha", "1", "-o", "p"]
    said = run(*args, code=3)
    assert "steps (I64)" in said and "differs between x and y" in said and "`--integers MODEL`" in said
    run(*args, "--integers", "./y/")
    for folder in ("alpha_0.5", "alpha_1"):
        assert np.frombuffer(load(models / "p" / folder / "model.safetensors")["steps"][2], np.int64).tolist() == [2]


def test_explain_agrees_with_the_merge(models):
    found = json.loads(run("explain", "recipe.yml", "--json", "--max-shard-size", "100"))
    assert not (models / "out").exists()
    report = json.loads(run("merge", "recipe.yml", "out", "--json", "--max-shard-size", "100"))
    sizes = {p.name: p.stat().st_size for p in (models / "out").glob("*.safetensors")}
    assert sizes == {f["name"]: f["bytes"] for f in found["files"]}
    written = {*sizes, *found["indexes"], *found["sidecars"]}
    assert written == {p.name for p in (models / "out").iterdir()}
    assert report["bytes_read"] == found["bytes_read"]
    assert [i for i, m in enumerate(found["models"]) if m["bytes_read"]] == [0, 1]
    (step,) = found["steps"]
    assert (step["pivot"], step["terms"]) == ("base", [{"model": "a", "coefficient": 0.5}])
    assert set(layers(1)) == {t["name"] for t in found["tensors"]}


def test_explain_says_what_is_not_read_copied_and_checked(models):
    for name, value in (("x", 1.0), ("y", 2.0)):
        save(models / name, {"w": np.full(8, value, np.float64), "steps": np.arange(2)})
    recipe = (
        "merge_method: linear\nmodels:\n- {model: x, parameters: {weight: 1}}\n- {model: y, parameters: {weight: 3}}\n"
    )
    (models / "r.yml").write_text(recipe)
    text = run("explain", "r.yml", "--threads", "3")
    assert "out = 0.25*x0 + 0.75*x1" in text and "1 tensor: out = x0 + 0.75*(x1 - x0)" in text
    assert "F64 -> F64, in float64" in text and "I64 -> I64, copied" in text
    assert "must be equal in all models: steps" in text and "3 threads x" in text
    assert "b  " in run("explain", "recipe.yml") and "not read" in run("explain", "recipe.yml")


def test_explain_and_inspect_stay_within_100_columns(models, monkeypatch):
    """On a terminal; elsewhere names are whole."""
    deep = {f"model.layers.{i}." + "very_long_name." * 9 + "weight": bf16([1.0]) for i in range(12)}
    save(models / ("m" * 60) / ("n" * 60), deep)
    name = f"{'m' * 60}/{'n' * 60}"
    (models / "long.yml").write_text(f"merge_method: passthrough\nmodels: [{{model: {name}}}]\n")
    for args in (["explain", "long.yml"], ["inspect", name], ["inspect", "--all", name], ["diff", name, name]):
        with monkeypatch.context() as patch:
            patch.setattr(testing._NamedTextIOWrapper, "isatty", lambda _: True, raising=False)
            lines = run(*args).splitlines()
        assert [line for line in lines if len(line) > 100 and name not in line] == []
    assert "very_long_name." * 9 in run("inspect", name)


def test_inspect_groups_layers_and_counts(models):
    text = run("inspect", "a")
    assert text.startswith("a: 116 parameters in 7 tensors, 232 B")
    (line,) = [line for line in text.splitlines() if "up_proj" in line]
    assert " ".join(line.split()) == "model.layers.{0..2}.mlp.up_proj.weight BF16 [6, 4] x3 144 B"
    assert "  format: pt" in text.splitlines()
    assert run("inspect", "a", "--all").count("up_proj") == 3


def test_inspect_json_says_where_every_tensor_lies(models):
    found = json.loads(run("inspect", "a", "--json"))
    raw = (models / "a" / "model.safetensors").read_bytes()
    expected = load(models / "a" / "model.safetensors")
    for t in found["tensors"]:
        assert expected[t["name"]] == (t["dtype"], t["shape"], raw[t["offset"] : t["offset"] + t["bytes"]])
    assert len(expected) == len(found["tensors"])
    assert (found["parameters"], found["bytes"], found["receipt"]) == (116, 232, None)


def test_inspect_shows_the_receipt_with_the_recipe(models):
    run("merge", "recipe.yml", "out")
    text = run("inspect", "out")
    assert "  method: task_arithmetic" in text and "    base_model: base" in text


def test_names_from_files_do_not_reach_the_terminal_raw(models):
    save(models / "evil", {"w\x1b[2J.0.x": bf16([1.0])}, {"k\x1b]0;": "v\n\x1b[31m", "fastinterp": "[" * 2000})
    save(models / "same", {"w\x1b[2J.1.x": bf16([1.0]), "y": bf16([1.0])})
    save(models / "other", {"y": bf16([1.0])})
    for args in (
        ["inspect", "evil"],
        ["inspect", "--all", "evil"],
        ["diff", "evil", "evil"],
        ["diff", "same", "other"],
    ):
        assert "\x1b" not in run(*args)
    for args in (["diff", "evil", "a"], ["interpolate", "same", "other", "--alpha", "0.5", "-o", "o"]):
        assert "\x1b" not in run(*args, code=3)


def test_explain_takes_what_merge_takes(models):
    found = json.loads(
        run("explain", "recipe.yml", "--dtype", "float32", "--rounding", "stochastic", "--seed", "7", "--json")
    )
    assert (found["rounding"], found["seed"], found["dtypes"][0]["out"]) == ("stochastic", 7, "F32")
    assert (found["bytes_written"], found["disk_bytes"]) == (4 * 116, found["files"][0]["bytes"])


def test_what_holds_for_every_point_is_said_once(models):
    """Of differing tokenizers, and of folders that an older run left."""
    for name in "ab":
        (models / name / "tokenizer.json").write_text(name)
    first = run("interpolate", "a", "b", "--alpha", "0:1:0.5", "-o", "p")
    assert first.count("  warning: tokenizer.json of a and of b differ") == 1 and "not changed" not in first
    text = run("interpolate", "a", "b", "--alpha", "0:0.4:0.2", "-o", "p", "--force")
    assert text.endswith("  not changed: 2 older alpha_* folders in p\n")
    assert "warning  tokenizer.json of base" not in run("explain", "recipe.yml")
    (models / "base" / "tokenizer.json").write_text("base")
    assert "\nwarning  tokenizer.json of base and of a, b differ" in run("explain", "recipe.yml")


@pytest.mark.parametrize(
    ("wall_s", "text"),
    [(123.4, "123.4 s"), (0.51, "0.51 s"), (0.0996, "0.10 s"), (0.0994, "99 ms"), (0.01, "10 ms"), (0.0042, "4.2 ms")],
)
def test_seconds(wall_s, text):
    assert text == seconds(wall_s)


def test_methods_lists_all():
    lines = run("methods").splitlines()
    assert names() == [line.split()[0] for line in lines if not line.startswith(" ")]
    assert len({line.index("out = ") for line in lines if "  out = " in line}) == 1
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", names())
def test_example_of_a_method_is_a_recipe(name):
    text = run("methods", name)
    words = text.partition("Example recipe:")[0].split()
    assert sorted(words) == sorted(find(name).doc.split())  # the same in other lines: no column is beyond the 80th
    assert max(map(len, text.splitlines())) <= 80
    assert load_recipe(example(find(name)) + "\n").method.name == name
    assert example(find(name)) in text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream, steps, quiet=False):
    """What a run shows on `stream` that calls back with `steps`, (bytes done, bytes to do)."""
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.shown(quiet) as show:
        if show is not None:
            for done, total in steps:
                show(done, total)
    return stream.getvalue()


def test_progress_in_a_log_is_a_line_now_and_then(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def steps():
        for done in range(1, 193):  # 24 seconds at 1 GB/s
            clock[0] += 0.125
            yield done * 125 * 10**6, 24 * 10**9

    lines = shown(monkeypatch, io.StringIO(), steps()).splitlines()
    assert lines == [" 42% 10.0 of 24.0 GB, 1.0 GB/s, 14 s left", " 83% 20.0 of 24.0 GB, 1.0 GB/s, 4 s left"]


def test_progress_on_a_terminal_is_a_bar_that_goes_away(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_PATIENCE_S", 0.0)
    text = shown(monkeypatch, Terminal(), [(10**9, 4 * 10**9)])
    assert " 25% 1.0 of 4.0 GB, " in text and "GB/s" in text
    assert text.endswith("\x1b[2K")  # the line is erased


@pytest.mark.parametrize("quiet", [False, True])
def test_short_and_quiet_runs_show_no_progress(monkeypatch, quiet):
    if quiet:
        monkeypatch.setattr(progress, "_PATIENCE_S", 0.0)
    assert shown(monkeypatch, Terminal(), [(1, 2), (2, 2)], quiet) == ""


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 KB"), (9994, "9.99 KB"), (9996, "10.0 KB"), (99_960, "100 KB"),
     (999_499, "999 KB"), (999_500, "1.00 MB"), (2_200_096_768, "2.20 GB"), (3 * 10**12, "3.00 TB"),
     (2**64 - 1, "18.4 EB"), (10**21, "1000 EB")],
)  # fmt: skip
def test_size_has_three_digits(nbytes, text):
    assert text == size(nbytes)


def test_table_cuts_the_first_column_only():
    lines = table([["x" * 200, "12"], ["y", "3"]], "<>")
    assert [len(line) for line in lines] == [80, 80] and lines[0].endswith("xx  12")
    assert fit("abcdefghijklmn", 12) == "abc...ijklmn"


def test_an_option_that_is_close_to_none_has_no_suggestion():
    """All options are alike in their dashes."""
    done = CliRunner().invoke(commands, ["merge", "--bogus"], prog_name="fastinterp")
    assert done.exit_code == 2 and "mean" not in done.stderr
