"""What makes numbers of quantised weights again: a command for each format that has one, with other programs."""

from __future__ import annotations

from pathlib import Path

from fastinterp.checkpoint.names import shell_word
from fastinterp.checkpoint.quantisation_config import declared_method
from fastinterp.checkpoint.remedies import literal, python
from fastinterp.checkpoint.sidecar_files import CONFIG, read_config
from fastinterp.errors import CheckpointError
from fastinterp.presence import is_file

_NEW = "NEW"  # what the commands write

# By `quant_method` of config.json: the class of transformers whose `dequantize=True` loads numbers, and what it needs.
_TRANSFORMERS = {
    "compressed-tensors": ("CompressedTensorsConfig", "compressed-tensors"),
    "metal": ("MetalConfig", ""),
}
# Those whose loaded model has `dequantize()`.
_LOADED = {"bitsandbytes": "bitsandbytes", "bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes"}
# Those that gptqmodel.utils.model_dequant reads.
_GPTQMODEL = ("gptq", "awq", "auto-round", "modelopt", "exl3")
# By the beginning of a format's name: what de-quantises it if there is a config.json.
_PROGRAMS = {
    "AWQ": "GPTQModel",
    "GPTQ": "GPTQModel",
    "EXL3": "GPTQModel",
    "bitsandbytes": "transformers and bitsandbytes",
    "MLX": "mlx-lm",
    "compressed-tensors": "transformers and compressed-tensors",
}


def command(format: str, root: Path) -> str:
    """`with PROGRAM: COMMAND`, which writes the checkpoint without codes as NEW; the program alone, where its command
    needs the model's config.json and there is none; empty, if none is known.

    format  as quantised.py calls it
    root    folder of the checkpoint
    """
    method = declared_method(root)
    folder = literal(root)
    if method in _TRANSFORMERS:
        config, needs = _TRANSFORMERS[method]
        load = f"M.from_pretrained({folder}, quantization_config=Q(dequantize=True))"
        return _transformers(f"from transformers import {_class(root)} as M, {config} as Q; {load}", needs)
    if method in _LOADED:
        load = f"M.from_pretrained({folder}).dequantize()"
        return _transformers(f"from transformers import {_class(root)} as M; {load}", _LOADED[method])
    if method in _GPTQMODEL:
        code = f'from gptqmodel.utils.model_dequant import dequantize_model as d; d({folder}, "{_NEW}")'
        return f"with GPTQModel: {python(code)}"
    if method == "mlx":
        return f"with mlx-lm: `mlx_lm.convert --hf-path {shell_word(root)} --mlx-path {_NEW} --dequantize`"
    program = next((program for start, program in _PROGRAMS.items() if format.startswith(start)), "")
    if not program or method:
        return ""
    needs = (
        "with the `quantization_config` of the model's config.json"
        if is_file(root / CONFIG)
        else ("which needs the model's config.json beside the weights")
    )
    return f"with {program}, {needs}"


def _transformers(load: str, needs: str) -> str:
    # The original format would have codes again.
    code = f'{load}.save_pretrained("{_NEW}", save_original_format=False)'
    return f"with transformers{f' and {needs}' if needs else ''}: {python(code)}"


def _class(root: Path) -> str:
    """The class of transformers that loads the whole model, as its configuration names it."""
    try:
        names = (read_config(root) or {}).get("architectures")
    except (CheckpointError, RecursionError):
        names = None
    first = names[0] if isinstance(names, list) and names else None
    return first if isinstance(first, str) and first.isidentifier() else "AutoModelForCausalLM"
