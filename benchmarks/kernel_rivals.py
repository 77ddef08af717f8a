"""The other ways to compute a kernel case: what each one runs, and how exact its answer must be.

A rival gives a function without arguments that fills case.outputs, or a reason why it cannot. Each computes as its
documentation says it is to be used; buffers are reused wherever it lets us.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.kernel_cases import KernelCase
from fastinterp.ops.dtypes import BF16, F8_E4M3, F16, F32

Run = Callable[[], object]


class CannotError(Exception):
    """This rival cannot compute this case here; the message says why."""


class Rival:
    """One competitor.

    name: in results. package: what must be installed. threads: whether it can use more than one.

    coarse: it computes in the storage dtype, so its answer is held to a wider bound (KernelCase.check).
    """

    package = ""
    threads = True
    coarse = False

    def takes(self, case: KernelCase) -> bool:
        """Whether it has an operation for as many inputs and outputs."""
        return True

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    def version(self) -> str | None:
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    @property
    def missing(self) -> str | None:
        """Why this rival cannot run here, or None."""
        if self.version is None:
            return f"pip install {self.package}"
        try:
            importlib.import_module(self.package)
        except ImportError as error:
            return f"{self.package} cannot be imported: {error}"
        return None

    def prepare(self, case: KernelCase, threads: int) -> Run:
        """What computes the case. Every rival has its own. Raises: CannotError."""
        raise NotImplementedError  # of the base class alone


class _Torch(Rival):
    package = "torch"

    def prepare(self, case: KernelCase, threads: int) -> Run:
        import torch

        torch.set_num_threads(threads)
        types = {BF16: torch.bfloat16, F16: torch.float16, F32: torch.float32, F8_E4M3: torch.float8_e4m3fn}
        inputs = [torch.from_numpy(x.view).view(types[case.dtype]) for x in case.inputs]
        outputs = [torch.from_numpy(x.view).view(types[case.dtype]) for x in case.outputs]
        return self.run(case, inputs, outputs)

    def run(self, case: KernelCase, inputs: list[Any], outputs: list[Any]) -> Run:
        """The same for tensors. Every rival of torch has its own."""
        raise NotImplementedError  # of the base class alone


class Naive(_Torch):
    """The loop that one writes: sum in float32, then cast. It makes its temporaries anew, as loops do."""

    def run(self, case: KernelCase, inputs: list[Any], outputs: list[Any]) -> Run:
        import torch

        def loop() -> None:
            for weights, out in zip(case.weights, outputs, strict=True):
                acc = torch.zeros_like(inputs[0], dtype=torch.float32)
                for weight, x in zip(weights, inputs, strict=True):
                    acc += weight * x.float()
                out.copy_(acc)

        return loop


class Lerp(_Torch):
    """torch.lerp: two inputs, one output, into a given array."""

    coarse = True

    def takes(self, case: KernelCase) -> bool:
        return (case.n, case.k) == (2, 1)

    def run(self, case: KernelCase, inputs: list[Any], outputs: list[Any]) -> Run:
        import torch

        a, b, weight, out = inputs[0], inputs[1], case.weights[0][1], outputs[0]
        try:
            torch.lerp(a[:1], b[:1], weight)
        except (RuntimeError, NotImplementedError) as error:
            raise CannotError(f"torch.lerp: {str(error).splitlines()[0]}") from None
        return lambda: torch.lerp(a, b, weight, out=out)


class Compile(_Torch):
    """torch.compile of the sum in float32 and a store into a given array: one fused loop, made for this very shape.

    For one output only: compiling eight takes minutes.
    """

    def takes(self, case: KernelCase) -> bool:
        return case.k == 1

    def run(self, case: KernelCase, inputs: list[Any], outputs: list[Any]) -> Run:
        import torch

        weights = case.weights[0]

        def total(out: Any, *xs: Any) -> None:
            acc = weights[0] * xs[0].float()
            for weight, x in zip(weights[1:], xs[1:], strict=True):
                acc = acc + weight * x.float()
            out.copy_(acc)

        torch.compiler.reset()  # or the ninth function of this name is refused
        compiled = torch.compile(total, fullgraph=True, dynamic=False)
        try:
            compiled(outputs[0], *inputs)
        except Exception as error:  # inductor raises whatever its compiler did
            raise CannotError(f"torch.compile: {type(error).__name__}: {str(error).splitlines()[0][:200]}") from None
        return lambda: compiled(outputs[0], *inputs)


class NumKong(Rival):
    """NumKong's blend: alpha * a + beta * b, on one thread."""

    package = "numkong"
    threads = False

    def takes(self, case: KernelCase) -> bool:
        return (case.n, case.k) == (2, 1)

    def prepare(self, case: KernelCase, threads: int) -> Run:
        import numkong

        name: Any  # its annotation is a list of literals
        name, raw = {BF16: ("bf16", "u2"), F16: ("f16", "f2"), F32: ("f32", "f4"), F8_E4M3: ("e4m3", "u1")}[case.dtype]
        a, b, out = (x.view.view(raw) for x in (*case.inputs, *case.outputs))
        alpha, beta = case.weights[0]
        return lambda: numkong.blend(a, b, name, alpha=alpha, beta=beta, out=out)


class Fastinterp(Rival):
    """One output: `fastinterp.weighted_sum`, with all that it checks. Several: the kernel below it."""

    package = "fastinterp"

    @property
    def version(self) -> str | None:
        from fastinterp import __version__

        return __version__  # of the source tree, which need not be installed

    def prepare(self, case: KernelCase, threads: int) -> Run:
        from fastinterp import _C, weighted_sum
        from fastinterp.backends.registry import cpu_isa

        if case.k == 1:
            inputs, out, weights = case.arrays(case.inputs), case.arrays(case.outputs)[0], case.weights[0]
            return lambda: weighted_sum(inputs, weights, out=out, threads=threads)
        code = case.dtype.code or 0
        sources, sinks = [x.address for x in case.inputs], [x.address for x in case.outputs]
        codes, isa = [code] * case.n, cpu_isa()
        return lambda: _C.combine(
            sources, codes, case.rows, sinks, code, case.numel, stats_every=0, threads=threads, isa=isa
        )


RIVALS: tuple[Rival, ...] = (Fastinterp(), Naive(), Lerp(), Compile(), NumKong())
ALL_THREADS = len(os.sched_getaffinity(0))
