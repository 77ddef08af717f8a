"""Models whose experts are stored in different layouts: aligned where rows follow rows, else what to do is named."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
import transformers
from safetensors.torch import load_file

import fastinterp
from fastinterp.errors import ShapeError
from tests.plan.test_tensor_sets_loaded import TEXT, Tensors, assert_average, averaged, fused_experts, saved


@pytest.mark.slow
def test_mixtral_of_older_and_newer_names(tmp_path):
    """`block_sparse_moe` with experts one by one, as files have it, against `mlp` with experts in one tensor."""
    kind = transformers.MixtralForCausalLM
    config = transformers.MixtralConfig(**TEXT, num_local_experts=3)

    def as_in_memory(tensors: Tensors) -> Tensors:
        made = fused_experts(tensors, "block_sparse_moe", ("w1", "w3", "w2"))
        return {n.replace("block_sparse_moe.", "mlp."): x for n, x in made.items()}

    a, b = saved(tmp_path / "a", kind(config), 1), saved(tmp_path / "b", kind(config), 2, as_in_memory)
    plain = saved(tmp_path / "plain", kind(config), 2)
    for first, second in ((a, b), (b, a)):
        out, report = averaged(tmp_path, first, second)
        assert any("block_sparse_moe.gate.weight" in remark for remark in report.remarks)
        assert load_file(out / "model.safetensors").keys() == load_file(first / "model.safetensors").keys()
        assert_average(kind, a, plain, out)


@pytest.mark.slow
def test_transposed_experts_and_the_commands_that_mend_them(tmp_path):
    """Qwen3-VL-MoE as the Hub has it, [experts, in, out], and as transformers 5 writes it. `missing: base`, which would
    merge no expert, is not what the error advises; on request it is done, with a warning.
    """
    kind = transformers.Qwen3VLMoeForConditionalGeneration
    text = transformers.Qwen3VLMoeTextConfig(
        **{**TEXT, "num_hidden_layers": 1}, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=12,
        decoder_sparse_step=1,
    )  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    config = transformers.Qwen3VLMoeConfig(text_config=text.to_dict(), vision_config=vision)

    def transposed(tensors: Tensors) -> Tensors:
        return {n: x.transpose(1, 2).contiguous() if ".experts." in n else x for n, x in tensors.items()}

    a = saved(tmp_path / "a model", kind(config), 1)
    b = saved(tmp_path / "b", kind(config), 2, transposed)
    plain = saved(tmp_path / "plain", kind(config), 2)
    recipe = {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1}} for m in (a, b)]}
    with pytest.raises(ShapeError, match="another layout") as error:
        fastinterp.merge(recipe, tmp_path / "out")
    assert "missing" not in str(error.value) and str(error.value).count("another layout") == 1
    assert [e.message for e in fastinterp.check(recipe).errors] == [str(error.value)]
    asked = fastinterp.check(recipe | {"missing": "base"})
    assert asked.errors == () and any("another layout" in warning.message for warning in asked.warnings)
    commands = re.findall(r"`(python -c .+?)`", str(error.value))
    assert len(commands) == 2
    for command in commands:
        code = shlex.split(command)[1:]
        subprocess.run([sys.executable, *code], check=True, capture_output=True, cwd=tmp_path)
    out, report = averaged(tmp_path, tmp_path / "NEW1", tmp_path / "NEW2")
    assert report.warnings == ()
    assert_average(kind, a, plain, out)
