"""Measures the kernels on a GPU, and merges from file to file, beside their floors and what else a user could call.

    python -m benchmarks.gpu [--backends cuda,triton] [--only NAME,...] [--runs 15] [--out FILE.json]
    python -m benchmarks.gpu --rehearse

Each answer is checked first: windows of the output must be the bytes that the CPU makes of the same inputs. Then the
case, its floor and its rivals run in turn, and the medians of the ratios in each turn are told. The floor is a copy on
the device that moves as many bytes, those read and those written together. `--rehearse` goes through all of it with
small arrays in Triton's interpreter, on a machine without a GPU: its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

Run = Callable[[], object]
WINDOW = 1 << 16  # elements that are compared at the start, in the middle and at the end


@dataclass
class Case:
    """One measurement.

    nbytes  that it must read and write at least
    bound   of its time over that of a copy of as many bytes, as the project promises it; None if it promises nothing
    check   raises AssertionError, if the answer is wrong
    rivals  what else makes the same, by name
    """

    name: str
    nbytes: int
    run: Run
    check: Run
    bound: float | None = None
    rivals: dict[str, Run] = field(default_factory=dict)


class Bench:
    """One device and one backend. scale: of all sizes; 1 moves about 2 GB in each case."""

    def __init__(self, backend: str, rehearse: bool):
        import torch

        self.torch, self.rehearse = torch, rehearse
        self.place = torch.device("cpu" if rehearse else "cuda:0")
        if backend == "cuda":
            from fastinterp.compute.cuda import CudaDevice as Opened
        else:
            from fastinterp.compute.triton import TritonDevice as Opened  # type: ignore[assignment]
        self.device: Any = Opened(0)
        self.queue = self.device.queue(None if rehearse else torch.cuda.current_stream().cuda_stream)
        self.numel = 3000 if rehearse else 1 << 28

    def random(self, numel: int, seed: int, like: Any = None) -> Any:
        """bf16[numel]: numbers, or a fine-tune of `like`."""
        torch = self.torch
        generator = torch.Generator(self.place).manual_seed(seed)
        x = torch.randn(numel, generator=generator, device=self.place, dtype=torch.bfloat16)
        return x if like is None else (like + 1e-2 * x).to(torch.bfloat16)

    def models(self, n: int, numel: int) -> list[Any]:
        first = self.random(numel, 0)
        return [first, *(self.random(numel, i, first) for i in range(1, n))]

    def piece(self, inputs: Sequence[Any], outputs: Sequence[Any], rows: Sequence[Any]) -> dict[str, Any]:
        from fastinterp.compute.dtypes import BF16

        code = BF16.code
        return {
            "kind": "combine", "inputs": [(x.data_ptr(), code) for x in inputs], "rows": list(rows),
            "outputs": [x.data_ptr() for x in outputs], "out_dtype": code, "numel": inputs[0].numel(), "first": 0,
            "stats_every": 0, "fp8_saturate": True,
        }  # fmt: skip

    def checked(self, inputs: Sequence[Any], outputs: Sequence[Any], rows: Sequence[Any]) -> Run:
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

    def seconds(self, run: Run) -> float:
        if self.rehearse:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        cuda = self.torch.cuda
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    # ---- cases

    def combine(self, n: int) -> Case:
        """A sum of n models."""
        inputs, out = self.models(n, self.numel), self.random(self.numel, 99)
        rows = [(0, 1.0, [(i, 0.7 / n) for i in range(1, n)])]
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
        rows = [(0, 1.0, [(1, (i + 1) / (k + 1))]) for i in range(k)]
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
        rows = [(0, 1.0, [(1, 0.35)])]
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
        """The same as a module that walks: every parameter of a 7B model from two end points in device memory."""
        import fastinterp

        torch, shapes = self.torch, _llama_7b()
        if self.rehearse:
            shapes = [max(8, numel >> 18) for numel in shapes]
        module = torch.nn.ParameterList(
            torch.nn.Parameter(self.random(numel, i), requires_grad=False) for i, numel in enumerate(shapes)
        )
        base = {name: p.detach().clone() for name, p in module.named_parameters()}
        ends = {name: self.random(p.numel(), 1000 + i, p) for i, (name, p) in enumerate(base.items())}
        live = fastinterp.Live(module, base=base, directions={"there": ends})
        at = iter(range(1, 1 << 30))

        def check() -> None:
            live.set(there=0.35)
            for name in ("0", "7", str(len(shapes) - 1)):
                self.checked([base[name], ends[name]], [getattr(module, name)], [(0, 1.0, [(1, 0.35)])])()

        # Another point each time: to be where one is already may cost nothing.
        run: Run = lambda: live.set(there=0.1 + 0.01 * (next(at) % 64))  # noqa: E731
        return Case("7B module, live", 2 * sum(shapes) * 3, run, check, 1.1)

    def measure(self) -> Case:
        """The Gram matrix of a base and two deltas."""
        inputs = self.models(3, self.numel)
        piece = {k: v for k, v in self.piece(inputs, [], []).items() if k in ("inputs", "numel", "first")}
        piece["kind"] = "measure_deltas"
        rows = min(self.numel, 1 << 20)  # of what is compared: whole chunks
        small = {**piece, "numel": rows}

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

        return Case("ties N=2, resident", 2 * numel * 4, lambda: merged(models), check, 4.0)

    def cases(self) -> Iterator[Callable[[], Case]]:
        yield from (lambda n=n: self.combine(n) for n in (2, 3, 4, 8))  # type: ignore[misc]
        yield lambda: self.outputs(8)
        yield self.model
        yield self.live
        yield self.measure
        yield self.ties


def _llama_7b() -> list[int]:
    """Elements of each tensor of a Llama of 6.7e9 parameters, in the order of its names."""
    hidden, inner, vocabulary = 4096, 11008, 32000
    layer = [hidden * hidden] * 4 + [hidden * inner] * 3 + [hidden] * 2
    return [vocabulary * hidden, *(layer * 32), hidden, vocabulary * hidden]


def _combine_on_cpu(inputs: Sequence[Any], out: Any, row: Any, first: int) -> None:
    from fastinterp import _C
    from fastinterp.compute.dtypes import BF16

    code, given = BF16.code or 0, [x.data_ptr() for x in inputs]
    _C.combine(given, [code] * len(given), [row], [out.data_ptr()], code, out.numel(), first=first)


def _measured_on_cpu(inputs: Sequence[Any]) -> list[list[float]]:
    from fastinterp._C import Pump
    from fastinterp.compute.backends import cpu_isa
    from fastinterp.compute.dtypes import BF16

    sources = [("memory", x.data_ptr(), 2 * x.numel()) for x in inputs]
    operands = [(i, 0, BF16.code) for i in range(len(inputs))]
    step = {"kind": "measure_deltas", "inputs": operands, "numel": inputs[0].numel()}
    pump = Pump(
        cpu_isa(), sources, [], [step], threads=1, write_bytes=4096, read_bytes=1 << 16, stochastic=False,
        fp8_saturate=True, prefetch=False, stats_every=0,
    )  # fmt: skip
    pump.start()
    while not pump.wait(1.0):
        pass
    pump.join()
    return [list(part) for part in pump.answers()[0]]


def measured(bench: Bench, case: Case, runs: int) -> dict[str, Any]:
    """Check it, then time it, its floor and its rivals in turn."""
    case.run()
    case.check()
    copy, part = bench.copy(case.nbytes)
    works: dict[str, Run] = {"fastinterp": case.run, "copy": copy, **case.rivals}
    for _ in range(1 if bench.rehearse else 3):
        for run in works.values():
            run()
    bench.synchronize()
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(runs):
        for name, run in works.items():
            taken[name].append(bench.seconds(run) / (part if name == "copy" else 1.0))
    ratios = [ours / floor for ours, floor in zip(taken["fastinterp"], taken["copy"], strict=True)]
    found = {
        "case": case.name, "bytes": case.nbytes, "bound": case.bound, "ratio": statistics.median(ratios),
        "ratios": ratios, "seconds": {name: statistics.median(times) for name, times in taken.items()},
        "gb_per_s": {name: case.nbytes / statistics.median(times) / 1e9 for name, times in taken.items()},
    }  # fmt: skip
    found["holds"] = None if case.bound is None else found["ratio"] <= case.bound
    return found


def told(found: dict[str, Any]) -> str:
    ours, floor = (found["gb_per_s"][name] for name in ("fastinterp", "copy"))
    bound = "" if found["bound"] is None else f", bound {found['bound']:.3f}: {'holds' if found['holds'] else 'MISSED'}"
    others = {name: s / found["seconds"]["fastinterp"] for name, s in found["seconds"].items()}
    rivals = "".join(f"; {name} {x:.2f}x" for name, x in others.items() if name not in ("fastinterp", "copy"))
    return f"{found['case']:26}{ours:8.0f} of {floor:.0f} GB/s, {found['ratio']:.3f} of a copy{bound}{rivals}"


def where(device: Any, rehearse: bool) -> dict[str, Any]:
    import torch

    from fastinterp.bench.provenance import provenance

    found = provenance() | {"torch": torch.__version__, "gpu": device.label, "rehearsal": rehearse}
    if not rehearse:
        found |= {"cuda": torch.version.cuda, "driver": _driver(), "capability": torch.cuda.get_device_capability()}
    return found


def _driver() -> str | None:
    try:
        first = Path("/proc/driver/nvidia/version").read_text("utf-8").splitlines()[0]
    except OSError:
        return None
    return next((word for word in first.split() if word[0].isdigit() and "." in word), None)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", default="cuda,triton")
    parser.add_argument("--only", default="", help="words, of which a case's name has one")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(given)
    if asked.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
        asked.backends, asked.runs = "triton", 1
    words = [word for word in asked.only.split(",") if word]
    results: dict[str, Any] = {"results": []}
    for backend in asked.backends.split(","):
        bench = Bench(backend, asked.rehearse)
        results |= where(bench.device, asked.rehearse)
        print(f"{backend} on {bench.device.label}")
        for make in bench.cases():
            case = make()
            if words and not any(word in case.name for word in words):
                continue
            found = {"backend": backend, **measured(bench, case, asked.runs)}
            results["results"].append(found)
            print(f"  {told(found)}", flush=True)
            del case
            if not asked.rehearse:
                bench.torch.cuda.empty_cache()
    if asked.out:
        asked.out.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    return 0 if asked.rehearse or all(r["holds"] is not False for r in results["results"]) else 1


if __name__ == "__main__":
    sys.exit(main())
