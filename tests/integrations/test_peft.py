"""Weighted combinations of LoRA adapters, beside PEFT's own."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastinterp.errors import ShapeError, UsageError
from tests.support.modules import llama

pytestmark = [
    pytest.mark.slow,  # peft takes seconds to import
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

peft = pytest.importorskip("peft")
from peft.tuners.lora import LoraLayer  # noqa: E402

from fastinterp.integrations.peft import COMBINATION_TYPES, add_weighted_adapter  # noqa: E402

WEIGHTS = {"first": 0.7, "second": -0.4, "third": 0.5}
DETERMINISTIC = [kind for kind in COMBINATION_TYPES if "dare" not in kind]


def config(**settings: Any) -> Any:
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "init_lora_weights": False} | settings))


def adapted(dtype: torch.dtype = torch.float32, module: Any = None, **settings: Any) -> Any:
    """A model with adapters first, second and third of different scales, on layers that only some of them have."""
    torch.manual_seed(0)
    targets = {"first": ["q_proj", "embed_tokens"], "second": ["q_proj", "down_proj"], "third": ["q_proj", "down_proj"]}
    model = None
    for alpha, (name, modules) in enumerate(targets.items(), 3):
        one = config(target_modules=modules, lora_alpha=alpha, **settings)
        if model is None:
            model = peft.get_peft_model(module or llama(1, dtype=dtype), one, name, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, one, autocast_adapter_dtype=False)
    assert model is not None
    return model


def deltas(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    """What an adapter adds to the weights, by layer."""
    return {
        name: layer.get_delta_weight(adapter).detach().float()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and (adapter in layer.lora_A or adapter in layer.lora_embedding_A)
    }


def summed(model: Any, weights: dict[str, float]) -> dict[str, torch.Tensor]:
    """The weighted sum of the adapters' deltas, in float64."""
    total: dict[str, torch.Tensor] = {}
    for adapter, weight in weights.items():
        for name, delta in deltas(model, adapter).items():
            total[name] = total.get(name, 0) + weight * delta.double()
    return total


def combine(model: Any, function: Any = None, weights: dict[str, float] = WEIGHTS, **settings: Any) -> Any:
    """The model with the adapter `mix`, by this package or by `function`."""
    arguments = [*weights], [*weights.values()], "mix"
    function(*arguments, **settings) if function else add_weighted_adapter(model, *arguments, **settings)
    return model


def assert_close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys() and got
    for name, delta in want.items():
        assert float((got[name] - delta).abs().max()) <= tolerance * float(delta.abs().max()), name


@pytest.mark.parametrize(
    ("kind", "sign"), [*((kind, "total") for kind in DETERMINISTIC), ("ties", "frequency"), ("ties_svd", "frequency")]
)
def test_the_result_of_peft(kind: str, sign: str):
    settings: dict[str, Any] = {"combination_type": kind, "density": 0.4, "majority_sign_method": sign}
    theirs, ours = adapted(), adapted()
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    combine(theirs, theirs.base_model.add_weighted_adapter, **settings)
    combine(ours, **settings)
    assert_close(deltas(ours, "mix"), deltas(theirs, "mix"), 1e-5 if kind.endswith("svd") else 1e-6)
    own, other = ({n: (p.shape, p.dtype, p.requires_grad) for n, p in m.named_parameters()} for m in (ours, theirs))
    assert own == other
    assert all(torch.equal(p, before[n]) for n, p in ours.named_parameters() if n in before)  # nothing else changes
    own, other = (dataclasses.asdict(m.peft_config["mix"]) for m in (ours, theirs))
    own.pop("init_lora_weights"), other.pop("init_lora_weights")
    assert own == other
    for model in (ours, theirs):
        model.set_adapter("mix")
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_exact_ones_are_the_sum_of_the_deltas(kind: str, dtype: torch.dtype):
    """svd by a rank that loses nothing; in bf16 the factors are rounded once."""
    model = adapted(dtype)
    want = summed(model, WEIGHTS)
    combine(model, combination_type=kind, svd_rank=12)
    assert model.peft_config["mix"].r == 12
    assert_close(deltas(model, "mix"), want, 2e-6 if dtype == torch.float32 else 3e-2)


def test_factors_of_cat_are_rounded_once():
    model = combine(adapted(torch.bfloat16), combination_type="cat")
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
    first = 0
    for adapter, weight in WEIGHTS.items():
        a = layer.lora_A[adapter].weight.float() * torch.tensor(weight * layer.scaling[adapter])  # rounded to float32
        assert torch.equal(layer.lora_A["mix"].weight[first : first + 4], a.bfloat16())
        assert torch.equal(layer.lora_B["mix"].weight[:, first : first + 4], layer.lora_B[adapter].weight)
        first += 4


def test_svd_is_the_best_of_its_rank():
    model = adapted()
    want = summed(model, WEIGHTS)
    combine(model, combination_type="svd", svd_rank=3)
    for name, delta in deltas(model, "mix").items():
        u, s, v = torch.linalg.svd(want[name], full_matrices=False)
        best = (u[:, :3] * s[:3]) @ v[:3]
        assert float((delta - best).abs().max()) < 1e-5 * float(s[0])


def test_clamped_factors():
    theirs, ours = adapted(), adapted()
    settings: dict[str, Any] = {"combination_type": "svd", "svd_clamp": 0.9}
    combine(theirs, theirs.base_model.add_weighted_adapter, **settings, svd_full_matrices=False)
    combine(ours, **settings)
    assert_close(deltas(ours, "mix"), deltas(theirs, "mix"), 1e-4)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_random_masks(kind: str, sign: str):
    """Kept elements are divided by the density; the seed and the layer's name decide which they are."""
    weights = {"second": 1.0}
    made = [
        combine(adapted(), weights=weights | {"third": 1e-30}, combination_type=kind, density=0.5, seed=seed,
                majority_sign_method=sign)
        for seed in (0, 0, 1)
    ]  # fmt: skip
    found = []
    for model in made:
        layer = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.down_proj"))
        scale = math.sqrt(layer.scaling["second"])
        found.append(layer.lora_A["mix"].weight / (layer.lora_A["second"].weight * scale))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    if kind == "dare_linear":
        kept = (found[0] - 2.0).abs() < 1e-5
        assert bool((kept | (found[0].abs() < 1e-5)).all()) and 0.3 < float(kept.float().mean()) < 0.7


def test_rank_stabilised_scaling_is_kept():
    model = adapted(use_rslora=True)
    want = summed(model, WEIGHTS)
    combine(model, combination_type="cat")
    assert_close(deltas(model, "mix"), want, 2e-6)


def test_ranks_that_differ_by_layer_and_adapter():
    model = adapted(rank_pattern={"q_proj": 2})
    model.add_adapter("d", config(r=7, target_modules=["q_proj"]), autocast_adapter_dtype=False)
    weights = WEIGHTS | {"d": 2.0}
    want = summed(model, weights)
    combine(model, weights=weights, combination_type="cat")
    assert model.peft_config["mix"].r == 4 + 4 + 4 + 7
    assert_close(deltas(model, "mix"), want, 2e-6)
    with pytest.raises(UsageError, match=r"sums the factors of adapters of one rank, got ranks 4, 4, 4, 7\. Use `cat`"):
        add_weighted_adapter(model, [*weights], [1.0] * 4, "m", combination_type="linear")


def test_one_adapter_is_scaled_whatever_the_type():
    model = adapted()
    want = summed(model, {"second": -0.4})
    combine(model, weights={"second": -0.4}, combination_type="cat")
    assert_close(deltas(model, "mix"), want, 1e-6)


def test_convolutions():
    class Convolutions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.three = torch.nn.Conv2d(6, 8, 1), torch.nn.Conv2d(8, 5, 3)

    def made() -> Any:
        torch.manual_seed(0)
        model = peft.get_peft_model(Convolutions(), config(target_modules=["one", "three"]), "first")
        model.add_adapter("second", config(target_modules=["three"]))
        return model

    weights = {"first": 0.5, "second": 2.0}
    for kind in ("cat", "svd", "linear", "ties_svd"):
        theirs, ours = made(), made()
        settings: dict[str, Any] = {"combination_type": kind, "density": 0.5}
        combine(theirs, theirs.base_model.add_weighted_adapter, weights, **settings)
        combine(ours, weights=weights, **settings)
        assert_close(deltas(ours, "mix"), deltas(theirs, "mix"), 1e-5)


def test_modules_to_save_of_one_adapter_are_taken_over(tmp_path: Path):
    one, other = config(target_modules=["q_proj"], modules_to_save=["lm_head"]), config(target_modules=["q_proj"])
    model = peft.get_peft_model(llama(1, dtype=torch.float32), one, "first")
    model.add_adapter("second", other)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["first"].weight.fill_(0.25)
    for order in (["first", "second"], ["second", "first"]):
        name = f"{order[0]} leads"
        add_weighted_adapter(model, order, [1.0, 1.0], name, "cat")
        model.set_adapter(name)
        assert bool((model.base_model.model.lm_head.modules_to_save[name].weight == 0.25).all())
        ids = torch.arange(1, 9)[None]
        want = model(ids).logits
        model.save_pretrained(tmp_path, selected_adapters=[name])
        again = peft.PeftModel.from_pretrained(llama(1, dtype=torch.float32), tmp_path / name)
        torch.testing.assert_close(again(ids).logits, want)
    model.add_adapter("third", one)
    with pytest.raises(UsageError, match="lm_head was trained as a whole by several of the adapters"):
        add_weighted_adapter(model, ["first", "third"], [1.0, 1.0], "no", "cat")


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_saved_and_loaded(tmp_path: Path, kind: str):
    model = combine(adapted(), combination_type=kind)
    want = deltas(model, "mix")
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    again = peft.PeftModel.from_pretrained(llama(1, dtype=torch.float32), tmp_path / "mix")
    got = deltas(again, "default")
    assert all(torch.equal(got[name], delta) for name, delta in want.items()) and got.keys() == want.keys()


def test_takes_a_lora_model_and_a_weight_of_0():
    model = adapted()
    want = summed(model, {"first": 0.0, "second": 1.5})
    add_weighted_adapter(model.base_model, ["first", "second"], [0.0, 1.5], "mix", "cat")
    got = deltas(model, "mix")
    assert got.keys() == want.keys()
    assert all(torch.allclose(got[name], delta.float(), atol=1e-6) for name, delta in want.items())


def test_refused():
    model = adapted()

    def refused(message: str, *arguments: Any, kind: Any = UsageError, **settings: Any) -> None:
        defaults = (["first", "second"], [1.0, 1.0], "mix")
        names = [*model.peft_config]
        with pytest.raises(kind) as caught:
            add_weighted_adapter(model, *(arguments + defaults[len(arguments) :]), **settings)
        assert message in str(caught.value)
        assert [*model.peft_config] == names

    refused("the model has no adapter 'd'", ["first", "d"])
    refused("each adapter needs a weight, got 2 adapters and 1 weights", ["first", "second"], [1.0])
    refused("each adapter needs a weight, got 0 adapters", [], [])
    refused("weights must be finite numbers", ["first", "second"], [1.0, math.nan])
    refused("has an adapter 'first' already: model.delete_adapter('first')", ["first", "second"], [1.0, 1.0], "first")
    refused("unknown combination_type 'tie', did you mean `ties`?", combination_type="tie")
    refused("`ties` needs a `density` above 0 and at most 1, got None", combination_type="ties")
    refused("must be total or frequency, got 'mean'", majority_sign_method="mean")
    with pytest.raises(UsageError, match="`model` must be a PeftModel with LoRA adapters, got LlamaForCausalLM"):
        add_weighted_adapter(llama(1), ["first"], [1.0], "mix")
    model.add_adapter("dora", config(target_modules=["q_proj"], use_dora=True))
    refused("adapter 'dora' has `use_dora`: it is more than two factors", ["first", "dora"])
    model = adapted(rank_pattern={"layers.0.self_attn.q_proj": 2})
    model.add_adapter("d", config(target_modules=["q_proj"]))
    refused("have no sum. Use `cat` or `svd`", ["first", "d"], kind=ShapeError, combination_type="linear")
