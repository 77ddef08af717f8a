"""Decoders of encoded tensors: their speed in cache, and merges of encoded checkpoints beside the same merge of bf16.

    python -m benchmarks.decoding [--isa avx512,avx2]                         gigabytes of float32 a second, one thread
    python -m benchmarks.decoding --merges MODELS_DIR [--only fp8-block] [--runs 5] [--out FILE.json]

MODELS_DIR holds base/, ft1/ and ft2/, BF16, as `fastinterp bench --models DIR` makes them; encoded checkpoints of the
same shapes are written beside them, with random codes. Raced is the average of two into bf16, a process each, in turn;
the answer is checked first, against the definitions in fastinterp/reference/decode.py. Decoders are timed by the
processor time that they take, so that a busy machine does not matter much.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastinterp import _C
from fastinterp.backends.cpu import Handle, Pump, PumpOptions
from fastinterp.bench.check import WrongAnswerError, read_tensors, weight_files
from fastinterp.bench.provenance import provenance
from fastinterp.bench.race import Racer, race
from fastinterp.ops import steps
from fastinterp.ops.combine import Row
from fastinterp.ops.dtypes import F32
from fastinterp.ops.operands import Decoder, Stored
from fastinterp.reference.decode import decode

Raw = NDArray[np.uint8]
ROWS, COLUMNS = 64, 2048  # of the tensor in cache: half a megabyte of float32
_BATCH, _BATCHES = 100, 9  # tensors in one run of the pump, runs
_POOL = 1 << 20  # random bytes, of which codes are slices
_CHECKED = 6  # tensors


@dataclass(frozen=True)
class Form:
    """How a weight [m, n] is encoded.

    decoder     the decoder's name
    bits        of codes, per element, with the scales between them
    parameters  (m, n) -> the decoder's
    scales      (m, n) -> (end of the name, dtype, shape) of each companion
    config      what config.json says of it
    codes       (end of the name, dtype) of the codes
    """

    decoder: str
    bits: float
    parameters: Callable[[int, int], tuple[float, ...]]
    scales: Callable[[int, int], list[tuple[str, str, tuple[int, ...]]]]
    config: dict[str, Any]
    codes: tuple[str, str] = ("", "F8_E4M3")


def _blocks(m: int, n: int) -> tuple[int, int]:
    return -(-m // 128), -(-n // 128)


_CT = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}


def _group(**weights: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


FORMS = {
    "fp8-block": Form(
        "scaled_f8_e4m3", 8, lambda m, n: (0, 128, 128, m), lambda m, n: [("_scale_inv", "F32", _blocks(m, n))],
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ),
    "fp8-row": Form(
        "scaled_f8_e4m3", 8, lambda m, n: (0, 1, n, m), lambda m, n: [("_scale", "F32", (m, 1))],
        {**_CT, "format": "float-quantized", **_group(num_bits=8, type="float", strategy="channel", symmetric=True)},
    ),
    "int8-row": Form(
        "scaled_i8", 8, lambda m, n: (0, 1, n, m), lambda m, n: [("_scale", "F32", (m, 1))],
        {**_CT, "format": "int-quantized", **_group(num_bits=8, type="int", strategy="channel", symmetric=True)},
        ("", "I8"),
    ),
    "nvfp4": Form(
        "nvfp4", 4, lambda m, n: (1, 1),
        lambda m, n: [("_scale", "F8_E4M3", (m, n // 16)), ("_global_scale", "F32", (1,))],
        {
            **_CT, "format": "nvfp4-pack-quantized",
            **_group(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True),
        },
        ("_packed", "U8"),
    ),
}  # fmt: skip
# Decoders that are timed in cache only.
IN_CACHE: dict[str, tuple[str, float, tuple[float, ...], list[int]]] = {  # decoder, bits, parameters, companions' bytes
    **{
        name: (
            form.decoder, form.bits, form.parameters(ROWS, COLUMNS),
            [math.prod(shape) * (4 if dtype == "F32" else 1) for _, dtype, shape in form.scales(ROWS, COLUMNS)],
        )
        for name, form in FORMS.items()
    },
    "mxfp8": ("scaled_f8_e4m3", 8, (3, 1, 32, ROWS), [ROWS * COLUMNS // 32]),
    "mxfp4": ("mxfp4", 4, (), [ROWS * COLUMNS // 32]),
    "mxfp4-transposed": ("mxfp4_transposed", 4, (ROWS,), [ROWS * COLUMNS // 32]),
    "q8_0": ("q8_0", 8.5, (), []),
}  # fmt: skip


# --- in cache --------------------------------------------------------------------------------------------------------


def gb_s(name: str, isa: str) -> float:
    """Float32 that one thread makes out of the second-level cache and into it: 10^9 bytes a second, at best."""
    decoder, bits, parameters, companions = IN_CACHE[name]
    rng = np.random.default_rng(0)
    stored = [rng.integers(0, 120, size, dtype=np.uint8) for size in (int(ROWS * COLUMNS * bits / 8), *companions)]
    out = np.zeros(4 * ROWS * COLUMNS, np.uint8)
    sources: list[Handle] = [("memory", x.ctypes.data, x.size) for x in stored]
    places = tuple((i + 1, 0, size) for i, size in enumerate(companions))
    step = steps.Combine(
        inputs=(Stored(0, 0, F32.kernel_code, Decoder(decoder, COLUMNS, places, parameters)),), numel=ROWS * COLUMNS,
        columns=COLUMNS, sinks=(0,), offsets=(0,), out_dtype=F32.kernel_code, rows=(Row(0),), keys=(0,),
    )  # fmt: skip
    best = math.inf
    for _ in range(_BATCHES):
        pump = Pump(sources, [("memory", out.ctypes.data, out.size)], [step] * _BATCH, PumpOptions(isa=isa, threads=1))
        start = time.process_time()
        pump.start()
        pump.join()
        best = min(best, time.process_time() - start)
        if pump.error():
            raise WrongAnswerError(f"{name}: {pump.error()}")
    want = decode(decoder, stored[0], stored[1:], parameters, ROWS * COLUMNS, COLUMNS)
    if out.tobytes() != want.tobytes():
        raise WrongAnswerError(f"{name}: it does not decode as the reference does")
    return _BATCH * out.size / best / 1e9


# --- merges ----------------------------------------------------------------------------------------------------------


def encoded(
    form: Form, shape: tuple[int, ...], name: str
) -> Iterator[tuple[str, str, tuple[int, ...], Callable[[], Raw]]]:
    """(name, dtype, shape, bytes) of the tensors that stand for a weight: random codes, scales near 1e-4."""
    m, n = shape
    end, dtype = form.codes
    yield name + end, dtype, (m, int(n * form.bits) // 8), partial(_random, int(m * n * form.bits) // 8, name)
    for end, dtype, of in form.scales(m, n):
        yield name + end, dtype, of, partial(_scales, math.prod(of), dtype, name + end)


def _random(count: int, name: str) -> Raw:
    rng = np.random.default_rng(list(name.encode()))
    pool = rng.integers(0, 256, _POOL, dtype=np.uint8)
    pool[(pool & 0x7F) == 0x7F] = 0  # NaN of E4M3
    return np.resize(pool, count)


def _scales(count: int, dtype: str, name: str) -> Raw:
    rng = np.random.default_rng(list(name.encode()))
    if dtype != "F32":
        return rng.integers(40, 80, count, dtype=np.uint8)
    scales = rng.uniform(1e-4, 2e-4, count)
    return (1 / scales if "global" in name else scales).astype(np.float32).view(np.uint8)


def write_encoded(form: Form, plain: Path, out: Path, seed: str) -> None:
    """A checkpoint with the shapes of a plain one: weights of layers encoded, all else as it is there."""
    tensors = read_tensors(plain)
    made: list[tuple[str, str, tuple[int, ...], Callable[[], Raw]]] = []
    for name, tensor in tensors.items():
        if ".layers." in name and len(tensor.shape) == 2:
            made += encoded(form, tensor.shape, name)
        else:
            made.append((name, "BF16", tensor.shape, partial(_bytes_of, tensor)))
    header: dict[str, Any] = {}
    at = 0
    for name, dtype, shape, _ in made:
        size = math.prod(shape) * {"F32": 4, "BF16": 2}.get(dtype, 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    out.mkdir()
    config = json.loads((plain / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": form.config}))
    text = json.dumps(header | {"__metadata__": {"format": "pt", "seed": seed}}).encode()
    with open(out / "model.safetensors", "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for *_, content in made:
            stream.write(content().data)


def _bytes_of(tensor: Any) -> Raw:
    bits = tensor.read(0, math.prod(tensor.shape)).astype(np.float32).view(np.uint32)
    return (bits >> 16).astype(np.uint16).view(np.uint8)


def checked(form: Form, folder: Path, out: Path) -> int:
    """Compares averages with the reference on the smallest encoded weights; both inputs have the same codes."""
    stored, codes = read_tensors(out), {t.name: t for t in _entries(folder)}
    weights = sorted((n for n in stored if n + form.codes[0] in codes), key=lambda n: (math.prod(stored[n].shape), n))
    names = [n for n in weights if codes[n + form.codes[0]].dtype == form.codes[1]][:_CHECKED]
    for name in names:
        m, n = stored[name].shape
        raw = codes[name + form.codes[0]].read()
        companions = [codes[name + end].read() for end, *_ in form.scales(m, n)]
        want = decode(form.decoder, raw, companions, form.parameters(m, n), m * n, n)
        bits = want.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).view(np.float32)
        if not np.array_equal(stored[name].read(0, m * n), rounded):
            raise WrongAnswerError(f"{name} is not what the reference decodes")
    if not names:
        raise WrongAnswerError("no encoded weight was merged")
    return sum(math.prod(stored[n].shape) for n in names)


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: str
    path: Path
    start: int
    end: int

    def read(self) -> Raw:
        return np.fromfile(self.path, np.uint8, self.end - self.start, offset=self.start)


def _entries(folder: Path) -> list[_Entry]:
    path = folder / "model.safetensors"
    with open(path, "rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    at = 8 + size
    return [_Entry(n, e["dtype"], path, *(at + o for o in e["data_offsets"])) for n, e in header.items()]


def measured(name: str, models: Path, runs: int) -> dict[str, Any]:
    """The race of one form: the average of two encoded checkpoints beside that of two plain ones."""
    form = FORMS[name]
    plain = [models / "ft1", models / "ft2"]
    with tempfile.TemporaryDirectory(dir=models, prefix=".decoding-") as scratch:
        work = Path(scratch)
        folders = [work / "a", work / "b"]
        write_encoded(form, plain[0], folders[0], "")
        write_encoded(form, plain[0], folders[1], "")
        racers = []
        for racer, inputs in ((name, folders), ("bf16", plain)):
            listed = [{"model": str(path), "parameters": {"weight": 0.5}} for path in inputs]
            file = work / f"{racer}.yml"
            file.write_text(json.dumps({"merge_method": "linear", "models": listed, "dtype": "bfloat16"}))
            command = [sys.executable, "-m", "fastinterp", "merge", str(file), str(work / "out"), "--json"]
            check = (lambda: checked(form, folders[0], work / "out")) if racer == name else (lambda: 0)
            racers.append(Racer(racer, command, check))
        files = [f for folder in (*folders, *plain) for f in weight_files(folder)]
        race(racers, files, work, runs=runs, cold=False, say=lambda _: None)
        own, other = (r.as_dict(racers[1]) for r in racers)
        ratios = [a / b for a, b in zip(own["wall_s"], other["wall_s"], strict=True)]
        cpu = [a / b for a, b in zip(own["cpu_s"], other["cpu_s"], strict=True)]
        return {
            "racers": {name: own, "bf16": other}, "wall_ratio": float(np.median(ratios)),
            "cpu_ratio": float(np.median(cpu)),
        }  # fmt: skip


def main() -> None:
    """Measure and print, or write, what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default=",".join(_C.isas()))
    parser.add_argument("--merges", metavar="MODELS_DIR", type=Path)
    parser.add_argument("--only", default=",".join(FORMS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    found: dict[str, Any] = {"benchmark": "decoding", "provenance": provenance(asked.merges), "gb_s": {}, "merges": {}}
    isas = asked.isa.split(",")
    for name in IN_CACHE:
        found["gb_s"][name] = {isa: round(gb_s(name, isa), 1) for isa in isas}
        print(f"{name:17}", *(f"{isa} {speed:5.1f} GB/s  " for isa, speed in found["gb_s"][name].items()), flush=True)
    for name in asked.only.split(",") if asked.merges else ():
        one = found["merges"][name] = measured(name, asked.merges.resolve(), asked.runs)
        walls = {racer: f"{v['median_wall_s']:.2f} s" for racer, v in one["racers"].items()}
        print(
            f"{name:17} {one['wall_ratio']:.2f} x bf16 (processor time {one['cpu_ratio']:.2f} x)  {walls}", flush=True
        )
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
