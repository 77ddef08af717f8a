"""Gradients of merges of torch tensors: of weighted sums whose weights are numbers, or come from Gram matrices.

With out = sum_k a_k * x_k and g the gradient of the result, that of x_i is a_i * g + sum_k <g, x_k> * da_k/dx_i. Where
the method asks for nothing, the weights a_k are constants. Where it asks for Gram matrices alone (slerp, karcher,
multislerp, model_stock, ...), they are functions of a few numbers, whose derivatives are taken numerically by running
the method again on matrices that differ a little; those of the matrices by the tensors are weighted sums again.
Rounding is ignored, and the result has no second derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastinterp.errors import MethodError, UsageError
from fastinterp.in_memory.dot_products import dots
from fastinterp.in_memory.weighted_sum import weighted_sum
from fastinterp.ops.combine import Combine
from fastinterp.ops.requests import Measure

_STEP = 1e-5  # of a difference, relative to the lengths of the two vectors: the error is about its square
_KINK = 0.01  # forward and backward differences that differ by more are of two branches of the method

Call = Callable[[], Any]


@dataclass
class Record:
    """What a method asked about one tensor, was answered, and returned. call: starts the method again."""

    call: Call
    answers: list[tuple[object, Any]] = field(default_factory=list)
    result: object = None

    def __call__(self) -> object:
        """Run the method as `call` does, and note what happens."""
        started = self.call()
        if not isinstance(started, Generator):
            self.result = started
            return started
        return self._noted(started)

    def _noted(self, steps: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        self.answers.clear()
        answer = None
        while True:
            try:
                request = steps.send(answer)
            except StopIteration as end:
                self.result = end.value
                return end.value
            answer = yield request
            self.answers.append((request, answer))

    def weights(self, answers: Sequence[Any]) -> list[float]:
        """f64[n], what the method weighs each input with, given other answers.

        Raises: MethodError, of the method; UsageError, if it returns no plain sum then.
        """
        steps = self.call()
        result = steps
        if isinstance(steps, Generator):
            try:
                next(steps)
                for answer in answers:
                    steps.send(answer)
            except StopIteration as end:
                result = end.value
        if not isinstance(result, Combine):
            raise UsageError("the sum is no weighted sum of the tensors")
        weights = list(result.weights)
        if result.base is not None:
            weights[result.base] = 1.0 - math.fsum(weights)
        return weights


def merged(
    method: str,
    models: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    run: Callable[[list[dict[str, Tensor]], dict[str, Record]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """What `run` returns for models without gradients, as tensors that autograd follows back to those of the models.

    names  of the tensors that are merged; the others are copied
    run    merges models, and has the record of every tensor by its name
    Raises: UsageError, if the sum of a tensor has no gradient here.
    """
    records: dict[str, Record] = {}
    with torch.no_grad():
        out = run([{name: x.detach() for name, x in model.items()} for model in models], records)
    for name, record in records.items():
        if out[name].is_complex():
            raise UsageError(f"{name}: autograd cannot follow sums of complex numbers here. Use torch.no_grad()")
        _check(method, name, record)
    for name in names:
        out[name] = _Followed.apply(records.get(name), out[name], *(model[name] for model in models))
    return out


def _check(method: str, name: str, record: Record) -> None:
    """Raises: UsageError, if the weights of a tensor are not a function of Gram matrices, or of nothing."""
    only = all(isinstance(request, Measure) and request.per == "tensor" for request, _ in record.answers)
    try:
        if only and isinstance(record.result, Combine):
            # Lengths in L1 are no function of Gram matrices: a method that looks at them ends up with NaN.
            answers = [replace(answer, l1=(math.nan,) * len(answer.l1)) for _, answer in record.answers]
            known = [answer for _, answer in record.answers]
            if record.weights(answers) == record.weights(known):
                return
    except (MethodError, UsageError):
        pass
    raise UsageError(
        f"{name}: autograd cannot follow `{method}` here, only weighted sums whose weights are numbers, or come from "
        "lengths and angles of whole tensors. Merge under torch.no_grad(), or detach the tensors"
    )


class _Followed(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, record: Record | None, result: Tensor, *tensors: Tensor) -> Tensor:
        """record, result: of the merge of these tensors; no record, if they have no elements"""
        ctx.record = record
        ctx.save_for_backward(*tensors)
        return result.view_as(result)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        inputs = [tensor.contiguous() for tensor in ctx.saved_tensors]
        if ctx.record is None:
            return (None, None, *(torch.zeros_like(x) for x in inputs))
        return (None, None, *_gradients(ctx.record, grad.contiguous(), inputs, ctx.needs_input_grad[2:]))


def _gradients(record: Record, grad: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Those of the inputs of one tensor; None where none is wanted."""
    answers = [answer for _, answer in record.answers]
    weights = record.weights(answers)
    n = len(inputs)
    mixed = [[0.0] * n for _ in range(n)]  # of x_i, the weights of all inputs
    if answers:
        products = dots(grad, inputs)
        for at, (request, _) in enumerate(record.answers):
            slopes = _slopes(record, answers, at, products)
            _add_sums(mixed, slopes, deltas=cast(Measure, request).deltas)
    return [
        _weighted([grad, *inputs], [weights[i], *mixed[i]], like=x) if wanted[i] else None for i, x in enumerate(inputs)
    ]


def _weighted(tensors: Sequence[Tensor], weights: Sequence[float], like: Tensor) -> Tensor:
    if not any(weights):
        return torch.zeros_like(like)
    return cast(Tensor, weighted_sum(tensors, weights, dtype=str(like.dtype).removeprefix("torch.")))


def _slopes(record: Record, answers: Sequence[Any], at: int, products: Sequence[float]) -> list[list[float]]:
    """f64[n][n], symmetric: the derivatives of sum_k products[k] * a_k by the entries of one of the Gram matrices, an
    entry and its mirror image changing together.
    """
    gram = answers[at].gram
    n = len(gram)

    def value(p: int, q: int, change: float) -> float:
        rows = [list(row) for row in gram]
        rows[p][q] += change
        rows[q][p] = rows[p][q]
        changed = replace(answers[at], gram=tuple(map(tuple, rows)))
        weights = record.weights([*answers[:at], changed, *answers[at + 1 :]])
        return math.fsum(w * x for w, x in zip(weights, products, strict=True))

    slopes = [[0.0] * n for _ in range(n)]
    here = value(0, 0, 0.0)
    for p in range(n):
        for q in range(p, n):
            step = _STEP * math.sqrt(gram[p][p] * gram[q][q])
            if step > 0.0:
                forward, back = (value(p, q, step) - here) / step, (here - value(p, q, -step)) / step
                kink = abs(forward - back) > _KINK * (abs(forward) + abs(back))
                slopes[p][q] = slopes[q][p] = min(forward, back, key=abs) if kink else 0.5 * (forward + back)
    return slopes


def _add_sums(mixed: list[list[float]], slopes: Sequence[Sequence[float]], *, deltas: bool) -> None:
    """Add to mixed[i][j] what the Gram matrix brings x_j into the gradient of x_i.

    The entry of v_p and v_q changes by <v_q, dv_p> + <v_p, dv_q>. deltas: v_0 is x_0, and v_p is x_p - x_0.
    """
    n = len(slopes)
    basis = [{p: 1.0, 0: -1.0} if deltas and p else {p: 1.0} for p in range(n)]
    for p in range(n):
        for q in range(p, n):
            for a, b in ((p, q), (q, p)):
                for i, of_a in basis[a].items():
                    for j, of_b in basis[b].items():
                        mixed[i][j] += slopes[p][q] * of_a * of_b
