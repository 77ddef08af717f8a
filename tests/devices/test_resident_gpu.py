"""Tensors on a real GPU: the CPU's bytes, CUDA graphs, torch.compile, and a module that walks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastinterp
from fastinterp.backends import torch_device as resident_devices
from fastinterp.errors import BackendError, UsageError
from fastinterp.integrations.torch_ops import weighted_sum
from tests.devices.test_resident import BASE, DTYPES, TUNES, dicts
from tests.in_memory.test_merge_tensors import WAYS
from tests.support import backends
from tests.support.devices.resident_cases import REFUSED
from tests.support.modules import same_bits
from tests.torch_models.test_live_device import POINTS, Mixed, copied

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Whose kernels work."""
    if request.param not in backends.on_devices():
        pytest.skip(backends.skipped()[request.param])
    with backends.device(request.param, monkeypatch) as opened:
        monkeypatch.setattr(resident_devices, "_opened", {0: opened})
        yield request.param


def assert_same(there: torch.Tensor, here: torch.Tensor) -> None:
    assert there.is_cuda and same_bits(there.detach().cpu(), here.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 255, 16385, 1 << 20])
def test_sum(dtype: torch.dtype, numel: int):
    xs = [torch.randn(numel, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(4)]
    for pivot in (None, xs[0].float()):
        want = fastinterp.weighted_sum(xs, [0.5, 0.25, -1.0, 2.0], pivot=pivot)
        there = None if pivot is None else pivot.cuda()
        got = fastinterp.weighted_sum([x.cuda() for x in xs], [0.5, 0.25, -1.0, 2.0], pivot=there)
        assert_same(got, want)
        # At addresses that are no multiples of 16.
        odd = [torch.empty(numel + 1, dtype=dtype, device="cuda")[1:].copy_(x) for x in xs]
        assert_same(fastinterp.weighted_sum(odd, [0.5, 0.25, -1.0, 2.0], pivot=there), want)


@pytest.mark.parametrize("way", WAYS)
def test_any_method(way: str):
    based, count, parameters = WAYS[way]
    keys: dict[str, Any] = {"parameters": parameters, "name": "w", "seed": 11, "rounding": "stochastic"}
    xs, base = [x.bfloat16() for x in TUNES[:count]], BASE.half() if based else None
    there = None if base is None else base.cuda()
    tensors = [x.cuda() for x in xs]
    if way in REFUSED:
        with pytest.raises(BackendError, match="w cannot be merged on cuda"):
            fastinterp.merge_tensors(tensors, way, base=there, dtype="bfloat16", **keys)
        return
    got = fastinterp.merge_tensors(tensors, way, base=there, dtype="bfloat16", **keys)
    assert_same(got, fastinterp.merge_tensors(xs, way, base=base, dtype="bfloat16", **keys))


def test_state_dicts():
    models = dicts(3)
    there = [{n: x.cuda() for n, x in model.items()} for model in models]
    for way in ("linear", "ties"):
        keys: dict[str, Any] = {"parameters": {"weight": 0.5}, "base": None if way == "linear" else models[0]}
        want = fastinterp.merge_state_dicts(models, way, **keys)
        got = fastinterp.merge_state_dicts(there, way, **{**keys, "base": keys["base"] and there[0]})
        for name, x in want.items():
            assert_same(got[name], x)


def test_streams():
    """A sum follows what is in its stream."""
    x, y, out = (torch.randn(1 << 20, device="cuda") for _ in "xyo")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        x.fill_(3.0)
        fastinterp.weighted_sum([x, y], [0.5, 0.0], out=out)
        assert_same(out, torch.full((1 << 20,), 1.5))
    torch.cuda.synchronize()


def test_graphs(kernels: str):
    """A captured sum is replayed with what the inputs hold then. Triton's kernels cannot be captured, and say so."""
    x, y, out = (torch.randn(1 << 20, device="cuda") for _ in "xyo")
    graph = torch.cuda.CUDAGraph()
    if kernels == "triton":
        with torch.cuda.graph(graph):
            with pytest.raises(BackendError, match="CUDA graph"):
                fastinterp.weighted_sum([x, y], [0.5, 0.25], out=out)
            out.zero_()  # a graph must not be empty
        return
    with torch.cuda.graph(graph):
        fastinterp.weighted_sum([x, y], [0.5, 0.25], out=out)
        inner = weighted_sum([x, out], [1.0, 1.0])
        with pytest.raises(BackendError, match="CUDA graph"):
            fastinterp.merge_tensors([y], "slerp", base=x, parameters={"t": 0.5})
    for value in (1.0, 2.0):
        x.fill_(value)
        graph.replay()
        want = fastinterp.weighted_sum([x.cpu(), y.cpu()], [0.5, 0.25])
        assert_same(out, want)
        assert_same(inner, fastinterp.weighted_sum([x.cpu(), want], [1.0, 1.0]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str, kernels: str):
    if kernels == "triton" and mode == "reduce-overhead":
        pytest.skip("Triton's kernels cannot be captured in a CUDA graph")
    xs, pivot = [x.bfloat16().cuda() for x in TUNES], BASE.bfloat16().cuda()
    compiled = torch.compile(lambda xs: weighted_sum(xs, [0.2, 0.3, 0.4], pivot=pivot) * 2, mode=mode, fullgraph=True)
    want = weighted_sum([x.cpu() for x in xs], [0.2, 0.3, 0.4], pivot=pivot.cpu()) * 2
    for _ in range(3):
        assert_same(compiled(xs), want)


def test_gradients():
    weights = torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64, requires_grad=True)
    for place in ("cpu", "cuda"):
        weighted_sum([x.to(place) for x in TUNES], weights, pivot=BASE.to(place)).sum().backward()
    found = weights.grad
    weights.grad = None
    weighted_sum(TUNES, weights, pivot=BASE).sum().backward()
    assert found is not None and weights.grad is not None and torch.equal(found, 2 * weights.grad)


@pytest.mark.parametrize("resident", [True, False])
def test_live(resident: bool):
    here, there = Mixed(7), Mixed(7).cuda()
    before = copied(there, torch.Tensor.cpu)
    ends = [copied(Mixed(seed)) for seed in range(3)]
    keys: dict[str, Any] = {"base": ends[0], "directions": {"p": ends[1], "f": ends[2]}, "resident": resident}
    with fastinterp.Live(here, **keys) as one, fastinterp.Live(there, **keys) as other:
        for point in POINTS:
            one.set(point)
            other.set(point)
            with torch.cuda.stream(torch.cuda.Stream()), other.step():
                assert all(same_bits(x.cpu(), here.state_dict()[n]) for n, x in there.state_dict().items())
    assert all(same_bits(x.cpu(), before[n]) for n, x in there.state_dict().items())


def test_refused():
    with pytest.raises(UsageError, match=r"array 0 is on cuda:0, but array 1 on cpu"):
        fastinterp.weighted_sum([BASE.cuda(), BASE], [1, 1])
