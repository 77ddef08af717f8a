"""A module set to points of a path: always from the end points, in place, and back to its own weights at the end."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import fastinterp
from fastinterp.errors import UsageError
from tests.support.modules import Buffers, assert_same_state, gpt2, llama, same_bits, saved, state

KINDS = {"llama": llama, "tied": lambda seed: llama(seed, tied=True), "gpt2": gpt2}


@pytest.fixture(scope="module", params=KINDS)
def family(request, tmp_path_factory):
    """(what makes the module, base/, p/, f/)"""
    make, root = KINDS[request.param], tmp_path_factory.mktemp(request.param)
    return make, *(saved(make(seed), root / name) for seed, name in enumerate(("base", "p", "f")))


def merged(recipe, folder, module):
    """What the module must hold after `recipe`: by `merge`, through files."""
    fastinterp.merge(recipe, folder)
    tensors = load_file(folder / "model.safetensors")
    expected = state(module)
    for name in expected:
        if name in tensors:
            expected[name] = tensors[name]
    if "lm_head.weight" not in tensors:
        embedding = next(n for n in tensors if n.endswith(("embed_tokens.weight", "wte.weight")))
        expected["lm_head.weight"] = tensors[embedding]
    return expected


def directions(base, p, f, positive, formal):
    models = [{"model": str(m), "parameters": {"weight": w}} for m, w in ((p, positive), (f, formal))]
    return {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}


@pytest.mark.parametrize("resident", [True, False])
def test_set_is_what_merge_writes(family, tmp_path, resident):
    make, base, p, f = family
    module = make(7)
    before = state(module)
    with fastinterp.Live(module, base=base, directions={"positive": p, "formal": f}, resident=resident) as live:
        places = {n: t.data_ptr() for n, t in module.state_dict().items()}
        assert not live.alphas
        for k, (positive, formal) in enumerate([(0.7, -0.2), (1.0, 0.0), (0.0, 0.0), (0.3, 2.0)]):
            live.set(positive=positive, formal=formal)
            assert live.alphas == {"positive": positive, "formal": formal}
            expected = merged(directions(base, p, f, positive, formal), tmp_path / str(k), module)
            assert_same_state(expected, state(module))
        live.set(formal=1)  # a direction that is not named is at 0
        assert live.alphas == {"positive": 0.0, "formal": 1.0}
        assert places == {n: t.data_ptr() for n, t in module.state_dict().items()}
    assert_same_state(before, state(module))


def test_line_is_what_interpolate_writes(family, tmp_path):
    make, a, b, _ = family
    module = make(7)
    live = fastinterp.Live(module, a=a, b=b, hooks=False)
    for alpha in (0.3, 1.0, -0.5, 0.0):
        live.set(alpha)
        fastinterp.interpolate(a, b, alpha, tmp_path / "out", force=True)
        tensors = load_file(tmp_path / "out" / "model.safetensors")
        assert_same_state(tensors, {name: tensor for name, tensor in state(module).items() if name in tensors})
    live.close()


def test_state_dicts_and_own_weights_are_end_points():
    """A state dict that is the module's own memory is copied first, and never written to."""
    module, other = llama(1), llama(2)
    before, there = state(module), state(other)
    for base in (None, module.state_dict()):
        with fastinterp.Live(module, base=base, directions={"far": other.state_dict()}) as live:
            for alpha in (0.5, 1.0, 0.5, 0.0):
                live.set(far=alpha)
                got = state(module)
            assert_same_state(before, got)
            live.set({"far": 1.0})
            assert_same_state(there, state(module))
            assert_same_state(there, state(other))
        assert_same_state(before, state(module))


def test_stores_the_module_s_dtype(tmp_path):
    """Bfloat16 end points, a float32 module: one rounding, to float32."""
    a, b = saved(llama(1), tmp_path / "a"), saved(llama(2), tmp_path / "b")
    module = llama(3, dtype=torch.float32)
    with fastinterp.Live(module, a=a, b=b) as live:
        live.set(0.3)
        fastinterp.interpolate(a, b, 0.3, tmp_path / "out", dtype="float32")
        assert_same_state(load_file(tmp_path / "out" / "model.safetensors"), state(module))


def test_only_layers_that_match(tmp_path):
    a, b = saved(llama(1), tmp_path / "a"), saved(llama(2), tmp_path / "b")
    module = llama(3)
    before, far = state(module), state(llama(2))
    with fastinterp.Live(module, a=a, b=b, layers=["model.layers.1.*", "lm_head*"]) as live:
        live.set(1.0)
        for name, tensor in state(module).items():
            moved = name.startswith(("model.layers.1.", "lm_head"))
            assert same_bits(tensor, (far if moved else before)[name]), name
    with pytest.raises(UsageError, match=r"no tensor of the module matches 'model\.layer\.\*'"):
        fastinterp.Live(module, a=a, b=b, layers="model.layer.*")


def test_buffers():
    """Floating buffers move; integers, booleans and those that are not saved stay."""
    module = Buffers(1)
    module.scratch.fill_(9)
    with fastinterp.Live(module, a=Buffers(2).state_dict(), b=Buffers(4).state_dict()) as live:
        live.set(0.5)
        assert module.norm.running_mean.tolist() == [3.0] * 4
        assert module.scale.tolist() == [3.0] * 3
        assert module.norm.num_batches_tracked.item() == 1
        assert module.mask.tolist() == [True, False]
        assert module.scratch.tolist() == [9.0] * 5
