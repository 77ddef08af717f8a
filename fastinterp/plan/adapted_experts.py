"""Products that adapters add to parameters of a module, as to the fused experts of a mixture: one for each expert.

peft stores a [r * experts, in], the rows of one expert after the other, and b [out, r * experts], where column
k * experts + e is that of expert e. The base may store the parameter as it is, or a matrix for each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.lora import LowRankModule
from fastinterp.plan.inputs import StoredInput, TensorInput
from fastinterp.plan.low_rank import FactorInput

# Models whose fused experts are stored as [experts, in, out]; those of others are [experts, out, in].
_TRANSPOSED = frozenset(("gpt_oss", "aria", "aria_text", "openai_privacy_filter"))
# Fused parameters, and the matrices of one expert that they consist of, in the spellings of several models: rows of one
# follow those of the other.
_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
_MODULES = {"mlp": "block_sparse_moe"}  # what older files call the module that experts are in

Product = tuple[tuple[int, int, int], FactorInput, FactorInput]  # matrices, rows and columns; left, right


def parts_of(name: str, tensors: Mapping[str, TensorInput]) -> tuple[str, ...]:
    """The base's tensors that a parameter is stored in: itself, or the matrices of all experts, those of one expert
    next to each other; empty, if the base has neither.
    """
    if name in tensors:
        return (name,)
    module, _, parameter = name.rpartition(".")
    modules = [module]
    for new, old in _MODULES.items():
        modules.append(module.replace(f".{new}.", f".{old}."))
    for start in modules:
        for matrices in _PARTS.get(parameter, ()):
            found: list[str] = []
            while (first := f"{start}.{len(found) // len(matrices)}.{matrices[0]}.weight") in tensors:
                expert = first.removesuffix(f"{matrices[0]}.weight")
                found += [f"{expert}{matrix}.weight" for matrix in matrices]
            if found and all(part in tensors for part in found):
                return tuple(found)
    return ()


def products_of(
    module: LowRankModule,
    parts: Sequence[str],
    tensors: Mapping[str, TensorInput],
    make: Callable[[Entry], StoredInput],
    model_type: str,
) -> dict[str, Product] | None:
    """The product that is added to each tensor of a parameter; None, if the factors do not fit.

    parts  its tensors
    make   the input that reads a tensor of the adapter
    """
    a, b, r = module.a, module.b, module.rank
    if not parts or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] % r:
        return None
    experts, into, out = a.shape[0] // r, a.shape[1], b.shape[0]
    of_a, of_b = make(a), make(b)
    if len(parts) == 1 and len(tensors[parts[0]].shape) == 2:
        if experts != 1 or tensors[parts[0]].shape != (out, into):
            return None
        right = FactorInput(of_a, by_index=1, by_rank=into)
        return {parts[0]: ((1, out, into), FactorInput(of_b, by_index=r, by_rank=1), right)}
    # Of the matrices [out, in] of all experts.
    rows = FactorInput(of_b, by_matrix=1, by_index=r * experts, by_rank=experts)
    columns = FactorInput(of_a, by_matrix=r * into, by_index=1, by_rank=into)
    if len(parts) == 1:
        shape = tensors[parts[0]].shape
        if shape == (experts, out, into) and not (out == into and model_type in _TRANSPOSED):
            return {parts[0]: (shape, rows, columns)}
        return {parts[0]: (shape, columns, rows)} if shape == (experts, into, out) else None
    each = len(parts) // experts
    if each * experts != len(parts) or out % each or any(tensors[p].shape != (out // each, into) for p in parts):
        return None
    products: dict[str, Product] = {}
    for i, part in enumerate(parts):
        expert, piece = divmod(i, each)
        first = expert + piece * (out // each) * r * experts
        left = FactorInput(of_b, first=first, by_index=r * experts, by_rank=experts)
        right = FactorInput(of_a, first=expert * r * into, by_index=1, by_rank=into)
        products[part] = ((1, out // each, into), left, right)
    return products
