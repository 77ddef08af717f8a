"""Readers of files that anybody may have written, fed with damaged ones: a result, or an error of fastinterp's own.

    python -m tests.attacks.fuzz TARGET [-runs=N] [options of libFuzzer]

mutates files of one kind, guided by the branches that they reach: with atheris, which `make fuzz` installs. Inputs that
end otherwise are kept in build/fuzz/TARGET/crashes, one for each line that raised, with the traceback; those that reach
something new in build/fuzz/TARGET/corpus. tests/attacks/corpus/TARGET.zip is the part of both that the tests replay;
`python -m tests.attacks.fuzz TARGET --keep` makes it anew.
"""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from fastinterp.errors import FastinterpError
from tests.support import torch_files as pickles

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "fuzz"
LIMIT_S = 20  # an input that takes longer is one that hangs
LIMIT_MB = 2048
_KEPT, _KEPT_BYTES = 60, 4096  # inputs of a corpus in the tree, and the most bytes of each

Reader = Callable[[Path, bytes], object]


@dataclass(frozen=True)
class Target:
    """One kind of files.

    read   writes the bytes that it is given as such a file into a folder, and has fastinterp read that
    seeds  files as they should be
    """

    read: Reader
    seeds: tuple[bytes, ...]


# --- weights ---------------------------------------------------------------------------------------------------------


def safetensors(header: object, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int = 0, end: int = 64, shape: Sequence[int] = (4, 4), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


LAYER = "model.layers.0.mlp.up_proj.weight"
NAMES = [f"model.layers.{i}.{x}.weight" for i in range(4) for x in ("mlp.up_proj", "input_layernorm")] + ["lm_head.weight"]
HALVES = {LAYER: entry(0, 32, (2, 4)), "model.embed_tokens.weight": entry(32, 64, (2, 4))}
RECEIPT = {"version": "0.2.0", "numerics": 1, "method": "linear", "recipe": "merge_method: linear\n", "models": ["a"]}


def opened(path: Path) -> None:
    """Everything that is printed about a checkpoint."""
    from fastinterp.checkpoint.open import open_checkpoint
    from fastinterp.inspect import describe
    from fastinterp.plan.models import open_model

    checkpoint = open_checkpoint(str(path))
    json.dumps(describe.as_dict(checkpoint))
    describe.as_text(checkpoint, every=True)
    open_model(str(path))


def in_folder(name: str, **others: bytes) -> Reader:
    """The input is the file `name`, beside `others`: `_` in a name stands for a point."""

    def read(folder: Path, data: bytes) -> None:
        for other, content in others.items():
            (folder / other.replace("__", "-").replace("_s", ".s").replace("_j", ".j")).write_bytes(content)
        (folder / name).write_bytes(data)
        opened(folder)

    return read


def one_file(name: str) -> Reader:
    def read(folder: Path, data: bytes) -> None:
        (folder / name).write_bytes(data)
        opened(folder / name)

    return read


def header(folder: Path, data: bytes) -> None:
    """The JSON of a header, in a file whose length of the header is right."""
    one_file("model.safetensors")(folder, safetensors(data))


def receipt(folder: Path, data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    head = {"__metadata__": {"fastinterp": text, "format": "pt"}, **HALVES}
    one_file("model.safetensors")(folder, safetensors(head))


def pickle(folder: Path, data: bytes) -> None:
    """The pickle of a file of torch.save, in an archive that is right, with a storage of 16 bytes."""
    one_file("pytorch_model.bin")(folder, pickles.zipped(pickles.archive(data, {"0": bytes(16)})))


def adapter(folder: Path, data: bytes) -> None:
    from fastinterp.checkpoint.lora import parse
    from fastinterp.checkpoint.open import open_checkpoint

    module = "base_model.model.model.layers.0.mlp.up_proj"
    head = {f"{module}.lora_A.weight": entry(0, 32, (2, 4)), f"{module}.lora_B.weight": entry(32, 64, (4, 2))}
    (folder / "adapter_model.safetensors").write_bytes(safetensors(head))
    (folder / "adapter_config.json").write_bytes(data)
    parse(open_checkpoint(str(folder)))


# --- text ------------------------------------------------------------------------------------------------------------


def recipe(folder: Path, data: bytes) -> None:
    from fastinterp.inspect.explain_parameters import parameters_in_force
    from fastinterp.recipe.check import value_warnings
    from fastinterp.recipe.load import load_recipes

    (folder / "recipe.yml").write_bytes(data)
    for found in load_recipes(str(folder / "recipe.yml")):
        value_warnings(found)
        parameters_in_force(found, [NAMES] * len(found.models))


def tokenizer(name: str) -> Reader:
    """The input is the file `name` of a model whose vocabulary is united with that of another."""

    def read(folder: Path, data: bytes) -> None:
        from fastinterp.tokenizer.chat_template import template_of
        from fastinterp.tokenizer.files import tokenizer_files
        from fastinterp.tokenizer.vocabulary import join, read_vocabulary

        models = []
        for model, table in (("one", BPE), ("other", UNIGRAM)):
            (folder / model).mkdir(exist_ok=True)
            (folder / model / "tokenizer.json").write_text(json.dumps(table))
            if model == "one":
                (folder / model / name).write_bytes(data)
            models.append(read_vocabulary(model, folder / model, 8))
            template_of(folder / model)
        for base, more in (models, models[::-1]):
            tokenizer_files(join(base, [more]))

    return read


def report(folder: Path, data: bytes) -> None:
    from fastinterp.paths.report import PathReport

    (folder / "report.json").write_bytes(data)
    found = PathReport.from_json(folder / "report.json")
    found.summary()
    found.to_csv()
    assert PathReport.from_json(found.to_json()).points == found.points or "NaN" in found.to_json()


BPE = {
    "version": "1.0",
    "added_tokens": [{"id": 3, "content": "<s>", "special": True, "normalized": False}],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "byte_fallback": False},
}
UNIGRAM = {"added_tokens": [], "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.5]]}}
SETTINGS = {
    "chat_template": "{{ m }}",
    "added_tokens_decoder": {"3": {"content": "<s>", "special": True}, "4": {"content": "x", "special": False}},
}
RECIPES = (
    "models:\n- model: a\n  parameters:\n    weight: 0.5\n- model: b\n  parameters:\n    weight: [0, 0.5, 1]\n"
    "merge_method: linear\ndtype: bfloat16\n",
    "slices:\n- sources:\n  - {model: a, layer_range: [0, 4]}\n  - {model: b, layer_range: [0, 4]}\n"
    "merge_method: slerp\nbase_model: a\nparameters:\n  t:\n  - {filter: mlp, value: [0, 1]}\n  - value: 0.5\n",
    "name: x\nmerge_method: ties\nbase_model: a\nmodels:\n- {model: b+c, parameters: {weight: 1, density: 0.3}}\n"
    "---\nmerge_method: linear\nmodels: [{model: x}, {model: b}]\nparameters: {normalize: true, weight: 1}\ntokenizer:\n"
    "  source: union\n  tokens: {<s>: {source: b, force: true}}\nchat_template: auto\n",
    '{"merge_method": "dare_ties", "base_model": "a", "models": [{"model": {"model": "b", "lora": "c", "scale": 2}, '
    '"parameters": {"weight": 1, "density": 0.5}}], "seed": 7, "rounding": "stochastic", "missing": "skip"}',
    "x: &a [1, 2]\ny: *a\n<<: {dtype: !!str float32}\nmodules:\n  text:\n    slices: []\n",
)
PATH_REPORT = {
    "format": "fastinterp path report",
    "version": 1,
    "ends": {"a": "x", "b": "y"},
    "base": None,
    "line": True,
    "seeds": [0, 1],
    "probabilities": [],
    "points": [
        {"at": {"alpha": x}, "samples": {"loss": [1.0, 2.0], "accuracy": [0.5, "NaN"]}, "strength": 1.0, "changed_fraction": 0.5,
         "relative_change": 0.1}
        for x in (0.0, 0.5, 1.0)
    ],
}  # fmt: skip


def _gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf() -> bytes:
    """A GGUF file with keys of several types, an array, and two tensors, of F32 and Q8_0."""
    keys = [
        _gguf_string("general.architecture") + struct.pack("<I", 8) + _gguf_string("llama"),
        _gguf_string("llama.block_count") + struct.pack("<II", 4, 1),
        _gguf_string("llama.rope.freq_base") + struct.pack("<If", 6, 1e4),
        _gguf_string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + _gguf_string("a") + _gguf_string("b"),
        _gguf_string("x") + struct.pack("<I?", 7, True),
    ]
    tensors = [
        _gguf_string("output_norm.weight") + struct.pack("<IQIQ", 1, 8, 0, 0),
        _gguf_string("token_embd.weight") + struct.pack("<IQQIQ", 2, 32, 2, 8, 32),
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys + tensors)
    return head + bytes(-len(head) % 32) + bytes(32) + bytes(2 * 34) + bytes(28)


def _pickles() -> tuple[bytes, ...]:
    two = pickles.mapping({LAYER: pickles.view(pickles.storage()), "b": pickles.view(pickles.storage(), 2, (2,), (1,))})
    nested = pickles.mapping({"state_dict": two, "step": pickles.whole(3)})
    return tuple(b"\x80\x02" + body + b"." for body in (two, nested))


def _json(*values: object) -> tuple[bytes, ...]:
    return tuple(json.dumps(value).encode() for value in values)


_SHARDS = {"a_safetensors": safetensors({LAYER: entry()}), "b_safetensors": safetensors({"x": entry()})}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1, "vocab_size": 2,
    "hidden_size": 4, "tie_word_embeddings": True, "torch_dtype": "float32",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 2], "modules_to_not_convert": ["lm_head"]},
}  # fmt: skip
PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"], "base_model_name_or_path": "x",
        "rank_pattern": {"up_proj": 2}, "alpha_pattern": {}, "use_rslora": False, "bias": "none"}  # fmt: skip

TARGETS: dict[str, Target] = {
    "header": Target(header, (*_json({"x": entry()}, {"__metadata__": {"format": "pt"}, **HALVES}), b"{}")),
    "file": Target(one_file("model.safetensors"), (safetensors({"x": entry()}), safetensors({}, b""), b"")),
    "index": Target(
        in_folder("model.safetensors.index.json", **_SHARDS),
        _json({"metadata": {"total_size": 128}, "weight_map": {LAYER: "a.safetensors", "x": "b.safetensors"}}),
    ),
    "config": Target(in_folder("config.json", model_safetensors=safetensors(HALVES)), _json(CONFIG, {})),
    "adapter": Target(adapter, _json(PEFT)),
    "receipt": Target(receipt, _json(RECEIPT)),
    "bin": Target(one_file("pytorch_model.bin"), tuple(
        pickles.zipped(pickles.archive(body, {"0": bytes(16)}), wide=wide) for body in _pickles() for wide in (False, True)
    )),
    "pickle": Target(pickle, _pickles()),
    "gguf": Target(one_file("model.gguf"), (gguf(),)),
    "recipe": Target(recipe, tuple(text.encode() for text in RECIPES)),
    "tokenizer": Target(tokenizer("tokenizer.json"), _json(BPE, UNIGRAM)),
    "tokenizer-config": Target(tokenizer("tokenizer_config.json"), _json(SETTINGS)),
    "report": Target(report, _json(PATH_REPORT)),
}  # fmt: skip


# --- runs ------------------------------------------------------------------------------------------------------------


def attempt(target: Target, folder: Path, data: bytes) -> FastinterpError | None:
    """Read one input. Any other exception than fastinterp's own leaves this function: it is a mistake."""
    try:
        target.read(folder, data)
    except FastinterpError as error:
        assert str(error), "an error without a message"
        return error
    return None


def members(path: Path) -> list[tuple[str, bytes]]:
    """Name and content of what an archive holds, if there is one."""
    if not path.exists():
        return []
    with zipfile.ZipFile(path) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def corpus(name: str) -> list[bytes]:
    """The inputs of a target that are kept in the tree."""
    return [data for _, data in members(HERE / "corpus" / f"{name}.zip")]


_WORDS = (b"", b"\0", b"\xff" * 8, b"-1", b"1e999", b"NaN", b'"', b"{", b"[", b"\\ud800", b"18446744073709551616", b"null")
_VALUES = (None, True, -1, 0, 1, 2**53, 2**64, 1e308, 0.5, math.inf, math.nan, "", "x", "\ud800", "../x", "a\0b", [], {},
           [0], ["x", "x"], [[]], {"": {}}, "\x1b[31m", "\u202e")  # fmt: skip


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a value with every key of it."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [pair for key in keys for pair in [(value, key), *_nodes(value[key])]]


def damaged_json(data: bytes, random: Random) -> bytes | None:
    """JSON with other values, keys or parts; None if it is none."""
    try:
        value = json.loads(data)
        nodes = _nodes(value)
    except (ValueError, RecursionError):
        return None
    if not nodes:
        return None
    for _ in range(random.randint(1, 3)):
        (holder, key), (other, place) = random.choice(nodes), random.choice(nodes)
        try:
            what = random.randint(0, 4)
            if what <= 1:
                holder[key] = random.choice(_VALUES)
            elif what == 2:
                del holder[key]
            elif what == 3:
                holder[key] = json.loads(json.dumps(other[place]))
            elif isinstance(holder, dict):
                holder[str(random.choice(_VALUES)) + random.choice((key, ""))] = holder.pop(key)
            else:
                holder.append(random.choice(_VALUES))
        except (KeyError, IndexError, RecursionError):  # of a part that is no longer there
            pass
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return None


def damaged(seeds: Sequence[bytes], random: Random) -> bytes:
    """A damaged copy of one: bytes changed, removed, repeated, or replaced by some of another; or parts of JSON."""
    chosen = random.choice(seeds)
    if random.randint(0, 1) and (found := damaged_json(chosen, random)):
        return found
    data = bytearray(chosen)
    for _ in range(random.randint(1, 4)):
        at = random.randint(0, len(data))
        to = min(len(data), at + random.choice((1, 1, 2, 4, 8, 30)))
        other = random.choice(seeds)
        start = random.randint(0, len(other))
        changes = (random.randbytes(to - at), random.choice(_WORDS), b"", bytes(data[at:to]) * 2, other[start : start + 40])
        data[at:to] = random.choice(changes)
    return bytes(data)


def fuzz(name: str, options: Sequence[str]) -> None:
    """Never returns: libFuzzer ends the process. The library is instrumented, so it may not be loaded before."""
    import atheris

    with atheris.instrument_imports(include=["fastinterp"]):
        import fastinterp.api
        import fastinterp.checkpoint.gguf_model
        import fastinterp.checkpoint.lora
        import fastinterp.checkpoint.pytorch.file
        import fastinterp.inspect.check
        import fastinterp.inspect.describe
        import fastinterp.inspect.explain
        import fastinterp.paths.report
        import fastinterp.tokenizer.files  # noqa: F401
    target = TARGETS[name]
    place = BUILD / name
    for part in ("corpus", "crashes"):
        (place / part).mkdir(parents=True, exist_ok=True)
    for number, data in enumerate([*target.seeds, *corpus(name)]):
        (place / "corpus" / f"seed-{number}").write_bytes(data)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:

        def one_input(data: bytes) -> None:
            try:
                attempt(target, Path(folder), data)
            except Exception as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                crash = place / "crashes" / f"{type(error).__name__}-{Path(frame.filename).stem}-{frame.lineno}"
                if not crash.exists():
                    crash.write_bytes(data)
                    crash.with_suffix(".txt").write_text(traceback.format_exc())

        def mutated(data: bytes, most: int, seed: int) -> bytes:
            random = Random(seed)
            found = damaged_json(data, random) if random.randint(0, 1) else None
            return found if found and len(found) <= most else atheris.Mutate(data, most)

        limits = [f"-timeout={LIMIT_S}", f"-rss_limit_mb={LIMIT_MB}", f"-artifact_prefix={place}/crashes/", "-max_len=8192"]
        arguments = [sys.argv[0], *limits, "-print_final_stats=1", *options, str(place / "corpus")]
        atheris.Setup(arguments, one_input, custom_mutator=mutated)
        atheris.Fuzz()


def keep(name: str) -> None:
    """Make the corpus of the tree: inputs that reach different places, as libFuzzer finds them, and all crashes."""
    place, kept = BUILD / name, HERE / "corpus" / f"{name}.zip"
    before = [data for member, data in members(kept) if member.startswith("crash")]
    crashes = [path.read_bytes() for path in sorted((place / "crashes").glob("*")) if path.suffix != ".txt"]
    with tempfile.TemporaryDirectory() as least:
        command = [sys.executable, "-m", "tests.attacks.fuzz", name, "-merge=1", least]
        subprocess.run(command, check=True, capture_output=True)
        found = sorted((path.read_bytes() for path in Path(least).iterdir()), key=lambda data: (len(data), data))
    found = [data for data in found if len(data) <= _KEPT_BYTES]
    found = found[:: -(-len(found) // _KEPT)]
    kept.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(kept, "w") as archive:
        for number, data in enumerate(dict.fromkeys([*before, *crashes])):
            archive.writestr(zipfile.ZipInfo(f"crash-{number:03d}"), data, zipfile.ZIP_DEFLATED)
        for number, data in enumerate(found):
            archive.writestr(zipfile.ZipInfo(f"{number:03d}"), data, zipfile.ZIP_DEFLATED)
    print(f"{name}: {len(found)} inputs, {kept.stat().st_size:,} bytes")


if __name__ == "__main__":
    if sys.argv[2:] == ["--keep"]:
        keep(sys.argv[1])
    else:
        fuzz(sys.argv[1], sys.argv[2:])
