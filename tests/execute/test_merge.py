"""Whole merges: what is on the disk afterwards, byte for byte, against the numpy reference."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastinterp
from fastinterp.ops.combine import Combine
from fastinterp.ops.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, F64, MERGING, DType
from tests.support import backends
from tests.support.checkpoints import (
    Tensor,
    assert_same,
    bell,
    digest,
    expected,
    family,
    integers,
    moved,
    read,
    read_header,
    recipe,
    saved,
    tensor,
    weights,
    write,
)
from tests.support.written import tree

# Of the merge in test_pinned_bytes. They change only with NUMERICS.
PINNED_DATA = "09373d04f8c124ef42385cc9fe1b10866de81ec5149763e8f01e45b1f8831ed1"
PINNED_TENSORS = "7c783dc424222b2b06867ed4ad406f6d42a63050dbaa2ebeaa264c6fc2a8bcf2"

WAYS: dict[str, tuple[int, dict[str, Any], Combine]] = {
    "average": (3, {"weights": [1, 1, 1]}, Combine((1 / 3, 1 / 3, 1 / 3), sums_to_one=True)),
    "weighted": (3, {"weights": [3.0, -1.0, 2.0]}, Combine((0.75, -0.25, 0.5), sums_to_one=True)),
    "sum": (3, {"weights": [0.3, 0.6, -0.2], "parameters": {"normalize": False}}, Combine((0.3, 0.6, -0.2))),
    "lone": (1, {"weights": [2.0]}, Combine((1.0,), sums_to_one=True)),
    "zero": (3, {"weights": [0.0, 3.0, 1.0]}, Combine((0.0, 0.75, 0.25), sums_to_one=True)),
}


def holds_all(kinds: list[DType]) -> DType:
    """The narrowest dtype with as many bits of exponent and mantissa as any of these."""
    if len(set(kinds)) == 1:
        return kinds[0]
    size = {d: (d.bits - 1 - d.layout.mantissa, d.layout.mantissa) for d in MERGING if d.layout}
    needed = tuple(max(size[d][i] for d in kinds) for i in (0, 1))
    fitting = [d for d in MERGING if size[d][0] >= needed[0] and size[d][1] >= needed[1]]
    return min(fitting, key=lambda d: (d.bits, -size[d][0]))


@pytest.mark.parametrize("mixed", [False, True], ids=["same-dtypes", "mixed-dtypes"])
@pytest.mark.parametrize("way", WAYS)
def test_linear(tmp_path, way, mixed):
    count, keys, combine = WAYS[way]
    models = family(count, mixed)
    paths = saved(tmp_path, models)
    report = fastinterp.merge(recipe("linear", paths, **keys), tmp_path / "out", threads=2)
    if mixed:  # stored in what holds all, also the dtype of a model that is not read
        got = read(tmp_path / "out")
        for name, first in models[0].items():
            kinds = [m[name].dtype for m in models]
            if first.dtype.merges:
                assert got[name].dtype == holds_all(kinds), name
                want = expected([{name: m[name]} for m in models], combine, out=got[name].dtype)
                assert_same(want, {name: got[name]})
        kinds_of = {name: {m[name].dtype for m in models} for name, first in models[0].items() if first.dtype.merges}
        assert len(report.remarks) == len({frozenset(kinds) for kinds in kinds_of.values() if len(kinds) > 1})
    else:
        assert_same(expected(models, combine), read(tmp_path / "out"))
        assert not report.remarks
    assert report.files == ("model.safetensors",)
    read_from = [m for m, w in zip(models, combine.weights, strict=True) if w]
    floats = sum(t.raw.size for m in read_from for t in m.values() if t.dtype.merges)
    rest = sum(t.raw.size for m in models for t in m.values() if not t.dtype.merges)  # compared in every model
    assert report.bytes_read == floats + rest
    assert report.bytes_written == sum(t.raw.size for t in read(tmp_path / "out").values())


@pytest.mark.parametrize(("lambda_", "normalize"), [(1.0, False), (-1.0, False), (0.5, True)])
def test_task_arithmetic(tmp_path, lambda_, normalize):
    models = family(3)
    paths = saved(tmp_path, models)
    how = recipe(
        "task_arithmetic", paths[1:], weights=[0.6, -0.2], base_model=paths[0],
        parameters={"lambda": lambda_, "normalize": normalize},
    )  # fmt: skip
    fastinterp.merge(how, tmp_path / "out", threads=2)
    total = 0.6 + -0.2 if normalize else 1.0
    combine = Combine((0.0, lambda_ * (0.6 / total), lambda_ * (-0.2 / total)), base=0)
    assert_same(expected(models, combine), read(tmp_path / "out"))


@pytest.mark.parametrize("scale", [None, 1.0, -2.0, 0.7])
def test_passthrough(tmp_path, scale):
    models = family(1)
    (path,) = saved(tmp_path, models)
    parameters = {} if scale is None else {"parameters": {"scale": scale}}
    fastinterp.merge({"merge_method": "passthrough", "models": [{"model": path, **parameters}]}, tmp_path / "out")
    if scale in (None, 1.0):
        assert_same(models[0], read(tmp_path / "out"))  # NaN payloads and all
    else:
        assert_same(expected(models, Combine((scale,))), read(tmp_path / "out"))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", MERGING, ids=str)
def test_output_dtype(tmp_path, dtype, rounding):
    models = family(2, mixed=True)
    paths = saved(tmp_path, models)
    how = recipe("linear", paths, weights=[1, 3])
    fastinterp.merge(how, tmp_path / "out", dtype=dtype.name.lower(), rounding=rounding, seed=9, threads=2)
    combine = Combine((0.25, 0.75), sums_to_one=True)
    assert_same(expected(models, combine, out=dtype, rounding=rounding, seed=9), read(tmp_path / "out"))


@pytest.mark.parametrize(
    ("keys", "argument", "want"),
    [
        ({"dtype": "float16"}, None, F16),
        ({"dtype": "float16", "out_dtype": "float32"}, None, F32),
        ({"dtype": "float16", "out_dtype": "float32"}, "bfloat16", BF16),
        ({}, None, F64),  # that which holds all
    ],
)
def test_which_dtype_counts(tmp_path, keys, argument, want):
    models = [{"x": weights(i, d, (99,))} for i, d in enumerate((F64, F16))]
    how = recipe("linear", saved(tmp_path, models), weights=[1, 1], **keys)
    fastinterp.merge(how, tmp_path / "out", dtype=argument)
    assert_same(expected(models, Combine((0.5, 0.5), sums_to_one=True), out=want), read(tmp_path / "out"))


def test_dtype_is_kept_from_the_model_whose_config_is_copied(tmp_path):
    """Of `base_model`, where it has the tensor as one that merges, even if the method reads only the others."""
    base = {"x": weights(9, F16, (99,)), "z": integers([1], "I64")}
    models = [{n: weights(i, F32, (99,)) for n in "xy"} | {"z": weights(i, BF16, (1,))} for i in range(2)]
    path, *paths = saved(tmp_path, [base, *models])
    (Path(path) / "config.json").write_text('{"torch_dtype": "float16"}')
    fastinterp.merge(recipe("linear", paths, weights=[1, 1], base_model=path), tmp_path / "out")
    combine, got = Combine((0.5, 0.5), sums_to_one=True), read(tmp_path / "out")
    assert {n: t.dtype for n, t in got.items()} == {"x": F16, "y": F32, "z": BF16}
    assert np.array_equal(got["x"].raw, expected(models, combine, out=F16)["x"].raw)
    fastinterp.merge(recipe("linear", paths, weights=[1, 1], base_model=path), tmp_path / "as_asked", dtype="float64")
    assert {t.dtype for t in read(tmp_path / "as_asked").values()} == {F64}


@pytest.mark.parametrize("policy", ["saturate", "nonfinite"])
@pytest.mark.parametrize("dtype", [F8_E4M3, F8_E5M2], ids=str)
def test_fp8_overflow(tmp_path, dtype, policy):
    models = [{"x": tensor(bell(i, 1000) * 3000, F32)} for i in range(2)]
    paths = saved(tmp_path, models)
    how = recipe("linear", paths, weights=[30, -29], fp8_overflow=policy, out_dtype=str(dtype))
    fastinterp.merge(how, tmp_path / "out")
    combine = Combine((30.0, -29.0), sums_to_one=True)
    want = expected(models, combine, out=dtype, fp8_overflow=policy)
    saturated = expected(models, combine, out=dtype)
    assert np.array_equal(want["x"].raw, saturated["x"].raw) == (policy == "saturate")
    assert_same(want, read(tmp_path / "out"))


def test_stochastic_rounding_is_the_same_for_threads_and_shards(tmp_path):
    models = family(2)
    paths = saved(tmp_path, models)
    how = recipe("linear", paths, weights=[1, 2], rounding="stochastic", seed=5)
    found = set()
    for i, (threads, shard) in enumerate([(1, "5GB"), (2, "20KB"), (7, "3KB")]):
        fastinterp.merge(how, tmp_path / f"out{i}", threads=threads, max_shard_size=shard)
        found.add(digest(read(tmp_path / f"out{i}")))
    assert len(found) == 1
    fastinterp.merge(how, tmp_path / "other", seed=6)
    assert digest(read(tmp_path / "other")) not in found


# --- points on a line ------------------------------------------------------------------------------------------------


def test_ends_of_the_line_are_the_models(tmp_path):
    """Bit for bit, NaN payloads and -0 included; and the other model's floats are not read."""
    models = family(2)
    a, b = saved(tmp_path, models)
    whole = sum(t.raw.size for t in models[0].values())
    rest = sum(t.raw.size for t in models[0].values() if not t.dtype.merges)
    for alpha in (0, 1):
        (report,) = fastinterp.interpolate(a, b, alpha, tmp_path / f"out{alpha}")
        assert_same(models[alpha], read(tmp_path / f"out{alpha}"))
        assert report.bytes_read == whole + rest
        assert report.tensors == {} and set(report.copied) == set(models[0])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("base", [False, True], ids=["line", "task-vectors"])
def test_several_alphas_from_one_read(tmp_path, base, rounding):
    """The same files as one by one, header and receipt included, and every input byte is read once."""
    models = family(3 if base else 2)
    a, b, *bases = saved(tmp_path, models)
    alphas = [0.3, 0.0, -0.5, 1.0, 1.5]
    options = {"base": bases[0] if base else None, "rounding": rounding, "max_shard_size": "20KB"}
    together = fastinterp.interpolate(a, b, alphas, tmp_path / "together", **options)
    assert [r.bytes_read for r in together] == [sum(t.raw.size for m in models for t in m.values())] * 5
    assert [Path(r.output).name for r in together] == ["alpha_0.3", "alpha_0", "alpha_-0.5", "alpha_1", "alpha_1.5"]
    for alpha, report in zip(alphas, together, strict=True):
        (single,) = fastinterp.interpolate(a, b, alpha, tmp_path / "single" / str(alpha), **options)
        assert tree(Path(report.output)) == tree(Path(single.output))
        assert repr(report.tensors) == repr(single.tensors)  # NaN and all
        combine = (
            Combine((0.0, 1.0 - alpha, alpha), base=0) if base else Combine((1.0 - alpha, alpha), sums_to_one=True)
        )
        inputs = [models[2], *models[:2]] if base else models
        assert_same(expected(inputs, combine, rounding=rounding), read(Path(report.output)))


@pytest.mark.parametrize(
    "alpha", [np.float32(0.5), np.array(0.5), np.array([0.5], np.float16), Fraction(1, 2)], ids=repr
)
def test_alpha_may_be_any_number(tmp_path, alpha):
    models = [{"x": weights(i, F32, (99,))} for i in range(2)]
    first, second = saved(tmp_path, models)
    fastinterp.interpolate(first, second, alpha, tmp_path / "out")
    assert_same(expected(models, Combine((0.5, 0.5), sums_to_one=True)), read(tmp_path / "out"))


def test_sixteen_outputs_and_sixty_four_inputs(tmp_path):
    """The most that one read can make, and the most that it can take."""
    models = [{"x": weights(i, BF16, (1000,)), "y": weights(99 - i, F32, (3,))} for i in range(64)]
    paths = [str(write(tmp_path / f"m{i}", m)) for i, m in enumerate(models)]
    fastinterp.merge(recipe("linear", paths, weights=[1] * 64), tmp_path / "average", threads=2)
    assert_same(expected(models, Combine((1 / 64,) * 64, sums_to_one=True)), read(tmp_path / "average"))
    alphas = [i / 10 for i in range(16)]
    reports = fastinterp.interpolate(paths[0], paths[1], alphas, tmp_path / "path", threads=2)
    for alpha, report in zip(alphas, reports, strict=True):
        combine = Combine((1.0 - alpha, alpha), sums_to_one=True)
        assert_same(expected(models[:2], combine), read(Path(report.output)))


# --- the same bytes everywhere ---------------------------------------------------------------------------------------


def large(seed: int) -> dict[str, Tensor]:
    """6 MB: tensors that span several blocks, whose edges fall into elements at odd offsets in the inputs."""
    shapes: dict[str, tuple[DType, tuple[int, ...]]] = {
        "a": (BF16, (1311, 1001)), "b": (F32, (700001,)), "c": (F64, (4099, 3)), "d": (F16, (9, 9, 9)),
        "e": (BF16, ()), "f": (F8_E4M3, (100003,)), "g": (BF16, (0,)), "h": (F8_E5M2, (1,)),
    }  # fmt: skip
    model = {"odd": integers(np.arange(131), "U8")}
    for i, (name, (dtype, shape)) in enumerate(shapes.items()):
        model[name] = moved(weights(i, dtype, shape), 1000 + 100 * seed + i, 0.1 if dtype.bits == 8 else 1e-3)
    return model


@pytest.fixture(scope="module")
def large_recipe(tmp_path_factory) -> tuple[dict[str, object], list[dict[str, Tensor]]]:
    models = [large(i) for i in range(3)]
    paths = saved(tmp_path_factory.mktemp("large"), models)
    how = recipe("task_arithmetic", paths[1:], weights=[0.7, -0.4], base_model=paths[0])
    return how, models


@pytest.mark.slow
def test_tensors_across_blocks_equal_the_reference(tmp_path, large_recipe):
    how, models = large_recipe
    fastinterp.merge(how, tmp_path / "out", threads=2)
    assert_same(expected(models, Combine((0.0, 0.7, -0.4), base=0)), read(tmp_path / "out"))


def data_digest(file: Path) -> str:
    _, start = read_header(file)
    return hashlib.sha256(file.read_bytes()[start:]).hexdigest()


@pytest.mark.parametrize("isa", backends.usable())
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_pinned_bytes(tmp_path, monkeypatch, large_recipe, isa, threads):
    """One merge, known by its SHA-256: what any machine, instruction set and number of threads must write."""
    monkeypatch.setenv("FASTINTERP_ISA", isa)
    report = fastinterp.merge(large_recipe[0], tmp_path / "out", threads=threads)
    assert (report.device, report.threads) == (f"cpu {isa}", threads)
    assert data_digest(tmp_path / "out" / "model.safetensors") == PINNED_DATA
    assert digest(read(tmp_path / "out")) == PINNED_TENSORS


@pytest.mark.parametrize(("threads", "memory"), [(1, "32KiB"), (2, "100KB"), (2, "1MB"), (7, "600KB"), (1, "2GB")])
def test_pinned_bytes_for_any_window(tmp_path, large_recipe, threads, memory):
    fastinterp.merge(large_recipe[0], tmp_path / "out", threads=threads, max_memory=memory)
    assert data_digest(tmp_path / "out" / "model.safetensors") == PINNED_DATA


@pytest.mark.parametrize(("shard", "files"), [("4MB", 2), ("300KB", 3), (1, 8)])
def test_pinned_tensors_for_any_sharding(tmp_path, large_recipe, shard, files):
    """A tensor larger than the limit gets a file of its own. Empty ones fit anywhere."""
    report = fastinterp.merge(large_recipe[0], tmp_path / "out", threads=2, max_shard_size=shard)
    assert len(report.files) == len(list((tmp_path / "out").glob("*.safetensors"))) == files
    assert digest(read(tmp_path / "out")) == PINNED_TENSORS
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {n: f for f in report.files for n in read_header(tmp_path / "out" / f)[0] if n != "__metadata__"}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(t.raw.size for t in read(tmp_path / "out").values())


def test_files_are_the_same_for_any_number_of_threads(tmp_path, large_recipe):
    for threads in (1, 2, 7):
        fastinterp.merge(large_recipe[0], tmp_path / str(threads), threads=threads, max_shard_size="500KB")
    assert tree(tmp_path / "1") == tree(tmp_path / "2") == tree(tmp_path / "7")


def test_order_of_tensors_in_the_inputs_does_not_matter(tmp_path):
    """Only the order in the output follows that of the first model."""
    models = family(2)
    found = []
    for i, order in enumerate([sorted(models[0]), sorted(models[0], reverse=True)]):
        paths = [str(write(tmp_path / f"{i}{j}", m, order=order, shards=1 + i + j)) for j, m in enumerate(models)]
        fastinterp.merge(recipe("linear", paths, weights=[1, 2]), tmp_path / f"out{i}")
        found.append(digest(read(tmp_path / f"out{i}")))
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_huge_header(tmp_path):
    """10,000 tensors of 0 to 4 elements: a header of 2 MB, and thousands of tensors in one block."""
    numels = [i % 5 for i in range(10000)]
    models = []
    for start in (weights(seed, BF16, (sum(numels),)) for seed in (1, 2)):
        pieces = np.split(start.raw.view(np.uint16), np.cumsum(numels)[:-1])
        names = [f"model.layers.{i}.{'x' * 120}" for i in range(len(pieces))]
        models.append({n: Tensor(BF16, p.shape, p.view(np.uint8)) for n, p in zip(names, pieces, strict=True)})
    paths = saved(tmp_path, models)
    fastinterp.merge(recipe("linear", paths, weights=[1, 1]), tmp_path / "out", threads=2)
    want = expected([{"x": joined(m)} for m in models], Combine((0.5, 0.5), sums_to_one=True))
    merged = read(tmp_path / "out")
    assert_same(want, {"x": joined({n: merged[n] for n in models[0]})})


def joined(model: dict[str, Tensor]) -> Tensor:
    raw = np.concatenate([t.raw for t in model.values()])
    return Tensor(BF16, (raw.size // 2,), raw)


# --- integers --------------------------------------------------------------------------------------------------------


def test_integers_that_agree_are_copied_and_read_everywhere(tmp_path):
    models = family(2)
    paths = saved(tmp_path, models)
    report = fastinterp.merge(recipe("linear", paths, weights=[1, 1]), tmp_path / "out")
    got = read(tmp_path / "out")
    for name in ("pad", "on", "ids"):
        assert np.array_equal(got[name].raw, models[0][name].raw)
        assert name in report.copied


@pytest.mark.parametrize("name", ["on", "ids", "pad"])
def test_integers_that_differ(tmp_path, name):
    """Are refused with the remedy; and the remedy works."""
    models = family(3)
    raw = models[2][name].raw.copy()
    raw[-1] ^= 1
    models[2][name] = Tensor(models[2][name].dtype, models[2][name].shape, raw)
    paths = saved(tmp_path, models)
    how = recipe("linear", paths, weights=[1, 1, 1])
    with pytest.raises(fastinterp.ShapeError) as caught:
        fastinterp.merge(how, tmp_path / "out")
    dtype = models[0][name].dtype
    assert str(caught.value) == (
        f"{name} ({dtype}) is not averaged, and differs between {paths[0]} and {paths[2]}. "
        "Say whose to take: `integers: MODEL`"
    )
    assert caught.value.tensor == name
    assert not (tmp_path / "out").exists()
    for whose in (2, 0):
        fastinterp.merge({**how, "integers": paths[whose]}, tmp_path / f"out{whose}")
        assert np.array_equal(read(tmp_path / f"out{whose}")[name].raw, models[whose][name].raw)
