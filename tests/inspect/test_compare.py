"""compare(): how two checkpoints differ, against numpy float64."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest

from fastinterp.backends import cpu
from fastinterp.backends.cpu import Pump, PumpOptions
from fastinterp.errors import BackendError, CheckpointError
from fastinterp.execute.sources import Sources
from fastinterp.inspect.compare import Comparison, Difference, compare
from fastinterp.ops.dtypes import BF16, F8_E4M3, F16, F32, F64
from tests.support import backends
from tests.support.checkpoints import Tensor, family, floats, integers, moved, patterns, saved, tensor, weights, write


def assert_near(a: Tensor, b: Tensor, got: Difference) -> None:
    """Within the bound of what is rounded: each difference once, to float32 (or float64), and n sums in float64."""
    x, y = floats(a), floats(b)
    delta = y - x
    u = 2.0**-53 if F64 in (a.dtype, b.dtype) else 2.0**-24
    e = u + x.size * 2.0**-53  # relative, of each product and of the sum of their magnitudes
    assert got.numel == x.size
    assert got.changed == np.count_nonzero(x != y)
    assert abs(got.norm_a - np.linalg.norm(x)) <= 2 * e * np.linalg.norm(x)
    assert abs(got.norm_delta - np.linalg.norm(delta)) <= 2 * e * np.linalg.norm(delta)
    assert abs(got.dot_a_delta - x @ delta) <= 2 * e * (abs(x) @ abs(delta))


def test_every_dtype_and_mixtures_of_them(tmp_path):
    models = [{n: t for n, t in m.items() if not n.startswith("patterns")} for m in family(2, mixed=True)]
    found = compare(*saved(tmp_path, models), threads=2)
    assert set(found.tensors) == {n for n, t in models[0].items() if t.dtype.merges}
    for name, difference in found.tensors.items():
        assert_near(models[0][name], models[1][name], difference)
    assert sorted(found.unmeasured) == ["ids", "on", "pad"]
    assert (found.only_a, found.only_b, found.shapes) == ([], [], [])


@pytest.mark.parametrize("numel", [1, 16385, 17 * 16384 + 5])
def test_near_fine_tunes_keep_their_digits(tmp_path, numel):
    """The cosine of two models that differ in one element of a million is told from 1."""
    a = weights(1, BF16, (numel,))
    b = Tensor(BF16, (numel,), a.raw.copy())
    b.raw.view(np.uint16)[numel // 2] += 1
    found = compare(*saved(tmp_path, [{"x": a}, {"x": b}])).tensors["x"]
    assert_near(a, b, found)
    assert (found.changed, found.changed_fraction) == (1, 1 / numel)
    assert found.relative is not None and 0 < found.relative < 0.01


def test_what_is_not_compared_is_named(tmp_path):
    a = {"both": weights(1, F32, (5,)), "a": weights(2, F32, (5,)), "shape": weights(3, F32, (2, 3))}
    b = {"both": weights(4, F16, (5,)), "b": weights(5, F32, (5,)), "shape": weights(6, F32, (3, 2))}
    a |= {"int": integers([1], "I64"), "kind": weights(7, F32, (4,))}
    b |= {"int": integers([2], "I64"), "kind": integers([1, 2, 3, 4], "I32")}
    found = compare(*saved(tmp_path, [a, b]))
    assert list(found.tensors) == ["both"]
    assert (found.only_a, found.only_b, found.shapes) == (["a"], ["b"], ["shape"])
    assert sorted(found.unmeasured) == ["int", "kind"]
    assert found.kinds == {
        "both": ("F32 [5]", "F16 [5]"), "shape": ("F32 [2, 3]", "F32 [3, 2]"), "kind": ("F32 [4]", "I32 [4]"),
    }  # fmt: skip


def test_a_checkpoint_and_itself(tmp_path):
    model = family(1)[0]
    (path,) = saved(tmp_path, [model])
    clean = {n for n in model if n.startswith("model") and model[n].raw.size}
    for name, d in compare(path, path).tensors.items():
        if name in clean:
            assert (d.changed, d.norm_delta, d.relative, d.changed_fraction) == (0, 0, 0, 0)
            assert d.cosine == pytest.approx(1, abs=2**-50)


def test_nan_counts_as_changed(tmp_path):
    """And makes the sums NaN, which is what they are."""
    a = {"x": patterns(F8_E4M3, 512, 0)}
    found = compare(*saved(tmp_path, [a, a])).tensors["x"]
    assert found.changed == np.isnan(floats(a["x"])).sum() == 4
    assert math.isnan(found.norm_a) and math.isnan(found.norm_delta) and not found.finite


def test_empty_and_zero_tensors(tmp_path):
    zero = {"none": weights(0, F32, (0, 3)), "zero": tensor(np.zeros(5), F32)}
    found = compare(*saved(tmp_path, [zero, {**zero, "zero": tensor(np.ones(5), F32)}])).tensors
    assert found["none"] == Difference(0, 0, 0.0, 0.0, 0.0)
    assert (found["none"].relative, found["none"].cosine, found["none"].changed_fraction) == (None, None, None)
    assert (found["zero"].relative, found["zero"].cosine) == (None, None)
    assert (found["zero"].norm_delta, found["zero"].changed) == (math.sqrt(5), 5)


def test_huge_values_do_not_raise(tmp_path):
    a, b = {"x": tensor(np.full(3, 1e200), F64)}, {"x": tensor(np.full(3, -1e200), F64)}
    found = compare(*saved(tmp_path, [a, b]))
    assert found.total.norm_a == math.inf
    assert found.total.cosine is None or math.isnan(found.total.cosine)
    assert Difference(1, 1, 1e200, 1e200, 0.0).cosine is not None


def bits(found: Comparison) -> list[tuple[object, ...]]:
    """Every number, to the last bit."""
    return [
        (n, d.changed, *(x.hex() for x in (d.norm_a, d.norm_delta, d.dot_a_delta))) for n, d in found.tensors.items()
    ]


def test_the_same_bits_for_threads_and_instruction_sets(tmp_path, monkeypatch):
    a = {"x": weights(1, BF16, (20 * 16384 + 3,)), "y": weights(2, F32, (1001,)), "z": weights(3, F64, (40000,))}
    paths = saved(tmp_path, [a, {n: moved(t, i) for i, (n, t) in enumerate(a.items())}])
    found = set()
    for isa in backends.usable():
        monkeypatch.setenv("FASTINTERP_ISA", isa)
        for threads in (1, 2, 7):
            found.add(str(bits(compare(*paths, threads=threads))))
    assert len(found) == 1


def test_total_is_that_of_one_long_vector(tmp_path):
    """Cut in two or not."""
    a, b = weights(1, F32, (5000,)), weights(2, F32, (5000,))
    whole = compare(*saved(tmp_path / "1", [{"x": a}, {"x": b}])).total

    def halves(t: Tensor) -> dict[str, Tensor]:
        return {"x": Tensor(F32, (2000,), t.raw[:8000]), "y": Tensor(F32, (3000,), t.raw[8000:])}

    parts = compare(*saved(tmp_path / "2", [halves(a), halves(b)])).total
    assert (whole.numel, whole.changed) == (parts.numel, parts.changed)
    for name in ("norm_a", "norm_delta", "dot_a_delta", "relative", "cosine", "changed_fraction"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-12)


def test_progress_ends_at_all_bytes_of_both(tmp_path):
    paths = saved(tmp_path, [{"x": weights(i, BF16, (1000,))} for i in range(2)])
    seen: list[tuple[int, int]] = []
    compare(*paths, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (4000, 4000)


@pytest.mark.parametrize("how", ["cut", "changed"])
def test_input_that_changes_while_it_is_read(tmp_path, monkeypatch, how):
    models = [{"x": weights(i, BF16, (100000,))} for i in range(2)]
    paths = [write(tmp_path / str(i), m) for i, m in enumerate(models)]
    file = paths[1] / "model.safetensors"

    init = Sources.__init__

    def opened(*args: Any) -> None:
        init(*args)
        if how == "cut":
            os.truncate(file, 4096)
        else:
            os.utime(file, ns=(0, 0))

    monkeypatch.setattr(Sources, "__init__", opened)
    said = "only .* bytes are left .*: it was truncated or replaced while" if how == "cut" else "it changed while"
    with pytest.raises(CheckpointError, match=said) as caught:
        compare(*paths)
    assert caught.value.file == str(file)


@pytest.mark.parametrize("cached", [True, False])
def test_files_are_read_ahead_unless_they_are_cached(tmp_path, monkeypatch, cached):
    asked = []

    def pump(sources: Any, sinks: Any, steps: Any, options: PumpOptions) -> Any:
        asked.append(options.prefetch)
        return Pump(sources, sinks, steps, options)

    monkeypatch.setattr(cpu, "Pump", pump)
    monkeypatch.setattr(Sources, "cached", lambda self: cached)
    assert compare(*saved(tmp_path, [{"x": weights(i, BF16, (10,))} for i in range(2)])).tensors
    assert asked == [not cached]


def test_unusable_instruction_set(tmp_path, monkeypatch):
    paths = saved(tmp_path, [{"x": weights(i, BF16, (10,))} for i in range(2)])
    monkeypatch.setenv("FASTINTERP_ISA", "nonsense")
    with pytest.raises(BackendError, match="FASTINTERP_ISA=nonsense"):
        compare(*paths)
