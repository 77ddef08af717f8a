"""Weighted sums as torch operators, with support for autograd, torch.compile and CUDA graphs.

    from fastinterp.integrations.torch_ops import weighted_sum

    merged = weighted_sum([a, b], [0.7, 0.3])                        # the bytes of fastinterp.weighted_sum
    loss = f(weighted_sum([x, y], alphas, pivot=base)); loss.backward()     # alphas.grad, x.grad, ...

    ema_(averages, params, 0.999)                                    # running averages of many tensors, in place
    AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))   # the same inside torch.optim.swa_utils

The operators are torch.ops.fastinterp.weighted_sum (weights as numbers), .weighted_sum_tensor (weights as a tensor),
.weighted_sum_out (into an existing tensor) and .dots (dot products in float64). torch.compile includes them in
its graph (fullgraph=True), and their results are the bytes of eager calls.

Kernels take weights as arguments from the host. So weights in a device tensor, and their gradient, synchronise with the
device: neither can be captured in a CUDA graph, which replays the numbers it was captured with. torch.compile compiles
again for other numbers: pass weights that change as a CPU tensor, which needs no synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastinterp.backends.torch_device import common_device
from fastinterp.errors import ShapeError, UsageError
from fastinterp.in_memory import dot_products as products
from fastinterp.in_memory import weighted_sum as arrays
from fastinterp.in_memory.arrays import TorchTensors
from fastinterp.in_memory.many_sums import lerp_in_place
from fastinterp.messages import counted
from fastinterp.ops.dtypes import parse_dtype
from fastinterp.torch_models.module_tensors import address_of


def weighted_sum(
    xs: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    *,
    pivot: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """sum_k weights[k] * xs[k], or with a pivot p: p + sum_k weights[k] * (xs[k] - p).

    xs       1 to 64 tensors of one shape and on one device, as `fastinterp.weighted_sum` takes them, of any strides
    weights  numbers, one per tensor; or a 1-d floating tensor of them on any device, which may require a gradient
    out      a contiguous tensor for the result; then weights must be numbers, and nothing may require a gradient
    dtype    of a new tensor; None: that of the pivot, else of the first tensor

    Gradients, given g of the result: of weights[k] <xs[k] - p, g>, computed in float64; of xs[k] weights[k] * g; of the
    pivot (1 - sum of weights) * g. The rounding of the result is ignored.
    Raises: UsageError, ShapeError, BackendError.
    """
    xs = list(xs)
    if not xs or (pivot is not None and pivot.shape != xs[0].shape) or any(x.shape != xs[0].shape for x in xs):
        shapes = [list(x.shape) for x in (*xs, *(() if pivot is None else (pivot,)))]
        raise ShapeError(f"one or more tensors of one shape are needed, got {shapes[:8]}")
    ops = torch.ops.fastinterp
    if isinstance(weights, Tensor):
        if weights.dim() != 1 or len(weights) != len(xs) or not weights.is_floating_point():
            raise UsageError(
                f"weights must be a floating tensor of shape [{len(xs)}], one for each tensor, got {weights.dtype} "
                f"{list(weights.shape)}"
            )
        if out is not None:
            raise UsageError(
                "`out` needs weights as numbers: pass weights.tolist(), which synchronises with their device"
            )
        return cast(Tensor, ops.weighted_sum_tensor(xs, weights, pivot, dtype))
    if len(weights) != len(xs):
        raise UsageError(
            f"each tensor needs a weight, got {counted(len(xs), 'tensor')} and {counted(len(weights), 'weight')}"
        )
    numbers = [float(w) for w in weights]
    if out is None:
        return cast(Tensor, ops.weighted_sum(xs, numbers, pivot, dtype))
    if dtype is not None:
        raise UsageError("give either `out` or `dtype`, not both")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (out, *xs, *(() if pivot is None else (pivot,)))):
        raise UsageError("`out` does not support gradients. Use torch.no_grad(), or call without `out`")
    ops.weighted_sum_out(out, xs, numbers, pivot)
    return out


# --- running averages, in place ---------------------------------------------------------------------------------------


def foreach_lerp_(
    averages: Iterable[Tensor], others: Iterable[Tensor], weight: float | Sequence[float], *, threads: int | None = None
) -> None:
    """averages[i] += weight * (others[i] - averages[i]), in place: `torch._foreach_lerp_` with this package's rounding.

    averages  tensors of floating or complex dtype, of any strides, that share no memory
    others    as many, of the same shapes and on the same device, of any of these dtypes: bfloat16 into float32, say
    weight    a number, or one for each pair. 0 leaves an average as it is, 1 copies the other
    threads   of the CPU; None: one per CPU, at most 32

    The bytes are those of `weighted_sum([other], [weight], pivot=average)`: float32 arithmetic (float64 if one of the
    two is float64), one rounding at the store. Torch rounds in float32 as often, but in another order: results differ
    by a few units in the last place of the larger of average and change.
    No gradient is recorded; a backward pass that needs the old values is an error, as after torch's own.
    Raises: UsageError, ShapeError, BackendError. Nothing is written then.
    """
    averages, others = list(averages), list(others)
    if len(averages) != len(others):
        raise UsageError(
            f"each average needs another tensor, got {counted(len(averages), 'average')} and "
            f"{counted(len(others), 'tensor')}"
        )
    pairs = [_Pair(*pair, i) for i, pair in enumerate(zip(averages, others, strict=True))]
    with torch.no_grad():
        targets = [TorchTensors.view(pair.target, f"average {i}", writable=True) for i, pair in enumerate(pairs)]
        sources = [TorchTensors.view(pair.other, f"tensor {i}") for i, pair in enumerate(pairs)]
        where = [
            (f"{name} {i}", TorchTensors.device(x))
            for i, pair in enumerate(pairs)
            for name, x in (("average", pair.target), ("tensor", pair.other))
        ]
        lerp_in_place(targets, sources, _weights(weight, len(pairs)), common_device(where), threads)
        for pair in pairs:
            pair.finish()
    for average in averages:
        if not average.is_inference():
            torch.autograd.graph.increment_version(average)


def ema_(averages: Iterable[Tensor], params: Iterable[Tensor], decay: float, *, threads: int | None = None) -> None:
    """Move exponential moving averages one step, in place: averages[i] = decay * averages[i] + (1 - decay) * params[i].

    averages, params  as `foreach_lerp_` takes them. Integers and booleans, as counters of batches, are copied
    decay             in 0..1. With 0.999 and averages in bfloat16 a step is mostly less than half a spacing, and lost:
                      keep averages in float32, whatever dtype the parameters have

    Computed as averages[i] + (1 - decay) * (params[i] - averages[i]), so that what is equal stays equal.
    Raises: as `foreach_lerp_`.
    """
    if not 0 <= decay <= 1:
        raise UsageError(f"decay must be in 0..1, got {decay!r}")
    averages, params = list(averages), list(params)
    floating = [a.is_floating_point() or a.is_complex() for a in averages]
    if all(floating) or len(averages) != len(params):
        return foreach_lerp_(averages, params, 1.0 - decay, threads=threads)
    foreach_lerp_(
        [a for a, merges in zip(averages, floating, strict=True) if merges],
        [p for p, merges in zip(params, floating, strict=True) if merges],
        1.0 - decay, threads=threads,
    )  # fmt: skip
    with torch.no_grad():
        for average, param, merges in zip(averages, params, floating, strict=True):
            if not merges:
                average.copy_(param)
    return None


def get_ema_multi_avg_fn(decay: float = 0.999) -> Callable[[list[Tensor], list[Tensor], Any], None]:
    """`multi_avg_fn` of torch.optim.swa_utils.AveragedModel that keeps an exponential moving average, by `ema_`."""

    def update(averages: list[Tensor], params: list[Tensor], _: Any) -> None:
        ema_(averages, params, decay)

    return update


def get_swa_multi_avg_fn() -> Callable[[list[Tensor], list[Tensor], Any], None]:
    """`multi_avg_fn` of torch.optim.swa_utils.AveragedModel for the mean of all models so far."""

    def update(averages: list[Tensor], params: list[Tensor], averaged: Any) -> None:
        ema_(averages, params, 1.0 - 1.0 / (int(averaged) + 1))

    return update


def get_ema_avg_fn(decay: float = 0.999) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """`avg_fn` of torch.optim.swa_utils.AveragedModel that keeps an exponential moving average, one tensor at a time.

    It makes a new tensor each time, which AveragedModel copies: `get_ema_multi_avg_fn` does neither.
    """

    def averaged(average: Tensor, param: Tensor, _: Any) -> Tensor:
        result = average.detach().clone()
        ema_([result], [param], decay)
        return result

    return averaged


def get_swa_avg_fn() -> Callable[[Tensor, Tensor, Any], Tensor]:
    """`avg_fn` of torch.optim.swa_utils.AveragedModel for the mean of all models so far, one tensor at a time."""

    def averaged(average: Tensor, param: Tensor, count: Any) -> Tensor:
        return get_ema_avg_fn(1.0 - 1.0 / (int(count) + 1))(average, param, count)

    return averaged


def _weights(weight: float | Sequence[float], count: int) -> list[float]:
    """Raises: UsageError."""
    numbers = [weight] * count if isinstance(weight, (int, float)) else list(weight)
    if len(numbers) != count or any(isinstance(w, Tensor) and w.dim() for w in numbers):
        raise UsageError(f"weight must be a number, or {count} in a list, one for each average, got {weight!r}"[:200])
    found = [float(w) for w in numbers]
    if not all(abs(w) <= 3.4e38 for w in found):
        raise UsageError(f"weights must be finite float32 numbers, got {weight!r}"[:200])
    return found


class _Pair:
    """An average and the tensor that it moves to, as contiguous tensors of real numbers of one shape.

    target  a view of the average's memory, wherever its strides allow that; else a copy, which `finish` copies back
    """

    def __init__(self, average: Tensor, other: Tensor, i: int):
        if average.shape != other.shape:
            raise ShapeError(f"average {i} has shape {list(average.shape)}, tensor {i} {list(other.shape)}")
        average, other = average.detach(), other.detach().resolve_conj().resolve_neg()
        for name, x in (("average", average), ("tensor", other)):
            if x.numel() and not address_of(x):
                kind = type(x).__name__
                raise UsageError(f"{name} {i} ({kind}) has no memory. Of a distributed tensor give .to_local()")
        if average.is_complex() or other.is_complex():
            if not (average.is_complex() and other.is_complex()) or average.is_conj():
                raise UsageError(
                    f"average {i} is {average.dtype}, tensor {i} {other.dtype}: both must be complex or none, and the "
                    "average no conjugated view"
                )
            average, other = torch.view_as_real(average), torch.view_as_real(other)
        if not average.is_contiguous():  # channels last, say: the same order of both
            order = sorted(range(average.dim()), key=average.stride, reverse=True)
            average, other = average.permute(order), other.permute(order)
        self._average, self.target, self.other = average, average.contiguous(), other.contiguous()

    def finish(self) -> None:
        if self.target.data_ptr() != self._average.data_ptr():
            self._average.copy_(self.target)


# --- the operators ---------------------------------------------------------------------------------------------------


def _dense(x: Tensor) -> Tensor:
    return x.detach().resolve_neg().contiguous()


def _sum(
    xs: Sequence[Tensor], weights: Sequence[float], pivot: Tensor | None, dtype: torch.dtype | None, out: Tensor | None
) -> Tensor:
    named = None if dtype is None else parse_dtype(str(dtype))
    if dtype is not None and named is None:
        raise UsageError(f"{dtype} is not supported: only float64 to float8 are")
    result = arrays.weighted_sum(
        [_dense(x) for x in xs], weights, pivot=None if pivot is None else _dense(pivot), out=out,
        dtype=None if named is None else str(named),
    )  # fmt: skip
    return cast(Tensor, result)


def _by_numbers(
    xs: Sequence[Tensor], weights: Sequence[float], pivot: Tensor | None, dtype: torch.dtype | None
) -> Tensor:
    return _sum(xs, weights, pivot, dtype, None)


def _by_tensor(xs: Sequence[Tensor], weights: Tensor, pivot: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    return _sum(xs, weights.tolist(), pivot, dtype, None)


def _into(out: Tensor, xs: Sequence[Tensor], weights: Sequence[float], pivot: Tensor | None) -> None:
    _sum(xs, weights, pivot, None, out.detach())


def _dots(of: Tensor, xs: Sequence[Tensor]) -> Tensor:
    """f64[xs], on the CPU."""
    return torch.tensor(products.dots(_dense(of), [_dense(x) for x in xs]), dtype=torch.float64)


# --- shapes and dtypes of the results, for torch.compile (fake tensors) ----------------------------------------------


def _fake_sum(xs: Sequence[Tensor], weights: Any, pivot: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    like = xs[0] if pivot is None else pivot
    return like.new_empty(like.shape, dtype=dtype or like.dtype)


def _fake_none(out: Tensor, xs: Sequence[Tensor], weights: Sequence[float], pivot: Tensor | None) -> None:
    return None


def _fake_dots(of: Tensor, xs: Sequence[Tensor]) -> Tensor:
    return torch.empty(len(xs), dtype=torch.float64, device="cpu")


# --- gradients, for autograd ------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    xs, weights, pivot, _ = inputs
    ctx.dtypes = [x.dtype for x in xs], None if pivot is None else pivot.dtype
    ctx.numbers = None if isinstance(weights, Tensor) else list(weights)
    if isinstance(weights, Tensor):
        # The tensors are saved only where they are needed: they may be whole models.
        wanted = weights.requires_grad
        ctx.save_for_backward(weights, *(xs if wanted else ()), *([pivot] if wanted and pivot is not None else ()))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    dtypes, pivot_dtype = ctx.dtypes
    weights, *saved = ctx.saved_tensors if ctx.numbers is None else (ctx.numbers,)
    to_xs, to_weights, to_pivot, _ = ctx.needs_input_grad
    of_xs = [(grad * weights[k]).to(dtypes[k]) if wanted else None for k, wanted in enumerate(to_xs)]
    of_weights = of_pivot = None
    if to_weights:
        dots = torch.ops.fastinterp.dots(grad, saved)
        if pivot_dtype is not None:  # in float64 the difference of the products is precise enough for float32
            dots = dots[:-1] - dots[-1]
        of_weights = dots.to(weights.device, weights.dtype)
    if to_pivot:
        total = sum(weights) if ctx.numbers is not None else weights.sum()
        of_pivot = (grad * (1.0 - total)).to(pivot_dtype)
    return of_xs, of_weights, of_pivot, None


for _name, _call, _fake, _has_gradient in (
    ("weighted_sum", _by_numbers, _fake_sum, True),
    ("weighted_sum_tensor", _by_tensor, _fake_sum, True),
    ("weighted_sum_out", _into, _fake_none, False),
    ("dots", _dots, _fake_dots, False),
):
    _op = torch.library.custom_op(f"fastinterp::{_name}", _call, mutates_args=("out",) if _call is _into else ())
    _op.register_fake(_fake)
    if _has_gradient:
        _op.register_autograd(_backward, setup_context=_setup_context)
