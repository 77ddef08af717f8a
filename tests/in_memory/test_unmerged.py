"""State dicts with quantised weights, integers and complex numbers, of torch and of numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastinterp
from fastinterp.errors import CheckpointError, ShapeError, UsageError
from fastinterp.in_memory.allocate import numpy_dtype, torch_dtype
from fastinterp.ops.dtypes import DTYPES
from tests.support.modules import same_bits
from tests.support.quantised_formats import FORMATS, NOT_QUANTISED, READ_FORMATS, model

HALF = {"weight": 1.0}
_WITHOUT = [name for name in FORMATS if "codes of" in name]  # torch has no such dtypes
_EVERY = {**FORMATS, **READ_FORMATS}  # in memory none is read
FORMATS_HERE = {name: form for name, form in _EVERY.items() if name not in (*_WITHOUT, "described by metadata")}


def state(layout, seed):
    """The same model as a state dict of torch."""
    return {
        name: torch.frombuffer(bytearray(t.raw.tobytes()) or bytearray(8), dtype=torch_dtype(t.dtype))[
            : int(np.prod(t.shape))
        ].view(t.shape)
        for name, t in model(layout, seed).items()
    }


@pytest.mark.parametrize("form", FORMATS_HERE.values(), ids=FORMATS_HERE)
def test_quantised_state_dicts(form):
    """Refused by name, once, and before names and shapes are compared; equal codes and scales are copied."""
    a, b = state(form.layout, 0), state(form.layout, 1)
    for other in (b, {"another": torch.ones(3)}, {**b, form.plain[0]: torch.ones(3)}):
        with pytest.raises(CheckpointError) as caught:
            fastinterp.merge_state_dicts([a, other], "linear", parameters=HALF)
        message = str(caught.value)
        assert message.startswith(f"state dict 0 is quantised ({form.name}): ") and "integers" not in message
    with pytest.raises(CheckpointError, match="base is quantised"):
        fastinterp.merge_state_dicts([b], "task_arithmetic", base=a, parameters=HALF, integers=0)
    mine = {**a, **{name: b[name] for name in form.plain}}
    merged = fastinterp.merge_state_dicts([a, mine], "linear", parameters=HALF, dtype="float32")
    assert list(merged) == list(a)
    for name, x in merged.items():
        if name in form.plain:
            assert x.dtype == torch.float32
            assert torch.allclose(x, (a[name].float() + b[name].float()) / 2, rtol=1e-6, atol=0)
        else:
            assert same_bits(x, a[name]) and (x.data_ptr() != a[name].data_ptr() or not x.numel())


def test_one_quantised_state_dict():
    """Is copied; a method that would change it is refused."""
    a = state(READ_FORMATS["fp8 per tensor"].layout, 0)
    copied = fastinterp.merge_state_dicts([a], "linear", parameters=HALF)
    assert all(same_bits(copied[name], a[name]) for name in a)
    with pytest.raises(CheckpointError, match="passthrough would change"):
        fastinterp.merge_state_dicts([a], "passthrough", parameters={"scale": 0.5})


@pytest.mark.parametrize("name", [n for n in NOT_QUANTISED if n != "integers"])
def test_others_are_merged(name):
    a, b = (state(NOT_QUANTISED[name], seed) for seed in range(2))
    ints = {n for n, x in a.items() if not x.is_floating_point()}
    merged = fastinterp.merge_state_dicts([a, {**b, **{n: a[n] for n in ints}}], "linear", parameters=HALF)
    assert any(not same_bits(merged[n], a[n]) for n in a)


def test_numpy_of_a_quantised_model():
    form = READ_FORMATS["mxfp8, exponents"]
    arrays = [
        {n: t.raw.view(numpy_dtype(t.dtype)).reshape(t.shape) for n, t in model(form.layout, seed).items()}
        for seed in range(2)
    ]
    with pytest.raises(CheckpointError, match=r"state dict 0, state dict 1|state dict 0 is quantised \(MXFP8\)"):
        fastinterp.merge_state_dicts(arrays, "linear", parameters=HALF)


# --- integers --------------------------------------------------------------------------------------------------------


def counters(library, steps):
    """A model that was trained for so many batches."""
    make = torch.tensor if library is torch else np.array
    return {"w": make([float(steps)]), **{f"bn.{i}.num_batches_tracked": make(steps + i) for i in range(7)}}


@pytest.mark.parametrize("library", [torch, np], ids=["torch", "numpy"])
def test_integers(library):
    """Those that differ are told once, with the argument, which works: an index or the base."""
    base, a, b = (counters(library, steps) for steps in (10, 20, 30))
    with pytest.raises(ShapeError) as caught:
        fastinterp.merge_state_dicts([a, b], "linear", parameters=HALF)
    assert str(caught.value) == (
        "bn.0.num_batches_tracked (int64), bn.1.num_batches_tracked (int64), bn.2.num_batches_tracked (int64), "
        "bn.3.num_batches_tracked (int64), bn.4.num_batches_tracked (int64) and 2 more are not averaged, and differ in "
        "state dict 1. Say whose to take: `integers=`, the number of a state dict or 'base'"
    )
    for whose, want in ((0, a), (1, b), ("base", base)):
        merged = fastinterp.merge_state_dicts([a, b], "task_arithmetic", base=base, parameters=HALF, integers=whose)
        assert all(int(merged[n]) == int(want[n]) for n in want if n != "w")
        assert float(merged["w"][0]) == 40.0


def test_integers_of_one_side():
    """That model's tensor is copied with its dtype, in a copy of its own."""
    a, b = {"ids": torch.arange(4), "w": torch.ones(2)}, {"ids": torch.arange(4).half(), "w": torch.zeros(2)}
    with pytest.raises(ShapeError, match=r"ids is of dtypes int64, float16\. Only floating ones merge\. Say"):
        fastinterp.merge_state_dicts([a, b], "linear", parameters=HALF)
    for whose, want in enumerate((a, b)):
        merged = fastinterp.merge_state_dicts([a, b], "linear", parameters=HALF, integers=whose, dtype="bfloat16")
        assert same_bits(merged["ids"], want["ids"]) and merged["ids"].data_ptr() != want["ids"].data_ptr()
        assert merged["w"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("integers", [2, -1, True, "base", "a", 0.0])
def test_integers_of_nobody(integers):
    with pytest.raises(UsageError, match=r"`integers` must be the index of a state dict, 0..1, got"):
        fastinterp.merge_state_dicts([{"w": torch.ones(2)}] * 2, "linear", parameters=HALF, integers=integers)


# --- complex numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [torch, np], ids=["torch", "numpy"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("integers", [None, 1])
def test_complex_numbers(library, dtype, integers):
    """Sums are those of the parts, as between files; the dtype stays. They are no integers."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(5, 3, 2)).astype(np.float32) for _ in range(2)]
    numbers = [x[..., 0] + 1j * x[..., 1] for x in arrays]
    given = [{"f": torch.from_numpy(x) if library is torch else x} for x in numbers]
    weight = {"weight": [0.25, 0.75]}
    merged = fastinterp.merge_state_dicts(given, "linear", parameters=weight, dtype=dtype, integers=integers)["f"]
    wanted = fastinterp.merge_state_dicts([{"f": x} for x in arrays], "linear", parameters=weight)["f"]
    assert str(merged.dtype).endswith("complex64") and tuple(merged.shape) == (5, 3)
    assert np.array_equal(np.asarray(merged).view(np.float32).ravel(), wanted.ravel())


def test_complex_numbers_that_are_no_plain_memory():
    """Conjugate and transposed views are read as what they stand for."""
    x, y = (torch.randn(3, 5, dtype=torch.complex64, generator=torch.Generator().manual_seed(k)) for k in range(2))
    merged = fastinterp.merge_state_dicts([{"f": x.conj().T}, {"f": y.T}], "linear", parameters=HALF)["f"]
    assert torch.allclose(merged, (x.conj().T + y.T) / 2)


@pytest.mark.parametrize("method", ["ties", "slerp"])
def test_complex_numbers_and_other_methods(method):
    x, y, z = (torch.full((3,), k + 1j) for k in range(3))
    given = {"density": 0.5, "weight": 1.0} if method == "ties" else {"t": 0.5}
    others = [{"f": y}, {"f": z}] if method == "ties" else [{"f": y}]
    with pytest.raises(ShapeError, match=f"f is complex and differs, and {method} does more than weigh"):
        fastinterp.merge_state_dicts(others, method, base={"f": x}, parameters=given)
    same = fastinterp.merge_state_dicts([{"f": x}] * len(others), method, base={"f": x}, parameters=given)
    assert same_bits(same["f"], x)
    chosen = fastinterp.merge_state_dicts(others, method, base={"f": x}, parameters=given, integers=0)
    assert same_bits(chosen["f"], y)


def test_dtypes_of_files_that_torch_has():
    """Those of the layouts: otherwise a format would be left out of these tests without a word."""
    missing = {DTYPES[dtype].name for form in FORMATS_HERE.values() for dtype, _ in form.layout.values()}
    assert all(torch_dtype(DTYPES[name]) is not None for name in missing)


ADAPTERS = {
    "LoRA, peft": ("base_model.model.l.0.q.lora_A.weight", "base_model.model.l.0.q.lora_B.weight"),
    "LoRA, kohya": ("lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight"),
    "LoHa, kohya": ("lora_unet_a.hada_w1_a", "lora_unet_a.hada_w1_b"),
}


@pytest.mark.parametrize("names", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters(names):
    """Factors are not merged one by one, as those of files are not."""
    model, adapter = {"l.0.q.weight": torch.ones(4, 4)}, {name: torch.ones(4, 4) for name in names}
    for dicts, base, which in (([adapter, adapter], None, 0), ([model, adapter], None, 1), ([model], adapter, "base")):
        with pytest.raises(CheckpointError, match="adapters are not merged") as error:
            fastinterp.merge_state_dicts(dicts, "task_arithmetic" if base else "linear", base=base, parameters=HALF)
        label = which if base else f"state dict {which}"
        assert str(error.value).startswith(f"{label} is a Lo") and f"(`{names[0]}`, `{names[1]}`)" in str(error.value)


def test_a_model_of_peft_with_its_adapter():
    layer = "base_model.model.l.0.q"
    weights = {
        f"{layer}.{part}.weight": torch.ones(4, 4) for part in ("base_layer", "lora_A.default", "lora_B.default")
    }
    with pytest.raises(
        CheckpointError, match="state dict 0 is a model of peft whose LoRA adapter is not merged into it"
    ):
        fastinterp.merge_state_dicts([weights, weights], "linear", parameters=HALF)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_wrapped_modules(prefix):
    """The error says what is in front of the names, and what it is in the other."""
    plain = {f"l.{i}.q.weight": torch.ones(2, 2) for i in range(3)}
    wrapped = {prefix + name: x for name, x in plain.items()}
    for a, b, first, second in ((plain, wrapped, f"{prefix}l.0", "l.0"), (wrapped, plain, "l.0", f"{prefix}l.0")):
        with pytest.raises(ShapeError) as error:
            fastinterp.merge_state_dicts([a, b], "linear", parameters=HALF)
        message = str(error.value)
        assert message.startswith("state dict 1 has other names than state dict 0; they are the same with ")
        assert message.endswith(f"Rename them, {first}.q.weight to {second}.q.weight and so on")
