"""Differences of quantised models in steps of the quantisation: measured, estimated, and warned of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fastinterp
from fastinterp.ops.dtypes import F32
from tests.execute.test_quantised_inputs import saved
from tests.support.checkpoints import bell, recipe, tensor
from tests.support.encodings import ENCODINGS, Encoding

SIZE = 512


def models(form: Encoding, relative: float, folder: Path) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Paths of a base and of a fine-tune; their numbers, and the difference before they were quantised."""
    base = bell(1, SIZE * SIZE).reshape(SIZE, SIZE) * 0.02
    change = bell(2, SIZE * SIZE).reshape(SIZE, SIZE) * 0.02 * relative
    made = [form.encode(base), form.encode(base + change)]
    paths = [
        saved(folder / n, {f"l.{e}": t for e, t in m.tensors.items()}, form) for n, m in zip("ab", made, strict=True)
    ]
    return paths, made[0].numbers, made[1].numbers, change


# Cosines of the differences of Gaussian weights with those before rounding to codes, as measured.
@pytest.mark.parametrize("relative", [0.0005, 0.005, 0.05])
@pytest.mark.parametrize(
    "form", ["fp8 blocks", "int8 rows", "mxfp4, compressed-tensors", "nvfp4, ModelOpt", "mxfp8, ComfyUI"]
)
def test_signal_and_warnings(tmp_path: Path, form: str, relative: float) -> None:
    """The estimate is near what it estimates; delta methods warn of noise, in reports and in check; others do not."""
    paths, a, b, change = models(ENCODINGS[form], relative, tmp_path)
    moved = b.astype(np.float64) - a
    cosine = float((moved * change).sum() / np.linalg.norm(moved) / np.linalg.norm(change))
    delta = recipe("task_arithmetic", paths[1:], weights=[0.7], base_model=paths[0])
    report = fastinterp.merge(delta, tmp_path / "out")
    found = report.quantised[paths[1]]
    assert found["against"] == paths[0] and found["sampled"] == 1 << 14
    assert found["signal"] == pytest.approx(cosine, abs=0.06) or (cosine > 0.75 and found["signal"] > 0.75)
    noisy = [w for w in report.warnings if "is mostly quantisation noise" in w]
    assert len(noisy) == (found["signal"] < 0.7)
    checked = fastinterp.check(delta)
    assert [w.message for w in checked.warnings if "quantisation noise" in w.message] == noisy
    line = f"{paths[1]} differs from {paths[0]} by {found['ratio']:.2g} quantisation steps on average"
    assert any(line in remark for remark in report.remarks) and any(line in remark for remark in checked.remarks)
    average = fastinterp.merge(recipe("linear", paths, weights=[0.5, 0.5]), tmp_path / "average")
    assert average.quantised and not any("noise" in w for w in average.warnings)


def test_ratio_is_that_of_all_elements(tmp_path: Path) -> None:
    """int8 rows: the step is the scale. The sample is of whole rows in the middle."""
    form = ENCODINGS["int8 rows"]
    paths, a, b, _ = models(form, 0.02, tmp_path)
    report = fastinterp.merge(recipe("linear", paths, weights=[0.5, 0.5]), tmp_path / "out")
    rows = slice(240, 272)
    scales = [np.abs(x[rows]).max(1, keepdims=True) / 127 for x in (a, b)]
    steps = np.broadcast_to(np.maximum(*scales), a[rows].shape)
    expected = np.abs(b[rows].astype(np.float64) - a[rows]).mean() / steps.mean()
    assert report.quantised[paths[1]]["ratio"] == pytest.approx(expected, rel=1e-3)


def test_one_model_in_codes(tmp_path: Path) -> None:
    """Beside one in numbers: its rounding is noise that is added."""
    paths, _, _, change = models(ENCODINGS["fp8 blocks"], 0.005, tmp_path)
    base = bell(1, SIZE * SIZE).reshape(SIZE, SIZE) * 0.02
    plain = saved(tmp_path / "plain", {"l.weight": tensor(base + change, F32)})
    report = fastinterp.merge(recipe("task_arithmetic", [plain], weights=[0.7], base_model=paths[0]), tmp_path / "out")
    assert report.quantised[plain]["signal"] < 0.4 and any("quantisation noise" in w for w in report.warnings)


def test_models_in_numbers_have_none(tmp_path: Path) -> None:
    paths = [saved(tmp_path / n, {"l.weight": tensor(bell(i, 64), F32)}) for i, n in enumerate("ab")]
    report = fastinterp.merge(recipe("linear", paths, weights=[0.5, 0.5]), tmp_path / "out")
    assert report.quantised == {} and report.as_dict()["quantised"] == {}
