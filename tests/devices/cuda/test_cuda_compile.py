"""The CUDA sources compile for every architecture without a warning, and to the code that they are meant to become."""

from __future__ import annotations

import re

import pytest

from tests.support.backends import nvcc_missing
from tests.support.devices import cuda_compile
from tests.support.devices.cuda_compile import ARCHITECTURES, SOURCES, compiled, machine_code, ptx

pytestmark = [
    pytest.mark.slow(20),
    pytest.mark.skipif(bool(nvcc_missing()), reason=f"nvcc: {nvcc_missing()}"),
]
FAST = cuda_compile.CSRC / "cuda" / "combine_fast.cu"
PREPARED = FAST.with_name("combine_prepared.cu")


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_compiles_without_warnings_and_spills(source):
    _, report = compiled(source)
    assert report.count("Compiling entry function") % len(ARCHITECTURES) == 0
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    assert not any(spills)


@pytest.mark.skipif(cuda_compile.cuobjdump() is None, reason="no cuobjdump: neither CUDA's nor Triton's is here")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "code"), [("f32", 1), ("f16", 2), ("bf16", 3)])
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_sums_read_and_write_16_bytes_at_a_time(n, dtype, code, architecture):
    """As many loads stand before the first store as keep enough bytes under way; nothing lies in slow local memory."""
    made, _ = compiled(FAST)
    both = [v for k, v in machine_code(made, architecture).items() if f"fastILNS_5DTypeE{code}ELi{n}ELi" in k]
    assert len(both) == 2  # with much room for arguments, and with little
    by_table, _ = compiled(PREPARED)
    symbol = f"preparedILNS_5DTypeE{code}ELi{n}EE"
    both += [v for k, v in machine_code(by_table, architecture).items() if symbol in k]
    assert len(both) == 3
    for code_of in both:
        check_sum(code_of, n)


def check_sum(code_of: list[str], n: int) -> None:
    ahead = {1: 4, 2: 2}.get(n, 1)
    wide = [i for i, op in enumerate(code_of) if op.startswith("LDG") and "128" in op.split(".")]
    stores = [i for i, op in enumerate(code_of) if op.startswith("STG") and "128" in op.split(".")]
    assert (len(wide), len(stores)) == (n * ahead, ahead)
    assert max(wide) < min(stores)
    assert not [op for op in code_of if op.startswith(("LDL", "STL"))]


@pytest.mark.skipif(cuda_compile.cuobjdump() is None, reason="no cuobjdump: neither CUDA's nor Triton's is here")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_fused_or_flushed_that_the_source_does_not_say(architecture):
    """A sum of two bf16 inputs has one fma per element and term, and one per element for the pivot."""
    made, _ = compiled(FAST)
    for name, every in machine_code(made, architecture).items():
        assert not [op for op in every if "FTZ" in op.split(".")], name
    both = [v for k, v in machine_code(made, architecture).items() if "fastILNS_5DTypeE3ELi2ELi" in k]
    assert len(both) == 2
    for code in both:
        fused = [op for op in code if op.split(".")[0] in ("FFMA", "FFMA2")]
        per_element = [op for op in code if op.split(".")[0] in ("FADD", "FADD2")]
        assert fused and per_element


@pytest.mark.skipif(cuda_compile.cuobjdump() is None, reason="no cuobjdump: neither CUDA's nor Triton's is here")
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_no_kernel_asks_for_flushed_or_approximate_arithmetic(source):
    """In the portable code: the machine's own routines for division, of indices too, flush inside where it is safe."""
    text = ptx(compiled(source)[0])
    assert (".entry" in text) == ("FI_KERNEL" in source.read_text("utf-8"))
    assert not re.findall(r"\.ftz|\.approx|\bfma\.r[zmp]\.f", text)


def test_the_build_and_the_checks_know_the_same_architectures():
    listed = re.search(r"set\(architectures (.*120.*)\)", (cuda_compile.ROOT / "CMakeLists.txt").read_text("utf-8"))
    checked = re.search(
        r"FASTINTERP_CUDA_ARCHITECTURES=([\d,]+) \$\(PY\)", (cuda_compile.ROOT / "Makefile").read_text("utf-8")
    )
    assert listed and checked
    assert [name.removesuffix("-real") for name in listed[1].split()] == checked[1].split(",")


def test_the_report_would_show_a_spill(tmp_path):
    """The check can fail: a kernel with far too few registers for what it holds."""
    source = tmp_path / "spill.cu"
    sums = "\n".join(f"  float a{i} = x[{i} * stride];" for i in range(80))
    uses = "\n".join(f"  x[{i}] = a{i} * a{(i + 7) % 80};" for i in range(80))
    head = "__global__ void __launch_bounds__(1024, 2) spill(float* x, int stride) {"
    source.write_text(f"{head}\n{sums}\n  __syncthreads();\n{uses}\n}}\n")
    with pytest.raises(RuntimeError, match="spill"):
        compiled(source)
