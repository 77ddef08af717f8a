"""Weighted sums as torch operators, with support for autograd, torch.compile and CUDA graphs.

    from fastinterp.integrations.torch_ops import weighted_sum

    merged = weighted_sum([a, b], [0.7, 0.3])                        # the bytes of fastinterp.weighted_sum
    loss = f(weighted_sum([x, y], alphas, pivot=base)); loss.backward()     # alphas.grad, x.grad, ...

The operators are torch.ops.fastinterp.weighted_sum (weights as numbers), .weighted_sum_tensor (weights as a tensor),
.weighted_sum_out (into an existing tensor) and .dots (dot products in float64). torch.compile includes them in
its graph (fullgraph=True), and their results are the bytes of eager calls.

Kernels take weights as arguments from the host. So weights in a device tensor, and their gradient, synchronise with the
device: neither can be captured in a CUDA graph, which replays the numbers it was captured with. torch.compile compiles
again for other numbers: pass weights that change as a CPU tensor, which needs no synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastinterp.errors import ShapeError, UsageError
from fastinterp.in_memory import dot_products as products
from fastinterp.in_memory import weighted_sum as arrays
from fastinterp.messages import counted
from fastinterp.ops.dtypes import parse_dtype


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
