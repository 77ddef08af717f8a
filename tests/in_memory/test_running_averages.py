"""Running averages of torch tensors, in place: the bytes of a lerp, and torch's AveragedModel with them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import fastinterp
from fastinterp.errors import ShapeError, UsageError
from fastinterp.in_memory.arrays import TorchTensors
from fastinterp.integrations import torch_ops
from fastinterp.integrations.torch_ops import ema_, foreach_lerp_
from tests.support.devices.on_host import HostDevice, Streams, bits, device, streams

__all__ = ["device", "streams"]  # fixtures

# Small ones, one that is cut into pieces, one of no elements and one of no dimension.
SHAPES = ((5, 7), (), (0, 3), (1100, 1001))


def tensors(dtype: torch.dtype, seed: int = 0, shapes: Any = SHAPES) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]


def lerp(average: torch.Tensor, other: torch.Tensor, weight: float) -> torch.Tensor:
    """The definition in numpy: float32, a rounding for each operation, then one to the dtype."""
    a, b = (x.float().numpy() for x in (average, other))
    return torch.from_numpy(np.asarray(a + np.float32(weight) * (b - a), np.float32)).to(average.dtype)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_ema_is_the_lerp_of_its_definition(dtype: torch.dtype, other: torch.dtype, threads: int):
    averages, params = tensors(dtype), tensors(other, 1)
    want = [lerp(a, p, 1.0 - 0.9) for a, p in zip(averages, params, strict=True)]
    addresses = [a.data_ptr() for a in averages]
    ema_(averages, params, 0.9, threads=threads)
    assert [a.data_ptr() for a in averages] == addresses
    for average, expected in zip(averages, want, strict=True):
        assert average.dtype == dtype and bits(average) == bits(expected)


def test_is_the_weighted_sum_of_files_and_arrays_in_float64_too():
    averages, params = tensors(torch.float64), tensors(torch.float32, 1)
    want = [fastinterp.weighted_sum([p], [0.25], pivot=a) for a, p in zip(averages, params, strict=True)]
    foreach_lerp_(averages, params, 0.25)
    assert [bits(a) for a in averages] == [bits(w) for w in want]


@pytest.mark.parametrize("huge", [float("nan"), float("inf"), 3.0e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_near_overflow_read_what_was_there(dtype: torch.dtype, huge: float):
    """In large tensors, whose loops between files may store before they have looked at everything."""
    (average,), (other,) = (tensors(dtype, seed, [(2000, 3001)]) for seed in b"01")
    average.view(-1)[5_000_017] = huge
    with np.errstate(invalid="ignore", over="ignore"):
        want = lerp(average, other, 0.5)
    foreach_lerp_([average], [other], 0.5)
    same = (average == want) | (average.isnan() & want.isnan())
    assert bool(same.all())


def test_weight_of_each_pair():
    averages, others = (tensors(torch.float32, seed, [(3, 4)] * 3) for seed in (0, 1))
    before = copy.deepcopy(averages)
    foreach_lerp_(averages, others, [0.0, 1.0, -0.5])
    assert bits(averages[0]) == bits(before[0]) and bits(averages[1]) == bits(others[1])
    assert bits(averages[2]) == bits(lerp(before[2], others[2], -0.5))


def test_strides_and_complex_numbers():
    rng = torch.Generator().manual_seed(3)
    x, y = (torch.randn(2, 3, 4, 5, generator=rng) for _ in "xy")
    last = torch.channels_last
    made: dict[str, tuple[torch.Tensor, torch.Tensor]] = {
        "channels last": (x.clone(memory_format=last), y.clone(memory_format=last)),
        "one channels last": (x.clone(memory_format=last), y),
        "transposed": (x.clone().transpose(1, 3), y.transpose(1, 3)),
        "every other": (x.clone()[..., ::2], y[..., ::2]),
        "complex": (torch.complex(x, y), torch.complex(y, x)),
        "conjugated": (torch.complex(x, y), torch.complex(y, x).conj()),
        "negated": (x.clone(), torch.complex(x, y).conj().imag),
    }
    for name, (average, other) in made.items():
        parts = [(average.real, other.real), (average.imag, other.imag)] if average.is_complex() else [(average, other)]
        want = [lerp(a.contiguous().resolve_neg(), b.contiguous().resolve_neg(), 0.125) for a, b in parts]
        strides = average.stride()
        foreach_lerp_([average], [other], 0.125)
        got = [average.real, average.imag] if average.is_complex() else [average]
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True)), name
        assert average.stride() == strides


def test_close_to_torch():
    """As documented: float32 roundings in another order."""
    averages, params = tensors(torch.float32), tensors(torch.float32, 1)
    want = copy.deepcopy(averages)
    torch._foreach_lerp_(want, params, 0.01)
    ema_(averages, params, 0.99)
    for average, other in zip(averages, want, strict=True):
        torch.testing.assert_close(average, other, rtol=4 * 2.0**-24, atol=4 * 2.0**-24)


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(8, 2)
    )


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("kind", ["multi_avg_fn", "avg_fn"])
@pytest.mark.parametrize("name", ["ema", "swa"])
def test_averaged_model(name: str, kind: str, use_buffers: bool):
    """Beside torch's own functions over five steps; the counter of batches is copied, where torch truncates it."""
    function = getattr(torch_ops, f"get_{name}_{kind}")
    theirs = getattr(torch.optim.swa_utils, f"get_{name}_avg_fn")  # swa's other one fails for integers
    module = model()
    ours = AveragedModel(module, **{kind: function()}, use_buffers=use_buffers)
    expected = AveragedModel(module, avg_fn=theirs(), use_buffers=use_buffers)
    for step in range(5):
        with torch.no_grad():
            for parameter in [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)))
            module[1].num_batches_tracked += 1
        ours.update_parameters(module)
        expected.update_parameters(module)
    found, want = ours.state_dict(), expected.state_dict()
    assert found.keys() == want.keys() and int(found["n_averaged"]) == 5
    for key, value in want.items():
        if key.endswith("num_batches_tracked"):
            assert int(found[key]) == 5
        else:
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


def test_mean_of_equal_models_is_the_model():
    module = model()
    averaged = AveragedModel(module, multi_avg_fn=torch_ops.get_swa_multi_avg_fn())
    for _ in range(4):
        averaged.update_parameters(module)
    assert all(bits(a) == bits(b) for a, b in zip(averaged.module.parameters(), module.parameters(), strict=True))


def test_backward_over_old_values_is_an_error():
    average = torch.ones(3, requires_grad=True)
    loss = (average * average).sum()
    ema_([average], [torch.zeros(3)], 0.5)
    assert average.tolist() == [0.5] * 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_on_a_device_it_is_one_launch(device: HostDevice, streams: Streams, monkeypatch: pytest.MonkeyPatch):
    averages, params = tensors(torch.bfloat16), tensors(torch.float32, 1)
    want = copy.deepcopy(averages)
    ema_(want, params, 0.75)
    monkeypatch.setattr(TorchTensors, "device", staticmethod(lambda x: torch.device("cuda:0")))
    ema_(averages, params, 0.75)
    assert device.waits == 0 and device.runs == 1
    device.finish()
    assert [bits(a) for a in averages] == [bits(w) for w in want]


X = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ema_([X], [], 0.9), UsageError, "got 1 average and 0 tensors"),
        (lambda: ema_([X], [X[:2]], 0.9), ShapeError, "average 0 has shape [4, 3], tensor 0 [2, 3]"),
        (lambda: ema_([X], [X.clone()], 1.5), UsageError, "decay must be in 0..1, got 1.5"),
        (lambda: ema_([X], [X.clone()], float("nan")), UsageError, "decay must be in 0..1, got nan"),
        (lambda: ema_([X, X], [X.clone()] * 2, 0.9), UsageError, "average 1 shares memory with average 0"),
        (lambda: ema_([X[:3]], [X[1:]], 0.9), UsageError, "tensor 0 shares memory with average 0"),
        (lambda: ema_([X[1:]], [X[:3]], 0.9), UsageError, "average 0 shares memory with tensor 0"),
        (lambda: foreach_lerp_([X], [X.clone()], float("inf")), UsageError, "weights must be finite"),
        (lambda: foreach_lerp_([X], [X.clone()], [1, 2]), UsageError, "weight must be a number, or 1 in a list"),
        (lambda: foreach_lerp_([X], [X.clone()], [X]), UsageError, "weight must be a number, or 1 in a list"),
        (lambda: foreach_lerp_([X.int()], [X], 0.5), UsageError, "average 0 has dtype torch.int32"),
        (lambda: foreach_lerp_([X], [X.to(torch.complex64)], 0.5), UsageError, "both must be complex or none"),
        (lambda: foreach_lerp_([X.to_sparse()], [X], 0.5), UsageError, "average 0 (Tensor) has no memory"),
    ],
)
def test_refused(call: Any, kind: type[Exception], message: str):
    with pytest.raises(kind) as caught:
        call()
    assert message in str(caught.value)
    assert bool((X == 1).all())
