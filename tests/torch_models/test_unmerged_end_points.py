"""Live and path: quantised end points are refused, and integers are those of the end point that is named."""

from __future__ import annotations

from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save_file

import fastinterp
from fastinterp.errors import CheckpointError, ShapeError, UsageError
from tests.support.modules import assert_same_state, same_bits, state


class Counting(torch.nn.Module):
    """A layer with integers beside it. ids: of any dtype."""

    def __init__(self, fill: float, ids: torch.Tensor):
        super().__init__()
        self.w = torch.nn.Parameter(torch.full((3,), fill))
        self.register_buffer("ids", ids)
        self.register_buffer("steps", torch.tensor(int(fill)))


def saved(module: torch.nn.Module, path) -> str:
    save_file(module.state_dict(), path)
    return str(path)


def quantised(seed: int) -> dict[str, torch.Tensor]:
    codes = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)).to(torch.float8_e4m3fn)
    return {
        "up.weight": codes,
        "up.weight_scale": torch.tensor(0.5 + seed),
        "up.weight_zero_point": torch.tensor([1.0]).to(torch.float8_e4m3fn),
        "norm.weight": torch.full((4,), float(seed)),
    }


class Quantised(torch.nn.Module):
    """Holds the tensors of a model with fp8 codes, in a form that is not read."""

    def __init__(self):
        super().__init__()
        self.up, self.norm = torch.nn.Module(), torch.nn.Module()
        first = quantised(0)
        self.up.register_buffer("weight", first["up.weight"])
        self.up.register_buffer("weight_scale", first["up.weight_scale"])
        self.up.register_buffer("weight_zero_point", first["up.weight_zero_point"])
        self.norm.register_buffer("weight", first["norm.weight"])


# --- quantised end points --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [True, False], ids=["checkpoints", "state dicts"])
def test_live_refuses_quantised_end_points(tmp_path, stored):
    ends: list[Any] = [quantised(k) for k in range(2)]
    if stored:
        for k, end in enumerate(ends):
            save_file(end, tmp_path / f"{k}.safetensors")
        ends = [str(tmp_path / f"{k}.safetensors") for k in range(2)]
    module = Quantised()
    own = state(module)
    with pytest.raises(
        CheckpointError, match=r"is quantised \(fp8 with scales and zero points\): 1 tensor, as up.weight with"
    ) as caught:
        fastinterp.Live(module, a=ends[0], b=ends[1])
    assert "integers" not in str(caught.value)
    assert_same_state(own, state(module))
    with fastinterp.Live(module, a=ends[0], b=ends[1], layers="norm.*") as live:  # what is not quantised can be set
        live.set(0.5)
        assert module.norm.weight.tolist() == [0.5] * 4


def test_path_refuses_quantised_end_points(tmp_path):
    """Unless codes and scales are equal: then they are copied."""
    for k in range(2):
        save_file(quantised(k), tmp_path / f"{k}.safetensors")
    save_file({**quantised(0), "norm.weight": torch.full((4,), 8.0)}, tmp_path / "2.safetensors")
    a, b, c = (str(tmp_path / f"{k}.safetensors") for k in range(3))
    with pytest.raises(CheckpointError, match=r"are quantised \(fp8 with scales and zero points\)"):
        fastinterp.path(a, b)
    with pytest.raises(CheckpointError, match=r"are quantised|is quantised"):
        fastinterp.path(a, quantised(1)).weights(0.5)
    point = fastinterp.path(a, c, dtype="float64").weights(0.5)
    assert same_bits(point["up.weight"], quantised(0)["up.weight"])
    assert same_bits(point["up.weight_scale"], quantised(0)["up.weight_scale"])
    assert point["norm.weight"].tolist() == [4.0] * 4


# --- integers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [True, False], ids=["checkpoints", "state dicts"])
@pytest.mark.parametrize("whose", ["a", "b"])
def test_live_takes_integers_of_one_end_point(tmp_path, stored, whose):
    """They are copied at the beginning, and the module has its own back at the end."""
    a, b = Counting(1.0, torch.arange(4)), Counting(5.0, torch.arange(1, 5).half())
    ends = [saved(m, tmp_path / f"{i}.safetensors") if stored else state(m) for i, m in enumerate((a, b))]
    module = Counting(9.0, torch.zeros(4, dtype=torch.float16))
    own = state(module)
    with pytest.raises(
        ShapeError, match=r"ids is float16 in the module but I64 in|ids is float16 .* int64 in a"
    ) as caught:
        fastinterp.Live(module, a=ends[0], b=ends[1])
    assert "Say whose to take: `integers=`" in str(caught.value)
    assert_same_state(own, state(module))
    with fastinterp.Live(module, a=ends[0], b=ends[1], integers=whose) as live:
        live.set(0.5)
        source = {"a": a, "b": b}[whose]
        assert module.w.tolist() == [3.0] * 3
        assert module.ids.dtype == torch.float16 and module.ids.tolist() == source.ids.tolist()
        assert int(module.steps) == int(source.steps)
        live.restore()
        assert module.w.tolist() == [9.0] * 3
    assert_same_state(own, state(module))


def test_live_takes_integers_of_a_direction():
    base, far = Counting(1.0, torch.arange(4)), Counting(5.0, torch.arange(4) + 7)
    module = Counting(9.0, torch.zeros(4, dtype=torch.int64))
    for whose, want in (("base", base), ("far", far)):
        with fastinterp.Live(module, base=state(base), directions={"far": state(far)}, integers=whose) as live:
            live.set(far=0.5)
            assert module.ids.tolist() == want.ids.tolist() and module.w.tolist() == [3.0] * 3
        assert module.ids.tolist() == [0] * 4
    with pytest.raises(UsageError, match="`integers` must be one of base, far, got 'near'"):
        fastinterp.Live(module, base=state(base), directions={"far": state(far)}, integers="near")
    other = Counting(5.0, torch.arange(3))
    with pytest.raises(ShapeError, match=r"ids is \[4\] in the module but \[3\] in direction far"):
        fastinterp.Live(module, base=state(base), directions={"far": state(other)}, integers="far")


@pytest.mark.parametrize("elsewhere", ["a", "b"])
def test_live_takes_integers_where_one_end_point_is_at_an_address(tmp_path, elsewhere):
    a, b = Counting(1.0, torch.arange(4)), Counting(5.0, torch.arange(4) + 7)
    ends = {name: saved(end, tmp_path / f"{name}.safetensors") for name, end in (("a", a), ("b", b))}
    memory = fsspec.filesystem("memory")
    memory.put_file(ends[elsewhere], "/live/m.safetensors")
    ends[elsewhere] = "memory://live/m.safetensors"
    module = Counting(9.0, torch.zeros(4, dtype=torch.int64))
    for whose, want in (("a", a), ("b", b)):
        with fastinterp.Live(module, a=ends["a"], b=ends["b"], integers=whose) as live:
            live.set(0.5)
            assert module.ids.tolist() == want.ids.tolist() and module.w.tolist() == [3.0] * 3
    memory.rm("/live", recursive=True)


def test_without_integers_buffers_of_the_module_stay():
    a, b = Counting(1.0, torch.arange(4)), Counting(5.0, torch.arange(4) + 7)
    module = Counting(9.0, torch.zeros(4, dtype=torch.int64))
    with fastinterp.Live(module, a=state(a), b=state(b)) as live:
        live.set(0.5)
        assert module.ids.tolist() == [0] * 4 and int(module.steps) == 9


@pytest.mark.parametrize("whose", ["a", "b"])
def test_path_takes_integers_of_one_end_point(tmp_path, whose):
    a, b = Counting(1.0, torch.arange(4)), Counting(5.0, torch.arange(1, 5).half())
    ends: list[Any] = [saved(a, tmp_path / "a.safetensors"), state(b)]
    with pytest.raises(ShapeError, match="Say whose to take: `integers=`"):
        fastinterp.path(*ends).weights(0.5)
    point = fastinterp.path(*ends, integers=whose).weights(0.5)
    want = {"a": a, "b": b}[whose]
    assert same_bits(point["ids"], want.ids) and same_bits(point["steps"], want.steps)
    assert point["w"].tolist() == [3.0] * 3
    seen = []
    module = Counting(9.0, torch.zeros(4, dtype=torch.int64))
    own = state(module)
    with pytest.raises(ShapeError, match="`integers=`"):
        fastinterp.path(*ends, model=module).evaluate(lambda m, x, s: {"y": 0.0}, [0.5])

    def look(m, alpha, seed):
        seen.append((m.ids.tolist(), m.w.tolist(), int(m.steps)))
        return {"y": 0.0}

    fastinterp.path(*ends, model=module, integers=whose).evaluate(look, [0.5])
    assert seen == [(want.ids.tolist(), [3.0] * 3, int(want.steps))]
    assert_same_state(own, state(module))


def test_path_names_whose_integers_there_are():
    a, b = state(Counting(1.0, torch.arange(4))), state(Counting(1.0, torch.arange(4)))
    with pytest.raises(UsageError, match="`integers` must be one of a, b, base, got 'c'"):
        fastinterp.path(a, b, base=a, integers="c")
    far = state(Counting(3.0, torch.arange(4) + 1))
    for whose, want in (("base", a), ("far", far)):
        point = fastinterp.path(base=a, directions={"far": far}, integers=whose).weights({"far": 0.5})
        assert same_bits(point["ids"], want["ids"]) and point["w"].tolist() == [2.0] * 3
