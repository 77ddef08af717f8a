"""The cases that gpu.py measures: what each moves, its answer, and what else makes the same."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

from msgspec.structs import replace

from fastinterp.backends.device import Piece
from fastinterp.ops import operands, steps
from fastinterp.ops.combine import Row
from fastinterp.ops.dtypes import BF16

Run = Callable[[], object]
AHEAD = 10_000_000  # cycles, of 5 ms, that the device waits while the host puts in what is timed
WINDOW = 1 << 16  # elements that are compared at the start, in the middle and at the end


@dataclass
class Case:
    """One measurement.

    nbytes  that it must read and write at least
    bound   of its time over that of a copy of as many bytes, as the project promises it; None if it promises nothing
    check   raises AssertionError, if the answer is wrong
    rivals  what else makes the same, by name
    wall    count from the call until the device has nothing left to do. Else the device's own time, while the host is
            ahead of it: what calls cost on the host is hidden then, as it is wherever a device has enough to do
    """

    name: str
    nbytes: int
    run: Run
    check: Run
    bound: float | None = None
    rivals: dict[str, Run] = field(default_factory=dict)
    wall: bool = False


class Bench:
    """The first device and a backend for it, "cuda" or "triton". Cases move about 2 GB each, but those of whole models.

    rehearse  on the host: CUDA's kernels emulated (tests/support/devices/cuda_host), Triton's interpreted, small arrays
    """

    def __init__(self, backend: str, rehearse: bool):
        import torch

        self.torch, self.rehearse = torch, rehearse
        self.place = torch.device("cpu" if rehearse else "cuda:0")
        self.device = opened(backend, rehearse)
        self.queue = self.device.queue(None if rehearse else torch.cuda.current_stream().cuda_stream)
        self.numel = 3000 if rehearse else 1 << 28

    def random(self, numel: int, seed: int, like: Any = None) -> Any:
        """bf16[numel]: numbers, or a fine-tune of `like`."""
        torch = self.torch
        generator = torch.Generator(self.place).manual_seed(seed)
        x = torch.randn(numel, generator=generator, device=self.place, dtype=torch.bfloat16)
        return x if like is None else x.mul_(1e-2).add_(like)

    def models(self, n: int, numel: int) -> list[Any]:
        first = self.random(numel, 0)
        return [first, *(self.random(numel, i, first) for i in range(1, n))]

    def piece(self, inputs: Sequence[Any], outputs: Sequence[Any], rows: Sequence[Row]) -> Piece:
        numel, count = inputs[0].numel(), len(outputs)
        step = steps.Combine(
            inputs=_stored(inputs), numel=numel, sinks=tuple(range(count)), offsets=(0,) * count,
            out_dtype=BF16.code or 0, rows=tuple(rows),
        )  # fmt: skip
        addresses, outs = (tuple(x.data_ptr() for x in some) for some in (inputs, outputs))
        return Piece(step=step, inputs=addresses, outputs=outs, numel=numel)

    def checked(self, inputs: Sequence[Any], outputs: Sequence[Any], rows: Sequence[Row]) -> Run:
        """Compares windows with what the CPU makes of them."""

        def check() -> None:
            self.synchronize()
            numel = inputs[0].numel()
            for at in {0, max(0, numel // 2 - WINDOW // 2), max(0, numel - WINDOW)}:
                count = min(WINDOW, numel - at)
                own = [x.flatten()[at : at + count].cpu() for x in inputs]
                for k, (out, row) in enumerate(zip(outputs, rows, strict=True)):
                    expected = self.torch.empty_like(own[0])
                    _combine_on_cpu(own, expected, row, at)
                    same = self.torch.equal(
                        expected.view(self.torch.int16), out.flatten()[at : at + count].cpu().view(self.torch.int16)
                    )
                    assert same, f"output {k} is wrong within {count} elements at {at}"

        return check

    def synchronize(self) -> None:
        if not self.rehearse:
            self.torch.cuda.synchronize()

    def copy(self, nbytes: int) -> tuple[Run, float]:
        """A copy on the device that reads one half of so many bytes and writes the other; and which part of it is done,
        since large ones do not fit beside the case."""
        torch = self.torch
        half = max(1, min(nbytes // 2, 4 << 30))
        source = torch.empty(half, dtype=torch.uint8, device=self.place).random_()
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 2 * half / nbytes

    def seconds(self, run: Run, wall: bool) -> float:
        """See `Case.wall`."""
        if self.rehearse or wall:
            self.synchronize()
            start = time.perf_counter()
            run()
            self.synchronize()
            return time.perf_counter() - start
        cuda = self.torch.cuda
        first, last = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        cuda._sleep(AHEAD)
        first.record()
        run()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    # ---- cases

    def combine(self, n: int) -> Case:
        """A sum of n models."""
        inputs, out = self.models(n, self.numel), self.random(self.numel, 99)
        rows = [Row(0, 1.0, tuple((i, 0.7 / n) for i in range(1, n)))]
        piece = self.piece(inputs, [out], rows)
        rivals: dict[str, Run] = {}
        if n == 2:
            torch, (a, b) = self.torch, inputs
            rivals["torch.lerp"] = lambda: torch.lerp(a, b, 0.35, out=out)
            rivals["torch eager a + w*(b-a)"] = lambda: a + 0.35 * (b - a)
            rivals["torch._foreach_lerp_"] = lambda: torch._foreach_lerp_([out], [b], 0.35)
            if not self.rehearse:
                compiled = torch.compile(lambda p, q: (p.float() + 0.35 * (q.float() - p.float())).to(p.dtype))
                rivals["torch.compile"] = lambda: compiled(a, b)
        nbytes, check = 2 * self.numel * (n + 1), self.checked(inputs, [out], rows)
        return Case(f"combine N={n}", nbytes, lambda: self.queue.run([piece]), check, 1 / 0.95, rivals)

    def outputs(self, k: int) -> Case:
        """k points of a path from one read of two models."""
        numel = self.numel // 2
        inputs, outs = self.models(2, numel), [self.random(numel, 50 + i) for i in range(k)]
        rows = [Row(0, 1.0, ((1, (i + 1) / (k + 1)),)) for i in range(k)]
        piece = self.piece(inputs, outs, rows)
        check = self.checked(inputs, outs, rows)
        return Case(f"combine N=2, K={k}", 2 * numel * (k + 2), lambda: self.queue.run([piece]), check)

    def model(self) -> Case:
        """The 291 tensors of a 7B model in one launch."""
        shapes = _llama_7b()
        if self.rehearse:
            shapes = [max(8, numel >> 18) for numel in shapes]
        total = sum(shapes)
        a, b = self.models(2, total)
        out = self.random(total, 98)
        ends = [0]
        for numel in shapes:
            ends.append(ends[-1] + numel)
        rows = [Row(0, 1.0, ((1, 0.35),))]
        parts = [([a[i:j], b[i:j]], out[i:j]) for i, j in pairwise(ends)]
        pieces = [self.piece(inputs, [to], rows) for inputs, to in parts]

        def check() -> None:
            for inputs, to in (parts[0], parts[7], parts[-1]):
                self.checked(inputs, [to], rows)()

        rivals: dict[str, Run] = {}
        ours, theirs = [to for _, to in parts], [inputs[1] for inputs, _ in parts]
        rivals["torch._foreach_lerp_"] = lambda: self.torch._foreach_lerp_(ours, theirs, 0.35)
        run: Run = lambda: self.queue.run(pieces)  # noqa: E731
        return Case("7B model, 291 tensors", 2 * total * 3, run, check, 1.1, rivals)

    def live(self) -> Case:
        """The same as a module that walks: every parameter of a 7B model, from its own weights to others."""
        import fastinterp

        torch, shapes = self.torch, _llama_7b()
        if self.rehearse:
            shapes = [max(8, numel >> 18) for numel in shapes]
        module = torch.nn.ParameterList(
            torch.nn.Parameter(self.random(numel, i), requires_grad=False) for i, numel in enumerate(shapes)
        )
        compared = ("0", "7", str(len(shapes) - 1))
        base = {name: getattr(module, name).detach().clone() for name in compared}
        ends = {name: self.random(p.numel(), 1000 + i, p) for i, (name, p) in enumerate(module.named_parameters())}
        live = fastinterp.Live(module, directions={"there": ends})
        at = iter(range(1, 1 << 30))

        def check() -> None:
            live.set(there=0.35)
            for name in compared:
                self.checked([base[name], ends[name]], [getattr(module, name)], [Row(0, 1.0, ((1, 0.35),))])()

        # Another point each time: to be where one is already may cost nothing.
        run: Run = lambda: live.set(there=0.1 + 0.01 * (next(at) % 64))  # noqa: E731
        return Case("7B module, live", 2 * sum(shapes) * 3, run, check, 1.1, wall=True)

    def measure(self) -> Case:
        """The Gram matrix of a base and two deltas."""
        inputs = self.models(3, self.numel)
        numel = inputs[0].numel()
        step = steps.Measure(inputs=_stored(inputs), numel=numel, deltas=True)
        piece = Piece(step=step, inputs=tuple(x.data_ptr() for x in inputs), numel=numel)
        rows = min(self.numel, 1 << 20)  # of what is compared: whole chunks
        small = replace(piece, numel=rows)

        def check() -> None:
            (pending,) = self.queue.run([small])
            self.queue.record().wait()
            found = [list(part) for part in pending.answer()]
            assert found == _measured_on_cpu([x[:rows].cpu() for x in inputs]), "the Gram matrix is wrong"

        return Case("measure N=3", 2 * self.numel * 3, lambda: self.queue.run([piece]), check, 1 / 0.85)

    def ties(self) -> Case:
        """TIES of two models in device memory, statistics included."""
        import fastinterp

        side = 64 if self.rehearse else 1 << 13
        numel = side * side
        base, *models = (x.reshape(side, side) for x in self.models(3, numel))
        settings: dict[str, Any] = {"base": base, "parameters": {"weight": 0.5, "density": 0.5}}

        def merged(tensors: Sequence[Any], **how: Any) -> Any:
            return fastinterp.merge_tensors(tensors, "ties", **{**settings, **how})

        def check() -> None:
            found, alone = merged(models).cpu(), merged([m.cpu() for m in models], base=base.cpu())
            assert self.torch.equal(found.view(self.torch.int16), alone.view(self.torch.int16)), "ties is wrong"

        return Case("ties N=2, resident", 2 * numel * 4, lambda: merged(models), check, 4.0, wall=True)

    def cases(self) -> Iterator[tuple[str, Callable[[], Case]]]:
        """Names, and what makes them: each takes much memory."""
        for n in (2, 3, 4, 8):
            yield f"combine N={n}", partial(self.combine, n)
        yield "combine N=2, K=8", partial(self.outputs, 8)
        yield "7B model, 291 tensors", self.model
        yield "7B module, live", self.live
        yield "measure N=3", self.measure
        yield "ties N=2, resident", self.ties

    def empty_cache(self) -> None:
        if not self.rehearse:
            self.torch.cuda.empty_cache()


def opened(backend: str, rehearse: bool) -> Any:
    """The device, which what fastinterp does with tensors on it uses too."""
    if backend == "triton":
        from fastinterp.backends.triton.device import TritonDevice

        device: Any = TritonDevice(0)
    else:
        from fastinterp.backends import cuda

        if rehearse:
            import fastinterp
            from tests.support.devices import cuda_host

            sys.modules["fastinterp._cuda"] = fastinterp._cuda = cuda_host.module()
            cuda_host.fake().reset(cuda_host.Fake.EAGER)
        device = cuda.device(0)
    if not rehearse:
        from fastinterp.backends import torch_device as resident_devices

        resident_devices._opened[0] = device
    return device


def _llama_7b() -> list[int]:
    """Elements of each tensor of a Llama of 6.7e9 parameters, in the order of its names."""
    hidden, inner, vocabulary = 4096, 11008, 32000
    layer = [hidden * hidden] * 4 + [hidden * inner] * 3 + [hidden] * 2
    return [vocabulary * hidden, *(layer * 32), hidden, vocabulary * hidden]


def _combine_on_cpu(inputs: Sequence[Any], out: Any, row: Any, first: int) -> None:
    from fastinterp import _C

    code, given = BF16.code or 0, [x.data_ptr() for x in inputs]
    _C.combine(given, [code] * len(given), [row], [out.data_ptr()], code, out.numel(), first=first)


def _measured_on_cpu(inputs: Sequence[Any]) -> list[list[float]]:
    from fastinterp.backends.cpu import PumpOptions, survey
    from fastinterp.backends.registry import cpu_isa

    sources = [("memory", x.data_ptr(), 2 * x.numel()) for x in inputs]
    step = steps.Measure(inputs=_stored(inputs), numel=inputs[0].numel(), deltas=True)
    (answer,) = survey(sources, [step], PumpOptions(isa=cpu_isa()), lambda error: RuntimeError(str(error)))
    return [list(part) for part in answer]


def _stored(inputs: Sequence[Any]) -> tuple[operands.Stored, ...]:
    """bf16 tensors as operands of a step: the first of source 0, and so on."""
    return tuple(operands.Stored(i, 0, BF16.code or 0) for i in range(len(inputs)))
