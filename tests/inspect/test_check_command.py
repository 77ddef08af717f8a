"""The command `check`: its text, its JSON, and its exit code, which is that of the merge."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from click.testing import CliRunner

import fastinterp
from fastinterp.cli import commands
from fastinterp.ops.dtypes import BF16
from tests.support.checkpoints import weights
from tests.support.llamas import llama, save


def run(*args: str, code: int = 0) -> str:
    done = CliRunner().invoke(commands, ["check", *args], prog_name="fastinterp")
    assert done.exit_code == code, done.output
    return done.stdout


def test_command(folder):
    (folder / "r.yml").write_text("merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n")
    assert run("r.yml") == run("r.yml", "--strict")
    assert run("r.yml").startswith("r.yml: no errors, no warnings\n")
    (folder / "odd.yml").write_text((folder / "r.yml").read_text() + "seed: 1\n")
    text = run("odd.yml")
    assert "odd.yml: 1 warning\n  warning  line 4: `seed` changes nothing" in text
    assert run("odd.yml", "--strict", code=2) == text
    (folder / "bad.yml").write_text((folder / "odd.yml").read_text().replace("model: b", "model: ./none"))
    assert "bad.yml: 1 error, 1 warning\n  error    line 2: ./none: there is no such folder" in run("bad.yml", code=3)
    found = json.loads(run("bad.yml", "--json", code=3))
    assert (found["ok"], found["recipe"], len(found["wrong"]), len(found["odd"])) == (False, "bad.yml", 1, 1)
    assert found["wrong"][0]["kind"] == "CheckpointError" and found["wrong"][0]["line"] == 2


@pytest.mark.parametrize("end", ["100000000", "0x" + "f" * 6000], ids=["large", "without decimal digits"])
def test_a_range_far_beyond_the_layers(folder, end):
    """It is found without counting the range out."""
    text = (
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n  - sources: "
        f"[{{model: a, layer_range: [0, {end}]}}, {{model: b, layer_range: [0, {end}]}}]\n"
    )
    tracemalloc.start()
    found = fastinterp.check(text)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 64 << 20
    assert {(f.line, f.kind) for f in found.errors} == {(4, "RecipeError")}
    assert "goes beyond the 2 layers of a" in found.errors[0].message
    with pytest.raises(fastinterp.RecipeError, match="goes beyond the 2 layers of a"):
        fastinterp.merge(text, "out")


BOTH = "  - sources: [{{model: a, layer_range: [0, {1}]}}, {{model: {0}, layer_range: [0, {1}]}}]\n"
SLICES = "merge_method: linear\nparameters: {weight: 1}\nslices:\n"
CANCELLING = (
    "merge_method: ties\nbase_model: base\nmodels: [{{model: a, parameters: {{weight: 1}}}}, {{model: {0}}}]\n"
    "parameters:\n  weight: [{{filter: up_proj, value: -1}}, {{value: 1}}]\n"
)
PAIR = "merge_method: linear\nmodels: [{{model: a}}, {{model: {0}}}]\nparameters: {{weight: 1}}\n"
# name: (exit code, recipe). narrow/ has a tensor of another shape, less/ lacks one, and in/f/ stands beside the recipe.
CODES: dict[str, tuple[int, str]] = {
    "nothing": (0, PAIR.format("b")),
    "a shape": (3, PAIR.format("narrow")),
    "a tensor that is not there": (3, PAIR.format("less")),
    "a model that is not there": (3, PAIR.format("./none")),
    "a dtype": (2, PAIR.format("narrow") + "dtype: f8\n"),
    "a key, and a model that is not there": (2, PAIR.format("./none") + "dtyp: float16\n"),
    "weights that cancel": (2, CANCELLING.format("b")),
    "weights that cancel, where models are counted": (
        0,
        CANCELLING.format("b").replace("ties", "dare_ties") + "  preset: paper\n  normalize: true\n  density: 0.5\n",
    ),
    "weights that cancel, and a shape": (3, CANCELLING.format("narrow")),
    "a range, then a tensor that is not there": (2, SLICES + BOTH.format("b", 5) + BOTH.format("less", 1)),
    "a tensor that is not there, then a range": (3, SLICES + BOTH.format("less", 1) + BOTH.format("b", 5)),
    "a side-car that is beside the recipe": (
        3,
        "merge_method: fisher\nmodels: [{model: a, parameters: {fisher: f}}, {model: b, parameters: {fisher: f}}]\n",
    ),
    "a shape in a document above": (
        3,
        "name: m\n" + PAIR.format("narrow") + "---\n" + PAIR.format("m"),
    ),
    "models that are left empty": (2, "merge_method: linear\nmodels:\nbase_model: base\n"),
}


@pytest.mark.parametrize(("code", "text"), CODES.values(), ids=CODES)
def test_the_exit_code_is_that_of_the_merge(folder, code, text):
    """Whatever else is wrong, and in which order: it is the code of the error that the merge meets first."""
    save("narrow", llama() | {"model.layers.0.mlp.up_proj.weight": weights(0, BF16, (24, 8))})
    save("less", {name: t for name, t in llama().items() if name != "model.layers.0.mlp.up_proj.weight"})
    (folder / "in").mkdir()
    save("in/f", llama())
    Path("in/r.yml").write_text(text)
    codes = {
        command[0]: CliRunner().invoke(commands, [*command, "in/r.yml", *more], prog_name="fastinterp").exit_code
        for command, more in ((["check"], []), (["explain"], []), (["merge", "--force"], ["out"]))
    }
    assert codes == {"check": code, "explain": code, "merge": code}
