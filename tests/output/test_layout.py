"""Checkpoints out: layout, sidecars, the model card."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors import safe_open

from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.checkpoint.sidecar_files import is_sidecar, read_config, with_dtype
from fastinterp.errors import CheckpointError, OutputError, UsageError
from fastinterp.ops.dtypes import BF16, DTYPES, F8_E4M3, F16, F32, F64
from fastinterp.output.layout import ALIGN, make_layout, parse_size
from fastinterp.output.model_card import model_card
from fastinterp.output.origin_files import origin_files

U8, I64, F4 = DTYPES["U8"], DTYPES["I64"], DTYPES["F4"]
GB = 10**9


# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * GB), ("5 gb", 5 * GB), ("1.5GiB", 3 * 2**29), ("0.1GB", 10**8), ("512MB", 512 * 10**6), ("2KiB", 2048),
     ("3KB", 3000), ("2MiB", 2**21), ("1TB", 10**12), ("1TiB", 2**40), ("12345", 12345), ("5G", 5 * GB),
     ("3m", 3 * 10**6), (" 7 ", 7), ("1.000000000000000001TB", 10**12)],
)  # fmt: skip
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "5Gi", "5B", "-5GB", "5GBs", "1e9", "5.GB", ".5GB", "5 G B", "nan", "\u0665GB", "5GB\n5"]
)
def test_parse_size_refuses(text):
    """A bare B could mean bytes or (in mergekit) 10^9 parameters."""
    with pytest.raises(UsageError, match=r"is not a size; write a number with KB, MB, GB, TB, KiB, MiB, GiB or TiB"):
        parse_size(text)


def test_parse_size_zero():
    for text in ("0", "0GB", "0.0001KB"):
        with pytest.raises(UsageError, match="is less than one byte"):
            parse_size(text)


# Layout

ODD = [
    ("u.odd", U8, (3,)), ("w.bf16", BF16, (3, 5)), ("f8", F8_E4M3, (7,)), ("w.f32", F32, (3,)), ("i", I64, ()),
    ("empty", F32, (0, 4)), ("f64", F64, (2,)), ("four", F4, (2, 3)), ("f16", F16, (1,)), ("ünï\n", F32, (1,)),
]  # fmt: skip


def write_layout(folder: Path, layout, fill) -> None:
    """What the engine does: header, then every tensor's bytes at its place. fill(name, nbytes) -> bytes."""
    folder.mkdir(exist_ok=True)
    sizes = {n: d.nbytes(int(np.prod(s))) for n, d, s in ODD}
    for file in layout.files:
        content = bytearray(file.size)
        content[: len(file.header)] = file.header
        for name, place in file.places.items():
            content[place : place + sizes[name]] = fill(name, sizes[name])
        (folder / file.name).write_bytes(content)
    for name, content in layout.indexes.items():
        (folder / name).write_bytes(content)


def pattern(name: str, nbytes: int) -> bytes:
    return bytes((sum(name.encode()) + i) % 251 for i in range(nbytes))


def test_layout_of_one_file(tmp_path):
    """Page-aligned data, each tensor aligned to its width, and read back with its bytes by safetensors and by us."""
    layout = make_layout(ODD, {"format": "pt", "k": "ü"}, 5 * GB)
    (file,) = layout.files
    assert file.name == "model.safetensors" and not layout.indexes
    assert len(file.header) % ALIGN == 0 and layout.disk_bytes == file.size == len(file.header) + layout.total_size
    assert all(file.places[n] % max(1, d.bits // 8) == 0 for n, d, _ in ODD)
    write_layout(tmp_path / "m", layout, pattern)
    with safe_open(tmp_path / "m" / file.name, "np") as opened:
        assert opened.metadata() == {"format": "pt", "k": "ü"}
        assert set(opened.keys()) == {n for n, _, _ in ODD}
        for name, _, shape in [t for t in ODD if t[1].name in ("U8", "F32", "I64", "F64", "F16")]:
            array = opened.get_tensor(name)
            assert array.shape == shape and array.tobytes() == pattern(name, array.nbytes)
    found = open_checkpoint(str(tmp_path / "m"))
    assert {(e.name, e.dtype, e.shape) for e in found.tensors.values()} == set(ODD)
    assert {n: e.start for n, e in found.tensors.items()} == file.places and found.nbytes == layout.total_size


def test_layout_keeps_the_order_within_a_dtype():
    names = [f"t{i}" for i in (3, 1, 2, 0)]
    (file,) = make_layout([(n, BF16, (2,)) for n in names], {}, GB).files
    assert list(file.places) == names and sorted(file.places.values()) == list(file.places.values())


def test_layout_in_shards(tmp_path):
    """Shards are filled in the order given; a tensor over the limit is alone; the whole opens again."""
    layout = make_layout(ODD, {"format": "pt"}, 20)
    names = [list(f.places) for f in layout.files]
    assert names == [["w.bf16"], ["u.odd", "f8"], ["i", "w.f32", "empty"], ["f64", "four"], ["ünï\n", "f16"]]
    assert layout.files[0].name == "model-00001-of-00005.safetensors"
    assert list(layout.indexes) == ["model.safetensors.index.json"]
    assert json.loads(layout.indexes["model.safetensors.index.json"])["metadata"] == {"total_size": layout.total_size}
    write_layout(tmp_path / "m", layout, pattern)
    found = open_checkpoint(str(tmp_path / "m"))
    assert found.index and found.nbytes == layout.total_size and len(found.files) == 5
    for file in layout.files:
        with safe_open(tmp_path / "m" / file.name, "np") as opened:
            assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("limit", [1, 10, 11, 100, 5000])
def test_shards_are_those_of_transformers(limit):
    """The split and the index equal those of huggingface_hub, which transformers saves with."""
    serialization = pytest.importorskip("huggingface_hub.serialization._base")
    sizes = {f"layers.{i}.weight": (i * 7) % 13 + 1 for i in range(40)}
    split = serialization.split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    layout = make_layout([(n, U8, (s,)) for n, s in sizes.items()], {"format": "pt"}, limit)
    ours = {tensor: f.name for f in layout.files for tensor in f.places}
    assert ours == split.tensor_to_filename
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        assert layout.indexes == {"model.safetensors.index.json": text.encode()}
    else:
        assert not layout.indexes


def test_layout_refuses():
    for tensors, expected in (
        ([], "there are no tensors to write"),
        ([("a", F32, (1,)), ("a", F32, (1,))], "tensor `a` would be written twice"),
        ([("__metadata__", F32, (1,))], "a tensor cannot be called `__metadata__`"),
        ([("a", F4, (3,))], r"tensor `a`: F4 \[3\] does not fill whole bytes"),
    ):
        with pytest.raises(OutputError, match=expected):
            make_layout(tensors, {}, GB)


# Sidecars


def test_which_files_are_sidecars():
    """Configuration, tokenizers and processors of the common families; never weights, code or optimizer state."""
    yes = """config.json generation_config.json tokenizer.json tokenizer_config.json tokenizer.model vocab.json
        vocab.txt merges.txt special_tokens_map.json added_tokens.json chat_template.jinja chat_template.json
        preprocessor_config.json processor_config.json video_preprocessor_config.json qwen.tiktoken spiece.model
        sentencepiece.bpe.model tekken.json source.spm modules.json model_index.json hf_quant_config.json
        sentence_bert_config.json config_sentence_transformers.json image_processor_config.json""".split()
    no = """model.safetensors model.safetensors.index.json pytorch_model.bin vocab.bin vocab.py chat_template.py
        modeling_x.py optimizer.pt trainer_state.json training_args.bin scheduler.pt README.md adapter_config.json
        rng_state.pth x.gguf tokenizer.pkl config.json.bak .config.json tokenizer/vocab.json""".split()
    assert [n for n in yes + no if is_sidecar(n)] == yes


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    layout = make_layout([("a", F32, (1,))], {}, GB)
    (folder / "model.safetensors").write_bytes(layout.files[0].header + bytes(4))
    (folder / "config.json").write_text(CONFIG)
    for name in ("tokenizer.json", "modeling.py", "optimizer.pt"):
        (folder / name).write_text("x")
    (folder / "vocab.d").mkdir()
    return open_checkpoint(str(folder))


CONFIG = """{
  "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "name": "ü", "hidden_act": "silu",
  "text_config": {"dtype": "bfloat16", "inner_config": {"torch_dtype": null}, "rope": {"dtype": "int"}},
  "quantization_config": {"dtype": "int4"}
}
"""


def test_contents_of_the_origins_files(source):
    """Paths as they are; with a dtype config.json is new content; folders, code and state stay behind."""
    paths = {n: source.root / n for n in ("config.json", "tokenizer.json")}
    files = origin_files(source.root, source)
    assert files.contents() == files.copied == paths
    assert files.contents(F16) == {**paths, "config.json": with_dtype(CONFIG.encode(), F16)}
    (source.root / "config.json").write_text("{")
    assert files.contents() == paths
    with pytest.raises(CheckpointError, match=r"config\.json: the model configuration is not JSON"):
        files.contents(F16)


def test_config_that_is_too_large(source):
    """Gigabytes are not read, by no one who looks into it."""
    with open(source.root / "config.json", "r+b") as stream:
        stream.truncate(5 * 10**9)
    files = origin_files(source.root, source)
    for look in (lambda: files.contents(F16), lambda: read_config(source.root)):
        with pytest.raises(
            CheckpointError, match=r"config\.json: the file has 5000000000 bytes, more than the allowed"
        ):
            look()


@pytest.mark.parametrize(
    ("dtype", "name"), [(F16, "float16"), (F32, "float32"), (F64, "float64"), (F8_E4M3, "float8_e4m3fn")]
)
def test_with_dtype(dtype, name):
    """Both keys, nested configurations too; nothing else changes, nothing is added, the order stays."""
    expected = json.loads(CONFIG)
    expected["torch_dtype"] = expected["text_config"]["dtype"] = name
    expected["text_config"]["inner_config"]["torch_dtype"] = name
    changed = with_dtype(CONFIG.encode(), dtype)
    assert json.loads(changed) == expected and list(json.loads(changed)) == list(expected) and "ü".encode() in changed


def test_with_dtype_unchanged():
    """No key, or the right value already: the same bytes, formatting included."""
    for config in (b'{"a":1}', b'{"dtype":  "bfloat16"}', b' {"torch_dtype":"bfloat16"}'):
        assert with_dtype(config, BF16) == config


def test_with_dtype_that_has_no_name():
    with pytest.raises(CheckpointError, match="no name for dtype U8"):
        with_dtype(b"{}", U8)


TAGS = ["merge", "mergekit", "fastinterp", "linear"]


def front_matter(card: str) -> dict:
    _, front, body = card.split("---\n", 2)
    assert body.startswith("\n# Merged model\n")
    return yaml.safe_load(front)


def test_model_card(tmp_path, monkeypatch):
    """Hub ids, without revision and once each, become base_model; local names stand in the text only."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local").mkdir()
    names = ["org/a@main", "org/a", "gpt2", "./x", "/elsewhere/y", "local", "null", "1e3"]
    card = model_card("merge_method: linear\n", names, "linear", "0.1.0")
    ids = ["org/a", "gpt2", "null", "1e3"]
    assert front_matter(card) == {"base_model": ids, "base_model_relation": "merge", "tags": TAGS}
    assert "Made with fastinterp 0.1.0 by the method `linear`." in card
    assert all(f"| `{n}` |\n" in card for n in names)
    assert "```yaml\nmerge_method: linear\n```\n" in card
    assert "base_model" not in model_card("x", ["./x"], "linear", "0.1.0")


CARDS = {
    "apache": "---\nlicense: apache-2.0\ntags: [x]\n---\n# A\n",
    "other": "---\r\nlicense: other\r\nlicense_name: llama3\r\nlicense_link: LICENSE\r\n---\r\n",
    "none": "---\ntags: [x]\n---\n",
    "empty": "# no front matter\nlicense: mit\n",
    "broken": "---\nlicense: [\n---\n",
}


@pytest.mark.parametrize(
    ("cards", "licence"),
    [
        (["apache", "apache"], {"license": "apache-2.0"}),
        (["other", "other"], {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}),
        (["apache", "other"], {}),
        (["apache", "none"], {}),
        (["apache", None], {}),
        (["empty", "empty"], {}),
        (["broken", "broken"], {}),
    ],
    ids=str,
)
def test_model_card_states_the_licence_that_all_models_state(tmp_path, cards, licence):
    roots = [tmp_path / str(i) for i in range(len(cards))]
    for root, card in zip(roots, cards, strict=True):
        root.mkdir()
        if card is not None:
            (root / "README.md").write_text(CARDS[card], newline="")
    found = front_matter(model_card("x", ["./x"], "linear", "0.1.0", roots))
    assert found == {**licence, "tags": TAGS}


@pytest.mark.parametrize(
    ("files", "library"),
    [
        (["config.json"], "transformers"),
        (["config.json", "modules.json"], "sentence-transformers"),
        (["model_index.json"], "diffusers"),
        ([], None),
    ],
    ids=str,
)
def test_model_card_names_the_library(tmp_path, files, library):
    for name in files:
        (tmp_path / name).write_text("{}")
    assert front_matter(model_card("x", ["./x"], "linear", "0.1.0", [tmp_path])).get("library_name") == library


def test_model_card_with_odd_names():
    """Names and recipes that try to break out of the front matter, of inline code and of the fenced block."""
    names = ["a\n---\nlicense: mit", '"]', "`x`", "a: b", "\u2028", "- x", "{}", "\ud800"]
    recipe = "models:\n# ```\n# ````\n---\n"
    card = model_card(recipe, names, "linear", "0.1.0")
    assert front_matter(card) == {"tags": TAGS}
    assert "| `a\\n---\\nlicense: mit` |\n" in card and "| `` `x` `` |\n" in card
    assert card.endswith(f"`````yaml\n{recipe}`````\n")
    assert card.encode()
