"""Models with adapters in merges: bytes of the reference, what is refused, warned of, read and recorded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from ml_dtypes import bfloat16, float8_e4m3fn
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import fastinterp
from fastinterp.cli import commands
from fastinterp.errors import CheckpointError, FastinterpError, ShapeError
from fastinterp.inspect.check import check
from fastinterp.ops.combine import Combine
from fastinterp.ops.dtypes import BF16, F32
from fastinterp.recipe.load import load_recipe
from fastinterp.reference import combine as reference
from fastinterp.reference import low_rank
from tests.support.hub_server import hub_server, in_this_process
from tests.support.remedies import follow

Q, NORM = "model.layers.0.self_attn.q_proj", "model.norm.weight"
Arrays = dict[str, Any]


def base() -> Arrays:
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (12, 8), f"{Q}.weight": (16, 8), f"{Q}.bias": (16,), NORM: (8,)}
    return {name: rng.normal(size=shape).astype(bfloat16) for name, shape in shapes.items()}


def adapter(seed: int = 1, rank: int = 3) -> Arrays:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rank, 8)), rng.normal(size=(16, rank))
    return {
        f"base_model.model.{Q}.lora_A.weight": a.astype("f4"),
        f"base_model.model.{Q}.lora_B.weight": b.astype("f4"),
    }


def put(name: str, tensors: Arrays, **config: Any) -> str:
    folder = Path(name)
    folder.mkdir(exist_ok=True)
    if config:
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6} | config))
    else:
        save_file(tensors, folder / "model.safetensors")
    return name


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """base/, and one/ and two/, which are adapters of it."""
    monkeypatch.chdir(tmp_path)
    put("base", base())
    put("one", adapter(), base_model_name_or_path="base")
    put("two", adapter(2), base_model_name_or_path="org/base", use_rslora=True)


def passthrough(model: Any) -> Arrays:
    return {"merge_method": "passthrough", "models": [{"model": model}]}


def merged(model: Any, out: str = "out", **options: Any) -> Arrays:
    fastinterp.merge(passthrough(model), out, force=True, **options)
    return dict(load_file(Path(out) / "model.safetensors"))


def adapted(*adapters: tuple[int, float]) -> Any:
    """The weight of Q in float32, with the adapters of these seeds and scales."""
    w = base()[f"{Q}.weight"].astype("f4")
    for seed, scale in adapters:
        a, b = adapter(seed).values()
        w = low_rank.add_product(w, b, a, scale)
    return w


def rounded(w: Any) -> bytes:
    return reference.narrow(w.ravel(), BF16).tobytes()


ROOT = 6 / 3**0.5  # of use_rslora


@pytest.mark.parametrize(
    ("model", "adapters"),
    [
        ("base+one", [(1, 2.0)]),
        ("base+one+two", [(1, 2.0), (2, ROOT)]),
        ("base+two+one:-0.25", [(2, ROOT), (1, -0.5)]),
        ({"model": "base", "lora": "one", "scale": 0.5}, [(1, 1.0)]),
        ({"model": {"path": "base"}, "lora": [{"path": "two", "scale": 3}, "one"]}, [(2, 3 * ROOT), (1, 2.0)]),
        ("base+one/adapter_model.safetensors", [(1, 2.0)]),
    ],
)
def test_bytes_are_those_of_the_reference(model, adapters):
    """Rounded once, to the dtype of the base; what no adapter changes is copied."""
    out = merged(model)
    assert out[f"{Q}.weight"].tobytes() == rounded(adapted(*adapters))
    assert all(out[name].tobytes() == x.tobytes() for name, x in base().items() if name != f"{Q}.weight")
    (metadata,) = [safe_open("out/model.safetensors", "np").metadata()]
    names = json.loads(metadata["fastinterp"])["models"]
    assert names == [str(load_recipe(passthrough(model)).models[0])] and "+" in names[0]


@pytest.mark.parametrize("threads", [1, 3])
def test_deltas_of_adapters(threads):
    """task_arithmetic and ties of a base with its adapters: the inputs are W + s*B*A in float32."""
    inputs = [base()[f"{Q}.weight"], adapted((1, 2.0)), adapted((2, ROOT))]
    raw = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in inputs]
    recipe = {
        "merge_method": "task_arithmetic", "base_model": "base",
        "models": [{"model": f"base+{n}", "parameters": {"weight": w}} for n, w in (("one", 0.75), ("two", -0.5))],
    }  # fmt: skip
    fastinterp.merge(recipe, "out", threads=threads)
    row = Combine((0.0, 0.75, -0.5), base=0).row()
    (want,), _ = reference.combine(raw, [BF16, F32, F32], (row,), BF16, rounding="nearest", keys=[0])
    assert load_file("out/model.safetensors")[f"{Q}.weight"].tobytes() == want.tobytes()
    save_file(base() | {f"{Q}.weight": inputs[1]}, "x1.safetensors")
    save_file(base() | {f"{Q}.weight": inputs[2]}, "x2.safetensors")
    for method in ("ties", "dare_linear", "dare_ties", "slerp", "karcher"):
        parameters = {"density": 0.5, "weight": 0.5} if method in ("ties", "dare_linear", "dare_ties") else {}
        if method == "slerp":
            parameters = {"t": 0.25}

        def made(one: str, two: str, method: str = method, parameters: Arrays = parameters) -> bytes:
            given = {
                "merge_method": method, "dtype": "bfloat16", "seed": 3, "models": [{"model": one}, {"model": two}],
                "base_model": one if method == "slerp" else "base", "parameters": parameters,
            }  # fmt: skip
            if method == "karcher":
                given.pop("base_model")
            fastinterp.merge(given, "made", force=True, threads=threads)
            return load_file("made/model.safetensors")[f"{Q}.weight"].tobytes()

        assert made("base+one", "base+two") == made("x1.safetensors", "x2.safetensors"), method


def test_codes_are_decoded_before_an_adapter_is_added():
    """fp8 with a scale: the sum is of what the codes stand for; it is stored as bf16, as models of codes are."""
    codes = base()[f"{Q}.weight"].astype("f4").astype(float8_e4m3fn)
    scale = np.float32(0.37)
    coded = base() | {f"{Q}.weight": codes, f"{Q}.weight_scale": scale.reshape(1)}
    put("coded", coded)
    config = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "format": "float-quantized"}
    Path("coded/config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    out = merged("coded+one")
    a, b = adapter().values()
    want = low_rank.add_product(codes.astype("f4") * scale, b, a, 2.0)
    assert out.keys() == base().keys() and out[f"{Q}.weight"].tobytes() == rounded(want)


def test_float32_is_not_rounded():
    assert merged("base+one", dtype="float32")[f"{Q}.weight"].tobytes() == adapted((1, 2.0)).tobytes()


def test_the_command_line(tmp_path):
    """Wherever a model is named."""
    run = CliRunner().invoke
    assert run(commands, ["interpolate", "base", "base+one", "--alpha", "1", "--out", "o1"]).exit_code == 0
    assert load_file("o1/model.safetensors")[f"{Q}.weight"].tobytes() == rounded(adapted((1, 2.0)))
    assert run(commands, ["average", "base+one", "base+two", "--in-order", "--out", "o2"]).exit_code == 0
    for step in (5, 10):
        Path("run").mkdir(exist_ok=True)
        put(f"run/checkpoint-{step}", adapter(step), base_model_name_or_path="base")
    assert run(commands, ["average", "base+run/checkpoint-*", "--out", "o4"]).exit_code == 0
    card = Path("o4/README.md").read_text()
    assert "base+run/checkpoint-5" in card and "base+run/checkpoint-10" in card
    assert run(commands, ["sweep", "base", "base+one", "--alphas", "0,1", "--out", "o3"]).exit_code == 0
    found = json.loads(run(commands, ["diff", "base", "base+one", "--json"]).stdout)
    assert found["tensors"]
    found = json.loads(run(commands, ["inspect", "base+one+two:0.5", "--json"]).stdout)
    assert found["adapted"] == [
        {"name": f"{Q}.weight", "shape": [16, 8], "formula": "W + 2*B*A[r=3] (one) + 1.73205*B*A[r=3] (two)"}
    ]
    assert [a["name"] for a in found["adapters"]] == ["one", "two"]
    text = run(commands, ["inspect", "base+one"]).stdout
    assert (
        "base+one: adapters change 1 tensor\n  W + 2*B*A[r=3] (one)" in text and "LoRA adapter (peft), rank 3" in text
    )


def test_what_is_stored_whole_is_told_beside_what_is_added():
    """By inspect and explain; the report of one model with adapters says what was computed and what was copied."""
    embeddings = "model.embed_tokens"
    whole = {f"base_model.model.{n}": np.full(base()[n].shape, 0.5, "f4") for n in (f"{embeddings}.weight", NORM)}
    put("both", adapter() | whole, base_model_name_or_path="base", modules_to_save=[embeddings, "model.norm"])
    run = CliRunner().invoke
    text = run(commands, ["inspect", "base+both"]).stdout
    assert text.startswith(
        "base+both: adapters change 3 tensors\n"
        "  stored whole by the adapter (both)  2 tensors\n"
        "  W + 2*B*A[r=3] (both)                1 tensor\n"
    )
    found = json.loads(run(commands, ["inspect", "base+both", "--json"]).stdout)["adapted"]
    assert {one["name"]: one["formula"] for one in found} == {
        f"{embeddings}.weight": "stored whole by the adapter (both)",
        f"{Q}.weight": "W + 2*B*A[r=3] (both)",
        NORM: "stored whole by the adapter (both)",
    }
    assert "W of x0 is stored whole by the adapter (both) in 2 tensors" in " ".join(
        str(fastinterp.explain(passthrough("base+both"))).split()
    )
    (report,) = fastinterp.interpolate("base", "base+both", 1, "made")
    note = "1 tensor computed: the sums of a model and its adapters; 2 tensors stored in another dtype; 1 tensor copied"
    assert str(report).endswith(f"  {note}") and report.as_dict()["adapted"] == (f"{Q}.weight",)
    for alpha, dtype, adapted_tensors, last in (
        (1, "float32", (f"{Q}.weight",), "1 tensor computed"),
        (0, "float32", (), "all tensors are copies, stored in another dtype"),
        (0, None, (), "all tensors are copies"),
    ):
        (report,) = fastinterp.interpolate("base", "base+both", alpha, "made", dtype=dtype, force=True)
        assert report.adapted == adapted_tensors and last in str(report).splitlines()[-1]
    (report,) = fastinterp.interpolate("base", "base+both", 0.5, "made", force=True)
    assert report.adapted == (f"{Q}.weight",) and "computed:" not in str(report)
    for words in (["interpolate", "base", "base+both", "points", "--alpha", "0,1"],
                  ["sweep", "base", "base+both", "swept", "--alphas", "0,1"]):  # fmt: skip
        rows = [line.split()[:2] for line in run(commands, words).stdout.splitlines()[2:4]]
        assert rows == [["0", "copy"], ["1", "computed"]]


def test_explain_and_check_read_headers_alone():
    recipe = passthrough("base+one")
    text = str(fastinterp.explain(recipe))
    assert "\n  W of x0 is W + 2*B*A[r=3] (one) in 1 tensor\n" in text
    found = check({"merge_method": "linear", "models": [
        {"model": n, "parameters": {"weight": 0.5}} for n in ("base", "base+one")
    ]})  # fmt: skip
    assert not found.errors and not found.warnings  # they are equal in all that is sampled, but not in the rest


def test_an_adapter_of_another_base_by_name_is_a_warning():
    report = fastinterp.merge(passthrough("base+two"), "other")
    assert not report.warnings  # a copy of org/base, as far as its name tells
    put("three", adapter(), base_model_name_or_path="org/llama")
    report = fastinterp.merge(passthrough("base+three"), "out")
    assert report.warnings == ("three was trained on `org/llama`, and is added to base here",)
    assert [w.message for w in check(passthrough("base+three")).warnings] == list(report.warnings)


def test_the_card_lists_adapters():
    merged("base+one")
    assert "base+one" in Path("out/README.md").read_text()


def test_an_adapter_is_an_input_that_the_output_must_not_touch():
    with pytest.raises(FastinterpError):
        fastinterp.merge(passthrough("base+one"), "one", force=True)
    assert sorted(path.name for path in Path("one").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


TOKENS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
A, B = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"


def without(name: str) -> Arrays:
    return {n: x for n, x in adapter().items() if n != name}


def renamed(old: str, new: str) -> Arrays:
    return {n.replace(old, new): x for n, x in adapter().items()}


# What is wrong -> the adapter's tensors, its configuration, words of the message
BAD: dict[str, tuple[Callable[[], Arrays], Arrays, str]] = {
    "another model": (lambda: renamed("q_proj", "query"), {}, r"base has none of the tensors that the adapter changes"),
    "other shapes": (
        lambda: adapter() | {A: np.zeros((3, 9), "f4")}, {"base_model_name_or_path": "org/m"},
        r"is \[3, 9\] and .* \[16, 3\], but `model.layers.0.self_attn.q_proj.weight` of base is \[16, 8\]: an adapter "
        r"of another model\? It says that it was trained on `org/m`",
    ),
    "another rank": (adapter, {"r": 4}, r"is \[3, 8\] and .* \[16, 3\], and adapter_config.json gives rank 4"),
    "no B": (lambda: without(B), {}, r"has `.*lora_A.weight`, but no `.*lora_B`: a product needs both"),
    "left over": (lambda: adapter() | {"x.lora_C": np.zeros(1, "f4")}, {}, r"1 of 3 tensors of the adapter have no pl"),
    "two, one of them without a name": (
        lambda: adapter() | renamed(".weight", ".x.weight"), {},
        r"lora_A.weight` and `.*lora_A.x.weight` are the same part of one module: two adapters in one file",
    ),
    "with a prefix and without": (
        lambda: adapter() | renamed("base_model.model.", ""), {}, r"are the same part of one module",
    ),
    "a bias of nothing": (
        lambda: adapter() | {"base_model.model.lm_head.bias": np.zeros(3, "f4")}, {},
        r"base has not 1 of 2 of the tensors that the adapter changes: `lm_head.bias`",
    ),
    "integers": (lambda: adapter() | {A: np.zeros((3, 8), "i4")}, {}, r"is I32: a factor of an adapter is floating"),
    "rank 0": (adapter, {"r": 0}, r"`r` of adapter_config.json must be a whole number above 0, got `0`"),
    "rank inf": (adapter, {"r": math.inf}, r"`r` of adapter_config.json must be a whole number above 0, got `inf`"),
    "alpha inf": (adapter, {"lora_alpha": math.inf}, r"`lora_alpha` of .* must be a finite number, got `inf`"),
    "alpha 1e400": (adapter, {"lora_alpha": 10**400}, r"`lora_alpha` of .* must be a finite number, got `1000"),
    "a pattern that overflows": (adapter, {"rank_pattern": {"a{99999999999}": 3}}, r"which is no regular expression"),
    "integers as lengths": (
        lambda: adapter() | {A.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(16, "i4")},
        {"use_dora": True}, r"is I32: a factor of an adapter is floating",
    ),
    "integers as a bias": (
        lambda: adapter() | {B.replace("weight", "bias"): np.ones(16, "i8")}, {"lora_bias": True},
        r"is I64: a factor of an adapter is floating",
    ),
    "integers as rows": (
        lambda: adapter() | {TOKENS: np.zeros((1, 8), "i4")}, {"trainable_token_indices": [1]},
        r"is I32: a factor of an adapter is floating",
    ),
    "a token twice": (
        lambda: adapter() | {TOKENS: np.zeros((2, 8), "f4")}, {"trainable_token_indices": [1, 1]},
        r"names a token of module `model.embed_tokens` twice",
    ),
    "a pattern": (adapter, {"rank_pattern": {"(": 3}}, r"`rank_pattern` .* has `\(`, which is no regular expression"),
    "no magnitude": (adapter, {"use_dora": True}, r"says `use_dora`, but module .* has no `lora_magnitude_vector`"),
    "lengths": (
        lambda: adapter() | {A.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(8, "f4")}, {"use_dora": True},
        r"has 8 lengths for 16 outputs",
    ),
    "layer_replication": (adapter, {"layer_replication": [[0, 1]]}, r"repeats layers of its base"),
    "PiSSA": (adapter, {"init_lora_weights": "pissa_niter_4"}, r"`pissa_niter_4`, which also changed the weights of"),
    "QA-LoRA": (adapter, {"use_qalora": True}, r"is QA-LoRA"),
    "AdaLoRA": (adapter, {"peft_type": "ADALORA"}, r"an ADALORA adapter"),
    "tokens": (
        lambda: adapter() | {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta":
                             np.zeros((2, 8), "f4")},
        {"trainable_token_indices": [1]}, r"is \[2, 8\], but `trainable_token_indices` .* gives 1 tokens",
    ),
    "a resized vocabulary": (
        lambda: adapter() | {"base_model.model.model.embed_tokens.weight": np.zeros((13, 8), "f4")}, {},
        r"is \[13, 8\], but .* is \[12, 8\]. Its vocabulary was resized: resize that of the base first",
    ),
    "two adapters": (
        lambda: adapter() | renamed("lora_A", "lora_A.x") | renamed("lora_B", "lora_B.y") | {
            n.replace(".weight", ".x.weight").replace("lora_B.x", "lora_B.y"): x for n, x in adapter().items()
        }, {}, r"the file has 2 adapters, `x`, `y`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_adapters(case):
    """Named, with exit code 3; nothing is written."""
    make, config, words = BAD[case]
    put("bad", make(), **{"base_model_name_or_path": "base"} | config)
    with pytest.raises(CheckpointError, match=words) as caught:
        fastinterp.merge(passthrough("base+bad"), "out")
    assert caught.value.exit_code == 3 and not Path("out").exists()
    assert [error.message for error in check(passthrough("base+bad")).errors] == [str(caught.value)]


def test_an_adapter_that_is_a_model_and_one_that_is_not_there():
    with pytest.raises(CheckpointError, match="this is no adapter, but a model"):
        merged("base+base")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        merged("base+./none")


def test_hub_ids_of_both(tmp_path):
    """With their revisions, which are looked up once."""
    revisions = {"base": "v1", "one": "v2", "two": "main"}
    with hub_server() as hub, in_this_process(hub, tmp_path / "cache"):
        for name, revision in revisions.items():
            hub.add(f"org/{name}", Path(name), **{revision: Path(name)})
        out = merged("org/base@v1+org/one@v2:0.5+org/two")
        looked_up = [request.path for request in hub.asked if request.path.startswith("/api/models/")]
    assert looked_up == ["/api/models/org/base/revision/v1", "/api/models/org/one/revision/v2", "/api/models/org/two"]
    assert out[f"{Q}.weight"].tobytes() == rounded(adapted((1, 1.0), (2, ROOT)))


def test_integers_take_no_adapter():
    put("base", base() | {f"{Q}.weight": np.zeros((16, 8), "i4")})
    with pytest.raises(CheckpointError, match="which is I32 in base: nothing can be added to that"):
        merged("base+one")


def test_names_follow_those_of_the_base():
    """A prefix that the base's own names lack, or have in addition."""
    for own, other in (("model.", ""), ("model.", "transformer.model.")):
        put("renamed", {name.replace(own, other, 1): x for name, x in base().items()})
        assert merged("renamed+one")[f"{Q}.weight".replace(own, other, 1)].tobytes() == rounded(adapted((1, 2.0)))


def test_shapes_of_a_misfit_are_a_shape_error():
    put("bad", adapter() | {B: np.zeros((17, 3), "f4")}, base_model_name_or_path="base")
    with pytest.raises(ShapeError):
        merged("base+bad")


def test_a_base_of_torch_with_strides(monkeypatch):
    """The remedy writes a file that the adapter can be added to."""
    torch = pytest.importorskip("torch")
    weights = {name: x.astype("f4") for name, x in base().items()}
    put("plain", weights)
    Path("strided").mkdir()
    file = Path("strided/pytorch_model.bin")
    state = {name: torch.from_numpy(x) for name, x in weights.items()}
    torch.save({"state_dict": {n: x.t().contiguous().t() if x.ndim == 2 else x for n, x in state.items()}}, file)
    with pytest.raises(CheckpointError, match="whose elements do not lie one after the other in strided") as caught:
        merged("strided+one")
    follow(str(caught.value), monkeypatch)
    Path("NEW.pt").replace(file)
    want = merged("plain+one")
    fastinterp.merge(passthrough("strided+one"), "out", force=True)
    got = load_file(next(Path("out").glob("*.safetensors")))
    assert {n: x.tobytes() for n, x in got.items()} == {n: x.tobytes() for n, x in want.items()}
