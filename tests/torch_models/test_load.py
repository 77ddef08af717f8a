"""Merged models in memory: the same bytes as in files, and into modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastinterp
from fastinterp.errors import BackendError, CheckpointError, RecipeError, ShapeError, UsageError
from fastinterp.execute import rounds
from fastinterp.execute.to_memory import fill
from tests.support.checkpoints import expected as made
from tests.support.checkpoints import family, read, recipe, saved, write
from tests.support.modules import assert_same_state, gpt2, llama, same_bits, state
from tests.support.modules import saved as saved_module

METHODS = {
    "linear": {"merge_method": "linear", "parameters": {"weight": 0.5}},
    "slerp": {"merge_method": "slerp", "parameters": {"t": 0.3}},
    "ties": {"merge_method": "ties", "parameters": {"weight": 0.7, "density": 0.4}},
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """(a/, b/, the modules that were saved there)"""
    root, modules = tmp_path_factory.mktemp("ends"), (llama(1), llama(2))
    return *(saved_module(m, root / name) for m, name in zip(modules, "ab", strict=True)), modules


def asked(ends, method="linear"):
    a, b, _ = ends
    found = dict(METHODS[method], models=[{"model": str(a)}, {"model": str(b)}])
    return found if method == "linear" else found | {"base_model": str(a)}


@pytest.mark.parametrize("method", METHODS)
def test_load_is_what_merge_writes(ends, tmp_path, method):
    how = asked(ends, method)
    fastinterp.merge(how, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert_same_state(written, fastinterp.load(how))
    assert_same_state(written, dict(fastinterp.load_iter(how)))
    with np.errstate(all="ignore"):
        arrays = fastinterp.load(how, framework="numpy")
    assert_same_state(written, {n: torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16) for n, x in arrays.items()})


def test_every_dtype_and_shape(tmp_path):
    """Mixed dtypes, integers, 0-d and empty tensors, NaN: through numpy, against the reference."""
    from fastinterp.ops.combine import Combine

    models = family(2)
    paths = saved(tmp_path, models)
    how = recipe("linear", paths, weights=[1, 1])
    expected = made(models, Combine((0.5, 0.5), sums_to_one=True))
    arrays = fastinterp.load(how, framework="numpy", threads=2)
    assert arrays.keys() == expected.keys()
    for name, tensor in expected.items():
        assert arrays[name].shape == tensor.shape
        assert arrays[name].tobytes() == tensor.raw.tobytes(), name
    streamed = dict(fastinterp.load_iter(how, framework="numpy"))
    assert {n: x.tobytes() for n, x in streamed.items()} == {n: x.tobytes() for n, x in arrays.items()}


def test_sources_of_every_kind(ends, tmp_path):
    """A file, YAML text, a mapping, a point, a checkpoint's folder and one of its files."""
    import yaml

    a, _, (module, _) = ends
    how = asked(ends)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(how))
    expected = fastinterp.load(how)
    for source in (tmp_path / "recipe.yml", str(tmp_path / "recipe.yml"), yaml.safe_dump(how)):
        assert_same_state(expected, fastinterp.load(source))
    assert_same_state(expected, fastinterp.load(fastinterp.Point("x", {}, how)))
    for source in (a, a / "model.safetensors"):
        assert_same_state(state(module), fastinterp.load(source))
    with pytest.raises(RecipeError, match="there is no such recipe file"):
        fastinterp.load(tmp_path / "none.yml")
    with pytest.raises(UsageError, match="`recipe` must be a path, got 3"):
        fastinterp.load(3)  # type: ignore[arg-type]


def test_options(ends, tmp_path):
    how = asked(ends)
    tensors = fastinterp.load(how, dtype="float32", device="cpu")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    fastinterp.merge(how, tmp_path / "out", rounding="stochastic", seed=7)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert_same_state(written, fastinterp.load(how, rounding="stochastic", seed=7))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"framework": "jax"}, UsageError, "framework must be torch or numpy, got 'jax'"),
        ({"device": "moon"}, BackendError, "device 'moon' cannot be used"),
        ({"device": "cuda", "framework": "numpy"}, BackendError, "numpy arrays are in the CPU's memory"),
        ({"dtype": "int8"}, UsageError, "unknown dtype 'int8'"),
        ({"max_memory": "1KB"}, UsageError, "--max-memory allows 1000"),
    ],
)
def test_bad_arguments(ends, given, error, message):
    with pytest.raises(error, match=message):
        fastinterp.load(asked(ends), **given)


def test_stream_comes_in_parts(ends, monkeypatch):
    """Tensors come before all of the models were read, and files are closed when the iterator is let go."""
    monkeypatch.setattr(rounds, "ROUND_BYTES", 10_000)
    stream = fastinterp.load_iter(asked(ends))
    first = [next(stream) for _ in range(3)]
    whole = fastinterp.load(asked(ends))
    for name, tensor in first:
        assert same_bits(whole[name], tensor)
    stream.close()
    assert len(dict(fastinterp.load_iter(asked(ends)))) == len(whole)


def test_file_that_changes_while_it_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "ROUND_BYTES", 10_000)
    a, b = (saved_module(llama(seed), tmp_path / str(seed)) for seed in (1, 2))
    stream = fastinterp.load_iter({"merge_method": "linear", "models": [{"model": str(m)} for m in (a, b)]} | WEIGHT)
    next(stream)
    save_file(load_file(b / "model.safetensors"), b / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="it changed while it was being read"):
        list(stream)


WEIGHT = {"parameters": {"weight": 1.0}}


@pytest.mark.parametrize("make", [llama, gpt2])
def test_load_into_module(tmp_path, make):
    """The module computes what one that is read from the merged files computes."""
    a, b = (saved_module(make(seed), tmp_path / str(seed)) for seed in (1, 2))
    how = {"merge_method": "linear", "models": [{"model": str(m)} for m in (a, b)]} | WEIGHT
    fastinterp.merge(how, tmp_path / "out")
    module = make(3)
    places = {n: t.data_ptr() for n, t in module.state_dict().items()}
    fastinterp.load_into(module, how)
    assert places == {n: t.data_ptr() for n, t in module.state_dict().items()}
    there = make(4)
    there.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=False)  # GPT-2's head is tied
    ids = torch.arange(1, 9)[None]
    assert torch.equal(module(ids).logits, there(ids).logits)


def test_load_into_takes_the_module_s_dtype(ends):
    module = llama(3, dtype=torch.float32)
    fastinterp.load_into(module, asked(ends))
    assert_same_state(fastinterp.load(asked(ends), dtype="float32"), state(module))


def test_load_into_what_is_no_module(ends):
    module = torch.nn.Linear(2, 2)
    told = r"^`module` must be a torch\.nn\.Module, got dict"
    with pytest.raises(UsageError, match=told + r"\. Are they swapped\? It is load_into\(module, recipe\)$"):
        fastinterp.load_into(asked(ends), module)
    with pytest.raises(UsageError, match=told + "$"):
        fastinterp.load_into({}, asked(ends))
    with pytest.raises(UsageError, match=r"^`recipe` must be a path, got Linear$"):
        fastinterp.load_into(module, module)


def test_load_into_some_layers(ends):
    module = llama(3)
    before, whole = state(module), fastinterp.load(asked(ends))
    fastinterp.load_into(module, asked(ends), layers="model.layers.0.*")
    for name, tensor in state(module).items():
        assert same_bits(tensor, (whole if name.startswith("model.layers.0.") else before)[name]), name


def test_thresholds_of_the_whole_model(ends):
    """What a method asks about the whole model does not depend on which layers are wanted."""
    how = asked(ends, "ties")
    how["parameters"] = dict(how["parameters"], preset="paper")
    module = llama(3)
    fastinterp.load_into(module, how, layers="model.layers.0.*")
    whole = fastinterp.load(how)
    for name, tensor in state(module).items():
        if name.startswith("model.layers.0."):
            assert same_bits(tensor, whole[name]), name


def test_tied_weights(tmp_path, ends):
    """A recipe that makes two of what is one in the module is refused before anything is written."""
    module = llama(3, tied=True)
    before = state(module)
    with pytest.raises(ShapeError, match="are one tensor in the module, but the recipe makes two that differ"):
        fastinterp.load_into(module, asked(ends))
    assert_same_state(before, state(module))
    tensors = load_file(ends[0] / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    (tmp_path / "own").mkdir()
    save_file(tensors, tmp_path / "own" / "model.safetensors")
    fastinterp.load_into(module, tmp_path / "own")
    assert_same_state(tensors, state(module))


def test_integer_buffers(tmp_path):
    """They are taken over; another integer dtype is a mismatch."""
    norm = torch.nn.BatchNorm1d(3)
    norm.num_batches_tracked.fill_(5)
    (tmp_path / "a").mkdir()
    save_file(dict(norm.state_dict()), tmp_path / "a" / "model.safetensors")
    module = torch.nn.BatchNorm1d(3)
    fastinterp.load_into(module, tmp_path / "a")
    assert module.num_batches_tracked.item() == 5
    module.num_batches_tracked = module.num_batches_tracked.to(torch.int32)
    with pytest.raises(ShapeError, match=r"num_batches_tracked is torch\.int32 in the module but I64"):
        fastinterp.load_into(module, tmp_path / "a")


def test_every_mismatch_at_once(ends):
    module = torch.nn.Module()
    module.lm_head = torch.nn.Linear(3, 4, bias=False)
    module.other = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ShapeError) as caught:
        fastinterp.load_into(module, asked(ends))
    message = str(caught.value)
    assert "lm_head.weight is [4, 3] in the module but [96, 32] in the recipe's model" in message
    assert "other [2] is not in the recipe's model" in message
    assert "model.norm.weight of the recipe's model is not in the module" in message


def test_files_read_once(ends, monkeypatch):
    """By the pump's own count."""
    reports = []

    def seen(*args, **keys):
        reports.extend(fill(*args, **keys))

    monkeypatch.setattr("fastinterp.torch_models.load.fill", seen)
    tensors = fastinterp.load(asked(ends))
    nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
    assert (reports[0].bytes_read, reports[0].bytes_written) == (2 * nbytes, nbytes)


def test_no_file_is_left_open(ends):
    import os

    before = len(os.listdir("/proc/self/fd"))
    fastinterp.load(asked(ends))
    stream = fastinterp.load_iter(asked(ends))
    next(stream)
    stream.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_dtype_that_a_library_lacks(tmp_path):
    from fastinterp.ops.dtypes import DTYPES
    from tests.support.checkpoints import Tensor

    path = tmp_path / "a"
    write(path, {"x": Tensor(DTYPES["F4"], (4,), np.zeros(2, np.uint8))})
    assert read(path)["x"].dtype.name == "F4"
    for framework in ("torch", "numpy"):
        with pytest.raises(UsageError, match=f"{framework} has no dtype for F4"):
            fastinterp.load(path, framework=framework)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = torch.nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
        self.head = self.wte


def test_tied_tensors_may_be_rounded_at_random(tmp_path):
    """Each name draws its own numbers; the module has one tensor, and gets those of its first name."""
    models = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        x = torch.randn(4096)
        save_file({"wte": x, "head": x.clone()}, tmp_path / f"{name}.safetensors")
        models.append({"model": str(tmp_path / f"{name}.safetensors"), "parameters": {"weight": seed + 1}})
    recipe = {"merge_method": "linear", "models": models, "rounding": "stochastic", "seed": 3}
    module = Tied()
    fastinterp.load_into(module, recipe)
    made = fastinterp.load(recipe, dtype="bfloat16")
    assert torch.equal(module.wte, made["wte"]) and not torch.equal(made["wte"], made["head"])


class Extra(torch.nn.Linear):
    """Its state_dict holds one tensor more than it computes with."""

    def get_extra_state(self):
        return torch.zeros(3)

    def set_extra_state(self, state):
        raise AssertionError("it is left alone")


def test_extra_state_is_left_alone(tmp_path):
    save_file({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "a.safetensors")
    save_file(
        {"weight": torch.ones(2, 2), "bias": torch.ones(2), "_extra_state": torch.ones(3)}, tmp_path / "b.safetensors"
    )
    for name in "ab":
        module = Extra(2, 2)
        fastinterp.load_into(module, tmp_path / f"{name}.safetensors")
        assert module.weight.tolist() == [[1.0, 1.0]] * 2
