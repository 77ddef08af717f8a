"""Small models in GGUF files, written with the package gguf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from fastinterp.ops.combine import Combine
from fastinterp.ops.dtypes import DTYPES, F32
from fastinterp.reference import combine as reference
from tests.support.checkpoints import bell

Type = gguf.GGMLQuantizationType
VOCABULARY = 40
WIDTH = 64


def shapes(layers: int = 2, width: int = WIDTH) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama, by the names that GGUF has, in the order of llama.cpp's converter."""
    every: dict[str, tuple[int, ...]] = {"output.weight": (VOCABULARY, width), "token_embd.weight": (VOCABULARY, width)}
    for i in range(layers):
        every |= {
            f"blk.{i}.attn_norm.weight": (width,),
            f"blk.{i}.ffn_down.weight": (width, 2 * width),
            f"blk.{i}.ffn_gate.weight": (2 * width, width),
            f"blk.{i}.attn_q.weight": (width, width),
        }
    return every | {"output_norm.weight": (width,)}


def numbers(seed: int, layers: int = 2, width: int = WIDTH) -> dict[str, NDArray[np.float32]]:
    """Weights: models of different seeds are close to each other, as fine-tunes are."""
    model = {}
    for i, (name, shape) in enumerate(shapes(layers, width).items()):
        numel = int(np.prod(shape))
        x = bell(i, numel) * 0.02 + bell(1000 * seed + i, numel) * 2e-3
        model[name] = x.astype(np.float32).reshape(shape)
    return model


def keys(layers: int = 2) -> dict[str, Any]:
    """Keys of a header as converters write them: numbers, strings, arrays of both."""
    return {
        "general.name": "tiny",
        "general.uuid": "0d1e",
        "llama.block_count": layers,
        "llama.context_length": 128,
        "llama.embedding_length": WIDTH,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"t{i} ä" for i in range(VOCABULARY)],
        "tokenizer.ggml.token_type": [1] * VOCABULARY,
        "tokenizer.ggml.scores": [0.5 * i for i in range(VOCABULARY)],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
    }


def write(
    path: Path,
    model: Mapping[str, NDArray[np.float32]],
    kind: Type = Type.F32,
    *,
    kinds: Mapping[str, Type] | None = None,
    header: Mapping[str, Any] | None = None,
    architecture: str = "llama",
    alignment: int | None = None,
    split: int = 0,
    general_type: str = "",
) -> Path:
    """Write a GGUF file. Tensors of fewer than two dimensions stay F32, as converters have it.

    kind, kinds  the type of the tensors, and of some by name
    header       its keys
    split        the most tensors in one file; 0: one file. Then `path` is the first of them
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    if general_type:
        writer.add_type(general_type)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value in (keys(1 + max(_layers(model), default=0)) if header is None else header).items():
        _add(writer, key, value)
    for name, x in model.items():
        stored = (kinds or {}).get(name, kind if x.ndim > 1 else Type.F32)
        writer.add_tensor(name, encoded(x, stored), raw_dtype=stored)
    writer.add_file_type(_file_type(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if not split else next(iter(sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))))


def encoded(x: NDArray[np.float32], kind: Type) -> NDArray[Any]:
    """Numbers as a type stores them. Types that the package does not encode: random blocks with small scales."""
    if kind in (Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1):
        return gguf.quants.quantize(x, kind)
    return random_blocks(kind, x.shape, int(abs(float(x.ravel()[0])) * 1e6))


# Where the float16 scales lie in the blocks of a type, in bytes.
SCALES: dict[Type, Sequence[int]] = {
    Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,),
    Type.IQ4_NL: (0,), Type.IQ4_XS: (0,), Type.IQ2_XXS: (0,), Type.IQ3_S: (0,), Type.TQ2_0: (64,), Type.TQ1_0: (52,),
    Type.Q4_0: (0,), Type.Q4_1: (0, 2), Type.Q5_0: (0,), Type.Q5_1: (0, 2), Type.Q8_0: (0,), Type.MXFP4: (),
}  # fmt: skip


def random_blocks(kind: Type, shape: Sequence[int], seed: int = 0) -> NDArray[np.uint8]:
    """Blocks of random codes, with scales of a few hundredths."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(shape)) // elements
    rng = np.random.default_rng([seed, int(kind)])
    blocks = rng.integers(0, 256, (count, nbytes), dtype=np.uint8)
    for at in SCALES[kind]:
        blocks[:, at : at + 2] = rng.uniform(1e-3, 1e-2, (count, 1)).astype(np.float16).view(np.uint8)
    if kind == Type.MXFP4:
        blocks[:, 0] = rng.integers(115, 122, count)
    return blocks.reshape(*shape[:-1], shape[-1] // elements * nbytes)


def read(path: Path) -> dict[str, tuple[str, NDArray[np.float32]]]:
    """The type and the numbers of every tensor, as the package reads them."""
    reader = gguf.GGUFReader(path)
    return {
        t.name: (
            t.tensor_type.name,
            np.array(gguf.quants.dequantize(t.data, t.tensor_type), np.float32).reshape(t.shape[::-1].tolist()),
        )
        for t in reader.tensors
    }


def raw(path: Path) -> dict[str, bytes]:
    """The bytes of every tensor."""
    return {t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors}


def header_of(path: Path) -> dict[str, Any]:
    """The keys and their values, as the package reads them."""
    fields = gguf.GGUFReader(path).fields.items()
    return {name: field.contents() for name, field in fields if not name.startswith("GGUF.")}


def combined(inputs: Sequence[NDArray[np.float32]], weights: Sequence[float], kind: str) -> NDArray[np.float32]:
    """The weighted mean by the numpy reference, stored in a type and read again."""
    dtype = DTYPES[kind]
    row = Combine(tuple(w / sum(weights) for w in weights), None, True).row()
    codes = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in inputs]
    outputs, _ = reference.combine(codes, [F32] * len(inputs), [row], dtype)
    return reference.widen(outputs[0], dtype).reshape(inputs[0].shape)


def _layers(model: Mapping[str, Any]) -> list[int]:
    return [int(name.split(".")[1]) for name in model if name.startswith("blk.")]


def _file_type(kind: Type) -> int:
    return {Type.F32: 0, Type.F16: 1, Type.BF16: 32, Type.Q8_0: 7, Type.Q4_K: 15}.get(kind, 1024)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
