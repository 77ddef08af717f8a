"""Adapters of diffusion models, in kohya's and diffusers' files: what is written is what diffusers fuses."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

import fastinterp  # noqa: E402
from fastinterp.errors import CheckpointError  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings(*(f"ignore::{kind}Warning" for kind in ("Future", "User", "Deprecation", "Runtime"))),
    pytest.mark.slow,
]
UNET = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv_shortcut", "time_emb_proj"]
TEXT = ["q_proj", "v_proj", "fc1"]


def pipeline() -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    return diffusers.StableDiffusionPipeline(
        unet=unet, text_encoder=text, vae=vae, tokenizer=None, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def factors(model: Any, **settings: Any) -> dict[str, Any]:
    """A random adapter of a component, in peft's names."""
    own = copy.deepcopy(model)
    torch.manual_seed(3)
    own.add_adapter(peft.LoraConfig(init_lora_weights=False, **settings))
    if settings.get("use_dora"):
        with torch.no_grad():
            for name, parameter in own.named_parameters():
                if "magnitude" in name:
                    parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    return dict(peft.get_peft_model_state_dict(own))


def kohya(unet: dict[str, Any], text: dict[str, Any], alphas: dict[str, float], te: str) -> dict[str, Any]:
    """As kohya's trainers write it."""
    file = {}
    for prefix, part in (("lora_unet_", unet), (te, text)):
        for name, tensor in part.items():
            module, end = name.rsplit(".lora_", 1)
            key = prefix + ("text_model_" if prefix == te else "") + module.replace(".", "_")
            which = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight", "magnitude_vector": "dora_scale"}[
                end
            ]
            file[f"{key}.{which}"] = tensor.contiguous()
            file[f"{key}.alpha"] = torch.tensor(alphas[prefix])
    return file


def written(tmp_path: Path, form: str, pipe: Any) -> Path:
    """An adapter of the UNet, rank 4, and of the text encoder, rank 2, in one of the forms of files."""
    targets = UNET[:4] if form in ("older", "processor") else UNET  # of attention: others had no older form
    unet = factors(pipe.unet, r=4, lora_alpha=6, target_modules=targets, use_dora=form == "dora")
    text = factors(pipe.text_encoder, r=2, lora_alpha=3, target_modules=TEXT, use_dora=form == "dora")
    file = tmp_path / "adapter" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir()
    if form in ("diffusers", "metadata"):
        metadata = {}
        if form == "metadata":
            metadata = {
                "unet_lora_adapter_metadata": {"r": 4, "lora_alpha": 6, "target_modules": UNET},
                "text_encoder_lora_adapter_metadata": {"r": 2, "lora_alpha": 3, "target_modules": TEXT},
            }
        pipe.save_lora_weights(file.parent, unet_lora_layers=unet, text_encoder_lora_layers=text, **metadata)
    elif form in ("older", "processor"):
        from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers

        renamed = {f"unet.{n}": t.contiguous() for n, t in convert_state_dict_to_diffusers(unet).items()}
        if form == "processor":
            renamed = {re.sub(r"\.(to_[a-z]+)(\.0)?\.lora\.", r".processor.\1_lora.", n): t for n, t in renamed.items()}
        save_file(renamed, file)
    else:
        te = "lora_te1_" if form == "te1" else "lora_te_"
        save_file(kohya(unet, text, {"lora_unet_": 1.5, te: 3.0}, te), file)
    return file


def load(pipe: Any, folder: Path, component: str) -> dict[str, Any]:
    """The weights of a component, as its library loads it."""
    kind = type(getattr(pipe, component))
    loaded, info = kind.from_pretrained(folder / component, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return dict(loaded.state_dict())


def by_formula(pipe: Any, component: str, scale: float, **settings: Any) -> dict[str, Any]:
    """W + scale * B A, DoRA as peft has it."""
    model = getattr(pipe, component)
    weights, products = dict(model.state_dict()), factors(model, **settings)
    for name, a in products.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            b, w = products[f"{module}.lora_B.weight"], weights[f"{module}.weight"]
            y = w + scale * (b.flatten(1) @ a.flatten(1)).reshape(w.shape)
            if (m := products.get(f"{module}.lora_magnitude_vector")) is not None:
                y = (y.flatten(1) * (m.flatten() / y.flatten(1).norm(dim=1))[:, None]).reshape(w.shape)
            weights[f"{module}.weight"] = y
    return weights


def assert_weights(got: dict[str, Any], want: dict[str, Any], before: dict[str, Any], changed: int = 5) -> None:
    """Of sums of at most 4 products, a scale, a sum, and of DoRA a length: a few roundings of float32 each."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=2e-5, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")
    assert sum(not torch.allclose(before[name], tensor, atol=1e-3) for name, tensor in want.items()) >= changed


# Form of the file -> the scale of its text encoder's products.
FORMS = {"diffusers": 1.0, "metadata": 1.5, "older": 0.0, "processor": 0.0, "kohya": 1.5, "te1": 1.5}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_what_diffusers_fuses(tmp_path, form):
    """Of the text encoder what the formula says, since diffusers loses adapters of those of today's transformers."""
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "base")
    file = written(tmp_path, form, pipe)
    model = f"{tmp_path / 'base'}+{file}:0.5"
    fastinterp.merge({"merge_method": "passthrough", "models": [{"model": model}]}, tmp_path / "out")
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    text = by_formula(pipe, "text_encoder", 0.5 * FORMS[form], r=2, target_modules=TEXT)
    old = dict(pipe.text_encoder.state_dict())
    assert_weights(load(pipe, tmp_path / "out", "text_encoder"), text, old, changed=5 if FORMS[form] else 0)
    pipe.load_lora_weights(file.parent)
    pipe.fuse_lora(lora_scale=0.5)
    pipe.unload_lora_weights()
    assert_weights(load(pipe, tmp_path / "out", "unet"), dict(pipe.unet.state_dict()), before)


def test_dora_of_kohya(tmp_path):
    """diffusers leaves `dora_scale` out."""
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "base")
    model = f"{tmp_path / 'base'}+{written(tmp_path, 'dora', pipe)}"
    fastinterp.merge({"merge_method": "passthrough", "models": [{"model": model}]}, tmp_path / "out")
    for component, scale, r, targets in (("unet", 0.375, (4, 6), UNET), ("text_encoder", 1.5, (2, 3), TEXT)):
        settings = {"r": r[0], "lora_alpha": r[1], "target_modules": targets, "use_dora": True}
        want = by_formula(pipe, component, scale, **settings)
        assert_weights(load(pipe, tmp_path / "out", component), want, dict(getattr(pipe, component).state_dict()))


def test_a_component_alone_takes_its_part_of_the_adapter(tmp_path):
    """The other parts are named: they would be lost."""
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "base")
    file = written(tmp_path, "kohya", pipe)
    alone = {"merge_method": "passthrough", "models": [{"model": f"{tmp_path / 'base' / 'unet'}+{file}"}]}
    with pytest.raises(CheckpointError, match=r"`lora_te_text_model_encoder_layers_0_[a-z0-9_]+\.weight`"):
        fastinterp.merge(alone, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    own = {name: t for name, t in load_file(file).items() if name.startswith("lora_unet_")}
    save_file(own, tmp_path / "unet_only.safetensors")
    both = {}
    for base, adapter in (("base", "unet_only.safetensors"), ("base/unet", "unet_only.safetensors")):
        model = f"{tmp_path / base}+{tmp_path / adapter}"
        out = tmp_path / base.replace("/", "_out_")
        fastinterp.merge({"merge_method": "passthrough", "models": [{"model": model}]}, f"{out}_merged")
        found = next(Path(f"{out}_merged").glob("**/diffusion_pytorch_model.safetensors"))
        unet = Path(f"{out}_merged/unet/diffusion_pytorch_model.safetensors")
        both[base] = load_file(unet if unet.exists() else found)
    assert both["base"].keys() == both["base/unet"].keys()
    assert all(torch.equal(both["base"][name], both["base/unet"][name]) for name in both["base"])
