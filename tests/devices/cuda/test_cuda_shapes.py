"""What the machine code of the CUDA kernels says of their speed, and docs/devices.md with it."""

from __future__ import annotations

import pytest

from tests.support.backends import nvcc_missing
from tests.support.devices import cuda_shapes
from tests.support.devices.cuda_compile import ARCHITECTURES, CSRC, SOURCES, compiled, cuobjdump
from tests.support.devices.cuda_shapes import ARCHITECTURE, ENOUGH, KERNELS, instructions, shape_of

pytestmark = [
    pytest.mark.slow(20),
    pytest.mark.skipif(bool(nvcc_missing()), reason=f"nvcc: {nvcc_missing()}"),
    pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump: neither CUDA's nor Triton's is here"),
    pytest.mark.skipif(ARCHITECTURE not in ARCHITECTURES, reason=f"not compiled for {ARCHITECTURE}"),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_inputs_are_loaded_as_vectors_and_together(kernel):
    """16 bytes at a time, without a branch among them, enough of them to keep the memory busy; nothing is spilled."""
    shape = shape_of(kernel)
    assert (shape.widest, shape.branches, shape.spilled, shape.converts) == (16, 0, 0, 0)
    assert shape.in_flight >= ENOUGH


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_single_bytes_are_loaded_of_dtypes_of_one_byte_alone(source):
    """Elements of two bytes are loaded whole: a load of a byte stands beside each, for the smaller dtypes."""
    for name, code in instructions(compiled(source)[0]).items():
        loads = [op.split(".") for op, _ in code if op.startswith("LDG")]
        assert sum("U8" in op for op in loads) <= sum("U16" in op for op in loads) + 2, name


def test_a_histogram_has_no_loop_for_an_addition():
    """In shared memory a warp's additions of 1 to one address are one; elsewhere they need no answer."""
    for name, code in instructions(compiled(CSRC / "cuda" / "histogram.cu")[0]).items():
        ops = {op for op, _ in code}
        assert "ATOMS.POPC.INC.32" in ops, name
        assert not [op for op in ops if "SPIN" in op or op.startswith("ATOM.")], name


def test_measures_widen_each_element_once():
    """Products are taken of what was widened: as many conversions as inputs, in a loop of two lines and its rest."""
    code = instructions(compiled(CSRC / "cuda" / "measure.cu")[0])
    for n in (1, 2, 3, 4):
        [kernel] = [v for k, v in code.items() if f"14measure_kernelILi3ELi{n}EE" in k]
        assert sum(op.startswith("F2F.F64.F32") for op, _ in kernel) == 2 * 3 * n


def test_the_table_is_what_the_code_says():
    """Renew it with: python -m tests.support.devices.cuda_shapes"""
    text = (CSRC.parent / "docs" / "devices.md").read_text("utf-8")
    assert cuda_shapes.table() in text


def test_what_is_used_at_once_is_not_under_way():
    """The reading of machine code: a load that is used, and a branch, end what is under way or are told."""
    load = "LDG.E.NA.128.CONSTANT"
    apart = [(load, "R4, desc[UR4][R2.64]"), ("IADD3", "R9, R5, R1, RZ"), (load, "R8, desc[UR4][R2.64+0x10]")]
    together = [apart[0], apart[2], apart[1]]
    assert cuda_shapes.under_way(apart, 16) == (1, 0)
    assert cuda_shapes.under_way(together, 16) == (2, 0)
    assert cuda_shapes.under_way([apart[0], ("BRA", "`(.L_x_1)"), *together[1:]], 16) == (2, 1)
    assert cuda_shapes.under_way([("LDG.E.U8", "R4, desc[UR4][R2.64]")], 16) == (0, 0)
