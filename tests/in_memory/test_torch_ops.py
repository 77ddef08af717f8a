"""The operators of torch: the bytes of eager calls, gradients, and graphs without breaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastinterp
from fastinterp.errors import BackendError, ShapeError, UsageError
from fastinterp.in_memory.arrays import TorchTensors
from fastinterp.integrations.torch_ops import weighted_sum
from tests.support.devices.on_host import HostDevice, Streams, bits, device, streams

pytestmark = pytest.mark.slow  # torch compiles, and checks gradients numerically

__all__ = ["device", "streams"]  # fixtures

OPS = torch.ops.fastinterp


def tensors(count: int, dtype: torch.dtype = torch.float64, **keys: Any) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(5)
    return [torch.randn(5, 7, generator=rng).to(dtype).requires_grad_(keys.get("grad", False)) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_same_bytes_as_without_the_operator(dtype: torch.dtype):
    *xs, pivot = tensors(4, dtype)
    want = fastinterp.weighted_sum(xs, [0.5, -1.0, 0.0], pivot=pivot)
    assert bits(weighted_sum(xs, [0.5, -1.0, 0.0], pivot=pivot)) == bits(want)
    assert bits(weighted_sum(xs, torch.tensor([0.5, -1.0, 0.0]), pivot=pivot)) == bits(want)
    out = torch.zeros(5, 7, dtype=dtype)
    assert weighted_sum(xs, [0.5, -1.0, 0.0], pivot=pivot, out=out) is out and bits(out) == bits(want)
    wide = weighted_sum([x.t().contiguous().t() for x in xs], (2, 3, 4), dtype=torch.float32)  # of any strides
    assert bits(wide) == bits(fastinterp.weighted_sum(xs, [2, 3, 4], dtype="float32"))


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("weighted_sum", lambda xs: (xs[:3], [0.3, 0.7, 0.0], xs[3], None)),
        ("weighted_sum", lambda xs: (xs[:1], [2.0], None, torch.bfloat16)),
        ("weighted_sum_tensor", lambda xs: (xs[:2], torch.tensor([0.3, 0.7], requires_grad=True), xs[2], None)),
        ("weighted_sum_tensor", lambda xs: (xs[:2], torch.tensor([0.3, 0.7]), None, torch.float32)),
        ("weighted_sum_out", lambda xs: (torch.empty(5, 7), [x.detach() for x in xs], [1.0] * 6, None)),
        ("dots", lambda xs: (xs[0].detach(), [x.detach() for x in xs])),
    ],
)
def test_is_what_it_says_it_is(operator: str, arguments: Any):
    """Schema, fake tensors, autograd, and the path of torch.compile."""
    found = torch.library.opcheck(getattr(OPS, operator).default, arguments(tensors(6, grad=True)))
    assert len(found) == 4 and set(found.values()) == {"SUCCESS"}


def test_gradients():
    *xs, pivot = tensors(7, grad=True)  # more than are measured at a time
    weights = torch.tensor([0.5, -1.0, 0.25, 3.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(lambda w, p, *xs: weighted_sum(xs, w, pivot=p), (weights, pivot, *xs))
    assert check(lambda w, *xs: weighted_sum(xs, w), (weights, *xs))
    assert check(lambda w: weighted_sum([x.detach() for x in xs], w), (weights,))
    assert check(lambda p, *xs: weighted_sum(xs, [1, 2, 3, 0, 0.5, -1], pivot=p), (pivot, *xs))


def test_gradients_of_weights_are_those_of_exact_products():
    """In bf16, where a float32 sum over the differences of close models would keep three digits."""
    rng = torch.Generator().manual_seed(1)
    base = torch.randn(300, 401, generator=rng).bfloat16()
    xs = [(base + 1e-2 * torch.randn(300, 401, generator=rng)).bfloat16() for _ in range(2)]
    grad = torch.randn(300, 401, generator=rng).bfloat16()
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64, requires_grad=True)
    weighted_sum(xs, weights, pivot=base).backward(grad)
    want = [((x.double() - base.double()) * grad.double()).sum() for x in xs]
    assert weights.grad is not None
    # Products are exact; sums of 120300 terms of magnitude below 20 lose at most 17 * 2^-53 of their size in pairs.
    torch.testing.assert_close(weights.grad, torch.stack(want), rtol=0, atol=120300 * 20 * 17 * 2.0**-53)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_without_a_break(backend: str):
    *xs, pivot = tensors(3, torch.bfloat16)

    def by_numbers(xs: list[torch.Tensor], pivot: torch.Tensor) -> torch.Tensor:
        return weighted_sum(xs, [0.3, 0.9], pivot=pivot) * 2

    def by_tensor(xs: list[torch.Tensor], weights: torch.Tensor, pivot: torch.Tensor) -> torch.Tensor:
        return weighted_sum([x + 1 for x in xs], weights, pivot=pivot).float()

    def into(out: torch.Tensor, xs: list[torch.Tensor]) -> torch.Tensor:
        return weighted_sum(xs, [0.3, 0.9], out=out) + 1

    compiled = torch.compile(by_numbers, backend=backend, fullgraph=True)
    assert bits(compiled(xs, pivot)) == bits(by_numbers(xs, pivot))
    w1, w2 = (torch.tensor([0.3, 0.9], dtype=torch.float64, requires_grad=True) for _ in "12")
    compiled = torch.compile(by_tensor, backend=backend, fullgraph=True)
    got, want = compiled(xs, w1, pivot), by_tensor(xs, w2, pivot)
    assert bits(got) == bits(want)
    got.sum().backward()
    want.sum().backward()
    assert w1.grad is not None and w2.grad is not None and bits(w1.grad) == bits(w2.grad)
    out1, out2 = torch.zeros(5, 7), torch.zeros(5, 7)
    assert bits(torch.compile(into, backend=backend, fullgraph=True)(out1, xs)) == bits(into(out2, xs))
    assert bits(out1) == bits(out2)


def test_weights_that_change_are_compiled_once_as_a_tensor():
    *xs, pivot = tensors(3, torch.bfloat16)
    compiled = torch.compile(lambda xs, w: weighted_sum(xs, w, pivot=pivot), backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for far in (0.25, 0.5, 0.75, -3.0, 0.1):
        want = weighted_sum(xs, [1.0 - far, far], pivot=pivot)
        assert bits(compiled(xs, torch.tensor([1.0 - far, far], dtype=torch.float64))) == bits(want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_on_a_device(device: HostDevice, streams: Streams, monkeypatch: pytest.MonkeyPatch):
    """Sums are not waited for, and go into graphs; the gradient of weights is waited for, and does not."""
    *xs, pivot, grad = tensors(8, torch.bfloat16)
    numbers = [0.5, -1.0, 0.25, 3.0, 0.0, 1.0]
    want, products = weighted_sum(xs, numbers, pivot=pivot), OPS.dots(grad, xs)
    # Operators see no subclasses: here every tensor is on the device.
    monkeypatch.setattr(TorchTensors, "device", staticmethod(lambda x: torch.device("cuda:0")))
    monkeypatch.setattr("fastinterp.in_memory.weighted_sum.plain_sum", lambda *_: None)  # which looks at the tensors
    streams.captured = True
    got = weighted_sum(xs, numbers, pivot=pivot)
    with pytest.raises(BackendError, match=r"products on cuda:0 are answers that a CUDA graph cannot wait for"):
        OPS.dots(grad, xs)
    streams.captured = False
    assert device.waits == 0
    device.finish()
    assert device.pieces == ["combine"] and bits(got) == bits(want)
    assert bits(OPS.dots(grad, xs)) == bits(products)
    assert device.waits == 1 and device.runs == 2
    weights = torch.tensor(numbers, dtype=torch.float64, requires_grad=True)
    weighted_sum(xs, weights, pivot=pivot).backward(grad)
    assert device.waits == 2 and weights.grad is not None
    device.finish()
    weights.grad = None
    weighted_sum(xs, weights).backward(grad)
    device.finish()
    assert weights.grad is not None and bits(weights.grad) == bits(products)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda x: weighted_sum([], []), ShapeError, "one or more tensors of one shape are needed, got []"),
        (lambda x: weighted_sum([x, x[:2]], [1, 1]), ShapeError, "got [[5, 7], [2, 7]]"),
        (lambda x: weighted_sum([x], [1, 2]), UsageError, "got 1 tensor and 2 weights"),
        (lambda x: weighted_sum([x], torch.ones(2)), UsageError, "a floating tensor of shape [1], one for each tensor"),
        (lambda x: weighted_sum([x], torch.ones(1), out=x.clone()), UsageError, "`out` needs weights as numbers"),
        (lambda x: weighted_sum([x], [1], out=x.clone(), dtype=x.dtype), UsageError, "either `out` or `dtype`"),
        (lambda x: weighted_sum([x.requires_grad_()], [1], out=x.detach().clone()), UsageError, "torch.no_grad()"),
        (lambda x: weighted_sum([x], [1], dtype=torch.int8), UsageError, "torch.int8 is not supported"),
        (lambda x: weighted_sum([x], [float("nan")]), UsageError, "weights must be finite"),
        (lambda x: weighted_sum([x], [2], out=x), UsageError, "out overlaps array 0"),
    ],
)
def test_refused(call: Any, kind: type[Exception], message: str):
    with pytest.raises(kind) as caught:
        call(tensors(1)[0])
    assert message in str(caught.value)
