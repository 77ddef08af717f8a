"""Merges of models whose sets of tensors differ: `missing`, recomputed buffers, channels, names; bytes by numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import fastinterp
from fastinterp.cli import commands
from fastinterp.errors import ShapeError
from fastinterp.ops.dtypes import BF16, F16, F32, DType
from tests.support.checkpoints import Model, Tensor, floats, integers, read, receipt, tensor, write

UNET, VAE, EMA = "model.diffusion_model", "first_stage_model", "model_ema"


def filled(seed: int, shape: tuple[int, ...] = (4, 4), dtype: DType = F32) -> Tensor:
    return tensor(np.random.default_rng(seed).normal(size=shape), dtype)


def unet(seed: int, **more: Tensor) -> dict[str, Tensor]:
    return {f"{UNET}.input_blocks.{i}.1.weight": filled(seed + i) for i in range(3)} | more


def values(of: Tensor) -> np.ndarray:
    return floats(of).reshape(of.shape)


def average(a: Path, b: Path, weights: tuple[float, float] = (0.5, 0.5), **keys: Any) -> dict[str, Any]:
    models = [{"model": str(p), "parameters": {"weight": w}} for p, w in zip((a, b), weights, strict=True)]
    return {"merge_method": "linear", "models": models, **keys}


def merged(tmp_path: Path, recipe: dict[str, Any], **options: Any) -> tuple[Model, Any]:
    out = tmp_path / f"out {len(list(tmp_path.glob('out *')))}"
    report = fastinterp.merge(recipe, out, **options)
    return read(out), report


def command(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(commands, [str(a) for a in args], prog_name="fastinterp", catch_exceptions=False)
    return result.exit_code, result.output


# --- missing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path) -> tuple[Path, Path]:
    """The first has a VAE and an EMA copy, the second a head; a tensor that both have is of other shapes."""
    more = {f"{VAE}.{i}.weight": filled(50 + i, dtype=F16) for i in range(4)} | {f"{EMA}.decay": filled(9, ())}
    a = write(tmp_path / "a", unet(1) | more | {"position.weight": filled(7, (8, 4))})
    b = write(tmp_path / "b", unet(2) | {"score.weight": filled(8), "position.weight": filled(6, (6, 4))})
    return a, b


def test_the_error_groups_what_differs_and_names_its_remedies(tmp_path, parts):
    """Each of them is followed, in a recipe and from the command line."""
    a, b = parts
    with pytest.raises(ShapeError) as caught:
        merged(tmp_path, average(a, b))
    assert str(caught.value) == (
        f"the models have different tensors: {a} alone has {VAE}.* (4 tensors), {EMA}.decay; {b} alone has "
        f"score.weight. `missing: base` in the recipe (--missing base) takes what not all have from {a} and leaves out "
        "what that lacks, `missing: skip` leaves out all of it, and `modules` merges parts of models"
    )
    errors = [error.message for error in fastinterp.check(average(a, b)).errors]
    assert errors == [str(caught.value), f"position.weight is [8, 4] in {a} but [6, 4] in {b}"]
    for i, how in enumerate(("base", "skip")):
        want, _ = merged(tmp_path, average(a, b, missing=how))
        code, _ = command("interpolate", a, b, "--alpha", "0.5", "--missing", how, "-o", tmp_path / f"line {i}")
        assert code == 0
        assert read(tmp_path / f"line {i}").keys() == want.keys()
        code, _ = command("sweep", a, b, "--alphas", "0.5", "--missing", how, "-o", tmp_path / f"sweep {i}")
        assert code == 0 and read(tmp_path / f"sweep {i}" / "alpha_0.5").keys() == want.keys()
        assert fastinterp.check(average(a, b, missing=how)).errors == ()
        code, said = command("explain", json.dumps(average(a, b)) + "\n", "--missing", how)
        assert code == 0 and f"because {b} lacks them: {VAE}" in " ".join(said.split())
    modules = {UNET: {"models": average(a, b)["models"]}}
    made, _ = merged(tmp_path, {"merge_method": "linear", "base_model": str(a), "modules": modules})
    assert made.keys() == read(a).keys()


def test_missing_base_copies_and_skip_leaves_out(tmp_path, parts):
    a, b = parts
    x, y = read(a), read(b)
    made, report = merged(tmp_path, average(a, b, missing="base"))
    assert made.keys() == x.keys()
    for name in x:
        want = (values(x[name]) + values(y[name])) / 2 if name.startswith(UNET) else values(x[name])
        np.testing.assert_allclose(values(made[name]), want, atol=1e-6)
    assert made[f"{VAE}.0.weight"].raw.tobytes() == x[f"{VAE}.0.weight"].raw.tobytes()
    shape = "because not all models have it in one shape"
    assert report.remarks == (
        f"copied from {a}, because {b} lacks them: {VAE}.* (4 tensors), {EMA}.decay",
        f"copied from {a}, {shape}: position.weight",
        f"left out, because {a} lacks it: score.weight",
    )
    skipped, report = merged(tmp_path, average(a, b), missing="skip")
    assert skipped.keys() == {name for name in x if name.startswith(UNET)}
    assert report.remarks == (
        f"left out, because {b} lacks them: {VAE}.* (4 tensors), {EMA}.decay",
        f"left out, {shape}: position.weight",
        f"left out, because {a} lacks it: score.weight",
    )
    assert report.warnings == ()
    assert receipt(tmp_path / "out 1")["missing"] == "skip" and "missing" not in receipt(parts_merged(tmp_path, a))


def parts_merged(tmp_path: Path, a: Path) -> Path:
    """A merge in which nothing is missing."""
    c = write(tmp_path / "same", {name: filled(3, t.shape, t.dtype) for name, t in read(a).items()})
    merged(tmp_path, average(a, c))
    return tmp_path / "out 2"


def test_the_base_that_missing_copies_from(tmp_path, parts):
    """base_model, wherever it is listed, and even if it is not merged; else the first model."""
    a, b = parts
    made, _ = merged(tmp_path, average(b, a, missing="base", base_model=str(a)))
    assert set(made) == set(read(a))
    made, _ = merged(tmp_path, average(b, a, missing="base"))
    assert set(made) == set(read(b))
    c = write(tmp_path / "c", unet(3) | {"score.weight": filled(99)})
    recipe = average(a, b, base_model=str(c))
    for asked, options in ((recipe | {"missing": "base"}, {}), (recipe, {"missing": "base"})):
        made, _ = merged(tmp_path, asked, **options)
        assert set(made) == set(read(c))
        assert made["score.weight"].raw.tobytes() == read(c)["score.weight"].raw.tobytes()


def test_missing_with_slices(tmp_path):
    """A tensor of some layers only comes from the layer of the base, or is left out."""

    def model(seed: int, layers: int, biased: tuple[int, ...]) -> dict[str, Tensor]:
        own = {f"model.layers.{i}.mlp.weight": filled(seed + i) for i in range(layers)}
        return own | {f"model.layers.{i}.mlp.bias": filled(seed + 10 + i, (4,)) for i in biased}

    a = write(tmp_path / "a", model(1, 3, (0, 1)))
    b = write(tmp_path / "b", model(5, 3, ()))
    sources = [{"model": str(p), "layer_range": [0, 3], "parameters": {"weight": 0.5}} for p in (a, b)]
    recipe = {"merge_method": "linear", "slices": [{"sources": sources}]}
    with pytest.raises(ShapeError, match=r"a alone has mlp.bias in layer 0\. `missing: base`"):
        merged(tmp_path, recipe)
    made, report = merged(tmp_path, recipe | {"missing": "base"})
    assert made.keys() == read(a).keys()
    assert made["model.layers.1.mlp.bias"].raw.tobytes() == read(a)["model.layers.1.mlp.bias"].raw.tobytes()
    assert "model.layers.{0,1}.mlp.bias (2 tensors)" in report.remarks[0]
    made, _ = merged(tmp_path, recipe | {"missing": "skip"})
    assert made.keys() == read(b).keys()


def test_nothing_in_common(tmp_path):
    a, b = write(tmp_path / "a", {"x.weight": filled(1)}), write(tmp_path / "b", {"other.bias": filled(2, (3,))})
    with pytest.raises(ShapeError, match=r"the models have no tensor name in common: .*a has x\.weight; .*b has other"):
        merged(tmp_path, average(a, b))
    for how in ("base", "skip"):
        with pytest.raises(ShapeError, match="no tensor is in all models in one shape, so nothing would be merged"):
            merged(tmp_path, average(a, b, missing=how))
    code, said = command("diff", a, b, "--quiet")
    assert code == 3 and "no tensor name in common" in said


def test_what_missing_may_be(tmp_path, parts):
    with pytest.raises(fastinterp.RecipeError, match="`missing` must be error or base or skip, got 'all'"):
        merged(tmp_path, average(*parts, missing="all"))
    with pytest.raises(fastinterp.UsageError, match="missing must be error or base or skip, got 'all'"):
        merged(tmp_path, average(*parts), missing="all")


# --- recomputed buffers ----------------------------------------------------------------------------------------------

FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


def rotary(seed: int, dtype: DType | None, base: float = 1e4, **more: Tensor) -> dict[str, Tensor]:
    frequencies = {} if dtype is None else {FREQ: tensor(base ** -(np.arange(4) / 4), dtype)}
    return {"model.layers.0.q_proj.weight": filled(seed)} | frequencies | more


def test_buffers_that_one_model_has(tmp_path):
    with_it, without = write(tmp_path / "a", rotary(1, F32)), write(tmp_path / "b", rotary(2, None))
    made, report = merged(tmp_path, average(with_it, without, dtype="bfloat16"))
    assert made[FREQ].raw.tobytes() == read(with_it)[FREQ].raw.tobytes()
    assert report.remarks == (f"taken from {with_it}, because software computes them: {FREQ}",)
    made, report = merged(tmp_path, average(without, with_it))
    assert list(made) == list(read(without))
    assert report.remarks == (f"left out, because software computes them: {FREQ}",)
    made, _ = merged(tmp_path, average(without, with_it, base_model=str(with_it)))
    assert made[FREQ].raw.tobytes() == read(with_it)[FREQ].raw.tobytes()


@pytest.mark.parametrize("other", [(F16, 1e4), (F32, 1e6)], ids=["dtype", "values"])
def test_buffers_that_differ_are_not_averaged(tmp_path, other):
    a, b = write(tmp_path / "a", rotary(1, F32)), write(tmp_path / "b", rotary(2, *other))
    made, report = merged(tmp_path, average(a, b))
    assert made[FREQ].raw.tobytes() == read(a)[FREQ].raw.tobytes() and len(report.remarks) == 1


def test_buffers_of_equal_bytes_are_as_ever(tmp_path):
    a, b = write(tmp_path / "a", rotary(1, F32)), write(tmp_path / "b", rotary(2, F32))
    made, report = merged(tmp_path, average(a, b))
    assert made[FREQ].raw.tobytes() == read(a)[FREQ].raw.tobytes() and report.remarks == ()


@pytest.mark.parametrize(
    ("name", "buffer"),
    [
        ("embeddings.position_ids", integers(np.arange(7)[None], "I64")),
        ("h.0.attn.bias", filled(3, (1, 1, 4, 4))),
        ("h.0.attn.masked_bias", filled(3, ())),
        ("gpt_neox.layers.0.attention.bias", integers(np.ones((1, 1, 4, 4)), "BOOL")),
        ("layers.0.blocks.0.attn.relative_position_index", integers(np.zeros((4, 4)), "I64")),
        ("freqs_cis", filled(3, (4, 2))),
    ],
)  # fmt: skip
def test_what_is_a_buffer(tmp_path, name, buffer):
    a, b = write(tmp_path / "a", unet(1)), write(tmp_path / "b", unet(2) | {name: buffer})
    made, _ = merged(tmp_path, average(a, b))
    assert made.keys() == read(a).keys()


@pytest.mark.parametrize(
    ("name", "shape"), [("h.0.attn.bias", (4,)), ("h.0.ln_1.bias", (4,)), ("position_ids.weight", (4, 4))]
)
def test_what_is_none(tmp_path, name, shape):
    a, b = write(tmp_path / "a", unet(1)), write(tmp_path / "b", unet(2) | {name: filled(3, shape)})
    with pytest.raises(ShapeError, match=name):
        merged(tmp_path, average(a, b))


def test_position_ids_of_other_dtypes(tmp_path):
    """Integers in one file and floats in the other."""
    name, numbers = "text_model.embeddings.position_ids", np.arange(77)[None]
    a = write(tmp_path / "a", unet(1) | {name: integers(numbers, "I64")})
    b = write(tmp_path / "b", unet(2) | {name: tensor(numbers, F16)})
    for first, second in ((a, b), (b, a)):
        made, _ = merged(tmp_path, average(first, second))
        assert made[name].raw.tobytes() == read(first)[name].raw.tobytes()
        made, report = merged(tmp_path, average(first, second, integers=str(second)))
        assert (
            made[name].raw.tobytes() == read(second)[name].raw.tobytes()
            and made[name].dtype == read(second)[name].dtype
        )
        assert report.remarks == (f"taken from {second}, because software computes them: {name}",)


# --- channels --------------------------------------------------------------------------------------------------------

CONV = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture
def inpainting(tmp_path) -> dict[str, Path]:
    """base and custom have 4 input channels, the inpainting model 9."""
    sizes = {"base": 4, "custom": 4, "inpaint": 9}
    return {
        name: write(tmp_path / name, unet(i) | {CONV: filled(20 + i, (5, n, 3, 3), F16)})
        for i, (name, n) in enumerate(sizes.items())
    }


def conv(folder: Path) -> np.ndarray:
    return values(read(folder)[CONV])


@pytest.mark.parametrize("base", ["base", "inpaint"])
def test_inpainting_plus_custom_minus_base(tmp_path, inpainting, base):
    """The first four channels are the usual sum, the others are those of the inpainting model, whatever the base is."""
    others = {"base": {"inpaint": 1.0, "custom": 1.0}, "inpaint": {"custom": 1.0, "base": -1.0}}[base]
    models = [{"model": str(inpainting[n]), "parameters": {"weight": w}} for n, w in others.items()]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(inpainting[base]), "models": models}
    with pytest.raises(ShapeError, match=r"`channels: first` \(--channels first\) merges the input channels that all"):
        merged(tmp_path, recipe)
    with pytest.raises(ShapeError) as caught:
        fastinterp.interpolate(inpainting["inpaint"], inpainting["custom"], 0.5, tmp_path / "none")
    assert "`channels='first'` merges the input" in str(caught.value) and "--" not in str(caught.value)
    for keys, options in (({"channels": "first"}, {}), ({}, {"channels": "first"})):
        made, report = merged(tmp_path, recipe | keys, **options)
        want = conv(inpainting["inpaint"]).copy()
        want[:, :4] += conv(inpainting["custom"]) - conv(inpainting["base"])
        np.testing.assert_allclose(values(made[CONV])[:, :4], want[:, :4], atol=4e-3)
        np.testing.assert_array_equal(values(made[CONV])[:, 4:], want[:, 4:])
        told = f"{CONV} of {inpainting['custom']} has 4 of 9 input channels: it merges into the first 4, and the "
        assert any(remark.startswith(told) for remark in report.remarks)


def test_channels_of_a_weighted_sum(tmp_path, inpainting):
    """What the narrow model lacks does not move, also where it is stored in another dtype."""
    custom = read(inpainting["custom"])
    narrow = write(tmp_path / "bf16", {n: tensor(values(t), BF16) for n, t in custom.items()})
    code, said = command(
        "interpolate", inpainting["inpaint"], narrow, "--alpha", "0.25", "-o", tmp_path / "o", "--channels", "first"
    )
    assert code == 0, said
    want = conv(inpainting["inpaint"]).copy()
    want[:, :4] = 0.75 * want[:, :4] + 0.25 * conv(narrow)
    np.testing.assert_allclose(conv(tmp_path / "o")[:, :4], want[:, :4], atol=2e-2)
    np.testing.assert_array_equal(conv(tmp_path / "o")[:, 4:], want[:, 4:])


def test_the_configuration_follows_the_channels(tmp_path):
    for name, count in (("a", 4), ("b", 9)):
        write(tmp_path / name, {"conv_in.weight": filled(count, (5, count, 3, 3)), "x": filled(1)})
        (tmp_path / name / "config.json").write_text(json.dumps({"in_channels": count}))
    merged(tmp_path, average(tmp_path / "a", tmp_path / "b", channels="first"))
    assert json.loads((tmp_path / "out 0" / "config.json").read_text()) == {"in_channels": 9}


# --- names -----------------------------------------------------------------------------------------------------------


def in_front(prefix: str, model: Model) -> dict[str, Tensor]:
    return {prefix + name: t for name, t in model.items()}


def test_names_are_the_bases(tmp_path):
    """Whichever that is; `check` says the same."""
    a, b = write(tmp_path / "a", unet(1)), write(tmp_path / "b", in_front("module.", unet(2)))
    for first, second in ((a, b), (b, a)):
        made, report = merged(tmp_path, average(first, second))
        assert list(made) == list(read(first))
        assert len(report.remarks) == 1 and report.remarks[0].startswith(f"names of {second} follow {first}: ")
        plain = {n.removeprefix("module."): values(t) for n, t in made.items()}
        for name, want in unet(1).items():
            np.testing.assert_allclose(plain[name], (values(want) + values(unet(2)[name])) / 2, atol=1e-6)
    assert fastinterp.check(average(a, b)).remarks == merged(tmp_path, average(a, b))[1].remarks


def test_documents_that_build_on_each_other(tmp_path):
    a, b = write(tmp_path / "a", unet(1)), write(tmp_path / "b", in_front("module.", unet(2)))
    c = write(tmp_path / "c", in_front("_orig_mod.", unet(3)))
    first = {**average(a, b), "name": "mix"}
    last = average(Path("mix"), c)
    assert fastinterp.check([first, last]).errors == ()
    made, _ = merged(tmp_path, [first, last])  # type: ignore[arg-type]
    for name, t in unet(1).items():
        want = values(t) / 4 + values(unet(2)[name]) / 4 + values(unet(3)[name]) / 2
        np.testing.assert_allclose(values(made[name]), want, atol=1e-6)


def test_side_cars_follow_the_names(tmp_path):
    weights = {n: tensor(np.abs(values(t)), F32) for n, t in unet(7).items()}
    folders = {"a": unet(1), "b": in_front("module.", unet(2)), "fa": weights, "fb": in_front("module.", weights)}
    a, b, fa, fb = (str(write(tmp_path / name, model)) for name, model in folders.items())
    models = [{"model": m, "parameters": {"fisher": f}} for m, f in ((a, fa), (b, fb))]
    made, _ = merged(tmp_path, {"merge_method": "fisher", "models": models})
    name = next(iter(unet(1)))
    np.testing.assert_allclose(values(made[name]), (values(unet(1)[name]) + values(unet(2)[name])) / 2, atol=1e-5)


def test_diff_of_models_whose_names_differ(tmp_path):
    a, b = write(tmp_path / "a", unet(1)), write(tmp_path / "b", in_front("module.", unet(1)))
    code, said = command("diff", a, b, "--quiet")
    assert code == 0 and f"names of {b} follow {a}: prefix `module.` removed (3 tensors)" in said
    assert "all elements of A and B are equal\n" in said and "all 3 matrices" in said


# --- fused projections -----------------------------------------------------------------------------------------------


def test_projections_in_one_tensor_and_one_by_one(tmp_path):
    rng = np.random.default_rng(0)
    q, k, v, gate, up = (rng.normal(size=(n, 6)) for n in (8, 4, 4, 10, 10))
    stem = "model.layers.0"
    fused = {f"{stem}.self_attn.qkv_proj.weight": np.concatenate([q, k, v]),
             f"{stem}.mlp.gate_up_proj.weight": np.concatenate([gate, up])}  # fmt: skip
    single = {f"{stem}.self_attn.{n}_proj.weight": x for n, x in (("q", q), ("k", k), ("v", v))}
    single |= {f"{stem}.mlp.{n}_proj.weight": x for n, x in (("gate", gate), ("up", up))}
    other = {name: x + 1 for name, x in single.items()}
    a = write(tmp_path / "a", {n: tensor(x, F32) for n, x in fused.items()})
    b = write(tmp_path / "b", {n: tensor(x, F32) for n, x in other.items()})
    made, report = merged(tmp_path, average(a, b))
    assert report.remarks == (f"{b}: 2 tensors fused, as {a} stores them",)
    for name, x in fused.items():
        np.testing.assert_allclose(values(made[name]), x + 0.5, atol=1e-6)
    made, report = merged(tmp_path, average(b, a))
    assert report.remarks == (f"{a}: 2 tensors split, as {b} stores them",)
    for name, x in single.items():
        np.testing.assert_allclose(values(made[name]), x + 0.5, atol=1e-6)


def test_projections_of_several_dtypes(tmp_path):
    """Fused ones hold the numbers of all: no float32 numbers are rounded to the BF16 of those in front of them."""
    q, k, v = (np.random.default_rng(i).normal(size=(4, 6)) for i in range(3))
    stem = "model.layers.0.self_attn"
    single = {f"{stem}.q_proj.weight": tensor(q, BF16), f"{stem}.k_proj.weight": tensor(k, F32),
              f"{stem}.v_proj.weight": tensor(v, F32)}  # fmt: skip
    a = write(tmp_path / "a", {f"{stem}.qkv_proj.weight": tensor(np.zeros((12, 6)), F32)})
    b = write(tmp_path / "b", single)
    made, _ = merged(tmp_path, average(a, b))
    wanted = np.concatenate([values(t) for t in single.values()]) / 2
    np.testing.assert_array_equal(values(made[f"{stem}.qkv_proj.weight"]), wanted.astype(np.float32))


def test_projections_in_another_order_are_not_fused(tmp_path):
    """Of CodeGen: its `qkv_proj` has the rows of queries, values, keys, four times. GPT-J has the same other names."""
    stem = "transformer.h.0.attn"
    a = write(tmp_path / "a", {f"{stem}.qkv_proj.weight": filled(1, (24, 8)), f"{stem}.out_proj.weight": filled(2)})
    single = {f"{stem}.{n}_proj.weight": filled(i, (8, 8)) for i, n in enumerate("qkv")}
    b = write(tmp_path / "b", {**single, f"{stem}.out_proj.weight": filled(3)})
    with pytest.raises(ShapeError, match=r"different tensors: .* alone has transformer\.h\.0\.attn\.qkv_proj\.weight"):
        merged(tmp_path, average(a, b))


def test_other_numbers_of_experts_are_not_fused(tmp_path):
    """Four experts are not two of twice the width, although the rows are as many."""
    stem = "model.layers.0.mlp.experts"
    fused = {f"{stem}.gate_up_proj": filled(1, (2, 8, 6)), f"{stem}.down_proj": filled(2, (2, 6, 4))}
    single = {f"{stem}.{e}.{p}_proj.weight": filled(e, s) for e in range(4)
              for p, s in (("gate", (2, 6)), ("up", (2, 6)), ("down", (3, 4)))}  # fmt: skip
    a, b = write(tmp_path / "a", fused | unet(1)), write(tmp_path / "b", single | unet(2))
    with pytest.raises(ShapeError, match="different tensors"):
        merged(tmp_path, average(a, b))


def test_experts_in_another_order_name_a_remedy(tmp_path):
    """Transposed matrices of experts are no rows one after the other."""
    stem = "model.layers.0.mlp.experts"
    single = {f"{stem}.{e}.{p}_proj.weight": filled(e, s) for e in range(3)
              for p, s in (("gate", (5, 8)), ("up", (5, 8)), ("down", (8, 5)))}  # fmt: skip
    fused = {f"{stem}.gate_up_proj": filled(1, (3, 8, 10)), f"{stem}.down_proj": filled(2, (3, 5, 8))}
    a, b = write(tmp_path / "a", single | unet(1)), write(tmp_path / "b", fused | unet(2))
    with pytest.raises(ShapeError, match=r"rows do not follow rows\. Load both with the same version of the") as error:
        merged(tmp_path, average(a, b))
    assert "missing" not in str(error.value)
