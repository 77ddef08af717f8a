"""The main job in a few seconds: write small models, merge them in four ways, and check each result with numpy.

    python examples/demo.py [FOLDER] [--tiny] [--again]

Works in a temporary folder and removes it, unless a FOLDER is given, where everything stays to be played with. Needs
nothing but fastinterp and numpy.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]


@dataclass(frozen=True)
class Size:
    """Of a Llama, in the words of its config.json."""

    hidden: int
    inner: int
    layers: int
    vocabulary: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        h, i = self.hidden, self.inner
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, h)}
        for n in range(self.layers):
            layer = f"model.layers.{n}"
            found |= {f"{layer}.self_attn.{x}_proj.weight": (h, h) for x in "qkvo"}
            found |= {f"{layer}.mlp.{x}_proj.weight": (i, h) for x in ("gate", "up")}
            found |= {f"{layer}.mlp.down_proj.weight": (h, i)}
            found |= {f"{layer}.{x}_layernorm.weight": (h,) for x in ("input", "post_attention")}
        return found | {"model.norm.weight": (h,), "lm_head.weight": (self.vocabulary, h)}


MODELS = ("base", "chat", "code")
MARK = ".fastinterp-demo"  # a file in the folder of a demo
SMALL, TINY = Size(256, 688, 8, 8000), Size(32, 48, 2, 100)


# --- writing the models ----------------------------------------------------------------------------------------------


def to_bf16(x: Values) -> NDArray[np.uint16]:
    """Round to nearest even, in integers: add half of the last place kept, less one if it is even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(codes: NDArray[np.uint16]) -> Values:
    return (codes.astype(np.uint32) << 16).view(np.float32)


def write_models(folder: Path, size: Size) -> None:
    """base, and two fine-tunes of it; each cut into shards of its own, as models from the Hub are."""
    rng = np.random.default_rng(2022)
    shapes = size.tensors()
    base = {n: to_bf16(0.02 * rng.standard_normal(int(np.prod(s)), np.float32)) for n, s in shapes.items()}
    write_model(folder / "base", base, size, shards=2)
    for name, shards in (("chat", 3), ("code", 4)):
        moved = {n: to_bf16(from_bf16(x) + 1e-3 * rng.standard_normal(x.size, np.float32)) for n, x in base.items()}
        write_model(folder / name, dict(sorted(moved.items())), size, shards)


def write_model(folder: Path, weights: dict[str, NDArray[np.uint16]], size: Size, shards: int) -> None:
    folder.mkdir(parents=True)
    names, shapes = list(weights), size.tensors()
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[len(names) * i // shards : len(names) * (i + 1) // shards]
        weight_map |= dict.fromkeys(mine, file)
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for n in mine:
            table[n] = {"dtype": "BF16", "shape": shapes[n], "data_offsets": [end, end + weights[n].nbytes]}
            end += weights[n].nbytes
        header = json.dumps(table).encode()
        with open(folder / file, "wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.writelines(weights[n].tobytes() for n in mine)
    total = sum(x.nbytes for x in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": size.hidden, "intermediate_size": size.inner, "num_hidden_layers": size.layers,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": size.vocabulary,
    }  # fmt: skip
    vocabulary = {f"token{i}": i for i in range(size.vocabulary)}
    tokenizer = {
        "version": "1.0", "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "token0"},
    }  # fmt: skip
    small = {
        "model.safetensors.index.json": index,
        "config.json": config,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "token0"},
    }
    for name, content in small.items():
        (folder / name).write_text(json.dumps(content, indent=1))


# --- what to do ------------------------------------------------------------------------------------------------------

RECIPES = {
    "average.yml": """\
merge_method: linear
models:
  - model: chat
  - model: code
parameters: {weight: 1}
""",
    "unlearn.yml": """\
merge_method: task_arithmetic
base_model: base
models:
  - model: code
    parameters: {weight: -1}
""",
}


@dataclass(frozen=True)
class Job:
    """A command, and what its output must be: the sum of `weights` times models, in any order that numpy likes.

    The engine takes differences from the model `pivot`; only the bound of its rounding errors depends on that.
    """

    title: str
    command: str
    out: str
    weights: dict[str, float]
    pivot: str


JOBS = (
    Job(
        "An average of two fine-tunes",
        "merge average.yml out/average", "out/average", {"chat": 0.5, "code": 0.5}, "chat",
    ),
    Job(
        "Three tenths of the way from one fine-tune to the other",
        "interpolate chat code --alpha 0.3 -o out/between", "out/between", {"chat": 0.7, "code": 0.3}, "chat",
    ),
    Job(
        "Beyond the fine-tune: one and a half times the way from the base",
        "interpolate base chat --alpha 1.5 -o out/beyond", "out/beyond", {"base": -0.5, "chat": 1.5}, "base",
    ),
    Job(
        "Away from a fine-tune: the base less its task vector, in several shards",
        "merge unlearn.yml out/unlearn --max-shard-size 10MB", "out/unlearn", {"base": 2.0, "code": -1.0}, "base",
    ),
)  # fmt: skip


def run(command: str, folder: Path) -> None:
    """Show a command and what it prints. Raises: SystemExit, if it fails."""
    print(f"\n  $ fastinterp {command}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "fastinterp", *shlex.split(command)],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    print("".join(f"    {line}\n" for line in done.stdout.splitlines()), end="")
    if done.returncode != 0:
        raise SystemExit(f"the command failed with exit code {done.returncode}")


# --- checking the results --------------------------------------------------------------------------------------------


def read(folder: Path) -> Iterator[tuple[str, Values]]:
    """Every tensor of a checkpoint, file by file; nothing of fastinterp's is used."""
    for path in sorted(folder.glob("*.safetensors")):
        raw = np.fromfile(path, np.uint8)
        start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        table = json.loads(raw[8:start].tobytes())
        for name, entry in table.items():
            if name != "__metadata__":
                begin, end = (start + offset for offset in entry["data_offsets"])
                yield name, from_bf16(raw[begin:end].view(np.uint16))


def steps(x: NDArray[Any]) -> NDArray[np.float64]:
    """The distance of neighbouring bf16 numbers around x: 2^-7 of the power of two below it."""
    return np.ldexp(1.0, np.maximum(np.frexp(x)[1] - 8, -133))


def check(folder: Path, job: Job) -> str:
    """Compare an output with the weighted sum in float64. Raises: SystemExit, if a single value is wrong.

    The engine computes y = p + sum of w * (x - p) in float32, rounding four times at most (difference, weight, product
    and sum, y), each time by 2^-24 of the value at most; then once to bf16, by half a step at most. float64 adds 2^-50.
    """
    models = {name: dict(read(folder / name)) for name in job.weights}
    count = ties = 0
    seen = set()
    for name, out in read(folder / job.out):
        if any(name not in m for m in models.values()):
            raise SystemExit(f"{job.out}: {name} is missing in an input")
        x = {m: models[m][name].astype(np.float64) for m in job.weights}
        exact, moved = np.zeros(out.size), np.zeros(out.size)
        for m, w in job.weights.items():
            exact += w * x[m]
            moved += abs(w * (x[m] - x[job.pivot]))
        rounding = 2.0**-24 * (4 * moved + 1.01 * abs(exact)) + 2.0**-50 * (moved + abs(x[job.pivot]))
        wrong = abs(out - exact) > steps(out) / 2 + rounding
        if wrong.any():
            raise SystemExit(f"{job.out}: {name} is WRONG: {wrong.sum()} of {out.size} values are not what numpy finds")
        nearest = np.rint(exact / steps(exact)) * steps(exact)
        count, ties = count + out.size, ties + int((out != nearest).sum())
        seen.add(name)
    if not seen or any(seen != set(m) for m in models.values()):
        raise SystemExit(f"{job.out}: tensors are missing, or there are more than in the inputs")
    rest = f" ({ties:,} ties as float32 has them)" if ties else ""
    return f"checked: all {count:,} values are numpy's float64 result, rounded to bf16{rest}"


def remove(folder: Path) -> None:
    """Remove what an earlier demo made, and nothing else."""
    for name in (*MODELS, *(job.out for job in JOBS)):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in RECIPES:
        (folder / name).unlink(missing_ok=True)


def demonstrate(folder: Path, size: Size) -> None:
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("made by examples/demo.py, which may make it anew\n")
    write_models(folder, size)
    for name, text in RECIPES.items():
        (folder / name).write_text(text)
    nbytes = sum(p.stat().st_size for p in folder.glob("*/*.safetensors"))
    print(f"Three Llama-shaped models in bf16 ({nbytes / 1e6:.1f} MB): base (2 shards), chat (3), code (4).")
    print("\nWhat a merge would do, before it does it")
    print("".join(f"    {line}\n" for line in RECIPES["average.yml"].splitlines()), end="")
    run("explain average.yml", folder)
    for job in JOBS:
        print(f"\n{job.title}", end="")
        run(job.command, folder)
        print(f"    {check(folder, job)}")
    print(f"\nAll four are right. {time.perf_counter() - start:.1f} s in all, most of it numpy's.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write small models, merge them in four ways, check the results.")
    parser.add_argument("folder", nargs="?", type=Path, help="a new folder that is kept; default: a temporary one")
    parser.add_argument("--tiny", action="store_true", help="models of kilobytes, for tests")
    parser.add_argument("--again", action="store_true", help="make what an earlier demo left in FOLDER anew")
    given = parser.parse_args()
    size = TINY if given.tiny else SMALL
    if given.folder is not None:
        if given.again and (given.folder / MARK).is_file():
            remove(given.folder)
        elif given.folder.exists() and any(given.folder.iterdir()):
            parser.error(f"{given.folder} is not empty. Give a new folder")
        demonstrate(given.folder, size)
        return
    with tempfile.TemporaryDirectory(prefix="fastinterp-demo-") as folder:
        demonstrate(Path(folder), size)


if __name__ == "__main__":
    main()
