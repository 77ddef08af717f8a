"""What the report says of the numbers, and when it warns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fastinterp
from fastinterp.execute.report import RoundingEffect
from fastinterp.ops.dtypes import BF16, F32
from tests.support.checkpoints import Tensor, floats, moved, read, recipe, saved, tensor, weights, writable, write


def test_nan_and_inf_in_the_inputs_are_counted(tmp_path):
    clean = {f"x{i}": weights(i, F32, (40000,)) for i in range(3)}
    dirty = {name: Tensor(F32, t.shape, t.raw.copy()) for name, t in clean.items()}
    values = dirty["x1"].raw.view(np.float32)
    values[[3, 20000, 39999]] = np.nan  # the second chunk of 16384 is not sampled; the counts are exact all the same
    values[[4, 20001]] = np.inf, -np.inf
    paths = saved(tmp_path, [clean, dirty])
    report = fastinterp.merge(recipe("linear", paths, weights=[1, 1]), tmp_path / "out")
    effect = report.tensors["x1"]
    assert (effect.nan_in, effect.inf_in, effect.nan_out, effect.inf_out) == (3, 2, 3, 2)
    assert report.tensors["x0"].nan_in == report.tensors["x2"].inf_in == 0
    assert report.warnings == ("the inputs hold 3 NaN and 2 Inf, first in x1; the output (F32) holds 3 and 2",)
    assert report.warnings[0] in report.summary()


def test_a_lone_inf_is_warned_of(tmp_path):
    a, b = weights(1, BF16, (100,)), writable(weights(2, BF16, (100,)))
    b.raw.view(np.uint16)[7] = 0x7F80
    report = fastinterp.merge(recipe("linear", saved(tmp_path, [{"x": a}, {"x": b}]), weights=[1, 1]), tmp_path / "out")
    assert report.warnings == ("the inputs hold 0 NaN and 1 Inf, first in x; the output (BF16) holds 0 and 1",)


def test_overflow_of_the_output_is_counted(tmp_path):
    big = {"x": tensor(np.full(100, 40000.0), F32)}
    paths = saved(tmp_path, [big, {"x": tensor(np.arange(100.0), F32)}])
    report = fastinterp.merge(recipe("linear", paths, weights=[2, -1]), tmp_path / "out", dtype="float16")
    want = int(np.isinf(floats(read(tmp_path / "out")["x"])).sum())
    assert want == 100 == report.effect.inf_out
    assert report.warnings[-1] == "0 NaN and 100 Inf were created in the output (F16), first in x"


@pytest.fixture(scope="module")
def near(tmp_path_factory) -> tuple[Path, Path, Tensor, Tensor]:
    """A bf16 model, and a fine-tune whose weights moved by about one unit in the last place: the worst case."""
    folder = tmp_path_factory.mktemp("near")
    a = weights(1, BF16, (1 << 20,))
    b = moved(a, 2, 1e-5)
    return write(folder / "a", {"x": a}), write(folder / "b", {"x": b}), a, b


def strength(a: Tensor, b: Tensor, out: Tensor, alpha: float) -> float:
    """<out - a, alpha * (b - a)> / |alpha * (b - a)|^2 over all elements, float64."""
    change = alpha * (floats(b) - floats(a))
    return float((floats(out) - floats(a)) @ change / (change @ change))


def test_bf16_makes_alpha_a_staircase(tmp_path, near):
    """Rounding to nearest lets a quarter of the change arrive as nearly nothing, and the report says so.

    It looks at n of N elements. With o the stored change, D the intended one and s the strength over all, the
    residuals e = (o - s D) D sum to 0, so what the sample finds is off by (sum of its e) / (sum of its D^2). A random
    sample's sum of e has a deviation of sqrt(n mean(e^2)): the report is within six of those.
    """
    first, second, a, b = near
    (report,) = fastinterp.interpolate(first, second, 0.25, tmp_path / "out")
    out = read(tmp_path / "out")["x"]
    real = strength(a, b, out, 0.25)
    assert real < 0.4
    sampled = report.effect.sampled
    assert sampled == 2 * 16384  # chunks 0 and 32 of 64
    change = 0.25 * (floats(b) - floats(a))
    residuals = (floats(out) - floats(a) - real * change) * change
    deviation = np.sqrt(sampled * np.mean(residuals**2)) / (sampled * np.mean(change**2))
    assert deviation < 0.02
    found = report.effect.strength
    assert found is not None and abs(found - real) < 6 * deviation
    assert report.warnings == (
        f"rounding to BF16 kept {100 * found:.3g} % of the change (sampled): the models differ by little more than the "
        "spacing of that dtype. Use --rounding stochastic (in Python rounding='stochastic'), or --dtype float32 (in "
        "Python dtype='float32')",
    )


def test_stochastic_rounding_walks_the_line(tmp_path, near):
    """Unbiased: the strength is 1 within six standard deviations of what its coins can do.

    An element moves by ulp u with probability f, else by none: a variance of u^2 f (1 - f) <= u^2 / 4. So the strength,
    sum (out - a) D / sum D^2 over n elements, has a variance of at most sum (u D)^2 / 4 / (sum D^2)^2.
    """
    first, second, a, b = near
    (report,) = fastinterp.interpolate(first, second, 0.25, tmp_path / "out", rounding="stochastic")
    real = strength(a, b, read(tmp_path / "out")["x"], 0.25)
    change = 0.25 * (floats(b) - floats(a))
    ulp = np.exp2(np.floor(np.log2(np.maximum(abs(floats(a)), abs(floats(b)) + 1e-30))) - 7)
    deviation = np.sqrt(((ulp * change) ** 2).sum() / 4) / (change @ change)
    assert deviation < 0.02
    assert abs(real - 1) < 6 * deviation
    found = report.effect.strength
    assert found is not None and abs(found - 1) < 6 * deviation * np.sqrt(32)  # of a 32nd of the elements
    assert not [w for w in report.warnings if "of the change" in w] or abs(found - 1) > 0.05


def test_float32_output_walks_the_line_exactly(tmp_path, near):
    """But for float32's own rounding: y is off by at most 2^-24 |y|, so the sum by sum |y D| 2^-24."""
    first, second, a, b = near
    (report,) = fastinterp.interpolate(first, second, 0.25, tmp_path / "out", dtype="float32")
    change = 0.25 * (floats(b) - floats(a))
    bound = 2.0**-24 * (abs(floats(b)) + abs(floats(a))) @ abs(change) / (change @ change)
    real = strength(a, b, read(tmp_path / "out")["x"], 0.25)
    assert abs(real - 1) <= bound < 1e-3
    assert report.effect.strength == pytest.approx(1, abs=1e-3)
    assert report.warnings == ()


def test_strength_adds_up_over_tensors():
    """The total is that of one long vector."""
    parts = [RoundingEffect(10, 10, 5, 4.0, 2.0, 1.0, 0, 0, 0, 0), RoundingEffect(30, 10, 5, 4.0, 6.0, 6.0, 1, 0, 1, 0)]
    total = RoundingEffect.total(parts)
    assert (total.strength, total.changed_fraction, total.relative_change) == (7 / 8, 0.5, 1.0)
    assert (total.numel, total.nan_in, total.nan_out) == (40, 1, 1)


def test_overflow_of_a_copy_that_changes_dtype_is_counted(tmp_path):
    """A lone model with weight 1 is converted, not taken over: what float16 cannot hold shows."""
    big = {"x": tensor(np.array([1.0, 7e4, -7e4]), F32)}
    report = fastinterp.merge(recipe("linear", saved(tmp_path, [big]), weights=[1]), tmp_path / "out", dtype="float16")
    assert report.copied == ()
    assert report.effect.inf_out == 2
    assert report.warnings == ("0 NaN and 2 Inf were created in the output (F16), first in x",)


def test_a_nan_in_one_tensor_does_not_hide_the_staircase_in_another(tmp_path):
    a = {"near": weights(1, BF16, (1 << 18,)), "nan": weights(2, BF16, (100,))}
    b = {"near": moved(a["near"], 3, 1e-5), "nan": writable(weights(4, BF16, (100,)))}
    b["nan"].raw.view(np.uint16)[7] = 0x7FC0
    first, second = saved(tmp_path, [a, b])
    report = fastinterp.interpolate(first, second, 0.25, tmp_path / "out")[0]
    assert report.tensors["nan"].strength is None
    assert any("% of the change" in w for w in report.warnings)
    assert any("1 NaN" in w for w in report.warnings)


# --- the files beside the weights ------------------------------------------------------------------------------------


def family_with(tmp_path: Path, **files: list[str | None]) -> list[str]:
    """Checkpoints that fit; files: name (`_` for `.`) -> what it holds in each of them, None for no file."""
    count = len(next(iter(files.values())))
    paths = saved(tmp_path, [{"x": weights(i, BF16, (10,))} for i in range(count)])
    for name, contents in files.items():
        for path, text in zip(paths, contents, strict=True):
            if text is not None:
                (Path(path) / f"{name}.json").write_text(text)
    return paths


def warned(paths: list[str], out: Path) -> list[str]:
    """By merge, and the same by explain."""
    asked = recipe("linear", paths, weights=[1] * len(paths))
    found = fastinterp.merge(asked, out).warnings
    assert found == fastinterp.explain(asked).warnings
    return list(found)


def test_tokenizers_that_differ(tmp_path):
    """By their bytes, of the same size or not; models that differ in the same files share a line."""
    a, b, c, d = paths = family_with(
        tmp_path, tokenizer=["{}", "[]", "[] ", "{}"], vocab=["1", "1", "1", None], config=["{}"] * 4
    )
    (line,) = warned(paths, tmp_path / "out")
    assert line.startswith(f"tokenizer.json of {a} and of {b}, {c} differ; the output gets {a}'s. ") and d not in line


def test_configurations_that_differ(tmp_path):
    """In keys that the weights depend on, at the top and in text_config; a key that one leaves out is a default."""
    first = '{"vocab_size": 8, "torch_dtype": "float32", "text_config": {"rope_theta": 1e4}, "head_dim": 4}'
    other = '{"vocab_size": 9, "torch_dtype": "bfloat16", "text_config": {"rope_theta": 5e5}}'
    scaled = '{"vocab_size": 8, "rope_scaling": {"factor": 4}}'
    a, b, c = paths = family_with(tmp_path, config=[first, other, scaled])
    one, two = warned(paths, tmp_path / "out")
    assert f"{a} and of {b} differ: vocab_size 8 and 9, text_config.rope_theta 10000.0 and 500000.0; the" in one
    assert f"{a} and of {c} differ: rope_scaling None and {{'factor': 4}}; the output gets {a}'s" in two


def test_configurations_that_agree(tmp_path):
    same = '{"vocab_size": 8, "text_config": null}'
    assert warned(family_with(tmp_path, config=[same, same.replace(" ", "")]), tmp_path / "out") == []


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", '{"a": ' * 100000, '{"vocab_size": ' + "9" * 5000 + "}"])
def test_damaged_configuration_of_another_model_does_not_stop_the_merge(tmp_path, text):
    paths = family_with(tmp_path, config=["{}", text])
    (line,) = warned(paths, tmp_path / "out")
    assert line.startswith(f"config.json of {paths[1]} cannot be read")


def test_damaged_configuration_that_would_be_copied_is_refused_at_once(tmp_path):
    paths = family_with(tmp_path, config=["{", "{}"])
    with pytest.raises(fastinterp.CheckpointError, match=r"a.config\.json: the model configuration is not JSON"):
        fastinterp.merge(recipe("linear", paths, weights=[1, 1]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_origin_lacks_and_another_has(tmp_path):
    paths = family_with(tmp_path, config=[None, "{}"], tokenizer=[None, "{}"])
    assert warned(paths, tmp_path / "out") == [
        f"{paths[0]} has no {what}, so the output has none. Copy that of {paths[1]}, if it fits"
        for what in ("config.json", "tokenizer")
    ]


def test_many_models_that_differ_make_few_lines(tmp_path):
    paths = family_with(tmp_path, config=[f'{{"vocab_size": {i}}}' for i in range(6)])
    found = warned(paths, tmp_path / "out")
    assert len(found) == 4 and found[-1] == "and 2 more like the last"


# --- a few lines for people ------------------------------------------------------------------------------------------


def last_line(report) -> str:
    """Of what is printed, but for notes of the empty shards that `saved` makes."""
    return [line for line in str(report).splitlines() if "note: left out" not in line][-1]


def test_identical_models_are_called_so(tmp_path):
    model = {"x": weights(1, BF16, (40 * 16384,)), "y": weights(2, BF16, (100,))}
    a, b = saved(tmp_path, [model, model])
    (report,) = fastinterp.interpolate(a, b, 0.5, tmp_path / "out")
    assert "nothing changed: the models are identical where they were measured (5% of the elements)" in str(report)
    c, d = saved(tmp_path / "s", [{"y": model["y"]}] * 2)
    (small,) = fastinterp.interpolate(c, d, 0.5, tmp_path / "small")
    assert last_line(small).endswith("nothing changed: the models are identical")
    (stored,) = fastinterp.interpolate(a, b, 0, tmp_path / "f32", dtype="float32")
    assert last_line(stored).endswith("all tensors are copies, stored in another dtype")
    (copied,) = fastinterp.interpolate(a, b, 0, tmp_path / "copy")
    assert last_line(copied).endswith("all tensors are copies")


def test_results_print_as_the_commands_do_and_show_shortly(tmp_path):
    paths = saved(tmp_path, [{"x": weights(i, F32, (1000,))} for i in range(2)])
    asked = recipe("linear", paths, weights=[1, 1])
    plan, report = fastinterp.explain(asked, dtype="bfloat16"), fastinterp.merge(asked, tmp_path / "out")
    assert "F32 -> BF16, in float32" in str(plan) and "2.00 KB, 6.10 KB with headers" in str(plan)
    assert repr(plan) == "<Plan: linear of 2 models, 8.00 KB read, 2.00 KB written>"
    assert repr(report) == f"<Report of {tmp_path / 'out'}: 1 file, 4.00 KB written, 0 warnings>"
    assert str(report) == report.summary() and "of elements changed, relative change " in str(report)
    found = fastinterp.compare(*paths)
    assert repr(found) == f"<Comparison of 1 tensors: {found.total.changed:,} of 1,000 elements differ>"
