"""The engine's decoders: the numbers that codes and scales are, bit for bit, on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastinterp.backends.cpu import Handle, Pump, PumpOptions
from fastinterp.ops import steps
from fastinterp.ops.combine import Combine, Row
from fastinterp.ops.dtypes import F32
from fastinterp.ops.operands import Decoder, Stored
from fastinterp.reference.decode import decode
from tests.support import backends, codes
from tests.support.codes import Codes

every_isa = pytest.mark.parametrize("isa", backends.usable())
EVERY = list(codes.every())
CODE = F32.code or 0


def decoded(tensor: Codes, isa: str, folder: Path | None = None, **options: Any) -> tuple[Any, Pump]:
    """float32 bits, written at an odd offset. Codes and companions lie at odd offsets of files, or in memory."""
    sources: list[Handle] = []
    kept: list[Any] = []
    with ExitStack() as stack:

        def place(raw: codes.Raw) -> tuple[int, int]:
            skipped = 2 * len(sources) + 1
            whole = np.concatenate([np.full(skipped, 0xEE, np.uint8), raw])
            if folder is None:
                kept.append(whole)
                sources.append(("memory", whole.ctypes.data, whole.size))
            else:
                path = folder / str(len(sources))
                whole.tofile(path)
                fd = os.open(path, os.O_RDONLY)
                stack.callback(os.close, fd)
                sources.append(fd)
            return len(sources) - 1, skipped

        operands = codes.stored_operands([tensor], place)
        out = np.full(4 * tensor.numel + 6, 0xEE, np.uint8)
        step = steps.Combine(
            inputs=tuple(operands), numel=tensor.numel, columns=tensor.columns, sinks=(0,), offsets=(3,),
            out_dtype=CODE, rows=(Row(0),), keys=(0,),
        )  # fmt: skip
        pump = Pump(sources, [("memory", out.ctypes.data, out.size)], [step], PumpOptions(isa=isa, **options))
        pump.start()
        assert pump.wait(60)
        pump.join()
    assert pump.error() is None, pump.error()
    assert (out[:3] == 0xEE).all() and (out[-3:] == 0xEE).all()
    return out[3:-3].copy().view(np.uint32), pump


def assert_bits(want: Any, got: Any, what: str) -> None:
    backends.assert_same_bits(want.view(np.uint8), got.view(np.uint8), F32, what)


@pytest.mark.parametrize("tensor", EVERY, ids=str)
def test_reference(tensor):
    numbers = decode(tensor.name, tensor.raw, tensor.companions, tensor.parameters, tensor.numel, tensor.columns)
    assert_bits(tensor.want, numbers.view(np.uint32), "reference")


@every_isa
@pytest.mark.parametrize("tensor", EVERY, ids=str)
def test_values(tensor, isa, tmp_path):
    """In memory and in files; in spans that begin and end inside blocks (4099 bytes are 1024 elements), and in large
    ones. One thread reads each byte once, but for scales of blocks that spans share.
    """
    for folder, options in (
        (None, {"threads": 1}),
        (tmp_path, {"threads": 2, "read_bytes": 4099, "write_bytes": 4099}),
        (tmp_path, {"threads": 1, "read_bytes": 5 * 4096 + 36, "write_bytes": 4096}),
    ):
        got, pump = decoded(tensor, isa, folder, **options)
        assert_bits(tensor.want, got, f"{isa}, {options}")
        assert pump.bytes_read >= tensor.bytes
    assert decoded(tensor, isa, threads=1, write_bytes=1 << 20, read_bytes=1 << 20)[1].bytes_read == tensor.bytes


@every_isa
def test_every_code_and_scale_of_one_byte(isa):
    """All 256 codes with all 256 powers, and with F16 scales of every exponent."""
    for name in codes.CODES:
        tensor = codes.scaled(name, (256, 256), 3, (1, 256), 256)
        rows = np.tile(np.arange(256, dtype=np.uint8), (256, 1)).reshape(-1)
        tensor = Codes(name, (256, 256), rows, [np.arange(256, dtype=np.uint8)], tensor.parameters, tensor.want)
        powers = np.arange(256, dtype=np.uint8).view(codes.SCALE_DTYPES[3]).astype(np.float32)
        want = codes.times(rows.view(codes.CODES[name]).astype(np.float32).reshape(256, 256), powers[:, None])
        assert_bits(codes.bits(want), decoded(tensor, isa)[0], f"{name} {isa}")


@every_isa
def test_products_are_rounded_once(isa):
    """To nearest even, also where they are subnormal: 1 + 2^-23 times codes, and 2^-149 times 0.5 and 1.5."""
    scales = np.array([1 + 2.0**-23, 2.0**-149, 3 * 2.0**-149], np.float32)
    codes_of = np.tile(np.array([0.5, 1.5, 1.75, 13, 240], codes.CODES["scaled_f8_e4m3"]), 3)
    want = (codes_of.astype(np.float64).reshape(3, 5) * scales.astype(np.float64)[:, None]).astype(np.float32)
    assert want[1, 0] == 0 and want[1, 1] == 2.0**-148  # ties, to even
    tensor = Codes("scaled_f8_e4m3", (3, 5), codes.raw(codes_of), [codes.raw(scales)], (0, 1, 5, 3), codes.bits(want))
    assert_bits(tensor.want, decoded(tensor, isa)[0], isa)


@every_isa
@pytest.mark.slow
def test_ranges_of_large_companions(isa, tmp_path):
    """Of scales that are larger than what is held, each span reads those that it needs."""
    for tensor in (
        codes.mxfp4((3, 1000, 3200)),
        codes.nvfp4((1000, 4800), True),
        codes.scaled("scaled_f8_e4m3", (2100, 4128), 3, (1, 32), 2100),
    ):
        assert tensor.companions[0].size > 256 << 10
        got, pump = decoded(tensor, isa, tmp_path, threads=2)
        assert_bits(tensor.want, got, f"{tensor} {isa}")
        assert pump.bytes_read < 1.01 * tensor.bytes
        assert pump.scratch_bytes < 1 << 20


@every_isa
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_matrices_stored_by_columns_are_read_once(isa, threads, tmp_path):
    """By all threads together: many matrices in a block of the output, or many blocks in a matrix."""
    for shape in ((40, 32, 24), (3, 1024, 1100)):
        tensor = codes.mxfp4_transposed(shape)
        got, pump = decoded(tensor, isa, tmp_path, threads=threads)
        assert_bits(tensor.want, got, f"{shape} {isa}")
        assert pump.bytes_read == tensor.bytes


@every_isa
def test_rows_and_columns_of_matrices_stored_by_columns(isa):
    """Surveys that read columns, or rows several times, see the same numbers as those of plain float32."""
    tensor = codes.mxfp4_transposed((5, 64, 40))
    scales = [np.full_like(tensor.companions[0], 127)]  # no NaN
    numbers = decode(tensor.name, tensor.raw, scales, tensor.parameters, tensor.numel, tensor.columns)
    for step in (
        lambda x: steps.Measure(inputs=(x, x), numel=tensor.numel, columns=40, per="row", deltas=True),
        lambda x: steps.Measure(inputs=(x, x), numel=tensor.numel, columns=40, per="column", deltas=True),
        lambda x: steps.Divergence(inputs=(x, x), numel=tensor.numel, columns=40),
    ):
        answers = []
        for source, operand in (
            ([numbers.view(np.uint8)], Stored(0, 0, CODE)),
            ([tensor.raw, *scales], Stored(0, 0, CODE, Decoder(tensor.name, 40, ((1, 0, scales[0].size),), (64,)))),
        ):
            places: list[Handle] = [("memory", x.ctypes.data, x.size) for x in source]
            pump = Pump(places, [], [step(operand)], PumpOptions(isa=isa, threads=3))
            pump.start()
            pump.join()
            assert pump.error() is None
            answers.append([part.tobytes() for part in pump.answers()[0]])
        assert answers[0] == answers[1]


@pytest.mark.parametrize("cut", ["codes", "scales"])
def test_a_matrix_that_is_cut_is_an_error(cut):
    """Of the source, for all threads that wait for it."""
    tensor = codes.mxfp4_transposed((2, 1024, 1100))
    stored = {"codes": tensor.raw, "scales": tensor.companions[0]}
    sizes = {name: raw.size for name, raw in stored.items()}
    with ExitStack() as stack:
        sources: list[Handle] = []
        for name, raw in stored.items():
            fd = os.memfd_create(name)
            stack.callback(os.close, fd)
            os.write(fd, raw[: sizes[name] - 1000 if name == cut else None].tobytes())
            sources.append(fd)
        operand = Stored(0, 0, CODE, Decoder(tensor.name, 1100, ((1, 0, sizes["scales"]),), (1024,)))
        step = steps.Measure(inputs=(operand,), numel=tensor.numel)
        pump = Pump(sources, [], [step], PumpOptions(threads=5))
        pump.start()
        assert pump.wait(60)
        pump.join()
    error = pump.error()
    assert error is not None and error[:3] == ("read", list(stored).index(cut), 0)


TINY: dict[str, tuple[int, tuple[int, ...], tuple[float, ...]]] = {  # numel, bytes of companions, parameters
    "scaled_i8": (12, (8,), (0, 3, 2, 3)),
    "mxfp4": (64, (2,), ()),
    "mxfp4_transposed": (64, (2,), (32,)),
    "nvfp4": (64, (4, 4), (0, 1)),
    "q8_0": (64, (), ()),
}


@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        ("scaled_i8", {"companions": ()}, "it takes 1 companion"),
        ("scaled_i8", {"companions": (4,)}, "companion 0 has 4 bytes, and the tensor needs 8"),
        ("scaled_i8", {"parameters": (0, 3, 4)}, "it takes 4 or 5 parameters"),
        ("scaled_i8", {"parameters": (4, 3, 4, 3)}, "first parameter"),
        ("scaled_i8", {"parameters": (0, 0, 4, 3)}, "1 row and column or more"),
        ("scaled_i8", {"parameters": (0, 3, 4, float("nan"))}, "1 row and column or more"),
        ("scaled_i8", {"parameters": (0, 1, 4, 3, 1)}, "tiles of scales are E8M0"),
        ("mxfp4", {"companions": (3,)}, "companion 0 has 3 bytes, and the tensor needs 2"),
        ("mxfp4", {"numel": 48}, "blocks have 32 elements"),
        ("mxfp4", {"parameters": (1,)}, "takes no parameters"),
        ("mxfp4_transposed", {"parameters": ()}, "the rows of a matrix"),
        ("mxfp4_transposed", {"parameters": (16,)}, "rows in blocks of 32"),
        ("mxfp4_transposed", {"parameters": (64,)}, "rows in blocks of 32"),
        ("nvfp4", {"companions": (4,)}, "takes 2 companions"),
        ("nvfp4", {"companions": (4, 8)}, "companion 1 has 8 bytes, and the tensor needs 4"),
        ("nvfp4", {"parameters": (0, 0)}, "number of matrices"),
        ("nvfp4", {"parameters": (2, 1)}, "flags"),
        ("nvfp4", {"parameters": (0, 1, 0, 1)}, "companion 0 has 4 bytes, and the tensor needs 512"),
        ("q8_0", {"numel": 40}, "blocks have 32 elements"),
        ("q8_0", {"companions": (4,)}, "neither companions nor parameters"),
    ],
)
def test_what_a_decoder_does_not_take(name, changed, words):
    numel, companions, parameters = TINY[name]
    given = {"numel": numel, "companions": companions, "parameters": parameters}

    def make(values: dict[str, Any]) -> None:
        columns = 4 if name == "scaled_i8" else 2 if name == "mxfp4_transposed" else values["numel"]
        places = tuple((0, 0, size) for size in values["companions"])
        operand = Stored(0, 0, CODE, Decoder(name, columns, places, values["parameters"]))
        Pump([("memory", 0, 0)], [], [steps.Measure(inputs=(operand,), numel=values["numel"])], PumpOptions())

    make(given)
    with pytest.raises(ValueError, match=rf"^decoder {name}: .*{words}"):
        make(given | changed)


def test_tensors_without_elements():
    for name, (_, companions, parameters) in TINY.items():
        sizes = tuple(size if name == "nvfp4" and i == 1 else 0 for i, size in enumerate(companions))
        decoder = Decoder(name, 32, tuple((0, 0, size) for size in sizes), parameters)
        step = steps.Combine(
            inputs=(Stored(0, 0, CODE, decoder),), numel=0, columns=32, sinks=(0,), offsets=(0,), out_dtype=CODE,
            rows=(Combine((1.0,)).row(),), keys=(0,),
        )  # fmt: skip
        pump = Pump([("memory", 0, 4)], [("memory", 0, 0)], [step], PumpOptions())
        pump.start()
        pump.join()
        assert pump.error() is None


# --- beside the libraries of the formats -----------------------------------------------------------------------------


def test_mxfp4_of_transformers():
    """What transformers makes of gpt-oss's experts, in bf16, which has all E2M1 values times powers of two."""
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    rng = np.random.default_rng(5)
    for shape in ((3, 96, 64), (2, 2880, 48)):
        matrices, rows, columns = shape
        blocks = rng.integers(0, 256, (matrices, columns, rows // 32, 16), dtype=np.uint8)
        scales = rng.integers(100, 140, (matrices, columns, rows // 32), dtype=np.uint8)
        want = mxfp4.convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
        assert want.shape == shape
        tensor = Codes("mxfp4_transposed", shape, blocks.reshape(-1), [scales.reshape(-1)], (rows,))
        for isa in backends.usable():
            got = decoded(tensor, isa)[0].view(np.float32).reshape(shape)
            assert torch.equal(torch.from_numpy(got), want.float())


def test_q8_0_of_gguf():
    quants = pytest.importorskip("gguf.quants")
    gguf = pytest.importorskip("gguf")
    numbers = np.random.default_rng(6).normal(size=(70, 96)).astype(np.float32)
    stored = quants.quantize(numbers, gguf.GGMLQuantizationType.Q8_0)
    want = quants.dequantize(stored, gguf.GGMLQuantizationType.Q8_0)
    tensor = Codes("q8_0", (70, 96), np.ascontiguousarray(stored).reshape(-1), [], ())
    for isa in backends.usable():
        assert_bits(want.reshape(-1).view(np.uint32), decoded(tensor, isa)[0], isa)


def test_products_of_torch():
    """fp8 codes in float32 times scales of 128 x 128 blocks, as transformers de-quantises them."""
    torch = pytest.importorskip("torch")
    weight = torch.randn(300, 260, generator=torch.Generator().manual_seed(7)).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 3, generator=torch.Generator().manual_seed(8))
    spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :260]
    want = (weight.float() * spread).numpy().reshape(-1)
    raw = weight.view(torch.uint8).numpy().reshape(-1)
    tensor = Codes("scaled_f8_e4m3", (300, 260), raw, [codes.raw(scales.numpy())], (0, 128, 128, 300))
    for isa in backends.usable():
        assert_bits(want.view(np.uint32), decoded(tensor, isa)[0], isa)


# --- memory ----------------------------------------------------------------------------------------------------------

# Prints RssAnon before a merge of two tensors of zeros, stored by columns, and its peak, in KiB.
MEMORY = """
    import os, sys, threading
    from fastinterp.backends.cpu import Pump, PumpOptions
    from fastinterp.ops import steps
    from fastinterp.ops.combine import Combine
    from fastinterp.ops.operands import Decoder, Stored

    matrices, rows, columns = map(int, sys.argv[2:])
    numel = matrices * rows * columns
    codes, out = (os.open(os.path.join(sys.argv[1], name), os.O_RDWR | os.O_CREAT) for name in ("codes", "out"))
    os.truncate(codes, numel // 2 + numel // 32)
    operand = Stored(0, 0, 1, Decoder("mxfp4_transposed", columns, ((0, numel // 2, numel // 32),), (rows,)))
    step = steps.Combine(
        inputs=(operand, operand), numel=numel, columns=columns, sinks=(0,), offsets=(0,), out_dtype=3,
        rows=(Combine((0.5, 0.5)).row(),), keys=(0,),
    )

    def anonymous():
        with open("/proc/self/status") as stream:
            return next(int(line.split()[1]) for line in stream if line.startswith("RssAnon"))

    seen = [anonymous()]
    pump = Pump([codes], [out], [step], PumpOptions(threads=3))
    pump.start()
    while not pump.wait(0.001):
        seen.append(anonymous())
    pump.join()
    assert pump.error() is None
    print(seen[0], max(seen), len(seen))
"""


@pytest.mark.slow
def test_memory_of_matrices_stored_by_columns(tmp_path):
    """Two matrices of codes per input, and one more for each thread that is behind: not the tensor."""
    shape = matrices, rows, columns = 48, 1024, 2048
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path), *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    idle, peak, samples = map(int, done.stdout.split())
    matrix = rows * columns * 17 // 32
    assert samples > 10
    assert 2 * matrix < (peak - idle) * 1024 < 2 * 4 * matrix + (6 << 20) < 2 * matrices * matrix / 5
