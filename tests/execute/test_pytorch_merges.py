"""Merges of files of torch.save: the bytes of the same merge of safetensors files, in every command."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import fastinterp
from fastinterp.cli import commands
from fastinterp.errors import StorageError
from fastinterp.output.receipt import RECEIPT
from tests.support.checkpoints import Tensor, assert_same, family, read, recipe, saved, write

torch = pytest.importorskip("torch")


def as_torch(t: Tensor) -> Any:
    """The same tensor as one of torch, with a storage of its own."""
    if not t.raw.size:
        return torch.zeros(t.shape, dtype=getattr(torch, t.dtype.library_name))
    data = torch.from_numpy(np.array(t.raw).reshape(-1))
    return data.view(getattr(torch, t.dtype.library_name)).reshape(t.shape)


def save(folder: Path, model: Mapping[str, Tensor], shards: int = 1) -> str:
    """A model as transformers saved it before safetensors."""
    folder.mkdir(parents=True)
    names, where = list(model), dict[str, str]()
    for i in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = names[len(names) * i // shards : len(names) * (i + 1) // shards]
        torch.save({name: as_torch(model[name]) for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return str(folder)


def merged(how: Any, out: Path) -> tuple[dict[str, Tensor], Any]:
    report = fastinterp.merge(how, out)
    return read(out), report


METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weights": [0.3, 0.5, 0.2]},
    "ties": {"base": 0, "parameters": {"density": 0.5, "weight": 0.7}},
    "dare_ties": {"base": 0, "parameters": {"density": 0.5, "weight": 0.7, "rescale": False}, "seed": 5},
    "breadcrumbs": {"base": 0, "parameters": {"density": 0.5, "weight": 0.7}},
}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_same_bytes_as_of_safetensors(tmp_path, method, mixed):
    """All dtypes; models in one file and in shards, and one of them in safetensors."""
    models = family(3, mixed)
    keys = dict(METHODS[method])
    base = keys.pop("base", None)

    def how(paths: list[str]) -> dict[str, Any]:
        return recipe(method, paths, **keys, **({} if base is None else {"base_model": paths[base]}))

    safe = saved(tmp_path / "safe", models)
    pickled = [save(tmp_path / f"p{i}", model, shards=(1, 3, 2)[i]) for i, model in enumerate(models)]
    want, expected = merged(how(safe), tmp_path / "want")
    got, report = merged(how(pickled), tmp_path / "got")
    assert_same(want, got)
    assert report.warnings == expected.warnings and set(report.files) == {"model.safetensors"}
    assert_same(want, merged(how([pickled[0], safe[1], pickled[2]]), tmp_path / "both")[0])


def views(seed: int) -> dict[str, Any]:
    """Tensors as models have them: tied, fused and cut, transposed."""
    torch.manual_seed(seed)
    e, qkv, big = torch.randn(97, 64), torch.randn(48, 64, dtype=torch.float16), torch.randn(300, 200)
    return {
        "model.embed_tokens.weight": e, "lm_head.weight": e, "q.weight": qkv[:16], "k.weight": qkv[16:32],
        "v.weight": qkv[32:], "t.weight": big.T, "cut.weight": big[:, 10:40], "bf16.weight": big.bfloat16().T,
        "ids": torch.arange(9).expand(1, 9), "mask": torch.ones(1, 1, dtype=torch.bool).expand(7, 7),
    }  # fmt: skip


def contiguous(state: Mapping[str, Any], folder: Path) -> str:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(
        {name: t.contiguous().clone() for name, t in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return str(folder)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_strides(tmp_path, method):
    """Converted first, with a warning of how much; tied tensors, and those cut along the first dimension, are not."""
    names = []
    for seed in range(2):
        contiguous(views(seed), tmp_path / f"s{seed}")
        (tmp_path / f"p{seed}").mkdir()
        torch.save(views(seed), tmp_path / f"p{seed}" / "pytorch_model.bin")
        names.append(str(tmp_path / f"p{seed}"))
    keys: dict[str, Any] = {"parameters": {"weight": 0.7}}
    keys |= {"base_model": names[0], "parameters": {"density": 0.5, "weight": 1}} if method == "ties" else {}
    text = json.dumps(recipe(method, names, **keys))
    got, report = merged(json.loads(text), tmp_path / "got")
    want, _ = merged(json.loads(text.replace(f"{tmp_path}/p", f"{tmp_path}/s")), tmp_path / "want")
    assert_same(want, got)
    sizes = 300 * 200 * 4 + 300 * 30 * 4 + 300 * 200 * 2 + 49
    assert report.warnings == tuple(
        f"4 tensors of {name} are converted by Python before the merge, which takes time and {sizes / 1000:.0f} KB of "
        "disk space: 4 with strides" for name in names
    )  # fmt: skip
    assert sorted(os.listdir(tmp_path / "got")) == ["README.md", RECEIPT, "model.safetensors"]


def test_strides_of_earlier_documents(tmp_path):
    """Converted for a tensor that another document reads, too."""
    paths = [contiguous(views(0), tmp_path / "s0"), contiguous(views(1), tmp_path / "s1")]
    torch.save(views(0), tmp_path / "p0.pt")

    def how(first: str) -> list[dict[str, Any]]:
        return [
            {"name": "mean", **recipe("linear", [first, paths[1]], parameters={"weight": 1})},
            recipe("ties", ["mean", first], base_model=paths[1], parameters={"density": 0.5, "weight": 1}),
        ]

    want, _ = merged(how(paths[0]), tmp_path / "want")
    got, report = merged(how(str(tmp_path / "p0.pt")), tmp_path / "got")
    assert_same(want, got)
    assert len(report.warnings) == 1 and "4 with strides" in report.warnings[0]


def test_no_room_for_what_is_converted(tmp_path, monkeypatch):
    """An error of the system while the temporary file is written ends the merge; nothing is left."""
    import errno

    from fastinterp.execute import sources

    torch.save({"w": torch.randn(30, 40).T}, tmp_path / "a.pt")
    torch.save({"w": torch.randn(30, 40).T}, tmp_path / "b.pt")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sources, "write_all", full)
    with pytest.raises(StorageError, match=r"No space left on device\. Free some space"):
        fastinterp.interpolate(tmp_path / "a.pt", tmp_path / "b.pt", 0.5, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.pt"]


def run(*args: Any) -> str:
    done = CliRunner().invoke(commands, [str(a) for a in args], prog_name="fastinterp")
    assert done.exit_code == 0, done.output
    return done.output


def test_commands(tmp_path):
    """inspect, diff, check, explain, average, sweep and interpolate, on single files."""
    state = views(0)
    for seed, name in enumerate(("epoch=1.ckpt", "epoch=2.ckpt", "epoch=3.ckpt")):
        value = {n: t if seed == 0 or not t.is_floating_point() else t + seed for n, t in views(0).items()}
        torch.save({"state_dict": value, "epoch": seed}, tmp_path / name)
    a, b, c = (tmp_path / f"epoch={k}.ckpt" for k in (1, 2, 3))
    found = json.loads(run("inspect", a, "--json"))
    assert {t["name"]: t["shape"] for t in found["tensors"]} == {n: list(t.shape) for n, t in state.items()}
    assert "lm_head.weight" in run("inspect", a)
    assert "all elements of A and B are equal" in run("diff", a, contiguous(state, tmp_path / "safe"))
    compared = json.loads(run("diff", a, b, "--json"))
    assert compared["tensors"]["t.weight"]["numel"] == 60_000
    (tmp_path / "r.yml").write_text(json.dumps(recipe("linear", [str(a), str(c)], parameters={"weight": 1})))
    for command in ("check", "explain"):
        assert "4 with strides" in " ".join(run(command, tmp_path / "r.yml").split())
    remarks = json.loads(run("explain", tmp_path / "r.yml", "--json"))["remarks"]
    assert f"{a}, {c}: its `state_dict` is read; left out: `epoch`" in remarks
    run("interpolate", a, c, "--alpha", 0.5, "-o", tmp_path / "mid.safetensors")
    run("average", a, c, "-o", tmp_path / "mean.safetensors")
    run("sweep", a, c, "--alphas", "0.5,1", "-o", tmp_path / "path")
    from safetensors.torch import load_file

    x = views(0)["t.weight"]
    want = (x.double() + 0.5 * ((x + 2) - x).double()).float()  # A + 0.5 * (B - A), the difference rounded to float32
    for file in ("mid.safetensors", "mean.safetensors", "path/alpha_0.5/model.safetensors"):
        got = load_file(tmp_path / file)
        assert got["t.weight"].equal(want) and got["lm_head.weight"].equal(got["model.embed_tokens.weight"])
        assert got["ids"].equal(torch.arange(9).expand(1, 9))


def test_into_memory_and_modules(tmp_path):
    """`load` of a file and of a recipe, `load_into`, and `Live` between two files."""
    state = {"weight": torch.randn(6, 5).T, "bias": torch.randn(5)}
    torch.save(state, tmp_path / "a.pt")
    torch.save({n: t + 1 for n, t in state.items()}, tmp_path / "b.pt")
    loaded = fastinterp.load(str(tmp_path / "a.pt"))
    assert loaded["weight"].equal(state["weight"]) and loaded["weight"].is_contiguous()
    module = torch.nn.Linear(6, 5)
    fastinterp.load_into(module, str(tmp_path / "a.pt"))
    assert module.weight.equal(state["weight"])
    for resident in (True, False):
        with fastinterp.Live(module, a=str(tmp_path / "a.pt"), b=str(tmp_path / "b.pt"), resident=resident) as live:
            live.set(0.5)
            want = (state["weight"].double() + (state["weight"] + 1).double()) / 2
            assert torch.allclose(module.weight.double(), want, atol=1e-6)
            live.set(1.0)
            assert module.weight.equal(state["weight"] + 1)


def test_prefixes_of_wrappers(tmp_path):
    """`module.` of DistributedDataParallel, `_orig_mod.` of torch.compile: aligned with the plain names."""
    plain = {"a.weight": torch.randn(3, 4), "b.weight": torch.randn(4)}
    paths = [contiguous(plain, tmp_path / "plain")]
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        torch.save({f"{prefix}{n}": t + 1 for n, t in plain.items()}, tmp_path / f"{prefix}pt")
        paths.append(str(tmp_path / f"{prefix}pt"))
    got, _ = merged(recipe("linear", paths, parameters={"weight": 1}), tmp_path / "out")
    assert sorted(got) == ["a.weight", "b.weight"]
    want = np.float32((plain["a.weight"].double() + 0.75).numpy())
    np.testing.assert_allclose(got["a.weight"].raw.view(np.float32).reshape(3, 4), want, rtol=1e-6)


def test_other_vocabularies(tmp_path):
    """Rows of an embedding in a file of torch.save follow the tokens, as those of a safetensors file do."""
    from tests.support import tokens

    words = ["<unk>", "cat", "dog", "owl"]
    folders = {}
    for kind in ("safe", "pickled"):
        for k, order in enumerate((words, ["<unk>", "dog", "owl", "ant", "cat"])):
            folder = tokens.words(tmp_path / kind / str(k), order)
            (folder / "config.json").write_text(json.dumps({"vocab_size": len(order), "model_type": "llama"}))
            torch.manual_seed(k)
            state = {"model.embed_tokens.weight": torch.randn(len(order), 6), "model.norm.weight": torch.randn(6)}
            if kind == "safe":
                os.rename(Path(contiguous(state, folder / "x")) / "model.safetensors", folder / "model.safetensors")
                os.rmdir(folder / "x")
            else:
                torch.save(state, folder / "pytorch_model.bin")
            folders[kind, k] = str(folder)
    keys = {"parameters": {"weight": 1}, "tokenizer": {"source": "union"}}
    results = [
        merged(recipe("linear", [folders[kind, 0], folders[kind, 1]], **keys), tmp_path / f"out-{kind}")[0]
        for kind in ("safe", "pickled")
    ]
    assert results[0]["model.embed_tokens.weight"].shape == (5, 6)
    assert_same(*results)


def test_an_output_is_no_pickle(tmp_path):
    """The suffixes are refused, before and after: only safetensors are written."""
    paths = [str(write(tmp_path / n, m)) for n, m in zip("ab", family(2), strict=True)]
    for suffix in ("bin", "pt", "pth", "ckpt"):
        with pytest.raises(fastinterp.UsageError, match="What is written is safetensors"):
            fastinterp.interpolate(paths[0], paths[1], 0.5, tmp_path / f"x.{suffix}")


def test_adapters(tmp_path, monkeypatch):
    """adapter_model.bin, and a base in pytorch_model.bin: the bytes of the same in safetensors."""
    from safetensors.torch import save_file

    from tests.support.remedies import follow

    monkeypatch.chdir(tmp_path)
    base = {"model.layers.0.q_proj.weight": torch.randn(12, 8), "model.norm.weight": torch.randn(8)}
    prefix = "base_model.model.model.layers.0.q_proj"
    adapter = {f"{prefix}.lora_A.weight": torch.randn(2, 8), f"{prefix}.lora_B.weight": torch.randn(12, 2)}
    for kind in ("safe", "torch", "strided"):
        Path(f"{kind}-lora").mkdir()
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        Path(f"{kind}-lora/adapter_config.json").write_text(json.dumps(config))
    contiguous(base, tmp_path / "safe")
    save_file(adapter, "safe-lora/adapter_model.safetensors")
    Path("torch").mkdir()
    torch.save(base, "torch/pytorch_model.bin")
    torch.save(adapter, "torch-lora/adapter_model.bin")
    want, _ = merged({"merge_method": "passthrough", "models": [{"model": "safe+safe-lora"}]}, tmp_path / "want")
    for k, name in enumerate(("torch+torch-lora", "safe+torch-lora", "torch+safe-lora")):
        got, _ = merged({"merge_method": "passthrough", "models": [{"model": name}]}, tmp_path / f"got{k}")
        assert_same(want, got)
    turned = {name: t.T.contiguous().T for name, t in adapter.items()}
    torch.save(turned, "strided-lora/adapter_model.bin")
    how = {"merge_method": "passthrough", "models": [{"model": "torch+strided-lora"}]}
    with pytest.raises(fastinterp.CheckpointError, match="do not lie one after the other") as caught:
        fastinterp.merge(how, tmp_path / "out")
    follow(str(caught.value), monkeypatch)
    os.replace("NEW.pt", "strided-lora/adapter_model.bin")
    assert_same(want, merged(how, tmp_path / "out")[0])
