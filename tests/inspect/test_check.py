"""`check`: all errors of a recipe and its models at once, and warnings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fastinterp
from fastinterp.execute import chunks
from fastinterp.inspect.check_result import CheckResult
from fastinterp.ops.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, F64
from tests.support import tokens
from tests.support.checkpoints import bell, floats, integers, recipe, tensor, weights
from tests.support.llamas import llama, save

TIES: dict[str, Any] = {"base_model": "base", "parameters": {"weight": 1, "density": 0.5}}


def messages(found: CheckResult) -> tuple[list[str], list[str]]:
    """Errors and warnings, with their lines."""
    every = [
        [f"{f.line}: {f.message}" if f.line else f.message for f in some] for some in (found.errors, found.warnings)
    ]
    return every[0], every[1]


def test_no_errors_no_warnings(folder):
    found = fastinterp.check(recipe("ties", ["a", "b"], **TIES))
    assert (found.errors, found.warnings, found.ok, found.exit_code) == ((), (), True, 0)
    assert (found.method, found.models, found.tensors, found.sampled) == ("ties", 3, 3, 3)
    assert str(found) == ("recipe: no errors, no warnings\n  checked: ties of 3 models, 3 tensors; samples of 3")


def test_faults_of_the_recipe_and_missing_models_are_told_together(folder):
    text = (
        "merge_method: linear\ndtyp: float32\nmodels:\n  - {model: ./aa, parameters: {weight: x}}\n"
        "  - {model: ./c, parameters: {weight: 1}}\n"
    )
    found = fastinterp.check(text)
    wrong, _ = messages(found)
    assert wrong == [
        "2: unknown key `dtyp`, did you mean `dtype`?",
        "4: `weight` must be a finite number (at most 3.4e38), got 'x'",
        "4: ./aa: there is no such folder or file. Did you mean `a`?",
        "5: ./c: there is no such folder or file.",
    ]
    assert [f.kind for f in found.errors] == ["RecipeError", "RecipeError", "CheckpointError", "CheckpointError"]
    assert found.exit_code == 2, "the merge would end with the fault of the recipe"
    assert str(found).endswith("not checked: the tensors of the models. Correct the recipe first")


def test_models_elsewhere_are_not_asked_for_while_the_recipe_has_errors(folder):
    """They may be there; a name that is close to one here is told all the same, in one sentence."""
    Path("models").mkdir()
    Path("a").rename("models/a")
    names = ["models/aa", "org/a", "s3://bucket/a", "hf://org/a"]
    wrong, _ = messages(fastinterp.check({"dtyp": "float32", **recipe("linear", names, parameters={"weight": 1})}))
    assert wrong == [
        "unknown key `dtyp`, did you mean `dtype`?",
        "models/aa: there is no such folder or file. Did you mean `models/a`?",
    ]


def test_missing_models_alone_have_their_exit_code(folder):
    found = fastinterp.check(recipe("linear", ["./x", "a", "./y"], parameters={"weight": 1}))
    assert [f.path for f in found.errors] == ["$.models[0].model", "$.models[2].model"]
    assert found.exit_code == 3


def test_missing_side_cars_are_told(folder):
    found = fastinterp.check(
        {"merge_method": "fisher", "models": [{"model": m, "parameters": {"fisher": f"./{m}-f"}} for m in ("a", "b")]}
    )
    assert [f.message.partition(":")[0] for f in found.errors] == ["./a-f", "./b-f"]


def test_missing_side_cars_have_their_lines(folder):
    (folder / "r.yml").write_text(
        "merge_method: fisher\nmodels:\n  - model: a\n    parameters: {fisher: ./a-f}\n  - model: b\n"
        "    parameters:\n      fisher: ./b-f\n"
    )
    assert [(f.line, f.path) for f in fastinterp.check("r.yml").errors] == [
        (4, "$.models[0].parameters.fisher"),
        (7, "$.models[1].parameters.fisher"),
    ]
    with pytest.raises(fastinterp.CheckpointError) as caught:
        fastinterp.merge("r.yml", "out")
    assert str(caught.value).endswith(" - at $.models[0].parameters.fisher (r.yml:4)")


def test_names_close_to_a_documents(folder):
    text = (
        "name: first-mix\nmerge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1}\n---\n"
        "merge_method: linear\nmodels: [{model: ./first_mix}]\nparameters: {weight: 1}\n"
    )
    wrong, _ = messages(fastinterp.check(text))
    assert wrong[1].startswith("7: ./first_mix: there is no such folder or file.")
    assert wrong[1].endswith("Did you mean the document 'first-mix'?")


def test_models_of_a_folder_above_the_recipe(folder, monkeypatch):
    """Relative paths start at the current folder: where they were meant to is said, by check and by merge."""
    (folder / "recipes").mkdir()
    text = "merge_method: linear\nmodels:\n  - {model: ./a}\n  - {model: ./b}\nparameters: {weight: 1}\n"
    (folder / "recipes" / "r.yml").write_text(text)
    (folder / "elsewhere").mkdir()
    for place, file in (("recipes", "r.yml"), ("elsewhere", "../recipes/r.yml")):
        monkeypatch.chdir(folder / place)
        wrong, _ = messages(fastinterp.check(file))
        hint = f" It is in '{folder}': relative paths start at the current folder. Run it there"
        assert len(wrong) == 2 and all(w.endswith(hint) for w in wrong)
        with pytest.raises(fastinterp.CheckpointError) as caught:
            fastinterp.merge(file, "out")
        assert str(caught.value).endswith(f"{hint} - at $.models[0].model ({file}:3)")
    (folder / "recipes" / "r.yml").write_text(text.replace("./a", "./no"))
    wrong, _ = messages(fastinterp.check("../recipes/r.yml"))
    assert wrong[0].endswith(f"Relative paths start at the current folder, '{folder / 'elsewhere'}'")


FISHER = {
    "merge_method": "fisher",
    "models": [{"model": m, "parameters": {"fisher": f"./{m}-f"}} for m in ("a", "b")],
}


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16, F8_E4M3, F8_E5M2], ids=str)
def test_negative_importances_are_told(folder, dtype):
    """By check and by the merge; -0 and NaN, whatever its sign, are not below 0."""
    size = dtype.bits // 8
    for name in ("a", "b"):
        model = {n: tensor(np.abs(floats(t)).reshape(t.shape), dtype) for n, t in llama().items()}
        bits = model["model.layers.1.mlp.up_proj.weight"].raw.view(f"u{size}")
        bits[1:3] = (1 << 8 * size - 1), (1 << 8 * size) - 1
        if name == "b":
            bits[9] |= 1 << 8 * size - 1
        save(f"{name}-f", model)
    told = (
        "the side-car ./b-f holds numbers below 0, in model.layers.1.mlp.up_proj.weight for example: importances "
        "must not be negative, since the merge divides by their sum"
    )
    assert messages(fastinterp.check(FISHER)) == ([], [told])
    assert told in fastinterp.merge(FISHER, "out").warnings
    model["model.layers.1.mlp.up_proj.weight"].raw.view(f"u{size}")[9] = 0
    save("b-f", model)
    assert messages(fastinterp.check(FISHER)) == ([], [])
    assert told not in fastinterp.merge(FISHER, "out", force=True).warnings


def test_tensors_of_one_model_only_and_shapes_that_differ(folder):
    more = llama(layers=3)
    more["model.embed_tokens.weight"] = weights(0, BF16, (25, 16))
    save("a", more)
    fewer = llama(noise=0.1)
    del fewer["model.layers.1.mlp.up_proj.weight"]
    save("b", fewer)
    wrong, _ = messages(fastinterp.check(recipe("linear", ["base", "a", "b"], parameters={"weight": 1})))
    remedy = (
        "`missing: base` in the recipe (--missing base) takes what not all have from base and leaves out what that "
        "lacks, `missing: skip` leaves out all of it, and `modules` merges parts of models"
    )
    assert wrong == [
        f"the models have different tensors: a alone has model.layers.2.mlp.up_proj.weight. {remedy}",
        f"the models have different tensors: base alone has model.layers.1.mlp.up_proj.weight. {remedy}",
        "model.embed_tokens.weight is [24, 16] in base but [25, 16] in a",
    ]


def test_vocabularies_of_different_size(folder):
    for name, rows in (("base", 24), ("a", 25)):
        save(name, {**llama(noise=0.1), "model.embed_tokens.weight": weights(0, BF16, (rows, 16))}, vocab_size=rows)
    asked = recipe("linear", ["base", "a"], parameters={"weight": 1})
    (wrong,), _ = messages(fastinterp.check(asked))
    assert wrong.endswith(
        "[25, 16] in a. Only tensors of the same shape merge: `missing: base` in the recipe (--missing base) takes "
        "those of base, `missing: skip` leaves them out. If a row is of the same token in all models, "
        "`truncate_embeddings: true` in the recipe cuts to the fewest rows"
    )
    assert fastinterp.check({**asked, "truncate_embeddings": True}).errors == ()
    assert fastinterp.check({**asked, "missing": "base"}).errors == ()
    for name in ("base", "a"):
        tokens.words(Path(name), ["<unk>", "cat"])
    (wrong,), _ = messages(fastinterp.check(asked))
    assert wrong.endswith(
        "The vocabularies differ in size: say which one the output has, `tokenizer_source: union` or "
        "`tokenizer_source: base` in the recipe, --tokenizer-source union or base of interpolate, "
        "average and sweep. Or `missing: base` copies these tensors from the base. If a row is of the same token in "
        "all models, `truncate_embeddings: true` in the recipe cuts to the fewest rows"
    )
    assert fastinterp.check({**asked, "missing": "base"}).errors == ()
    for source in ("union", "base"):
        assert fastinterp.check({**asked, "tokenizer_source": source}).errors == ()


def test_parameters_that_are_never_used_are_said_once(folder):
    """Planning has these warnings, too: of a document that is the whole recipe, and of one above another."""
    text = """merge_method: linear
models:
  - {model: a, parameters: {weight: 1}}
  - model: b
    parameters: {weight: 1, int8_mask: true}
"""
    Path("li.yml").write_text(text)
    _, warnings = messages(fastinterp.check("li.yml"))
    assert warnings == ["5: `linear` has no parameter `int8_mask`: it is ignored"]
    below = "---\nmerge_method: linear\nmodels:\n  - {model: x}\n  - {model: base}\nparameters: {weight: 1}\n"
    Path("two.yml").write_text(f"name: x\n{text}{below}")
    _, warnings = messages(fastinterp.check("two.yml"))
    assert warnings == ["6: `linear` has no parameter `int8_mask`: it is ignored"]


def test_integers_that_differ(folder):
    for name, value in (("a", 1), ("b", 2)):
        save(name, {**llama(noise=value / 100), "step": integers([value], "I64"), "same": integers([7], "I64")})
    (wrong,), _ = messages(fastinterp.check(recipe("linear", ["a", "b"], parameters={"weight": 1})))
    assert wrong.startswith("step (I64) is not averaged, and differs between a and b. Say whose to take")
    assert fastinterp.check(recipe("linear", ["a", "b"], parameters={"weight": 1}, integers="b")).errors == ()


def test_long_integers_are_compared_in_part(folder, monkeypatch):
    monkeypatch.setattr(chunks, "_AGREE_BYTES", 16)
    for name in ("a", "b"):
        save(name, {**llama(noise=0.01 * ord(name)), "step": integers(range(4), "I64")})
    wrong, (warnings,) = messages(fastinterp.check(recipe("linear", ["a", "b"], parameters={"weight": 1})))
    assert wrong == [] and warnings.startswith("1 tensor that no method merges must be the same in all models")


def test_what_the_recipe_alone_tells(folder):
    text = (
        "merge_method: ties\nbase_model: base\nmodels:\n  - {model: a}\n"
        "parameters: {weight: 0.5, density: 0.5, int8_mask: true}\nseed: 3\n"
    )
    assert messages(fastinterp.check(text)) == (
        [],
        [
            "5: `weight` changes nothing: there is one model, and `normalize` divides by its weight. Write `normalize: "
            "false`, or use `lambda`",
            "5: `int8_mask` changes nothing: masks take no memory here",
            "6: `seed` changes nothing: ties draws nothing, and rounding is to nearest",
        ],
    )


def test_weights_that_cancel_are_wrong_before_anything_is_read(folder):
    """The merge would find out when it has answers."""
    given = recipe("ties", ["a", "b"], weights=[0.5, -0.5], base_model="base", parameters={"density": 0.5})
    (wrong,), _ = messages(fastinterp.check(given))
    assert wrong.startswith("the weights 0.5, -0.5 sum to 0, which is too near 0 to divide by")
    with pytest.raises(fastinterp.MethodError, match="too near 0 to divide by"):
        fastinterp.merge(given, folder / "out")
    given["parameters"] = {"density": 0.5, "preset": "peft"}  # counts models
    assert fastinterp.check(given).errors == ()
    fastinterp.merge(given, folder / "out")


def test_nan_and_inf_in_the_samples(folder):
    for name, bits in (("a", 0x7FC0), ("b", 0x7F80)):
        model = llama(noise=1e-2 * ord(name))
        model["model.layers.1.mlp.up_proj.weight"].raw.view(np.uint16)[7] = bits
        save(name, model)
    _, warnings = messages(fastinterp.check(recipe("linear", ["base", "a", "b"], parameters={"weight": 1})))
    assert warnings == [f"{name} contains NaN or Inf, in model.layers.1.mlp.up_proj.weight" for name in ("a", "b")]
    _, warnings = messages(fastinterp.check(recipe("passthrough", ["a"])))
    assert warnings == ["a contains NaN or Inf, in model.layers.1.mlp.up_proj.weight"]


def test_models_that_are_the_same(folder):
    save("a", llama())
    _, warnings = messages(
        fastinterp.check(recipe("task_arithmetic", ["a", "b"], base_model="base", parameters={"weight": 1}))
    )
    assert warnings == ["a and base are equal in all samples: is one of them the wrong model?"]


def test_models_that_only_say_that_they_are_quantised(folder):
    save("a", llama(noise=0.01), quantization_config={"quant_method": "fp8"})
    result = fastinterp.check(recipe("linear", ["a", "base"], parameters={"weight": 1}))
    assert messages(result) == ([], [])
    assert result.remarks == (
        "config.json of a says that weights are quantised (fp8), and those here are not: left out",
    )


def cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("dtype", [F8_E4M3, F8_E5M2], ids=str)
@pytest.mark.parametrize("size", [5e-4, 5e-3, 5e-2])
@pytest.mark.parametrize("both", [True, False], ids=["both", "base"])
def test_deltas_of_quantised_models(folder, dtype, size, both):
    """The share of signal that is told is the cosine of the stored delta with the true one, to a tenth."""
    exact = bell(1, 16384)
    change = bell(2, 16384) * size
    base, tuned = tensor(exact, dtype), tensor(exact + change, dtype if both else F32)
    save("base", {"w": base})
    save("a", {"w": tuned})
    want = cosine(floats(tuned) - floats(base), change)
    found = fastinterp.check(recipe("task_arithmetic", ["a"], base_model="base", parameters={"weight": 0.5}))
    noisy = [f.message for f in found.warnings if "mostly rounding noise" in f.message]
    if want > 0.8:
        assert noisy == []
    elif want < 0.6:
        (message,) = noisy
        assert f"stored as {dtype}" in message
        told = float(message.partition("about ")[2].split()[0])
        # Where one model is rounded, a signal far below the rounding is lost in the variance of the estimate.
        assert told == pytest.approx(want, abs=0.1 if both else 0.25)
    averaged = fastinterp.check(recipe("linear", ["base", "a"], parameters={"weight": 1}))
    assert averaged.warnings == (), "an average takes no deltas"


def test_samples_are_few(folder, monkeypatch):
    monkeypatch.setattr(chunks, "TENSORS", 2)
    found = fastinterp.check(recipe("ties", ["a", "b"], **TIES))
    assert (found.tensors, found.sampled) == (3, 2)


def test_a_sample_is_the_middle_of_a_tensor(folder, monkeypatch):
    """NaN there is found; at an end of the tensor, where nothing is read, it is not."""
    monkeypatch.setattr(chunks, "CHUNK", 4)
    for at, found in ((3, ()), (4, ("x",)), (7, ("x",)), (8, ())):
        values = np.ones(12)
        values[at] = np.nan
        save("n", {"x": tensor(values, F32)})
        warnings = fastinterp.check(recipe("passthrough", ["n"])).warnings
        assert tuple(f.message.rpartition(" ")[2] for f in warnings) == found


def test_slices(folder):
    text = (
        "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [0, 2]}]\n"
        "  - sources: [{model: b, layer_range: [1, 2]}]\n"
    )
    found = fastinterp.check(text)
    assert (found.errors, found.warnings, found.tensors) == ((), (), 4)
    (wrong,), _ = messages(fastinterp.check(text.replace("[1, 2]", "[1, 3]")))
    assert wrong == "4: `layer_range` [1, 3] goes beyond the 2 layers of b"


def test_no_document_hides_another(folder):
    """What is wrong in one is no reason not to look at those that do not use it."""
    text = "name: {0}\nmerge_method: passthrough\nslices: [{{sources: [{{model: {1}, layer_range: [1, {2}]}}]}}]\n---\n"
    text = text.format("one", "a", 7) + text.format("two", "b", 9) + "merge_method: linear\nmodels:\n  - {model: one}\n"
    wrong, _ = messages(fastinterp.check(text + "  - {model: two}\nparameters: {weight: 1}\n"))
    assert wrong == [
        "3: `layer_range` [1, 7] goes beyond the 2 layers of a",
        "7: `layer_range` [1, 9] goes beyond the 2 layers of b",
    ]


def test_a_fault_of_the_tokenizer_hides_no_filter(folder):
    text = (
        "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: [{filter: mpl, value: 2}, {value: 1}]}}\n"
        "  - {model: b, parameters: {weight: 1}}\nseed: 0\ntokenizer: {source: union}\n"
    )
    wrong, warnings = messages(fastinterp.check(text))
    assert len(wrong) == 1 and wrong[0].startswith("6: ") and "tokenizer" in wrong[0]
    assert "3: the filter 'mpl' matches nothing: no tensor's name has it, did you mean `mlp`?" in warnings


def test_documents_that_build_on_each_other(folder):
    text = (
        "name: cut\nmerge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [1, 2]}]}]\n---\n"
        "merge_method: passthrough\nmodels: [{model: cut}]\n"
        "parameters: {scale: [{filter: layers.1., value: 2}, {value: 3}]}\n"
    )
    found = fastinterp.check(text)
    assert messages(found) == ([], ["7: the filter 'layers.1.' matches nothing: no tensor's name has it"])
    assert found.tensors == 2
    (wrong,), _ = messages(fastinterp.check(text.replace("model: a,", "model: ./c,")))
    assert wrong.startswith("3: ./c: there is no such folder")


def test_models_beside_the_recipe(folder):
    """Each is told where it is."""
    (folder / "in").mkdir()
    text = "merge_method: linear\nmodels: [{model: x}, {model: y}]\nparameters: {weight: 1}\n"
    (folder / "in" / "r.yml").write_text(text)
    for name in ("x", "y"):
        save(f"in/{name}", llama())
    wrong, _ = messages(fastinterp.check("in/r.yml"))
    assert [w.partition(". Write")[0] for w in wrong] == [
        f"2: there is no '{name}' in the current folder, where relative paths start, but there is one beside the recipe"
        for name in ("x", "y")
    ]


def test_a_name_that_is_wrong_in_itself_is_not_looked_for(folder):
    (wrong,), _ = messages(fastinterp.check(recipe("linear", ["a", "a+"], parameters={"weight": 1})))
    assert wrong.startswith("the name of an adapter, behind `+`, must not be empty")


def test_names_that_are_close(folder):
    (folder / "recipe.yml").write_text("")
    assert (
        fastinterp.check("recipy.yml").errors[0].message == "there is no such recipe file. Did you mean 'recipe.yml'?"
    )
    assert fastinterp.check("a:\n\t- b\n").errors[0].message == "not valid YAML: a tab indents this line. Write spaces"
    given = recipe("ties", ["a"], base_model="base", parameters={"weight": 1, "density": "30%"})
    assert fastinterp.check(given).errors[0].message.endswith("got '30%'. A fraction? Write 0.3")
    assert fastinterp.check("no/r.yml").errors[0].message == "there is no such recipe file: there is no folder 'no'"
    text = (
        "merge_method: passthrough\nmodels: [{model: a}]\nparameters: {scale: [{filter: mpl, value: 2}, {value: 3}]}\n"
    )
    assert [f.message for f in fastinterp.check(text).warnings] == [
        "the filter 'mpl' matches nothing: no tensor's name has it, did you mean `mlp`?"
    ]


@pytest.mark.parametrize("text", ["none.yml", "merge_method: [\n", "- a\n"])
def test_what_is_no_recipe(folder, text):
    found = fastinterp.check(text)
    assert len(found.errors) == 1 and found.exit_code == 2
