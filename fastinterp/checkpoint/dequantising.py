"""What makes numbers of quantised weights again: a command for each format that has one, with other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastinterp.checkpoint.header import Header
from fastinterp.checkpoint.names import shell_word
from fastinterp.checkpoint.quantised import declared_method
from fastinterp.checkpoint.remedies import literal, python
from fastinterp.checkpoint.sidecar_files import CONFIG, read_config
from fastinterp.errors import CheckpointError

_NEW = "NEW"  # what the commands write

# By `quant_method` of config.json: the class of transformers whose `dequantize=True` loads numbers, and what it needs.
_TRANSFORMERS = {
    "fp8": ("FineGrainedFP8Config", ""),
    "mxfp4": ("Mxfp4Config", ""),
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
    "MXFP": "transformers",
    "fp8": "transformers",
    "compressed-tensors": "transformers and compressed-tensors",
}
# Formats in which a number is a code times its scale; unless what is stored is the largest number, as `_amax`.
_PRODUCTS = ("fp8 with scales", "fp8 with scales of blocks", "int8 with scales")
_BLOCK = 128  # rows and columns of a block, where its scales are one for each begun block
_DROPPED = ("scale_input", "input_scale", "scaled_fp8", "comfy_quant")  # of no use without codes


def command(
    format: str, root: Path, files: Sequence[Path], codes: tuple[str, Header], scale: tuple[str, Header] | None
) -> str:
    """`with PROGRAM: COMMAND`, which writes the checkpoint without codes as NEW; the program alone, where its command
    needs the model's config.json and there is none; empty, if none is known.

    format        as quantised.py calls it
    root, files   folder and files of the checkpoint
    codes, scale  name and header of a tensor of codes and of its scale
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
    exponents = format == "MXFP8" and scale is not None and scale[1].dtype.name == "F8_E8M0"  # torch reads as numbers
    if (format in _PRODUCTS or exponents) and scale is not None and "amax" not in scale[0] and len(files) == 1:
        return _product(files[0], codes, scale)
    program = next((program for start, program in _PROGRAMS.items() if format.startswith(start)), "")
    if not program or method:
        return ""
    needs = (
        "with the `quantization_config` of the model's config.json"
        if (root / CONFIG).is_file()
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


def _product(file: Path, codes: tuple[str, Header], scale: tuple[str, Header]) -> str:
    """Python that multiplies the codes in one file by their scales: of a tensor, of rows, or of blocks."""
    (name, weight), (scale_name, by) = codes, scale
    if scale_name.startswith(name):
        end = scale_name.removeprefix(name)
        of = f"n + {literal(end)}"
    else:
        old, end = name.rpartition(".")[2], scale_name.rpartition(".")[2]
        of = f"n[:-{len(old)}] + {literal(end)}"
    factor = "s[n]"
    if len(by.shape) == 1 and by.shape[0] > 1:
        factor = "s[n].reshape(-1, *[1] * (x.ndim - 1))"
    elif by.shape and by.shape[-1] > 1:
        if len(weight.shape) != 2 or len(by.shape) != 2:
            return ""
        rows, columns = (
            _BLOCK if -(-m // _BLOCK) == k else -(-m // k) for m, k in zip(weight.shape, by.shape, strict=True)
        )
        factor = f"s[n].repeat_interleave({rows}, 0)[:len(x)].repeat_interleave({columns}, 1)[:, :x.shape[1]]"
    dropped = ", ".join(map(literal, (end, *_DROPPED)))
    code = (
        "from safetensors import safe_open; from safetensors.torch import save_file; "
        f'f = safe_open({literal(file)}, "pt"); t = {{n: f.get_tensor(n) for n in f.keys()}}; '
        f"s = {{n: t[{of}].float() for n in t if {of} in t}}; "
        f"w = {{n: (x.float() * {factor}).bfloat16() if n in s else x for n, x in t.items() "
        f"if not n.endswith(({dropped}))}}; "
        'm = f.metadata() or {}; m.pop("_quantization_metadata", None); '
        f'save_file(w, "{_NEW}.safetensors", m)'
    )
    return f"with torch and safetensors: {python(code)}"
