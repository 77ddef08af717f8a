"""Merged models in transformers without files, and the Trainer's callbacks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastinterp
from fastinterp.errors import CheckpointError, ShapeError, UsageError
from tests.support.modules import assert_same_state, gpt2, llama, saved, state

pytestmark = pytest.mark.slow  # transformers takes seconds to import

transformers = pytest.importorskip("transformers")
from fastinterp.integrations.transformers import AverageCheckpoints, EMACallback, from_recipe  # noqa: E402


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("ends")
    return saved(llama(1), root / "a"), saved(llama(2), root / "b")


def average(a: Path, b: Path) -> dict[str, Any]:
    return {
        "merge_method": "linear", "models": [{"model": str(a)}, {"model": str(b)}], "parameters": {"weight": 0.5}
    }  # fmt: skip


# --- from_recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "float32", torch.float16], ids=str)
def test_the_module_that_loads_what_merge_writes(ends: tuple[Path, Path], tmp_path: Path, dtype: Any):
    how = average(*ends)
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    fastinterp.merge(how, tmp_path / "out", dtype=name)
    want, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    got = from_recipe(how, transformers.AutoModelForCausalLM, dtype=dtype)
    assert type(got) is type(want) and got.dtype == want.dtype and not got.training
    assert_same_state(want.state_dict(), got.state_dict())
    assert got.config.to_diff_dict() == want.config.to_diff_dict()
    assert got.generation_config.to_dict() == want.generation_config.to_dict()
    ids = torch.arange(1, 9)[None]
    assert torch.equal(got(ids).logits, want(ids).logits)  # with the buffers that no file has


def test_other_layers_and_tied_heads(tmp_path: Path):
    """The configuration is the output's: three layers of two models, whose heads are their embeddings."""
    a, b = (saved(llama(seed, tied=True), tmp_path / name) for seed, name in ((1, "a"), (2, "b")))
    sources = [[{"model": str(a), "layer_range": [0, 2]}], [{"model": str(b), "layer_range": [1, 2]}]]
    how = {"merge_method": "passthrough", "slices": [{"sources": source} for source in sources]}
    model = from_recipe(how, transformers.LlamaForCausalLM)
    assert model.config.num_hidden_layers == len(model.model.layers) == 3
    assert model.lm_head.weight is model.model.embed_tokens.weight
    own = transformers.LlamaForCausalLM.from_pretrained(b)
    assert torch.equal(model.model.layers[2].mlp.up_proj.weight, own.model.layers[1].mlp.up_proj.weight)


def test_names_that_differ_from_the_modules(tmp_path: Path):
    """GPT-2's bare model has no prefix; a checkpoint is loaded as it is."""
    whole = saved(gpt2(1), tmp_path / "gpt2")
    bare = from_recipe(whole, transformers.AutoModel)
    assert_same_state(transformers.AutoModel.from_pretrained(whole).state_dict(), bare.state_dict())


def test_merged_tensors_are_the_parameters(ends: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    """No second copy is made of them."""
    import fastinterp.integrations.transformers as module
    from fastinterp.torch_models.load import allocate

    made: list[int] = []

    def noted(*arguments: Any) -> Any:
        tensors, places = allocate(*arguments)
        made.extend(address for address, _ in places.values())
        return tensors, places

    monkeypatch.setattr(module, "allocate", noted)
    model = from_recipe(average(*ends), transformers.AutoModelForCausalLM, dtype="float32")
    assert {p.data_ptr() for p in model.parameters()} == set(made)


def test_a_head_that_the_merge_does_not_make(ends: tuple[Path, Path]):
    how = average(*ends)
    with pytest.raises(ShapeError) as caught:
        from_recipe(how, transformers.AutoModelForSequenceClassification)
    message = str(caught.value)
    assert (
        "does not fit LlamaForSequenceClassification: 1 tensor of the class that the merge does not make: score"
        in message
    )
    assert message.endswith("To load it anyway: strict=False")
    model = from_recipe(how, transformers.AutoModelForSequenceClassification, strict=False)
    want = fastinterp.load(how)["model.norm.weight"]
    assert torch.equal(model.model.norm.weight, want)


def test_refused(ends: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(UsageError, match="AutoModelForCTC has no model for a LlamaConfig"):
        from_recipe(average(*ends), transformers.AutoModelForCTC)
    with pytest.raises(UsageError, match="`model_class` must be a class of transformers"):
        from_recipe(average(*ends), llama)
    import shutil

    for end in ends:
        shutil.copytree(end, tmp_path / end.name)
        (tmp_path / end.name / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"it has no config.json, from which transformers makes the model"):
        from_recipe(average(tmp_path / "a", tmp_path / "b"), transformers.AutoModelForCausalLM)


# --- callbacks --------------------------------------------------------------------------------------------------------


class Numbers(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(2, 90, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


class Weights(transformers.TrainerCallback):  # type: ignore[name-defined]
    """Copies of the weights after each step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        self.seen.append({n: p.detach().clone() for n, p in model.named_parameters()})

    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        self.seen.append({n: p.detach().clone() for n, p in model.named_parameters()})


def trainer(model: Any, out: Path, callbacks: list[Any], steps: int = 4, **arguments: Any) -> Any:
    settings = {
        "max_steps": steps, "save_steps": 1, "per_device_train_batch_size": 4, "report_to": [], "learning_rate": 0.05,
        "disable_tqdm": True, "use_cpu": True, "lr_scheduler_type": "constant", "seed": 3,
    } | arguments  # fmt: skip
    args = transformers.TrainingArguments(str(out), **settings)
    return transformers.Trainer(model, args, train_dataset=Numbers(), callbacks=callbacks)


def moved(seen: list[dict[str, torch.Tensor]], decay: float) -> dict[str, torch.Tensor]:
    """The moving average of weights, in float32 as its definition rounds it."""
    average = {n: x.float() for n, x in seen[0].items()}
    for weights in seen[1:]:
        average = {n: x + (1.0 - decay) * (weights[n].float() - x) for n, x in average.items()}
    return average


@pytest.mark.parametrize("tied", [False, True])
def test_moving_average_of_a_run(tmp_path: Path, tied: bool):
    model, seen, callback = llama(1, tied=tied), Weights(), EMACallback(0.75)
    trainer(model, tmp_path, [seen, callback]).train()
    want = moved(seen.seen, 0.75)
    assert callback.averages.keys() == want.keys()
    for name, average in callback.averages.items():
        torch.testing.assert_close(average, want[name], rtol=0, atol=0)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint-4" / "ema", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and loaded.dtype == torch.bfloat16
    assert all(torch.equal(p, want[n].bfloat16()) for n, p in loaded.named_parameters())
    stored = load_file(tmp_path / "checkpoint-4" / "ema" / "model.safetensors")
    assert all(torch.equal(x, want[n]) for n, x in stored.items())  # float32
    before = state(model)
    callback.copy_to(model)
    assert all(torch.equal(p, want[n].bfloat16()) for n, p in model.named_parameters())
    assert any(not torch.equal(before[n], x) for n, x in model.state_dict().items())


def test_training_that_resumes_goes_on_with_the_average(tmp_path: Path):
    whole, halves = EMACallback(0.75, every=2), EMACallback(0.75, every=2)
    trainer(llama(1), tmp_path / "whole", [whole]).train()
    trainer(llama(1), tmp_path / "halves", [EMACallback(0.75, every=2)], steps=2).train()
    trainer(llama(1), tmp_path / "halves", [halves]).train(resume_from_checkpoint=str(tmp_path / "halves/checkpoint-2"))
    assert_same_state(whole.averages, halves.averages)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # that peft asks for
def test_only_what_is_trained_of_an_adapter(tmp_path: Path):
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(0)
        return peft.get_peft_model(llama(1), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))

    seen, callback = Weights(), EMACallback(0.5)
    trainer(adapted(), tmp_path, [seen, callback], steps=2).train()
    assert callback.averages and all("lora_" in name for name in callback.averages)
    want = moved(seen.seen, 0.5)
    loaded = peft.PeftModel.from_pretrained(llama(1), tmp_path / "checkpoint-2" / "ema")
    found = {n: p for n, p in loaded.named_parameters() if "lora_" in n}
    assert found.keys() == callback.averages.keys()
    assert all(torch.equal(p, want[n]) for n, p in found.items())
    again = EMACallback(0.5)
    trainer(adapted(), tmp_path, [again], steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    straight = EMACallback(0.5)
    trainer(adapted(), tmp_path / "straight", [straight], steps=3).train()
    assert_same_state(straight.averages, again.averages)


def test_last_checkpoints_are_averaged_at_every_save(tmp_path: Path):
    run = trainer(llama(1), tmp_path, [AverageCheckpoints(3, weights="ema", decay=0.5)], save_total_limit=3)
    run.train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["averaged", "checkpoint-2", "checkpoint-3", "checkpoint-4"]
    weights = {2: 1 / 7, 3: 2 / 7, 4: 4 / 7}
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": str(tmp_path / f"checkpoint-{step}"), "parameters": {"weight": w}} for step, w in weights.items()
        ],
    }
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "averaged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_state(fastinterp.load(recipe), copy.deepcopy(loaded.state_dict()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMACallback(1.5), "decay must be in 0..1, got 1.5"),
        (lambda: EMACallback(every=0), "`every` must be 1 or more, got 0"),
        (lambda: AverageCheckpoints(1), "`last` must be in 2..64, got 1"),
        (lambda: AverageCheckpoints(3, weights="cosin"), "did you mean `cosine`?"),
        (lambda: AverageCheckpoints(3, out="checkpoint-avg"), "the Trainer takes it for one of its checkpoints"),
    ],
)
def test_arguments_of_callbacks_are_refused_before_training(make: Any, message: str):
    with pytest.raises(UsageError) as caught:
        make()
    assert message in str(caught.value)


def test_a_limit_of_checkpoints_that_is_too_small(tmp_path: Path):
    with pytest.raises(UsageError, match=r"keeps 2 checkpoints, but the last 3 .* set save_total_limit=3 or more"):
        trainer(llama(1), tmp_path, [AverageCheckpoints(3)], save_total_limit=2).train()
