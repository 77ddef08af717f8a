"""What is Triton's own of a device: errors, and which versions are right. Its kernels are tested in test_gpu.py.

Run by test_triton.py in a process of its own, since Triton decides at its import whether it compiles or interprets:

    TRITON_INTERPRET=1 python -m pytest tests/support/devices/triton_interpreted.py
"""

from __future__ import annotations

import os

import pytest
from msgspec.structs import replace

from fastinterp.backends.device import Piece
from fastinterp.backends.triton.device import TritonDevice, missing
from fastinterp.backends.triton.launch import LaunchContext
from fastinterp.errors import BackendError, OutOfMemory
from fastinterp.ops.combine import Row
from fastinterp.ops.dtypes import BF16, F32
from fastinterp.ops.operands import Gathered
from fastinterp.ops.steps import WORDS, Divergence, MaskedStats, MaskTest, Measure, Step
from tests.support.devices.cuda_combine import piece_of
from tests.support.devices.cuda_pieces import pump_answers, same
from tests.support.pumps import raws, stored

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton would compile")


def test_names():
    device = TritonDevice()
    assert (device.name, device.backend, device.label) == ("triton:0", "triton", "Triton's interpreter")


def test_too_little_memory():
    with pytest.raises(OutOfMemory, match=r"^memory of 1152921504606846976 bytes on triton:0: "):
        TritonDevice().memory(1 << 60)


def test_errors_name_call_and_device(monkeypatch):
    def fails(*_):
        raise RuntimeError("a launch failed\nand more")

    monkeypatch.setattr("fastinterp.backends.triton.combine.combine", fails)
    piece = piece_of([0], [F32], [Row(0)], [0], 1, 10)
    what = r"^kernels for 1 pieces, at most 80 bytes an operand, on triton:0: a launch failed$"
    with pytest.raises(BackendError, match=what):
        TritonDevice().queue().run([piece])


def test_tritons_that_round_differently(monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.8.1+git")
    assert missing() == "triton 3.8.1+git rounds differently: 3.9 or newer is needed"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert missing() == ""
    monkeypatch.setattr("triton.__version__", "3.5.0")
    assert missing() == "triton 3.5.0 rounds differently: 3.6 or newer is needed"


def test_devices_that_are_not_there():
    with pytest.raises(BackendError, match="device triton:1 cannot be used: there are 1, numbered from 0"):
        TritonDevice(1)


def test_what_is_refused():
    refuses = TritonDevice().refuses
    assert refuses(Divergence(inputs=stored([F32, F32]), numel=4)) == "the divergence of rows"
    gathered = Gathered(((0, 0, 1),), 3, b"")
    assert refuses(Measure(inputs=(gathered,), numel=4)) == "rows gathered from several places"


@pytest.mark.parametrize(("per", "n"), [("tensor", 2), ("row", 2), ("column", 2), ("column", 5)])
def test_measures_in_tiles_as_compiled(monkeypatch, per, n):
    """The interpreter takes large tiles, and loads nothing ahead: here as a GPU does, to an end that is no tile's."""
    shape = (5, 304) if per == "column" else (2, 600)
    numel = shape[0] * shape[1]
    step = Measure(inputs=stored([BF16] * n), numel=numel, columns=shape[1], deltas=True, per=per)
    check_tiles_as_compiled(monkeypatch, step, [step, replace(step, numel=numel - shape[1])])


def test_masked_statistics_in_tiles_as_compiled(monkeypatch):
    """What is loaded ahead ends with the chunk: the next one is another program's."""
    numel, test = 16384 + 600, MaskTest(0x3F000000, 0x7F7FFFFF, WORDS, WORDS, 0)
    step = MaskedStats(
        inputs=stored([BF16, BF16]), numel=numel, columns=numel, tests=(test, test), score=None, l1=True, squares=True
    )
    check_tiles_as_compiled(monkeypatch, step, [step, replace(step, numel=616, columns=616)])


def check_tiles_as_compiled(monkeypatch: pytest.MonkeyPatch, step: Step, steps: list[Step]) -> None:
    """All steps, of the same elements or the first of them, answer what the pump does."""
    monkeypatch.setattr(LaunchContext, "tile", lambda self, compiled, interpreted: compiled)
    data = raws("normal", [BF16] * len(step.inputs), step.numel)
    inputs = tuple(raw.ctypes.data for raw in data)
    pieces = [Piece(step=one, inputs=inputs, numel=one.numel) for one in steps]
    queue = TritonDevice().queue()
    for one, pending in zip(steps, queue.run(pieces), strict=True):
        held = [raw[: 2 * one.numel] for raw in data]
        assert same(pending.answer(), pump_answers(one, held))
