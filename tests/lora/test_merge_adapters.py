"""Adapters merged with each other, compared with dense sums in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import fastinterp
from fastinterp.cli import commands
from fastinterp.errors import CheckpointError, MethodError, RecipeError, ShapeError, UsageError
from tests.lora.adapters import (
    assert_close,
    changes,
    factors,
    read_adapter,
    recipe,
    summed,
    write_adapter,
)
from tests.support.stated_checksums import checked_weights

Q, UP, CONV = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "unet.conv_in"
# Products of stored factors of float32 in float64: what differs are roundings of B * c to float32, at most 2^-24 each.
EXACT = 1e-6


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    """Two adapters of different ranks, scales and modules."""
    a = write_adapter(tmp_path / "a", {Q: factors(1, 12, 4, 10), UP: factors(2, 20, 4, 10)}, lora_alpha=6)
    b = write_adapter(
        tmp_path / "b", {Q: factors(3, 12, 8, 10), "model.layers.1.self_attn.q_proj": factors(4, 12, 2, 10)},
        lora_alpha=16, use_rslora=True, rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 3},
    )  # fmt: skip
    return a, b


def merge(tmp_path: Path, given: dict[str, Any], **settings: Any) -> Any:
    return fastinterp.merge_adapters(given, tmp_path / "out", **settings)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.7, -0.4), (-1.0, -1.0), (2.5, 0.0)])
def test_linear_is_the_sum_of_the_changes(tmp_path, two, weights):
    weights = dict(zip(two, weights, strict=True))
    report = merge(tmp_path, recipe(weights))
    want = {module: change for module, change in summed(weights).items() if change.any()}
    assert_close(changes(tmp_path / "out"), want, EXACT)
    assert report.exact and report.total.relative_error < 2**-24


def test_ranks_are_added_and_the_configuration_says_so(tmp_path, two):
    merge(tmp_path, recipe(dict.fromkeys(two, 0.5)))
    tensors, config = read_adapter(tmp_path / "out")
    assert tensors[f"{Q}.lora_A.weight"].shape == (12, 10) and tensors[f"{Q}.lora_B.weight"].shape == (12, 12)
    assert config["target_modules"] == ["q_proj", "up_proj"]
    assert config["base_model_name_or_path"] == "org/base" and config["task_type"] == "CAUSAL_LM"
    assert not config["use_rslora"] and config["modules_to_save"] is None
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    checked_weights(tmp_path / "out" / "adapter_model.safetensors")


def test_task_arithmetic_needs_no_base(tmp_path, two):
    merge(tmp_path, recipe({two[0]: 0.5, two[1]: 1.5}, "task_arithmetic", parameters={"lambda": 2.0}))
    assert_close(changes(tmp_path / "out"), summed({two[0]: 1.0, two[1]: 3.0}), EXACT)


def test_weights_are_normalised_as_those_of_models(tmp_path, two):
    merge(tmp_path, recipe({two[0]: 1.0, two[1]: 3.0}, parameters={"normalize": True}))
    assert_close(changes(tmp_path / "out"), summed({two[0]: 0.25, two[1]: 0.75}), EXACT)


def test_parameters_of_tensors_and_layers_count(tmp_path, two):
    given = recipe(dict.fromkeys(two, 1.0))
    given["models"][0]["parameters"]["weight"] = [{"filter": "mlp", "value": 0.0}, {"value": 0.5}]
    merge(tmp_path, given)
    want = summed({two[0]: 0.5, two[1]: 1.0})
    del want[UP]
    assert_close(changes(tmp_path / "out"), want, EXACT)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_factors_keep_their_bits_where_scales_are_equal(tmp_path, dtype):
    """The mean of adapters of one scale: alpha is that of each, and nothing is rounded."""
    pairs = [factors(seed, 12, 4, 10, dtype) for seed in (1, 2)]
    a, b = (write_adapter(tmp_path / name, {Q: p}, lora_alpha=16) for name, p in zip("ab", pairs, strict=True))
    report = merge(tmp_path, recipe({a: 0.5, b: -0.5}))
    tensors, config = read_adapter(tmp_path / "out")
    assert (config["r"], config["lora_alpha"]) == (8, 16) and report.total.error == 0
    assert tensors[f"{Q}.lora_A.weight"].tobytes() == np.concatenate([p[0] for p in pairs]).tobytes()
    want = np.concatenate([pairs[0][1], -pairs[1][1]], axis=1)
    assert tensors[f"{Q}.lora_B.weight"].dtype == dtype and tensors[f"{Q}.lora_B.weight"].tobytes() == want.tobytes()


def test_a_dtype_that_rounds_is_reported(tmp_path, two):
    report = merge(tmp_path, recipe(dict.fromkeys(two, 0.3), dtype="float16"))
    assert read_adapter(tmp_path / "out")[0][f"{Q}.lora_A.weight"].dtype == np.float16
    want = summed(dict.fromkeys(two, 0.3))
    got = changes(tmp_path / "out")
    error = np.linalg.norm([np.linalg.norm(got[m] - want[m]) for m in want])
    assert report.total.error == pytest.approx(error, rel=1e-3) and 0 < report.total.relative_error < 2**-10


@pytest.mark.parametrize("rank", [1, 3, 9, 11])
def test_rank_is_the_best_approximation_of_the_sum(tmp_path, two, rank):
    weights = {two[0]: 0.7, two[1]: -0.4}
    report = merge(tmp_path, recipe(weights, rank=rank))
    got, want = changes(tmp_path / "out"), summed(weights)
    for module, change in want.items():
        s = np.linalg.svd(change, compute_uv=False)
        best = np.linalg.norm(s[rank:])
        assert np.linalg.norm(got[module] - change) <= best + 1e-6 * s[0]
        found = next(m for m in report.modules if m.name == module)
        assert found.error == pytest.approx(best, abs=1e-6 * s[0]) and found.norm == pytest.approx(np.linalg.norm(s))
        assert found.energy == pytest.approx(1 - best**2 / np.sum(s**2), abs=1e-6) and found.rank <= rank
    assert report.total.norm == pytest.approx(np.linalg.norm([np.linalg.norm(c) for c in want.values()]))


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear", "breadcrumbs"])
def test_other_methods_run_on_the_changes(tmp_path, two, method):
    """The oracle: the same method on the dense changes, with a base of zeros, and its SVD in float64."""
    parameters = {"density": 0.6}
    weights = {two[0]: 0.7, two[1]: 0.4}
    report = merge(tmp_path, recipe(weights, method, parameters=parameters, rank=5, seed=7))
    got, both = changes(tmp_path / "out"), [changes(folder) for folder in two]
    names = {module for one in both for module in one}
    assert got.keys() == names and not report.exact
    for module in names:
        shape = next(one[module].shape for one in both if module in one)
        dense = [one.get(module, np.zeros(shape)).astype(np.float32) for one in both]
        merged = fastinterp.merge_tensors(
            dense, method, base=np.zeros(shape, np.float32), parameters={"weight": [*weights.values()]} | parameters,
            name=f"{module}.weight", seed=7,
        )  # fmt: skip
        u, s, v = np.linalg.svd(merged.astype(np.float64), full_matrices=False)
        assert np.abs(got[module] - (u[:, :5] * s[:5]) @ v[:5]).max() <= 1e-5 * s[0]
        found = next(m for m in report.modules if m.name == module)
        assert found.relative_error == pytest.approx(np.linalg.norm(s[5:]) / np.linalg.norm(s), abs=1e-5)


def test_other_methods_have_the_sum_of_ranks_by_default(tmp_path, two):
    report = merge(tmp_path, recipe(dict.fromkeys(two, 1.0), "ties", parameters={"density": 0.5}))
    assert {m.name: m.rank for m in report.modules} == {Q: 12, UP: 4, "model.layers.1.self_attn.q_proj": 2}


def test_convolutions(tmp_path):
    def conv(seed, rank):
        a, b = factors(seed, 6, rank, 5 * 9)
        return a.reshape(rank, 5, 3, 3), b.reshape(6, rank, 1, 1)

    a, b = (write_adapter(tmp_path / name, {CONV: conv(i, i + 2)}) for i, name in enumerate("ab"))
    merge(tmp_path, recipe({a: 0.5, b: -2.0}))
    tensors, _ = read_adapter(tmp_path / "out")
    assert tensors[f"{CONV}.lora_A.weight"].shape == (5, 5, 3, 3)
    assert tensors[f"{CONV}.lora_B.weight"].shape == (6, 5, 1, 1)
    assert_close(changes(tmp_path / "out"), summed({a: 0.5, b: -2.0}), EXACT)
    merge(tmp_path, recipe({a: 0.5, b: -2.0}, "ties", parameters={"density": 1.0}, rank=4), force=True)
    assert read_adapter(tmp_path / "out")[0][f"{CONV}.lora_A.weight"].shape == (4, 5, 3, 3)


def test_adapters_of_other_styles_give_files_of_their_style(tmp_path):
    """kohya: alpha is stored beside the factors."""
    stem, files = "lora_unet_down_blocks_0_attn_to_q", []
    for seed, alpha in ((1, 2.0), (2, 3.0)):
        a, b = factors(seed, 8, 4, 6, np.float16)
        tensors = {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": np.float16(alpha)}
        files.append(str(tmp_path / f"{seed}.safetensors"))
        save_file({name: np.asarray(x) for name, x in tensors.items()}, files[-1])
    fastinterp.merge_adapters(recipe(dict(zip(files, (0.7, -0.4), strict=True))), tmp_path / "out.safetensors")
    made = load_file(tmp_path / "out.safetensors")
    assert made.keys() == tensors.keys() and made[f"{stem}.lora_down.weight"].shape == (8, 6)

    def change(x):
        down, up = (x[f"{stem}.lora_{part}.weight"].astype(np.float64) for part in ("down", "up"))
        return float(x[f"{stem}.alpha"]) / down.shape[0] * up @ down

    want = 0.7 * change(load_file(files[0])) - 0.4 * change(load_file(files[1]))
    assert np.abs(change(made) - want).max() <= EXACT * np.abs(want).max()


# --- tensors that are no products ------------------------------------------------------------------------------------

HEAD = {"lm_head.weight": np.ones((6, 4), np.float32)}


def test_modules_that_were_trained_whole_are_averaged(tmp_path):
    a = write_adapter(tmp_path / "a", {Q: factors(1, 12, 4, 10)}, HEAD, modules_to_save=["lm_head"])
    b = write_adapter(
        tmp_path / "b", {Q: factors(2, 12, 4, 10)}, {"lm_head.weight": HEAD["lm_head.weight"] * 3},
        modules_to_save=["lm_head"],
    )  # fmt: skip
    report = merge(tmp_path, recipe({a: 0.25, b: 0.75}))
    tensors, config = read_adapter(tmp_path / "out")
    assert config["modules_to_save"] == ["lm_head"] and np.array_equal(tensors["lm_head.weight"], np.full((6, 4), 2.5))
    assert len(report.saved) == 1


def test_whole_modules_need_weights_that_add_up_to_1(tmp_path):
    a = write_adapter(tmp_path / "a", {Q: factors(1, 12, 4, 10)}, HEAD, modules_to_save=["lm_head"])
    b = write_adapter(tmp_path / "b", {Q: factors(2, 12, 4, 10)})
    with pytest.raises(CheckpointError, match=r"`lm_head.weight` is .* replaced as a whole, in .* add up to 0.5"):
        merge(tmp_path, recipe({a: 0.5, b: 0.5}))
    with pytest.raises(CheckpointError, match="`ties` needs the base's for that"):
        merge(tmp_path, recipe({a: 1.0, b: 0.5}, "ties", parameters={"density": 0.5}))
    assert not (tmp_path / "out").exists()
    merge(tmp_path, recipe({a: 1.0, b: 0.5}))  # that of `a`, as b leaves it
    assert np.array_equal(read_adapter(tmp_path / "out")[0]["lm_head.weight"], HEAD["lm_head.weight"])


@pytest.mark.parametrize("equal", [True, False])
def test_embeddings_that_peft_copied_from_the_base(tmp_path, equal):
    """peft stores the base's embedding beside factors of it: the copies are equal, whatever the weights are."""
    name = "model.embed_tokens.base_layer.weight"
    copies = [np.ones((6, 4), np.float32), np.full((6, 4), 1.0 if equal else 2.0, np.float32)]
    a, b = (
        write_adapter(tmp_path / folder, {Q: factors(1, 12, 4, 10)}, {name: copy})
        for folder, copy in zip("ab", copies, strict=True)
    )
    if equal:
        merge(tmp_path, recipe({a: 2.0, b: 0.5}))
        assert np.array_equal(read_adapter(tmp_path / "out")[0][name], copies[0])
    else:
        with pytest.raises(ShapeError, match="not the same in all adapters"):
            merge(tmp_path, recipe({a: 2.0, b: 0.5}))
        assert not (tmp_path / "out").exists()


def test_biases_of_adapters_are_summed(tmp_path):
    """lora_bias: a bias is added with the scale of the product."""
    name = f"{Q}.lora_B.bias"
    bias = np.arange(12, dtype=np.float32)
    a = write_adapter(tmp_path / "a", {Q: factors(1, 12, 4, 10)}, {name: bias}, lora_alpha=8, lora_bias=True)
    b = write_adapter(tmp_path / "b", {Q: factors(2, 12, 4, 10), UP: factors(3, 20, 4, 10)}, lora_alpha=2)
    merge(tmp_path, recipe({a: 0.7, b: 0.3}))
    tensors, config = read_adapter(tmp_path / "out")
    assert config["lora_bias"] is True and not tensors[f"{UP}.lora_B.bias"].any()
    scale = config["lora_alpha"] / config["r"]
    np.testing.assert_allclose(scale * tensors[name], 0.7 * 2 * bias, rtol=1e-6)


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, kind: type[Exception], match: str, given: dict[str, Any], **settings: Any) -> None:
    with pytest.raises(kind, match=match):
        merge(tmp_path, given, **settings)
    assert not (tmp_path / "out").exists()


def test_adapters_of_other_shapes(tmp_path):
    a = write_adapter(tmp_path / "a", {Q: factors(1, 12, 4, 10)})
    b = write_adapter(tmp_path / "b", {Q: factors(1, 14, 4, 10)})
    message = rf"the products for `{Q}.weight` do not fit each other: \[12, 4\] x \[4, 10\] in .* of different models"
    refused(tmp_path, ShapeError, message, recipe({a: 1, b: 1}))


def test_adapters_of_another_base_are_a_warning(tmp_path):
    a = write_adapter(tmp_path / "a", {Q: factors(1, 12, 4, 10)})
    b = write_adapter(tmp_path / "b", {Q: factors(1, 12, 4, 10)}, base_model_name_or_path="org/other")
    report = merge(tmp_path, recipe({a: 1, b: 1}))
    assert any("'org/other'" in warning and "'org/base'" in warning for warning in report.warnings)


def test_transposed_and_plain_weights(tmp_path):
    a = write_adapter(tmp_path / "a", {Q: factors(1, 12, 4, 10)})
    b = write_adapter(tmp_path / "b", {Q: factors(1, 12, 4, 10)}, fan_in_fan_out=True)
    refused(tmp_path, CheckpointError, "its `fan_in_fan_out` is true, that of .* false", recipe({a: 1, b: 1}))


def test_dora(tmp_path):
    magnitude = {f"{Q}.lora_magnitude_vector": np.ones(12, np.float32)}
    a = write_adapter(tmp_path / "a", {Q: factors(1, 12, 4, 10)}, magnitude, use_dora=True)
    refused(tmp_path, CheckpointError, "it is of DoRA", recipe({a: 1}))


def test_a_model_among_the_adapters(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    save_file({f"{Q}.weight": np.ones((12, 10), np.float32)}, model / "model.safetensors")
    a = write_adapter(tmp_path / "a", {Q: factors(1, 12, 4, 10)})
    refused(
        tmp_path, CheckpointError, "this is a model, and `out: lora` merges adapters", recipe({a: 1, str(model): 1})
    )


def test_adapters_behind_a_plus(tmp_path, two):
    refused(tmp_path, RecipeError, "list each as a model of its own", recipe({"+".join(two): 1}))


def test_a_model_as_base_is_what_the_adapters_change(tmp_path, two):
    model = tmp_path / "model"
    model.mkdir()
    save_file({f"{Q}.weight": np.ones((12, 10), np.float32)}, model / "model.safetensors")
    merge(tmp_path, recipe(dict.fromkeys(two, 0.5), "task_arithmetic", base_model=str(model)))
    assert_close(changes(tmp_path / "out"), summed(dict.fromkeys(two, 0.5)), EXACT)


def test_an_adapter_as_base_is_where_deltas_start(tmp_path, two):
    merge(tmp_path, recipe({two[1]: 0.25}, "task_arithmetic", base_model=two[0]))
    assert_close(changes(tmp_path / "out"), summed({two[0]: 0.75, two[1]: 0.25}), EXACT)


@pytest.mark.parametrize(
    ("keys", "kind", "match"),
    [
        ({"rank": 0}, RecipeError, "`rank` must be at least 1"),
        ({"out": "loar"}, RecipeError, "`out` must be model or lora"),
        ({"out": "model", "rank": 4}, RecipeError, "`rank` is that of an adapter: it needs `out: lora`"),
        ({"tokenizer_source": "union"}, RecipeError, "`tokenizer_source` has no meaning for adapters"),
        ({"rounding": "stochastic"}, RecipeError, "rounded to nearest: remove `rounding`"),
        ({"missing": "skip"}, RecipeError, "`missing` has no meaning for adapters"),
        ({"merge_method": "slerp", "parameters": {"t": 0.5}}, RecipeError, "`slerp` needs the key `base_model`"),
    ],
)
def test_keys(tmp_path, two, keys, kind, match):
    given = recipe(dict.fromkeys(two, 1.0)) | keys
    if keys.get("merge_method"):
        given["models"] = [{"model": folder} for folder in two]
    refused(tmp_path, kind, match, given)


@pytest.mark.parametrize(
    ("method", "match"),
    [("linear", "every weight is 0"), ("task_arithmetic", "all weights are 0: the adapter would have no tensor")],
)
def test_weights_of_0(tmp_path, two, method, match):
    refused(tmp_path, MethodError, match, recipe(dict.fromkeys(two, 0.0), method))


def test_a_file_is_no_adapter_of_peft(tmp_path, two):
    with pytest.raises(UsageError, match="an adapter of peft is a folder"):
        fastinterp.merge_adapters(recipe(dict.fromkeys(two, 1.0)), tmp_path / "out.safetensors")


def test_nan_in_factors(tmp_path):
    a, b = factors(1, 12, 4, 10)
    a[0, 0] = np.nan
    folder = write_adapter(tmp_path / "a", {Q: (a, b)})
    refused(tmp_path, CheckpointError, f"the factors of `{Q}` hold NaN or Inf", recipe({folder: 0.3}))


def test_numbers_that_the_dtype_cannot_hold(tmp_path):
    a, b = factors(1, 12, 4, 10)
    folder = write_adapter(tmp_path / "a", {Q: (a, b * 1e6)})
    refused(tmp_path, CheckpointError, "beyond the range of F16", recipe({folder: 0.3}, dtype="float16"))
    merge(tmp_path, recipe({folder: 0.3}, dtype="float16"), dtype="float32")  # the remedy


def test_inputs_and_existing_outputs_are_kept(tmp_path, two):
    merge(tmp_path, recipe(dict.fromkeys(two, 1.0)))
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(fastinterp.errors.OutputError, match="--force"):
        merge(tmp_path, recipe(dict.fromkeys(two, 2.0)))
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    merge(tmp_path, recipe(dict.fromkeys(two, 2.0)), force=True)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != before
    with pytest.raises(fastinterp.errors.OutputError, match="inputs are never overwritten"):
        fastinterp.merge_adapters(recipe(dict.fromkeys(two, 1.0)), two[0], force=True)


def test_only_merge_makes_adapters(tmp_path, two):
    with pytest.raises(RecipeError, match="only `fastinterp merge` does"):
        fastinterp.load(recipe(dict.fromkeys(two, 1.0)))


def test_without_out_lora_the_message_says_what_to_write(tmp_path, two):
    given = recipe(dict.fromkeys(two, 1.0))
    del given["out"]
    with pytest.raises(CheckpointError, match="`out: lora`") as caught:
        fastinterp.merge(given, tmp_path / "model")
    assert "Name it behind its base" in str(caught.value)
    merge(tmp_path, given | {"out": "lora"})  # the remedy


def test_the_report_as_json(tmp_path, two):
    report = merge(tmp_path, recipe(dict.fromkeys(two, 0.5), rank=2))
    made = json.loads(json.dumps(report.as_dict()))
    assert made["modules"][Q]["rank"] == 2 and 0 < made["total"]["energy"] < 1 and made["exact"] is False
    assert "energy kept" in report.summary()


# --- explain, check and the command ----------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(commands, [*arguments])


def test_explain_says_what_is_made(tmp_path, two):
    made = fastinterp.explain_adapters(recipe(dict.fromkeys(two, 0.5), rank=6))
    values = json.loads(json.dumps(made.as_dict()))
    assert values["modules"][Q] == {"ranks": [4, 8], "rank": 6, "exact": False, "shape": [12, 10]}
    assert values["modules"][UP]["exact"] and values["models"][0]["adapter"]["ranks"] == [4]
    assert "2 concatenated, 1 approximated" in str(made) and "0.5*x0 + 0.5*x1" in str(made)


def test_check_finds_what_merge_would_refuse(tmp_path, two):
    assert not fastinterp.check(recipe(dict.fromkeys(two, 0.5))).warnings  # weights of changes need not add up to 1
    other = write_adapter(tmp_path / "c", {Q: factors(1, 14, 4, 10)}, base_model_name_or_path="org/other")
    found = fastinterp.check(recipe({two[0]: 1, other: 1}))
    assert found.exit_code == 3 and "do not fit each other" in found.errors[0].message
    wrong = fastinterp.check(recipe({two[0]: 1}) | {"rank": -1})
    assert wrong.exit_code == 2 and "`rank` must be at least 1" in wrong.errors[0].message


def test_commands(tmp_path, two):
    file, out = tmp_path / "merge.yml", str(tmp_path / "out")
    file.write_text(json.dumps(recipe(dict.fromkeys(two, 0.5))))
    assert "an adapter of 3 modules" in run("explain", str(file)).stdout
    assert run("check", str(file)).exit_code == 0
    result = run("merge", str(file), out)
    assert result.exit_code == 0 and "3 modules of ranks 2 to 12" in result.stdout
    again = run("merge", str(file), out)
    assert again.exit_code == 4 and "--force" in again.stderr
    made = json.loads(run("merge", str(file), out, "--force", "--json").stdout)
    assert made["exact"] and made["modules"].keys() == changes(out).keys()
    assert "LoRA adapter (peft)" in run("inspect", out).stdout


def test_options_of_models_are_errors(tmp_path, two):
    """Options that would have no effect are named, and nothing is written."""
    (tmp_path / "r.json").write_text(json.dumps(recipe(dict.fromkeys(two, 0.5))))
    out = tmp_path / "out"
    done = run("merge", str(tmp_path / "r.json"), str(out), "--quantize", "same")
    assert done.exit_code == 2 and "--quantize is about models" in done.stderr
    assert not out.exists()
    done = run("merge", str(tmp_path / "r.json"), str(out), "--dtype", "float32")
    assert done.exception is None and (out / "adapter_config.json").exists()
