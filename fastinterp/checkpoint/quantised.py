"""Quantised tensors: which tensors of a checkpoint are codes and which are scales, by names, dtypes and shapes.

Codes are no numbers without their scales, so no method merges them. A format is recognised here, where nothing can
decode it; one that has a reader (formats.py) is not: its tensors are left out before.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fastinterp.checkpoint.formats.said import described_format
from fastinterp.checkpoint.formats.scales import may_scale
from fastinterp.checkpoint.header import Header
from fastinterp.checkpoint.quantisation_config import declared_method
from fastinterp.checkpoint.strict_json import parse_json
from fastinterp.errors import CheckpointError

if TYPE_CHECKING:
    from fastinterp.checkpoint.open import Checkpoint


Headers = Mapping[str, Header]


class QuantisedTensor(NamedTuple):
    """Codes, and what belongs to them: scales, zero points, code books.

    format      as people call it: `GPTQ`
    codes       name of the tensor of codes
    companions  names of the others
    """

    format: str
    codes: str
    companions: tuple[str, ...]


_FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_BYTES = ("I8", "U8")
_WORDS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
_SUB_BYTE = ("F4", "F6_E2M3", "F6_E3M2")
_ANY: tuple[str, ...] = ()

# A checkpoint without a tensor of one of these dtypes has no codes, but for those that are stored as other numbers.
_TELLING = frozenset({*_FP8, *_SUB_BYTE, "F8_E8M0", *_WORDS} - {"I64", "U64"})
_TELLING_NAMES = (".absmax", ".W_q", ".compressed")


class _Layout(NamedTuple):
    """A format whose tensors have names of their own within a module.

    codes       last part of the name of the codes
    dtypes      of the codes; none: any
    needs       one of these is beside them
    companions  all that belong to them, where they are there
    """

    format: str
    codes: str
    dtypes: tuple[str, ...]
    needs: tuple[str, ...]
    companions: tuple[str, ...] = ()


_LAYOUTS = (
    _Layout("AWQ or GPTQ", "qweight", _WORDS, ("scales", "qzeros", "wscales"),
            ("g_idx", "smooth_factor", "smooth_factor_orig", "wzeros", "dqweight", "forward_hadamard_matrix",
             "backward_hadamard_matrix", "act_global_scale", "weight_global_scale")),
    _Layout("HQQ", "W_q", _ANY, ("zero", "meta"),  # `scale` alone: attention has one, and `W_q` may be its queries
            ("scale", "axis", "channel_wise", "compute_dtype", "encoded_state_dict", "group_size", "nbits",
             "offload_meta", "optimize", "packing", "quant_scale", "quant_zero", "round_zero", "shape",
             "stores_quant_config", "unpack_view_dtype", "view_as_float")),
    _Layout("EXL2", "q_weight", _WORDS, ("q_scale", "q_groups"),
            ("q_scale_max", "q_group_map", "q_invperm", "q_perm")),
    _Layout("EXL3", "trellis", _WORDS, ("suh", "su", "svh", "sv"), ("mcg", "mul1")),
    _Layout("AQLM", "codes", _WORDS, ("codebooks",), ("scales",)),
    _Layout("VPTQ", "indices", _WORDS, ("centroids.weight",),
            ("res_centroids.weight", "outlier_centroids.weight", "outlier_indices", "res_indices", "weight_scale",
             "weight_bias", "perm")),
    _Layout("SpQR", "dense_weights", _WORDS, ("row_offsets", "col_vals"), ("in_perm",)),
    _Layout("QuIP#", "Qidxs", _WORDS, ("SU", "SV"), ("Wscale", "codebook_id", "A", "B")),
    _Layout("Marlin", "B", ("I32",), ("s",), ("workspace",)),
    _Layout("compressed-tensors", "weight_packed", _WORDS, ("weight_scale", "scale_packed", "weight_shape"),
            ("weight_zero_point", "weight_g_idx", "weight_global_scale", "input_global_scale", "input_scale",
             "input_zero_point", "output_scale", "meta")),
    _Layout("sparse compressed-tensors", "compressed", _ANY, ("bitmask",), ("row_offsets", "shape")),
    _Layout("quanto", "_data", _ANY, ("_scale",), ("_shift", "_zeropoint")),
    _Layout("quanto", "_data._data", _ANY, ("_scale",), ("_shift", "_zeropoint")),
    _Layout("bitsandbytes int8", "weight", ("I8",), ("SCB",), ("weight_format",)),
    _Layout("EETQ", "weight", ("I8",), ("weight_scales",)),
    _Layout("HIGGS", "weight", _WORDS, ("tables",), ("scales", "tables2")),
    _Layout("MLX", "weight", ("U32", "I32"), ("scales",), ("biases", "qbiases")),
)  # fmt: skip
_BY_CODES: dict[str, list[_Layout]] = {}
for _layout in _LAYOUTS:
    _BY_CODES.setdefault(_layout.codes, []).append(_layout)

# Codes of 8 bits and less with scales, as many programs write them: `X` or `P.weight` and these.
_SCALED = (*_FP8, *_BYTES, *_SUB_BYTE)
_SCALE_ENDS = ("_scale", "_scale_inv", "_scales", "_scale_2", "_weight_scale", ".scale")  # of X, what codes must have
_MORE_ENDS = (
    "_weight_scale_2", "_scale_inv_2", "_zero_point", "_global_scale", "_activation_scale", "_input_scale", "_shape",
    "_g_idx", "_scaling",
)  # fmt: skip
_SCALES = ("scale_weight", "qscale_weight")  # of P.weight
_MAYBE_SCALES = ("scale", "scales")  # the same, if dtype and shape fit: parameters of other kinds have these names, too
_MORE = (
    "input_scale", "scale_input", "qscale_act", "activation_scale", "act_scale", "input_scale_ub", "output_scale",
    "pre_quant_scale", "zero_point", "input_zero_point", "input_global_scale", "comfy_quant",
)  # fmt: skip
# Other names behind `P.` of the scales of `P.weight`: weights_scaling_factor, weight_quantizer._amax, w_scale, ...
_OTHER_SCALES = re.compile(
    r"(?!input|output|act|kv|k_|v_|logit|pre_?quant|scaled)(?:\w*|weights?(?:_quantizer)?\.\w*)(?:scal|amax)\w*"
)
_UNNAMED = frozenset((*_SCALED, *_WORDS))  # codes, if a configuration says that there are some
_WEIGHT = re.compile(r"weight\w*$|_proj$")
_MARKER = "scaled_fp8"
_PARAMETER = re.compile(r"_(\w+)_qdata")  # of torchao's safetensors: P._weight_qdata is of P.weight


def quantised_tensors(headers: Headers, metadata: Mapping[str, str] | None = None) -> list[QuantisedTensor]:
    """The quantised tensors among these, in the order of their codes.

    headers   by name; those that a reader has taken left out
    metadata  of the files' headers
    """
    described = _described(headers, metadata or {})
    if not described and not any(h.dtype.name in _TELLING or n.endswith(_TELLING_NAMES) for n, h in headers.items()):
        return []
    names = sorted(headers)
    found = [q for name in headers for q in _of(name, headers, names, described)]
    taken = {name for q in found for name in (q.codes, *q.companions)}
    for name, header in headers.items():
        if name in taken:
            continue
        if header.dtype.name in _SUB_BYTE or header.dtype.name == "F8_E8M0":
            found.append(QuantisedTensor("microscaling", name, ()))
        elif found and name.rpartition(".")[2] == _MARKER:
            found[0] = found[0]._replace(companions=(*found[0].companions, name))
    return found


def quantised_in(checkpoint: Checkpoint, taken: Collection[str] = ()) -> list[QuantisedTensor]:
    """The quantised tensors of a checkpoint. taken: names of those that a reader decodes.

    Where its configuration, or that of a component, says that it is quantised, and no format is recognised, these are
    matrices of bytes, words or 8-bit floats that are called weights.
    """
    headers = {n: e for n, e in checkpoint.tensors.items() if n not in taken} if taken else checkpoint.tensors
    found = quantised_tensors(headers, checkpoint.metadata)
    if any(name.endswith(".comfy_quant") for q in found for name in q.companions):
        found = [q._replace(format=described_format(checkpoint, q.codes) or q.format) for q in found]
    codes = [n for n, h in headers.items() if len(h.shape) > 1 and h.dtype.name in _UNNAMED and _WEIGHT.search(n)]
    for part in checkpoint.parts if codes and not found else ():
        method = declared_method(part.checkpoint.root, part.checkpoint.metadata)
        found += [QuantisedTensor(method, name, ()) for name in codes if method and name.startswith(part.prefix)]
    return found


def _of(
    name: str, headers: Headers, names: Sequence[str], described: frozenset[str]
) -> Iterator[QuantisedTensor]:  # fmt: skip
    """The quantised tensor whose codes are the tensor `name`, if it is one. names: all of them, sorted."""
    prefix, _, leaf = name.rpartition(".")
    start = f"{prefix}." if prefix else ""
    if leaf == "_data" and prefix.endswith("._data"):
        start, leaf = prefix.removesuffix("_data"), "_data._data"
    header = headers[name]
    for layout in _BY_CODES.get(leaf, ()):
        fits = not layout.dtypes or header.dtype.name in layout.dtypes
        if fits and any(start + need in headers for need in layout.needs):
            known = _there(headers, (start + leaf for leaf in (*layout.needs, *layout.companions)))
            yield QuantisedTensor(_packing(layout.format, header, headers, start), name, known)
            return
    if f"{name}.absmax" in headers:
        beside = _starting(names, f"{name}.")
        kind = next((n.rpartition("__")[2] for n in beside if ".quant_state.bitsandbytes__" in n), "4-bit")
        yield QuantisedTensor(f"bitsandbytes {kind}", name, beside)
    elif leaf.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in headers:
        if header.dtype.name in _BYTES:
            yield QuantisedTensor("MXFP4", name, (name.removesuffix("_blocks") + "_scales",))
    elif match := _PARAMETER.fullmatch(leaf):
        parts = tuple(n for n in _starting(names, f"{start}_{match[1]}_") if n != name)
        if parts:
            yield QuantisedTensor("torchao", name, parts)
    elif header.dtype.name in _SCALED and (len(header.shape) > 1 or name in described):
        yield from _scaled(name, header, headers, names, described)


def _scaled(
    name: str, header: Header, headers: Headers, names: Sequence[str], described: frozenset[str]
) -> Iterator[QuantisedTensor]:
    start, leaf = name[: name.rfind(".") + 1], name.rpartition(".")[2]
    scales = _there(headers, (name + end for end in _SCALE_ENDS))
    more = _there(headers, (name + end for end in _MORE_ENDS))
    # A scale is stored with more precision than fp8 codes: a model cast to fp8 has no other numbers than those.
    if header.dtype.name in _FP8:
        scales = tuple(n for n in scales if headers[n].dtype.name not in _FP8)
    if leaf == "weight":
        scales += _there(headers, (start + end for end in _SCALES))
        scales += tuple(
            n for n in _there(headers, (start + end for end in _MAYBE_SCALES)) if may_scale(headers[n], header)
        )
        more += _there(headers, (start + end for end in _MORE))
        if not scales:
            scales = tuple(
                n for n in (_starting(names, start) if start else ())
                if _OTHER_SCALES.fullmatch(n, len(start)) and n not in more and may_scale(headers[n], header)
            )  # fmt: skip
    if scales or name in described or start + "comfy_quant" in more:
        scale = headers[scales[0]] if scales else None
        yield QuantisedTensor(_scaled_format(header, scale, scales) + _beside(more), name, (*scales, *more))


def _beside(names: Iterable[str]) -> str:
    """What else than scales makes numbers of codes, by the names of what is beside them, as the end of a format."""
    ends = {
        "_zero_point": " and zero points", "_g_idx": ", columns in another order",
        ".pre_quant_scale": " with scaled activations",
    }  # fmt: skip
    found = [n for n in names if not n.endswith(".input_zero_point")]
    return "".join(text for end, text in ends.items() if any(n.endswith(end) for n in found))


def _scaled_format(codes: Header, scale: Header | None, names: Sequence[str]) -> str:
    kind, scales = codes.dtype.name, "" if scale is None else scale.dtype.name
    exponents = scales in ("F8_E8M0", "U8")
    if kind in _FP8:
        if exponents:
            return "MXFP8"
        blocks = scale is not None and len(scale.shape) > 1 and scale.shape[-1] > 1
        return "fp8 with scales of blocks" if blocks else "fp8 with scales"
    if kind in (*_BYTES, "F4") and scales == "F8_E4M3":
        return "NVFP4"
    if kind in (*_BYTES, "F4") and exponents:
        return "MXFP4"
    if kind == "U8" and scale is not None and scale.shape in ((), (1,)) and names[0].endswith(".weight_scale"):
        return "BitNet"
    return {"I8": "int8 with scales", "U8": "packed codes with scales"}.get(kind, f"{kind} with scales")


def _packing(format: str, codes: Header, headers: Headers, start: str) -> str:
    """Which of the formats with a `qweight` it is: GPTQ packs rows into words, AWQ columns."""
    if format != "AWQ or GPTQ":
        return format
    scales = headers.get(f"{start}scales")
    if f"{start}wscales" in headers:
        return "SVDQuant"
    if codes.dtype.name not in ("I32", "U32") or scales is None or len(scales.shape) < 2 or len(codes.shape) < 2:
        return "packed qweight"
    return "GPTQ" if scales.shape[-1] == codes.shape[-1] else "AWQ"


def _there(headers: Headers, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name in headers))


def _starting(names: Sequence[str], start: str) -> tuple[str, ...]:
    """Those of the sorted names that begin with `start`."""
    first = last = bisect_left(names, start)
    while last < len(names) and names[last].startswith(start):
        last += 1
    return tuple(names[first:last])


def _described(headers: Headers, metadata: Mapping[str, str]) -> frozenset[str]:
    """The weights that ComfyUI's metadata says are quantised."""
    text = metadata.get("_quantization_metadata", "")
    try:
        layers = parse_json(text.encode(errors="replace"), "the metadata", "")["layers"] if text else {}
    except (CheckpointError, KeyError, TypeError):
        return frozenset()
    names = (f"{layer}.weight" for layer in layers) if isinstance(layers, (dict, list)) else ()
    return frozenset(name for name in names if name in headers and headers[name].dtype.name in _SCALED)
