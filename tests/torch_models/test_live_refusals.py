"""What a module with Live refuses, and that the module has its own weights again after every error."""

from __future__ import annotations

import gc

import pytest
import torch

import fastinterp
from fastinterp.errors import BackendError, CheckpointError, ShapeError, UsageError
from tests.support.modules import Buffers, assert_same_state, llama, same_bits, saved, state


def test_every_mismatch_at_once():
    module = Buffers(1)
    other = Buffers(2).state_dict()
    del other["norm.bias"]
    other["scale"] = torch.zeros(4)
    other["norm.weight"] = torch.zeros(4, dtype=torch.int64)
    other["extra"] = torch.zeros(1)
    with pytest.raises(ShapeError) as caught:
        fastinterp.Live(module, base=Buffers(1).state_dict(), directions={"far": other})
    message = str(caught.value)
    for part in (
        "the module does not fit, 4 mismatches:\n  ",
        "norm.bias [4] is not in direction far",
        "scale is [3] in the module but [4] in direction far",
        "norm.weight is float32 in the module but int64 in direction far",
        "extra of direction far is not in the module",
    ):
        assert part in message
    assert len(message.splitlines()) == 5


def test_mismatches_beyond_fifty_are_counted():
    other = Buffers(2).state_dict() | {f"more.{i}": torch.zeros(1) for i in range(60)}
    with pytest.raises(ShapeError) as caught:
        fastinterp.Live(Buffers(1), directions={"far": other})
    lines = str(caught.value).splitlines()
    assert lines[0] == "the module does not fit, 60 mismatches:"
    assert (len(lines), lines[-1]) == (52, "  ... and 10 more")


@pytest.mark.parametrize("resident", [True, False])
def test_one_checkpoint_may_be_several_end_points(tmp_path, resident):
    base, far = saved(llama(1), tmp_path / "base"), saved(llama(2), tmp_path / "far")
    module, wanted = llama(3), state(llama(2))
    with fastinterp.Live(module, base=base, directions={"x": far, "y": far}, resident=resident) as live:
        live.set(y=1.0)
        assert_same_state(wanted, state(module))
    with fastinterp.Live(module, a=far, b=far, resident=resident) as live:
        live.set(0.5)
        assert_same_state(wanted, state(module))


def test_more_directions_than_a_sum_has_inputs():
    module, base, far = Buffers(1), Buffers(2).state_dict(), Buffers(3).state_dict()
    with fastinterp.Live(module, base=base, directions={f"d{i}": far for i in range(64)}) as live:
        live.set(d0=1.0)
        assert same_bits(far["norm.weight"], module.norm.weight.detach())
        live.set({f"d{i}": 0.5 for i in range(63)})
        with pytest.raises(UsageError, match="at most 63 directions can have a distance at a time, got 64"):
            live.set({f"d{i}": 0.5 for i in range(64)})
        live.set(d63=1.0)
        assert same_bits(far["norm.weight"], module.norm.weight.detach())


class Extra(torch.nn.Linear):
    """Its state_dict holds more than tensors."""

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        raise AssertionError("it is left alone")


def test_extra_state_is_left_alone():
    module, far = Extra(2, 2), Extra(2, 2)
    with fastinterp.Live(module, directions={"far": far.state_dict()}) as live:
        live.set(far=1.0)
        assert same_bits(far.weight.detach(), module.weight.detach())


@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.parametrize("dtype", ["complex64", "float8_e4m3fnuz", "qint8"])
def test_dtypes_that_cannot_be_interpolated_are_named(dtype):
    module = Buffers(1)
    odd = torch.zeros(3)
    if dtype == "qint8":
        odd = torch._empty_affine_quantized([3], scale=1.0, zero_point=0, dtype=torch.qint8)
    module.register_buffer("odd", odd if dtype == "qint8" else odd.to(getattr(torch, dtype)))
    ends = {"a": Buffers(1).state_dict(), "b": Buffers(2).state_dict()}
    with pytest.raises(UsageError, match=rf"odd \({dtype}\): this dtype cannot be interpolated"):
        fastinterp.Live(module, **ends)
    with fastinterp.Live(module, **ends, layers="scale") as live:
        live.set(1.0)
        assert module.scale.tolist() == [2.0] * 3


def test_tensors_without_memory_are_refused():
    module = torch.nn.Module()
    module.register_buffer("odd", torch.eye(3).to_sparse())
    with pytest.raises(UsageError, match=r"odd has no memory of its own .*sparse"):
        fastinterp.Live(module, a={}, b={})
    module = torch.nn.Linear(2, 2)
    module.weight.untyped_storage().resize_(0)
    with pytest.raises(UsageError, match="weight has no memory of its own"):
        fastinterp.Live(module, a={}, b={})
    sparse = {"weight": torch.eye(2).to_sparse(), "bias": torch.zeros(2)}
    with pytest.raises(UsageError, match=r"weight of direction far has no memory of its own .*sparse"):
        fastinterp.Live(torch.nn.Linear(2, 2), directions={"far": sparse})


def test_a_second_live_on_the_same_tensors_is_refused(tmp_path):
    """It would take the first one's point for the module's own weights."""
    a, b = saved(llama(1), tmp_path / "a"), saved(llama(2), tmp_path / "b")
    module = llama(3)
    before = state(module)
    first = fastinterp.Live(module, a=a, b=b, layers="model.layers.0.*")
    first.set(0.5)
    moved = state(module)
    with pytest.raises(UsageError, match=r"an open Live already sets model\.layers\.0\..*live\.close\(\)"):
        fastinterp.Live(module, a=a, b=b)
    with fastinterp.Live(module, a=a, b=b, layers="model.layers.1.*") as beside:  # other tensors
        beside.set(1.0)
        with pytest.raises(UsageError, match="an open Live already sets"):
            fastinterp.Live(module, a=a, b=b, layers=["model.layers.1.*", "lm_head*"])
    assert_same_state(moved, state(module))
    first.close()
    for _ in range(2):  # also one that failed holds no tensors, while its error is held
        with fastinterp.Live(module, a=a, b=b) as live:
            live.set(1.0)
        assert_same_state(before, state(module))
        with pytest.raises(CheckpointError) as caught:
            fastinterp.Live(module, a=a, b=tmp_path / "none")
    assert caught.value is not None


def test_a_live_that_is_gone_holds_no_tensors():
    module, ends = llama(1), {"a": llama(2).state_dict(), "b": llama(3).state_dict()}
    live = fastinterp.Live(module, **ends, hooks=False)  # hooks hold it as long as the module is there
    with pytest.raises(UsageError, match="an open Live already sets"):
        fastinterp.Live(module, **ends)
    del live
    gc.collect()
    fastinterp.Live(module, **ends).close()


def test_state_dict_whose_memory_is_gone_is_refused():
    module, far = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = state(module)
    with fastinterp.Live(module, directions={"far": far.state_dict()}) as live:
        far.weight.untyped_storage().resize_(0)
        with pytest.raises(UsageError, match="were given other memory"):
            live.set(far=1.0)
    assert_same_state(before, state(module))


def test_names_may_change_while_tensors_stay():
    """As when adapters are put around them."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    before = state(module)
    with fastinterp.Live(
        module, directions={"far": state(torch.nn.Sequential(torch.nn.Linear(2, 2)))}, layers="0.*"
    ) as live:
        module[0] = torch.nn.ModuleDict({"inner": module[0]})
        live.set(far=1.0)
    assert same_bits(module[0]["inner"].weight.detach(), before["0.weight"])


@pytest.mark.parametrize("layers", [5, [5], {"x": 1}])
def test_layers_that_are_no_patterns(layers):
    with pytest.raises(UsageError, match="`layers` must be a pattern of names"):
        fastinterp.Live(Buffers(1), a={}, b={}, layers=layers)


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"formall": 1.0}, "unknown direction `formall`, did you mean `formal`"),
        ({"formal": float("nan")}, "`formal` must be a finite number, got nan"),
        ({"formal": float("inf")}, "`formal` must be a finite number, got inf"),
        ({"formal": "1"}, "`formal` must be a finite number, got '1'"),
        ({"formal": True}, "`formal` must be a finite number, got True"),
        ({"formal": 1e39}, "`formal` must be a finite number"),
    ],
)
def test_bad_points_change_nothing(point, message):
    module, other = Buffers(1), Buffers(2).state_dict()
    with fastinterp.Live(module, directions={"formal": other}) as live:
        live.set(formal=0.5)
        before = state(module)
        with pytest.raises(UsageError, match=message):
            live.set(**point)
        assert_same_state(before, state(module))
        assert live.alphas == {"formal": 0.5}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give either the ends of a line"),
        ({"a": {}}, "give either the ends of a line"),
        ({"a": {}, "b": {}, "directions": {"x": {}}}, "not both"),
        ({"directions": {}}, "is empty"),
        ({"directions": ["b"]}, "must be a mapping of names"),
        ({"directions": {"": {}}}, "a direction must have a name"),
        ({"a": {"x": 1}, "b": {}}, "x of a must be a torch tensor, got int"),
        ({"a": 3, "b": {}}, "a must be a checkpoint's path or a state dict, got int"),
    ],
)
def test_bad_end_points(given, message):
    with pytest.raises(UsageError, match=message):
        fastinterp.Live(Buffers(1), **given)


def test_modules_that_cannot_be_set():
    ends = {"a": Buffers(1).state_dict(), "b": Buffers(2).state_dict()}
    with pytest.raises(UsageError, match=r"must be a torch\.nn\.Module, got dict"):
        fastinterp.Live({}, **ends)
    with pytest.raises(UsageError, match="has no memory yet"):
        fastinterp.Live(Buffers(1).to("meta"), **ends)
    tensor = torch.zeros(6)
    module = torch.nn.Module()
    module.x, module.y = torch.nn.Parameter(tensor[:4]), torch.nn.Parameter(tensor[2:])
    with pytest.raises(UsageError, match="x and y share memory without being the same tensor"):
        fastinterp.Live(module, a={}, b={})


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (torch.device("cuda", 0), "norm.weight is on cpu, but scale on cuda:0. Move the module to one device"),
        (torch.device("mps"), "scale is on mps. Move the module to the CPU, or to a device with CUDA"),
    ],
)
def test_other_devices_are_refused(monkeypatch, place, message):
    module = Buffers(1)
    elsewhere = module.state_dict(keep_vars=True)
    elsewhere["scale"] = type("T", (torch.Tensor,), {"device": place})(torch.zeros(3))
    monkeypatch.setattr(module, "state_dict", lambda **_: elsewhere)
    with pytest.raises(BackendError, match=message):
        fastinterp.Live(module, a={}, b={})


@pytest.mark.parametrize("how", ["touched", "cut", "removed"])
def test_end_point_that_changes_on_disk(tmp_path, how):
    """Its file is looked at before and after every set; the module has its own weights again."""
    a, b = saved(llama(1), tmp_path / "a"), saved(llama(2), tmp_path / "b")
    module = llama(3)
    before = state(module)
    live = fastinterp.Live(module, a=a, b=b, resident=False)
    live.set(0.5)
    moved = state(module)
    file = b / "model.safetensors"
    if how == "touched":
        file.write_bytes(file.read_bytes())
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match=r"no longer what Live opened.*Make a new Live") as caught:
        live.set(0.6)
    assert str(file) in str(caught.value)
    assert_same_state(moved, state(module))  # refused before anything was written
    live.close()
    assert_same_state(before, state(module))


def test_failure_in_the_middle_gives_the_weights_back(tmp_path, monkeypatch):
    """A file that is cut after it was looked at: some tensors are written when that shows."""
    a, b = saved(llama(1), tmp_path / "a"), saved(llama(2), tmp_path / "b")
    module = llama(3)
    before = state(module)
    live = fastinterp.Live(module, a=a, b=b, resident=False)
    for look in ("refuse_changed", "refuse_changed_files"):
        monkeypatch.setattr(live._operands, look, lambda: None)
    file = b / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="bytes are left"):
        live.set(0.5)
    assert live.alphas is None
    assert_same_state(before, state(module))
    live.close()


def test_file_that_is_cut_during_a_set(tmp_path, monkeypatch):
    """The first look found it whole; what is told is what to do, not only which bytes were missing."""
    a, b = saved(llama(1), tmp_path / "a"), saved(llama(2), tmp_path / "b")
    module = llama(3)
    before = state(module)
    file = b / "model.safetensors"
    with fastinterp.Live(module, a=a, b=b, resident=False) as live:
        write = live._writer.write

        def cut_first(row):
            monkeypatch.undo()
            file.write_bytes(file.read_bytes()[:-100])
            write(row)

        monkeypatch.setattr(live._writer, "write", cut_first)
        with pytest.raises(CheckpointError, match=r"no longer what Live opened.*Make a new Live"):
            live.set(0.5)
        assert live.alphas is None
        assert_same_state(before, state(module))


def test_resident_end_points_outlive_their_files(tmp_path):
    a, b = saved(llama(1), tmp_path / "a"), saved(llama(2), tmp_path / "b")
    module = llama(3)
    with fastinterp.Live(module, a=a, b=b) as live:
        (b / "model.safetensors").unlink()
        live.set(1.0)
        assert_same_state(state(llama(2)), state(module))


def test_error_inside_gives_the_weights_back():
    module, other = llama(1), llama(2)
    before = state(module)

    def fail(live):
        live.set(far=1.0)
        raise RuntimeError("callback")

    with (
        pytest.raises(RuntimeError, match="callback"),
        fastinterp.Live(module, directions={"far": other.state_dict()}) as live,
    ):
        fail(live)
    assert_same_state(before, state(module))
    assert not module._forward_hooks and not module._forward_pre_hooks
    with pytest.raises(UsageError, match="this Live is closed"):
        live.set(far=1.0)
    live.close()


def test_tied_weights_that_differ_in_an_end_point(tmp_path):
    """One tensor in the module, two in a checkpoint: fine if they are equal, refused if not."""
    module = llama(1, tied=True)
    ends = [state(llama(seed)) for seed in (2, 3)]
    with pytest.raises(ShapeError, match=r"are one tensor in the module, but differ in a\. Untie"):
        fastinterp.Live(module, a=ends[0], b=ends[1])
    for end in ends:
        end["lm_head.weight"] = end["model.embed_tokens.weight"].clone()
    with fastinterp.Live(module, a=ends[0], b=ends[1]) as live:
        live.set(1.0)
        assert same_bits(ends[1]["lm_head.weight"], module.lm_head.weight.detach())


def test_module_that_was_converted(tmp_path):
    module = llama(1)
    live = fastinterp.Live(module, directions={"far": state(llama(2))})
    module.to(torch.float32)
    with pytest.raises(UsageError, match="is not where it was"):
        live.set(far=1.0)
    with pytest.raises(UsageError, match="cannot be given back"):
        live.close()
    live.close()  # it is closed


@pytest.mark.parametrize("leave", ["convert", "free"])
def test_weights_that_cannot_be_given_back_are_told(leave):
    """Nothing is written to memory that is no longer the module's."""
    module = torch.nn.Linear(3, 3, bias=False)
    with (
        pytest.raises(UsageError, match="cannot be given back"),
        fastinterp.Live(module, directions={"far": state(torch.nn.Linear(3, 3, bias=False))}) as live,
    ):
        live.set(far=1.0)
        if leave == "convert":
            module.double()
        else:
            module.weight.untyped_storage().resize_(0)


def test_backward_over_old_weights_is_an_error():
    module = torch.nn.Linear(3, 3)
    with fastinterp.Live(module, directions={"far": state(torch.nn.Linear(3, 3))}) as live:
        loss = module(torch.ones(1, 3, requires_grad=True)).square().sum()
        live.set(far=1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
