"""Triton's kernels without a GPU: interpreted they give the reference's bytes, and they compile for NVIDIA and AMD.

Skipped as a whole where Triton or torch is not installed: both are of the extras `gpu` and `dev`, and Triton is for
Linux alone. What is not tested here is how the compiled kernels run.
"""

from __future__ import annotations

import ast
import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastinterp._triton.combine import combine_kernel, effect_kernel  # noqa: E402
from fastinterp._triton.histogram import histogram_kernel  # noqa: E402
from fastinterp._triton.masked_stats import masked_stats_kernel  # noqa: E402
from fastinterp._triton.masked_sum import masked_sum_effect_kernel, masked_sum_kernel  # noqa: E402
from fastinterp._triton.measure import measure_columns_kernel, measure_kernel  # noqa: E402
from fastinterp.backends.device import Piece  # noqa: E402
from fastinterp.backends.triton.launch import LaunchContext  # noqa: E402
from fastinterp.backends.triton.pieces import run  # noqa: E402
from fastinterp.ops import steps  # noqa: E402
from fastinterp.ops.combine import Row  # noqa: E402
from fastinterp.ops.operands import Stored  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "fastinterp" / "_triton").glob("*.py"))
SM80, SM90, SM100 = (GPUTarget("cuda", arch, 32) for arch in (80, 90, 100))
GFX942 = GPUTarget("hip", "gfx942", 64)
TARGETS = (SM80, SM90, SM100, GFX942)
BF16, F16, F32, F64, E4M3 = 3, 2, 1, 0, 4


@pytest.mark.slow(60)
def test_interpreted_kernels_give_the_bytes_of_the_reference():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["tests/devices/test_gpu.py", "tests/support/devices/triton_interpreted.py"]
    command += ["-k", "triton and not sanitized and not 291"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]


# --- compiled --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _compiled_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel: Any, target: Any, arguments: str, constants: dict[str, Any], warps: int = 4) -> Any:
    """As backends/triton/launch.py launches it. arguments: "name:type name:type ...", pointers with a star."""
    signature = dict(argument.split(":") for argument in arguments.split()) | dict.fromkeys(constants, "constexpr")
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=target, options=options)


def weighted(codes: tuple[int, ...], out: int, **others: Any) -> dict[str, Any]:
    plain = {
        "N": len(codes), "DT": codes, "OUT": out, "WIDE": F64 in codes, "PER": 0, "STOCHASTIC": False, "SATURATE": True,
        "MARK_NONFINITE": True, "ALIGN": 16, "BLOCK": 2048,
    }  # fmt: skip
    return plain | others


def effect(constants: dict[str, Any], counts: bool) -> dict[str, Any]:
    kept = {name: value for name, value in constants.items() if name not in ("STOCHASTIC", "MARK_NONFINITE")}
    return kept | {"COUNTS": counts, "BLOCK": 1024}


MASKED = weighted(
    (BF16,) * 3, BF16, TERMS=(1, 2), IMPORTANCE=(), RANDOM=(True, False), ELECTS=True, DIVIDES=True, SOLE=True,
    LIMITED=True, SCORE=2, BLOCK=1024,
)  # fmt: skip
MASKED.pop("PER")
SCORES = {"N": 2, "DT": (BF16, BF16), "WIDE": False, "SCORE": 1, "ALIGN": 16, "STRIPS": 4}
SUMS = "table:*i64 numbers:*fp64 flags:*i32 pieces:i32"
STATISTICS = "table:*i64 numbers:*fp64 flags:*i32 spans:*i64 results:"
COUNTED = "table:*i64 numbers:*fp64 bins:*i32 totals:*i64 pieces:i32"
GROUPED = weighted((BF16, F32), E4M3, PER=1, STOCHASTIC=True, ALIGN=1)
LAUNCHED = (
    combine_kernel, effect_kernel, histogram_kernel, masked_stats_kernel, masked_sum_effect_kernel, masked_sum_kernel,
    measure_columns_kernel, measure_kernel,
)  # fmt: skip
CASES = {
    "wide": (combine_kernel, SUMS, weighted((F64, F16, E4M3), F16, PER=2, STOCHASTIC=True, ALIGN=0), 4),
    "grouped": (combine_kernel, SUMS, GROUPED, 4),
    "copied": (combine_kernel, SUMS, weighted((F32,), F32, PER=4), 4),
    "nonfinite": (effect_kernel, STATISTICS + "*i64", effect(GROUPED, True), 4),
    "scores": (histogram_kernel, COUNTED, SCORES, 4),
    "masked": (masked_sum_kernel, SUMS, MASKED, 4),
    "masked_sampled": (masked_sum_effect_kernel, STATISTICS + "*fp64", effect(MASKED, False), 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.backend}-{t.arch}")
@pytest.mark.parametrize("name", CASES)
def test_compiles(name, target):
    check_rounding(compiled(CASES[name][0], target, *CASES[name][1:]), target)


def check_rounding(made: Any, target: Any) -> None:
    """Each operation says how it rounds, so that none is contracted, and flushes nothing."""
    if target.backend == "hip":
        assert made.asm["hsaco"]
        assert ".amdhsa_float_denorm_mode_32 3" in made.asm["amdgcn"]  # subnormals are kept
        return
    ptx = made.asm["ptx"]
    assert made.asm["cubin"]
    assert ".ftz" not in ptx and "div.full" not in ptx and ".approx" not in ptx
    sums = re.findall(r"\b(?:add|sub|mul|fma|mad)\.(\S*f(?:32|64))", ptx)
    assert all(kind.startswith("rn.") for kind in sums), sorted(set(sums))


def memory_of(ptx: str) -> tuple[list[str], list[str]]:
    """Loads of elements, which are hinted as read once, and stores."""
    loads = re.findall(r"ld\.global\.L1::evict_first\.(?:L2::cache_hint\.)?(\S+)", ptx)
    return loads, re.findall(r"st\.global\.(\S+)", ptx)


def widths_of(made: Any, target: Any) -> tuple[set[int], set[int]]:
    """Bytes that a thread loads of elements at a time, and stores."""
    if target.backend == "hip":  # scalars have their address in other registers
        asm, sizes = made.asm["amdgcn"], {"dwordx4": 16, "dwordx2": 8, "dword": 4, "ushort": 2}
        loads = re.findall(r"(?:global|buffer)_load_(\w+) v\S+, v\[\d+:\d+\], off", asm)
        return {sizes[kind] for kind in loads}, {sizes[k] for k in re.findall(r"(?:global|buffer)_store_(\w+)", asm)}
    every = []
    for kinds in memory_of(made.asm["ptx"]):
        parts = [re.fullmatch(r"(?:cs\.)?(?:v(\d)\.)?b(\d+)", kind) for kind in kinds]
        every.append({int(part[1] or 1) * int(part[2]) // 8 for part in parts if part})
    return every[0], every[1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("target", [SM80, SM90, SM100], ids=lambda t: str(t.arch))
def test_elements_move_in_16_bytes(n, dtype, target):
    """In the body, which has whole 16s of them: addresses come from a table, so Triton must be told."""
    block = 2048 if n <= 4 else 1024
    made = compiled(combine_kernel, target, SUMS, weighted((dtype,) * n, dtype, MARK_NONFINITE=False, BLOCK=block))
    loads, stores = memory_of(made.asm["ptx"])
    vectors = block * (4 if dtype == F32 else 2) // (128 * 16)  # of a thread and an operand
    assert loads == ["v4.b32"] * (n * vectors)
    assert stores == ["cs.v4.b32"] * vectors


def scalar_loads(made: Any) -> dict[tuple[str, ...], int]:
    """How many scalars are loaded outside of loops, (), and in each kind of loop: ("while",), ("for", "for")."""
    counts: dict[tuple[str, ...], int] = {}
    regions: list[str] = []
    for line in made.asm["ttgir"].splitlines():
        text = line.strip()
        if text.startswith("}"):
            regions.pop()
        if re.search(r"= tt\.load .*: !tt\.ptr", text):
            loops = tuple(region for region in regions if region in ("for", "while"))
            counts[loops] = counts.get(loops, 0) + 1
        if text.endswith("{"):
            found = re.search(r"scf\.(for|while)|(\} do) ", text)
            regions.append((found[1] or "while") if found else "")
    return counts


@pytest.mark.parametrize("n", [2, 8])
def test_a_program_reads_its_row_once(n):
    """One row is searched in a loop of one load. Then what all outputs share: tile, count, addresses, where outputs,
    their number, flags and numbers are; and for each output where it is, total and weights."""
    made = compiled(combine_kernel, SM90, SUMS, weighted((BF16,) * n, BF16, BLOCK=1024))
    assert scalar_loads(made) == {("while",): 1, (): 6 + n, ("for",): 1 + n}
    assert len(re.findall(r"ld\.global\.b64", made.asm["ptx"])) == 8 + 2 * n


def test_statistics_load_elements_alone_in_their_loop():
    made = compiled(effect_kernel, SM90, STATISTICS + "*fp64", effect(weighted((BF16,) * 3, BF16), False))
    assert scalar_loads(made) == {(): 6, ("for",): 3 + 3 + 3}


class Driver:
    """A GPU that kernels can be compiled for, and that nothing runs on."""

    def __init__(self, target: Any):
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiling(LaunchContext):
    """Launches nothing: compiles each kernel for the arguments that it is launched with."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.launched: list[tuple[str, Any, dict[str, Any]]] = []

    def _launch(self, kernel: Any, programs: int, arguments: Any, named: dict[str, Any]) -> None:
        made = kernel.warmup(*arguments, grid=(programs,), **named)
        self.launched.append((kernel.fn.__name__, made, named))

    @functools.cached_property
    def warp(self) -> int:
        return int(triton.runtime.driver.active.get_current_target().warp_size)

    def tile(self, compiled: int, interpreted: int) -> int:
        return compiled  # though its memory is the host's


@pytest.fixture
def room(monkeypatch, request):
    """A context for the target that is the fixture's parameter, or for Hopper."""
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(getattr(request, "param", SM90)))
    for kernel in LAUNCHED:
        monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    return Compiling()


def pieces_of(n: int, numel: int = 98304, first: int = 1 << 20, random: bool = True) -> dict[str, Piece]:
    """One of each kind, and a measure by column, of bf16: what methods ask of most tensors.

    random  whether masks are
    """
    operands: Any = {"inputs": tuple(Stored(i, 0, BF16) for i in range(n)), "numel": numel, "columns": numel}
    columns: Any = operands | {"columns": 1024, "per": "column"}
    written: Any = {"sinks": (0,), "offsets": (0,), "out_dtype": BF16}
    limit = 5 if random else steps.WORDS
    test = steps.MaskTest(0, 1 << 30, limit, limit, 1 << 63)
    terms = tuple(
        steps.MaskedTerm(input=i, weight=1.0, sign_weight=1.0, share=1.0, sole_weight=0.0, importance=-1, test=test)
        for i in range(1, n)
    )
    output = steps.MaskedOutput(
        base=0, terms=terms, elects_signs=True, divides=True, has_sole_weights=False, least_share=0.0, other_share=1.0,
        limit=math.inf, score=None,
    )  # fmt: skip
    brackets = tuple(steps.Bracket(i, 0, 0x7FFFFFFF, 16) for i in range(1, n))
    made: list[steps.Step] = [
        steps.Combine(**operands, **written, rows=(Row(0, 1.0, tuple((i, 0.5) for i in range(1, n))),)),
        steps.Measure(**operands),
        steps.Measure(**columns),
        steps.Histogram(**operands, brackets=brackets),
        steps.MaskedStats(**operands, tests=(test,) * n, score=None, l1=True, squares=True),
        steps.MaskedSum(**operands, **written, outputs=(output,)),
    ]
    addresses = tuple(first * (1 + i) for i in range(n))
    return {
        "columns" if step.columns == 1024 else step.kind: Piece(
            step=step, inputs=addresses, outputs=(first * (1 + n),) if isinstance(step, steps.SumStep) else (),
            numel=numel, stats_every=2,
        )
        for step in made
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("room", TARGETS, ids=lambda t: f"{t.backend}-{t.arch}", indirect=True)
def test_launches_compile_as_they_are_made(room):
    """What a launch passes is what a kernel takes, constants and all. Threads load and store 16 bytes of bf16 at a
    time, 8 in the kernel of a sum with masks that sees one chunk in many: of 16 its sums would fill the registers."""
    target = triton.runtime.driver.active.get_current_target()
    run(room, [*pieces_of(2, random=target is SM90).values()])  # these take long to compile
    assert {name for name, *_ in room.launched} == {kernel.fn.__name__ for kernel in LAUNCHED}
    for name, made, constants in room.launched:
        check_rounding(made, target)
        least = 8 if name == "masked_sum_effect_kernel" and not constants["COUNTS"] else 16
        loads, stores = widths_of(made, target)
        flag = {4} if target.backend == "hip" and constants.get("COUNTS") is True else set()
        assert loads - flag == {least}, name
        if name in ("combine_kernel", "masked_sum_kernel", "measure_columns_kernel"):
            assert max(stores) == 16, name
        if name == "measure_columns_kernel":
            assert stores == {16}


def test_tables_of_different_lengths_are_one_kernel(room):
    """Where numbers begin is no reason to compile again."""
    combine = replace(pieces_of(2)["combine"], stats_every=0)
    step = combine.step
    assert isinstance(step, steps.Combine)
    twice = replace(step, rows=step.rows * 2, sinks=(0, 1), offsets=(0, 0))
    odd = replace(combine, step=twice, outputs=(*combine.outputs, 1 << 23))
    for pieces in ([combine], [combine] * 2, [odd], [odd, combine]):
        run(room, pieces)
    assert len({made.hash for _, made, _ in room.launched}) == 1


@pytest.mark.slow
def test_registers_hold_all_of_8_inputs(room, tmp_path):
    """Nothing is spilled, on Hopper."""
    run(room, [*pieces_of(8).values()])
    file = tmp_path / "kernel.cubin"
    for name, made, constants in room.launched:
        file.write_bytes(made.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert " STACK:0 " in told and " LOCAL:0 " in told, f"{name} {constants}: {told}"


def test_each_fma_is_written():
    """An input costs one difference and one fma; a total costs one fma."""
    made = compiled(combine_kernel, SM90, SUMS, weighted((F32,) * 3, F32, MARK_NONFINITE=False, BLOCK=512))
    ops = re.findall(r"\b(fma|add|sub|mul|mad)\.rn\.f32", made.asm["ptx"])
    assert {op: ops.count(op) for op in ops} == {"sub": 2 * 4, "fma": 3 * 4}  # 4 elements a thread


# --- installed -------------------------------------------------------------------------------------------------------


def test_the_package_links_to_its_kernels():
    link = ROOT / "fastinterp" / "_triton"
    if not link.is_symlink():
        pytest.skip("an unpacked archive holds files")
    assert os.readlink(link) == "../kernels/triton"
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_import_triton_and_leaves_alone(path):
    allowed = {"__future__", "triton", "triton.language", "fastinterp.ops.combine", "fastinterp.ops.dtypes"}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.module == "fastinterp.ops":
            assert [alias.name for alias in node.names] == ["contract"]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and (node.module in allowed or str(node.module).startswith("fastinterp._triton."))
