"""The commands on which `benchmarks/compare_builds.py` compares two builds, and the checkpoints that they merge."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.methods import CASES, recipe, write_sidecars
from fastinterp.bench.check import read_tensors
from fastinterp.bench.checkpoints import SIZES, Size, write_checkpoints

# Rows of 260 elements end within every vector, and the embedding within a block of the output and a chunk of elements.
SMALL = Size(hidden=260, inter=690, layers=4, heads=4, kv_heads=2, vocab=4099)
INPUT_SIZES = {"small": SMALL, **SIZES}
_SHARD_BYTES = 3 << 20

OUT = "out"
MODELS = Path("models")  # as recipes name it: commands run in the folder that holds it
RECIPE = "recipe.yml"


@dataclass(frozen=True)
class Command:
    """One command of fastinterp.

    name       of the case: `NAME` of a method with the parameters that it is raced with, else `WHAT/DETAIL`
    arguments  of the program; the output is the folder `out`
    recipe     the text of `recipe.yml`, if the command reads one
    """

    name: str
    arguments: tuple[str, ...]
    recipe: str | None = None


def commands(methods: Iterable[str]) -> list[Command]:
    """Every command to compare, `methods` being those that both builds have. Raises: KeyError, if one has no case."""
    raced = [_merge(name, recipe(name, CASES[name], MODELS)) for name in methods]
    return raced + _options() + _layers() + _documents() + _stored() + _vocabularies() + _points()


# --- commands --------------------------------------------------------------------------------------------------------


def _merge(name: str, *documents: Mapping[str, Any], options: tuple[str, ...] = ()) -> Command:
    text = "---\n".join(json.dumps(document, indent=1) + "\n" for document in documents)  # JSON is YAML
    return Command(name, ("merge", RECIPE, OUT, *options), text)


def _model(name: str) -> str:
    return str(MODELS / name)


def _of(method: str, *models: str, base: str | None = None, each: Any = None, once: Any = None, **keys: Any) -> Any:
    """A recipe. each: parameters of every model; once: those of the merge; keys: further keys of the recipe."""
    entries = [{"model": _model(model), **({"parameters": each} if each else {})} for model in models]
    document: dict[str, Any] = {"merge_method": method, "models": entries}
    document |= {"base_model": _model(base)} if base else {}
    document |= {"parameters": once} if once else {}
    return document | keys


_PAIR = ("ft1", "ft2")
_THIN = {"weight": 0.6, "density": 0.4}


def _options() -> list[Command]:
    """Presets, and parameters beside those of the races."""

    def deltas(method: str, each: Any = _THIN, **once: Any) -> Command:
        detail = " ".join(f"{k}={v}" for k, v in once.items())
        return _merge(f"{method}/{detail}", _of(method, *_PAIR, base="base", each=each, once=once))

    return [
        *(deltas("ties", preset=preset) for preset in ("paper", "peft")),
        *(deltas(method, preset="paper") for method in ("dare_linear", "dare_ties")),
        deltas("dare_ties", preset="peft", normalize=True),
        deltas("ties", rescale=True, normalize=False),
        deltas("ties", {"weight": 0.6, "density": 1.0}, **{"lambda": 1.5}),
        deltas("dare_linear", rescale=False, normalize=True),
        deltas("della", epsilon=0.2, rescale=False),
        deltas("della_linear", {"weight": -0.5, "density": 0.4}, epsilon=0.3, **{"lambda": 1.5}),
        deltas("breadcrumbs", gamma=0.05, rescale=True),
        deltas("breadcrumbs_ties", gamma=0.02, normalize=True),
        deltas("task_arithmetic", {"weight": -0.7}, normalize=False),
        deltas("multislerp", {"weight": 0.3}, normalize_weights=False),
        deltas("nuslerp", {"weight": 0.3}, nuslerp_flatten=False),
        deltas("nuslerp", {"weight": 0.3}, nuslerp_flatten=False, nuslerp_row_wise=True),
        deltas("model_stock", {}, filter_wise=True),
        deltas("sce", {}, select_topk=0.1),
        _merge("linear/normalize=False", _of("linear", *_PAIR, each={"weight": 0.4}, once={"normalize": False})),
        _merge("ema/weights", _of("ema", "base", *_PAIR, once={"weights": {"decay": "1-sqrt"}})),
        _merge("geometric_median/weight", _of("geometric_median", "base", *_PAIR, each={"weight": 0.7})),
        _merge("dare_ties/seed", _of("dare_ties", *_PAIR, base="base", each=_THIN, seed=7)),
        _merge("della/--max-memory", _of("della", *_PAIR, base="base", each=_THIN), options=("--max-memory", "8MB")),
    ]


def _layers() -> list[Command]:
    """Gradients, filters, slices and modules."""

    def layers(model: str, first: int, end: int, **parameters: Any) -> dict[str, Any]:
        source = {"model": _model(model), "layer_range": [first, end]}
        return {**source, **({"parameters": parameters} if parameters else {})}

    by_name = [{"filter": "mlp", "value": 0.2}, {"filter": "self_attn.q", "value": 1.0}, {"value": 0.4}]
    filtered = {"weight": 0.5, "density": by_name}
    up = [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0]}, {"value": 0.3}]
    stack = {"slices": [{"sources": [layers("ft1", 0, 3)]}, {"sources": [layers("ft2", 1, 4, scale=0.5)]}]}
    pairs = [[layers("ft1", i, i + 2, weight=0.3), layers("ft2", i + 1, i + 3)] for i in (0, 1)]
    twice = {"slices": [{"sources": pair} for pair in pairs]}
    from_base = {"slices": [{"sources": [layers("base", i, i + 2), *pair]} for i, pair in enumerate(pairs)]}
    modules = {
        "lm_head": {"models": [{"model": _model("ft2")}], "parameters": {"weight": 2, "normalize": False}},
        "layers": {"models": [{"model": _model(m), "parameters": {"weight": 0.5}} for m in _PAIR]},
    }
    return [
        *(_merge(f"filters/{m}", _of(m, *_PAIR, base="base", each=filtered)) for m in ("ties", "dare_linear")),
        _merge("gradients/slerp", _of("slerp", "ft2", base="ft1", once={"t": up})),
        _merge("gradients/linear", _of("linear", *_PAIR, each={"weight": [0.1, 0.9, 0.4]})),
        _merge("gradients/della", _of("della", *_PAIR, base="base", each={"weight": [1, 0.2], "density": 0.5})),
        _merge("slices/passthrough", {"merge_method": "passthrough", **stack, "dtype": "bfloat16"}),
        _merge("slices/linear", {"merge_method": "linear", "parameters": {"weight": 0.7}, **twice}),
        _merge("slices/ties", {"merge_method": "ties", "base_model": _model("base"), "parameters": _THIN, **from_base}),
        _merge("modules", {"merge_method": "linear", "base_model": _model("base"), "modules": modules}),
    ]


def _documents() -> list[Command]:
    """Documents that merge what those above them make: folded into one sum, or made tensor by tensor."""
    average = _of("linear", *_PAIR, each={"weight": [0.2, 0.8]}, name="above")
    rounded = average | {"out_dtype": "bfloat16"}
    trimmed = _of("ties", *_PAIR, base="base", each=_THIN, name="above")

    def below(method: str, **keys: Any) -> dict[str, Any]:
        models = [{"model": "above", **({"parameters": keys.pop("each")} if "each" in keys else {})}]
        return {"merge_method": method, "base_model": _model("base"), "models": models, **keys}

    step = below("task_arithmetic", each={"weight": 1.5})
    return [
        _merge("documents/sum of a sum", average, step),
        _merge("documents/sum of a rounded sum", rounded, step),
        _merge("documents/sum of ties", trimmed, step | {"dtype": "float32"}),
        _merge("documents/slerp of a sum", average, below("slerp", parameters={"t": 0.3})),
        _merge("documents/dare_ties of ties", trimmed, below("dare_ties", each=_THIN, seed=3)),
        _merge("documents/three", trimmed, step | {"name": "next"}, _of("linear", "ft1") | {
            "models": [{"model": m, "parameters": {"weight": 0.5}} for m in ("above", "next", _model("ft1"))]
        }),
    ]  # fmt: skip


def _stored() -> list[Command]:
    """Dtypes of inputs and outputs, rounding, files of the output."""
    mixed, seeded = ("mixed1", "mixed2"), {"rounding": "stochastic", "seed": 5}
    names = {"f64": "float64", "f32": "float32", "f16": "float16", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
    sums = _of("linear", *_PAIR, each={"weight": 0.3})
    masked = _of("ties", *_PAIR, base="base", each=_THIN)
    large = {**_of("passthrough", "ft1", once={"scale": 30000}), "out_dtype": "float8_e4m3fn"}

    def of_mixed(method: str, base: str | None = "mixed0", **keys: Any) -> Command:
        return _merge(f"mixed/{method}", _of(method, *mixed, base=base, **keys, integers=_model(base or "mixed1")))

    return [
        *(_merge(f"out_dtype/{k} linear", sums | {"out_dtype": v}) for k, v in names.items()),
        *(_merge(f"out_dtype/{k} ties", masked | {"out_dtype": v}) for k, v in names.items()),
        *(_merge(f"stochastic/{k}", sums | {"out_dtype": names[k]} | seeded) for k in ("f16", "e4m3", "e5m2")),
        _merge("stochastic/bf16", sums | {"rounding": "stochastic"}, options=("--seed", "9")),
        _merge("stochastic/ties", masked | seeded),
        _merge("dtype/--dtype", sums, options=("--dtype", "float32")),
        _merge("fp8_overflow/saturate", large),
        _merge("fp8_overflow/nonfinite", large | {"fp8_overflow": "nonfinite"}),
        of_mixed("linear", None, each={"weight": 0.3}),
        of_mixed("task_arithmetic", each={"weight": 0.3}),
        of_mixed("ties", each=_THIN),
        of_mixed("dare_ties", each=_THIN),
        of_mixed("della", each=_THIN),
        of_mixed("karcher", None),
        of_mixed("model_stock"),
        of_mixed("sce", once={"select_topk": 0.3}, out_dtype="bfloat16"),
        _merge("shards", sums, options=("--max-shard-size", "1MB")),
    ]


def _vocabularies() -> list[Command]:
    """Vocabularies that differ, embeddings that are tied."""
    words = ("words1", "words2")
    other = _of("slerp", "words2", base="words0", once={"t": 0.3}, tokenizer_source=_model("words2"))
    tokens = {"new7": {"source": _model("words1"), "force": True}, "made up": {"source": {"kind": "zero"}}}
    padded = {"tokenizer": {"source": "union", "pad_to_multiple_of": 64, "tokens": tokens}, "chat_template": "chatml"}
    return [
        _merge("tokenizer/union", _of("linear", "words0", *words, each={"weight": 0.5}, tokenizer_source="union")),
        _merge("tokenizer/union ties", _of("ties", *words, base="words0", each=_THIN, **padded)),
        _merge("tokenizer/model", other),
        _merge("tied", _of("linear", "tied", "ft1", each={"weight": 0.5})),
    ]  # fmt: skip


def _points() -> list[Command]:
    """Commands that make many outputs of one read."""
    a, b, base = _model("ft1"), _model("ft2"), ("--base", _model("base"))
    alphas = ("--alpha", "0:1:0.25", "--alpha", "-0.5,1.5")
    mixed = (_model("mixed1"), _model("mixed2"), "--integers", _model("mixed1"))
    trimmed = ("--method", "ties", "--parameter", "density=0.4")
    directions = (*base, "--add", f"pos={a}", "--add", f"neg={b}", "--grid", "pos=0:1:0.5", "--grid", "neg=-1,0.3")

    def points(name: str, *arguments: str) -> Command:
        return Command(name, (*arguments, "-o", OUT))

    return [
        points("interpolate/one", "interpolate", a, b, "--alpha", "0.3"),
        points("interpolate/many", "interpolate", a, b, *alphas),
        points("interpolate/--base", "interpolate", a, b, *base, *alphas, "--dtype", "float16"),
        points("interpolate/stochastic", "interpolate", a, b, *alphas, "--rounding", "stochastic", "--seed", "3"),
        points("interpolate/mixed", "interpolate", *mixed, *alphas),
        points("sweep/line", "sweep", a, b, "--alphas", "-0.5:1.5:0.5"),
        points("sweep/slerp", "sweep", a, b, "--alphas", "0:1:0.25", "--method", "slerp"),
        points("sweep/ties", "sweep", a, b, *base, "--alphas", "0:1:0.5", *trimmed),
        points("sweep/grid", "sweep", *directions),
        points("sweep/--virtual", "sweep", *directions, "--virtual"),
    ]  # fmt: skip


# --- checkpoints -----------------------------------------------------------------------------------------------------


def write_inputs(folder: Path, given: Path | None, size: Size) -> None:
    """Write all that the commands read into `folder`, from the BF16 checkpoints base, ft1 and ft2.

    given  the folder of these three; linked, not copied. None: they are made, of `size`
    """
    folder.mkdir(parents=True)
    if given is None:
        write_checkpoints(folder, size, shard_bytes=_SHARD_BYTES)
    else:
        for name in ("base", *_PAIR):
            (folder / name).symlink_to((given / name).resolve(), target_is_directory=True)
    write_sidecars(CASES["fisher"], folder)
    for k, name in enumerate(("base", *_PAIR)):
        tensors = {
            # Every pair of dtypes meets in some tensor.
            tensor: _stored_as(entry.read(0, math.prod(entry.shape)), entry.shape, _DTYPES[(i + i // 6 * k) % 6])
            for i, (tensor, entry) in enumerate(sorted(read_tensors(folder / name).items()))
        }
        position_ids = ("I64", (3,), np.arange(k, k + 3, dtype="<i8").tobytes())
        _write(folder / f"mixed{k}", folder / name, tensors | {"model.position_ids": position_ids})
        _write_words(folder, name, k)
    kept = {n: t for n, t in read_tensors(folder / "base").items() if n != "lm_head.weight"}
    raw = {n: _stored_as(t.read(0, math.prod(t.shape)), t.shape, "BF16") for n, t in kept.items()}
    _write(folder / "tied", folder / "base", raw, tie_word_embeddings=True)


_DTYPES = ("F32", "F16", "F64", "BF16", "F8_E4M3", "F8_E5M2")
_Stored = tuple[str, tuple[int, ...], bytes]  # dtype as safetensors names it, shape, data


def _stored_as(x: NDArray[np.float64], shape: tuple[int, ...], dtype: str) -> _Stored:
    # The finest have bits of their own below those of BF16.
    noisy = x * (1 + np.random.default_rng(x.size).uniform(-1e-3, 1e-3, x.size)) if dtype in ("F32", "F64") else x
    if dtype in ("F64", "F32", "F16"):
        return dtype, shape, noisy.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
    if dtype == "BF16":  # exact: that is where x comes from
        return dtype, shape, (x.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    if dtype == "F8_E5M2":  # the upper half of an F16
        return dtype, shape, (x.astype("<f2").view("<u2") >> 8).astype(np.uint8).tobytes()
    code = np.arange(127)  # E4M3 from 0 to its largest number; 127 is NaN
    values = np.where(code < 8, code / 8 * 2.0**-6, (1 + code % 8 / 8) * 2.0 ** (code // 8 - 7.0))
    nearest = np.searchsorted((values[1:] + values[:-1]) / 2, np.abs(x))
    return dtype, shape, (nearest + 128 * np.signbit(x)).astype(np.uint8).tobytes()


def _write(folder: Path, like: Path, tensors: Mapping[str, _Stored], **config: Any) -> None:
    """A checkpoint of one file, its configuration that of the checkpoint `like`, with changes."""
    folder.mkdir()
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        start, end = end, end + len(data)
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for _, _, data in tensors.values():
            stream.write(data)
    (folder / "config.json").write_text(json.dumps(json.loads((like / "config.json").read_text()) | config, indent=1))


def _write_words(folder: Path, name: str, k: int) -> None:
    """The checkpoint `name` with a vocabulary: some words in common with the others, some of its own, some padding."""
    made = folder / f"words{k}"
    made.mkdir()
    for file in (folder / name).resolve().iterdir():
        shutil.copy(file, made / file.name)  # a link that leaves the model is refused
    rows = json.loads((made / "config.json").read_text())["vocab_size"]
    common = [f"word{i}" for i in range(rows - 40)]
    words = ["<unk>", *(common[::-1] if k == 2 else common), *(f"new{k * 7 + i}" for i in range(9 * k))]
    special = {"content": f"<|special{k}|>", "single_word": False, "lstrip": False, "rstrip": False}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": None,
        "added_tokens": [{"id": len(words), **special, "normalized": False, "special": True}],
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "<unk>"},
    }  # fmt: skip
    (made / "tokenizer.json").write_text(json.dumps(tokenizer))
    (made / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
