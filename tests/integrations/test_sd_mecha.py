"""Recipes of sd-mecha: its graphs as recipes of this package, beside numpy and beside sd-mecha itself.

The graphs are stand-ins with the attributes of nodes that are read. With sd-mecha installed (`make oracle`), its
own are merged by both.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fastinterp
from fastinterp.errors import OutputError, ShapeError, UsageError
from fastinterp.integrations.sd_mecha import merge, recipe_of
from tests.support import backends
from tests.support.models import load, save

UNET = "model.diffusion_model."
# A tensor of each kind of block of SDXL, with the name of its number.
TENSORS = {
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": "BASE",
    f"{UNET}label_emb.0.0.weight": "BASE",
    f"{UNET}input_blocks.0.0.weight": "IN00",
    f"{UNET}input_blocks.4.0.in_layers.2.weight": "IN04",
    f"{UNET}middle_block.1.proj_in.weight": "M00",
    f"{UNET}output_blocks.8.0.skip_connection.weight": "OUT08",
    f"{UNET}out.2.weight": "OUT08",
    "first_stage_model.decoder.conv_in.weight": "VAE",
}
NAMES = ["BASE", *(f"IN{i:02}" for i in range(9)), "M00", *(f"OUT{i:02}" for i in range(9)), "VAE"]
BY_BLOCK = {name: round(0.1 + 0.03 * i, 2) for i, name in enumerate(NAMES)}
Arrays = dict[str, Any]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """a, b and c: .safetensors files of float32 tensors."""
    found = {}
    for seed, name in enumerate("abc"):
        rng = np.random.default_rng(seed)
        folder = save(tmp_path / name, {tensor: rng.normal(size=(6, 5)).astype(np.float32) for tensor in TENSORS})
        found[name] = tmp_path / f"{name}.safetensors"
        (folder / "model.safetensors").rename(found[name])
    return found


def arrays(file: Path) -> Arrays:
    return {name: np.frombuffer(raw, np.float32).astype(np.float64) for name, (_, _, raw) in load(file).items()}


# --- stand-ins --------------------------------------------------------------------------------------------------------


def node(method: str, **arguments: Any) -> Any:
    return SimpleNamespace(
        merge_method=SimpleNamespace(identifier=method), bound_args=SimpleNamespace(arguments=arguments)
    )  # fmt: skip


def model(file: Path) -> Any:
    return SimpleNamespace(path=file)


def number(value: Any, config: str = "singleton-mecha") -> Any:
    values = value if isinstance(value, dict) else {"key": value}
    literal = SimpleNamespace(value_dict=values, model_config=SimpleNamespace(identifier=config))
    return node("convert_singleton" if config == "singleton-mecha" else "convert_blocks", singleton=literal)


BLOCKS = number(BY_BLOCK, "sdxl-supermerger_blocks")


def slerp(a: Any, b: Any, t: float) -> Any:
    norms = np.linalg.norm(a), np.linalg.norm(b)
    omega = np.arccos(np.sum(a / norms[0] * b / norms[1]))
    direction = (np.sin((1 - t) * omega) * a / norms[0] + np.sin(t * omega) * b / norms[1]) / np.sin(omega)
    return direction * ((1 - t) * norms[0] + t * norms[1])


# Of nodes a, b, c: a graph; of arrays a, b, c and the number of their block: the result.
GRAPHS: dict[str, tuple[Any, Any]] = {
    "weighted_sum": (
        lambda a, b, c: node("weighted_sum", a=a, b=b, alpha=number(0.3)),
        lambda a, b, c, w: 0.7 * a + 0.3 * b,
    ),
    "default": (lambda a, b, c: node("weighted_sum", a=a, b=b), lambda a, b, c, w: 0.5 * a + 0.5 * b),
    "by block": (
        lambda a, b, c: node("weighted_sum", a=a, b=b, alpha=BLOCKS),
        lambda a, b, c, w: (1 - w) * a + w * b,
    ),
    "add_difference": (
        lambda a, b, c: node("fallback", a=node("add_difference", a=a, b=node("subtract", a=b, b=c)), default=a),
        lambda a, b, c, w: a + (b - c),
    ),
    "difference by block": (
        lambda a, b, c: node("add_difference", a=a, b=node("subtract", a=b, b=a), alpha=BLOCKS),
        lambda a, b, c, w: a + w * (b - a),
    ),
    "scaled": (
        lambda a, b, c: node(
            "add_difference", a=a, b=node("scale", a=node("subtract", a=b, b=c), alpha=number(-0.5)), alpha=number(2)
        ),
        lambda a, b, c, w: a - (b - c),
    ),
    "n_average": (lambda a, b, c: node("n_average", models=(a, b, c)), lambda a, b, c, w: (a + b + c) / 3),
    "half": (lambda a, b, c: node("scale", a=a, alpha=number(0.5)), lambda a, b, c, w: a / 2),
    "one model": (lambda a, b, c: a, lambda a, b, c, w: a),
    "slerp": (lambda a, b, c: node("slerp", a=a, b=b, alpha=number(0.4)), lambda a, b, c, w: slerp(a, b, 0.4)),
    "nested": (
        lambda a, b, c: node(
            "weighted_sum", a=node("slerp", a=a, b=node("weighted_sum", a=b, b=c)), b=c, alpha=number(0.25)
        ),
        lambda a, b, c, w: 0.75 * slerp(a, (b + c) / 2, 0.5) + 0.25 * c,
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graph(files: dict[str, Path], name: str, tmp_path: Path):
    graph, formula = GRAPHS[name]
    made = graph(*(model(file) for file in files.values()))
    merge(made, output=tmp_path / "out.safetensors", output_dtype="float32")
    a, b, c = (arrays(file) for file in files.values())
    out = arrays(tmp_path / "out.safetensors")
    assert out.keys() == TENSORS.keys()
    for tensor, block in TENSORS.items():
        want = formula(a[tensor], b[tensor], c[tensor], BY_BLOCK[block])
        np.testing.assert_allclose(out[tensor], want, rtol=0, atol=1e-6)
    found = merge(made, output_dtype="float32")
    assert isinstance(found, dict)
    assert all(np.array_equal(found[t].double().numpy().ravel(), out[t]) for t in TENSORS)
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [
        "a.safetensors", "b.safetensors", "c.safetensors", "out.safetensors"
    ]  # fmt: skip


def test_sums_of_sums_are_one_sum_that_keeps_equal_models(files: dict[str, Path]):
    a, b = (model(files[name]) for name in "ab")
    half = node("weighted_sum", a=a, b=b)
    documents = recipe_of(
        node("weighted_sum", a=half, b=node("weighted_sum", a=b, b=a, alpha=number(0.25)), alpha=number(0.5))
    )
    assert len(documents) == 1 and documents[0]["merge_method"] == "task_arithmetic"
    assert documents[0]["models"] == [{"model": str(files["b"]), "parameters": {"weight": 0.625}}]
    assert fastinterp.explain(documents).as_dict()


def test_float16_is_the_default(files: dict[str, Path]):
    found = merge(model(files["a"]))
    assert isinstance(found, dict) and {str(x.dtype) for x in found.values()} == {"torch.float16"}


def test_refused(files: dict[str, Path], tmp_path: Path):
    a, b, c = (model(file) for file in files.values())

    def refused(graph: Any, message: str, kind: Any = UsageError, **settings: Any) -> None:
        with pytest.raises(kind) as caught:
            merge(graph, **settings)
        assert message in str(caught.value)

    refused(node("ties_sum", models=(a, b)), "`ties_sum` of sd-mecha is not understood here. Known: weighted_sum")
    refused(node("subtract", a=a, b=b), "the recipe is a difference of models, and no model")
    refused(node("fallback", a=node("weighted_sum", a=a, b=b), default=c), "`fallback` of sd-mecha is understood only")
    refused(node("weighted_sum", a=a, b=b, alpha=node("clamp", a=a)), "not what `clamp` computes")
    refused(node("weighted_sum", a=a, b=b, alpha=number("much")), "alpha must be a number, got 'much'")
    some = number({"BASE": 0.5, "IN00": 0.1}, "sdxl-supermerger_blocks")
    refused(node("weighted_sum", a=a, b=b, alpha=some), "no number for IN01, IN02, IN03, IN04 and 14 more")
    other = number({"x": 0.5, "y": 0.1}, "flux-flux")
    refused(node("weighted_sum", a=a, b=b, alpha=other), "numbers for the tensors of flux-flux are not understood here")
    fifteen = number(dict.fromkeys(NAMES[:-1], 0.5), "sdxl-supermerger_blocks")
    mixed = node("weighted_sum", a=node("weighted_sum", a=a, b=b, alpha=BLOCKS), b=c, alpha=fifteen)
    refused(mixed, "numbers by block of two kinds of models, or with and without one for the VAE, do not mix")
    refused({"a": 1}, "models must be files: sd_mecha.model('a.safetensors')")
    refused(a, "`output` must be a .safetensors file, got 'out'", output="out")
    refused(a, "exists already", OutputError, output=files["b"])
    refused(node("weighted_sum", a=a, b=b), "the output is the input", OutputError, output=files["b"], force=True)
    (tmp_path / "old.safetensors").write_bytes(b"")
    merge(a, output=tmp_path / "old.safetensors", force=True)
    assert arrays(tmp_path / "old.safetensors").keys() == TENSORS.keys()


def without_vae(file: Path) -> Arrays:
    """Writes the file anew without the tensor of the VAE; what it has now."""
    kept = {
        name: array.astype(np.float32).reshape(6, 5) for name, array in arrays(file).items() if TENSORS[name] != "VAE"
    }
    folder = save(file.with_suffix(""), kept)
    (folder / "model.safetensors").replace(file)
    return arrays(file)


def test_a_file_without_the_vae(files: dict[str, Path], tmp_path: Path):
    """Each remedy of the message, in the spelling of this function, with and without `output`."""
    b, a, c = without_vae(files["b"]), arrays(files["a"]), arrays(files["c"])
    vae = next(name for name, block in TENSORS.items() if block == "VAE")
    nodes = {name: model(file) for name, file in files.items()}
    graph = node("weighted_sum", a=nodes["a"], b=nodes["b"])
    with pytest.raises(ShapeError) as caught:
        merge(graph)
    assert "`missing='base'` " in str(caught.value) and "`missing='skip'` leaves out" in str(caught.value)
    for output in (None, tmp_path / "out.safetensors"):
        for how in ("base", "skip"):
            found: Any = merge(graph, output=output, output_dtype="float32", missing=how, force=True)
            got = arrays(output) if output else {n: x.double().numpy().ravel() for n, x in found.items()}
            assert got.keys() == (TENSORS.keys() if how == "base" else b.keys())
            for name in b:
                np.testing.assert_allclose(got[name], (a[name] + b[name]) / 2, rtol=0, atol=1e-6)
            assert how == "skip" or np.array_equal(got[vae], a[vae])
    nested = node("weighted_sum", a=nodes["a"], b=node("slerp", a=nodes["c"], b=nodes["b"]), alpha=number(0.25))
    made: Any = merge(nested, output_dtype="float32", missing="base")
    np.testing.assert_allclose(made[vae].double().numpy().ravel(), 0.75 * a[vae] + 0.25 * c[vae], rtol=0, atol=1e-6)


def test_integers_and_channels(files: dict[str, Path]):
    for i, file in enumerate(files.values()):
        kernel = np.full((2, 9 if i == 0 else 4, 3, 3), i, np.float32)
        folder = save(file.with_suffix(""), {f"{UNET}input_blocks.0.0.weight": kernel, "position_ids": np.array([i])})
        (folder / "model.safetensors").replace(file)
    a, b, c = (model(file) for file in files.values())
    with pytest.raises(ShapeError, match="channels='first'"):
        merge(node("weighted_sum", a=a, b=b))
    found: Any = merge(node("weighted_sum", a=a, b=b), channels="first")
    kernel = found[f"{UNET}input_blocks.0.0.weight"]
    assert kernel[:, :4].eq(0.5).all() and kernel[:, 4:].eq(0).all() and found["position_ids"].tolist() == [0]
    for graph in (node("slerp", a=b, b=c), node("weighted_sum", a=b, b=node("slerp", a=b, b=c))):
        for integers, value in ((None, 1), (files["b"], 1), (files["c"], 2)):
            found = merge(graph, integers=integers)
            assert found["position_ids"].tolist() == [value]
    for settings, message in (
        ({"integers": files["a"]}, "`integers` must be one of the models that are read, got "),
        ({"missing": "bse"}, "`missing` must be error or base or skip, got 'bse'"),
        ({"channels": "last"}, "`channels` must be same or first, got 'last'"),
    ):
        with pytest.raises(UsageError) as caught:
            merge(node("weighted_sum", a=b, b=c), **settings)
        assert message in str(caught.value)


@pytest.mark.skipif(bool(backends.sd_mecha_missing()), reason=backends.sd_mecha_missing() or "it is there")
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "weighted_sum", "by block", "add_difference", "operators", "n_average", "slerp", "nested", "model_stock",
        "half a stock", "geometric_median",
    ],
)  # fmt: skip
def test_the_result_of_sd_mecha(files: dict[str, Path], name: str):
    import sd_mecha
    import torch
    from tqdm import tqdm

    a, b, c = (sd_mecha.model(file) for file in files.values())
    blocks = sd_mecha.convert(sd_mecha.literal(BY_BLOCK, config="sdxl-supermerger_blocks"), "sdxl-sgm")
    graph = {
        "weighted_sum": lambda: sd_mecha.weighted_sum(a, b, alpha=0.3),
        "by block": lambda: sd_mecha.weighted_sum(a, b, alpha=blocks),
        "add_difference": lambda: sd_mecha.add_difference(a, b, c, alpha=0.5),
        "operators": lambda: a + sd_mecha.subtract(b, c) * 0.7,
        "n_average": lambda: sd_mecha.n_average(a, b, c),
        "slerp": lambda: sd_mecha.slerp(a, b, alpha=0.4),
        "nested": lambda: sd_mecha.weighted_sum(sd_mecha.slerp(a, sd_mecha.weighted_sum(b, c)), c, alpha=0.2),
        "model_stock": lambda: sd_mecha.n_model_stock(a, b, c),
        "half a stock": lambda: a + sd_mecha.model_stock(sd_mecha.subtract(b, a), sd_mecha.subtract(c, a)) * 0.5,
        "geometric_median": lambda: sd_mecha.geometric_median(a, b, c),
    }[name]()
    theirs = sd_mecha.merge(graph, threads=0, tqdm=partial(tqdm, disable=True), output_dtype=torch.float32)
    theirs.pop("__metadata__", None)
    ours = merge(graph, output_dtype=torch.float32)
    assert isinstance(ours, dict) and ours.keys() == theirs.keys()
    # sd-mecha has cosines in float32, with errors of a few 2^-24. t = 2c/(1+c) of a row has 2/(1+c)^2 times that, with
    # c from -0.5 on here: 1e-6, of changes up to 5. Its median ends where the sum of the distances r does not change in
    # float32: sqrt(2 * 2^-24) * r from the minimum, which is flat; r is about 5.
    atol = {"model_stock": 1e-5, "half a stock": 1e-5, "geometric_median": 2e-3}.get(name, 1e-6)
    for tensor, want in theirs.items():
        torch.testing.assert_close(ours[tensor], want, rtol=1e-6, atol=atol)


@pytest.mark.skipif(bool(backends.sd_mecha_missing()), reason=backends.sd_mecha_missing() or "it is there")
@pytest.mark.slow
def test_what_is_not_understood_is_merged_by_sd_mecha(files: dict[str, Path], tmp_path: Path, caplog):
    """And named in the log, with the reason; what sd-mecha cannot do is an error."""
    import sd_mecha
    import torch

    a, b, c = (sd_mecha.model(file) for file in files.values())
    graph, out = a + sd_mecha.ties_sum(sd_mecha.subtract(b, a), sd_mecha.subtract(c, a)), tmp_path / "out.safetensors"
    found: Any = merge(graph, output_dtype="float32", threads=0)
    assert "merged by sd-mecha, not by fastinterp: `ties_sum` of sd-mecha is not understood here" in caplog.text
    theirs = sd_mecha.merge(graph, threads=0, output_dtype=torch.float32)
    assert found.keys() == theirs.keys() - {"__metadata__"} and all(torch.equal(x, theirs[n]) for n, x in found.items())
    assert merge(graph, output=out, output_dtype="float32") is None
    written = arrays(out)
    assert all(np.array_equal(written[n], x.double().numpy().ravel()) for n, x in found.items())
    with pytest.raises(OutputError, match=r"exists already\. Write force=True to replace it"):
        merge(graph, output=out)
    merge(graph, output=out, force=True)
    for settings in ({"missing": "base"}, {"channels": "first"}, {"integers": files["a"]}):
        with pytest.raises(UsageError, match="`ties_sum` of sd-mecha is not understood here"):
            merge(graph, **settings)
    for other in (
        sd_mecha.n_model_stock(a, b, c, b), sd_mecha.geometric_median(a, a),
        sd_mecha.add_perpendicular(a, b, c),
    ):  # fmt: skip
        caplog.clear()
        assert isinstance(merge(other, threads=0), dict)
        assert "merged by sd-mecha, not by fastinterp: " in caplog.text
