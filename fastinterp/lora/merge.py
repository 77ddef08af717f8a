"""Adapters merged with each other into an adapter: a recipe whose models are adapters, with `out: lora`."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np

from fastinterp.backends.cpu import Progress
from fastinterp.backends.registry import cpu_threads
from fastinterp.checkpoint import hub
from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.lora import LowRankModule
from fastinterp.checkpoint.names import names_file, quote
from fastinterp.errors import CheckpointError, UsageError
from fastinterp.lora.adapter_files import WEIGHTS_FILE, AdapterWriter, Described, model_card, rounded, write_small_files
from fastinterp.lora.algebra import Array, balanced, concatenated, norm_of_product, padded, singular
from fastinterp.lora.merged_config import merged_config
from fastinterp.lora.plan import AdapterPlan, PlannedProduct, PlannedWhole, plan_adapters
from fastinterp.lora.report import AdapterReport, FactorisedModule
from fastinterp.lora.tensors import TensorReader
from fastinterp.ops.combine import Combine
from fastinterp.ops.dtypes import F32, DType, promoted
from fastinterp.output.address import uploads
from fastinterp.output.earlier import key_of
from fastinterp.output.folder import OutFolder
from fastinterp.plan.inputs import TensorInput
from fastinterp.presence import exists
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.shown_names import shown_names

_FILE = "pytorch_lora_weights.safetensors"  # as diffusers names it


@uploads
def merge_adapters(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    threads: int | None = None,
    force: bool = False,
    durable: bool = False,
    progress: Progress | None = None,
) -> AdapterReport:
    """Merge adapters of one base with each other into the adapter `out`.

    Where the method is a weighted sum (`linear`, `task_arithmetic`, ...) the products are concatenated: the sum of the
    changes, exactly, of a rank that is the sum of the ranks. With `rank: R` it is the best approximation of that sum of
    that rank, by the singular values of a matrix as small as all ranks. Every other method is applied to the changes
    themselves, s*B*A, one weight after the other, and what it makes is approximated with rank R, by default the sum of
    the ranks. The base that methods subtract is zero then: deltas are the adapters' changes.

    out  a folder, for adapters of peft; a folder or a .safetensors file, for those of kohya and diffusers
    The other arguments are those of `merge`.

    Factors are float32 in computations. In memory is one module at a time: the factors of all adapters, three times;
    for methods that are no weighted sums also n + 2 matrices f32 of the weight's size, for n adapters.
    Raises: what plan_adapters does; CheckpointError, StorageError, OutputError, UsageError.
    """
    start = time.perf_counter()
    if recipe.rounding != "nearest":
        raise recipe.document.error("factors of adapters are rounded to nearest: remove `rounding`", "$.rounding")
    plan = plan_adapters(recipe)
    target = os.fspath(out)
    if names_file(target) and plan.style == "peft":
        raise UsageError(f"an adapter of peft is a folder, with an adapter_config.json. Give {quote(target[:-12])}")
    with ExitStack() as stack:
        files = stack.enter_context(ExitStack())
        merge = AdapterMerge(plan, files, threads)
        name = WEIGHTS_FILE if plan.style == "peft" else _FILE
        inputs = [path for adapter in plan.adapters for path in adapter.checkpoint.inputs]
        key = key_of((recipe.text, recipe.out_dtype, recipe.dtype, recipe.rank, recipe.seed), inputs)
        folder = stack.enter_context(
            OutFolder(
                target, inputs, force=force, durable=durable, needed=merge.most_bytes, names=(name,), merge=key
            )
        )  # fmt: skip
        if folder.finished:  # an earlier run died in its last step: its report is not known
            folder.anew()
        modules, written = merge.write(folder, name, progress)
        merge.reader.refuse_changed()
        if plan.style == "peft":
            write_small_files(folder, merged_config(plan, modules, merge.alphas), _card(plan))
        files.close()  # of the inputs: what fails there fails before the output is in place
        folder.commit()
    names = sorted({re.sub(r"\.[^.]+$", "", whole.name) for whole in plan.whole})
    return AdapterReport(
        folder.name, modules, tuple(names), (), merge.exact, merge.bytes_read, written, time.perf_counter() - start,
        plan.remarks, plan.warnings, folder.removed, folder.replaced,
    )  # fmt: skip


class AdapterMerge:
    """The products of a plan, computed one after the other.

    alphas  by module: by what peft or kohya scale it, so that alpha over rank is the scale of the stored product
    exact   no product was approximated
    """

    def __init__(self, plan: AdapterPlan, stack: ExitStack, threads: int | None):
        self._plan, self._threads = plan, threads
        self.alphas: dict[str, float] = {}
        self.exact = True
        used = [*self._entries()]
        self.reader = TensorReader(
            [s.model for s in plan.sources if s.model is not None], [self._input(i, e) for i, e in used], stack, threads
        )
        self.bytes_read = sum(entry.nbytes for _, entry in used)
        self._scales = {product.name: _common_scale(plan, product) for product in plan.products}
        kept = all(scale is not None for scale in self._scales.values()) and plan.recipe.rank is None
        dtype = plan.recipe.out_dtype or plan.recipe.dtype
        factors = [e.dtype for p in plan.products for m in p.products if m is not None for e in (m.a, m.b)]
        self.dtype: DType = dtype or (promoted(factors) if kept and factors else F32)
        self._biased = any(m.bias is not None for p in plan.products for m in p.products if m is not None)

    def _entries(self) -> Iterator[tuple[int, Entry]]:
        """(number of the source, tensor) of all that is read."""
        for product in self._plan.products:
            for (model, _), module in zip(product.target.inputs, product.products, strict=True):
                if module is not None:
                    yield from ((model, entry) for entry in module.tensors)
        for whole in self._plan.whole:
            yield from ((model, entry) for model, entry, _ in whole.entries)

    def _input(self, source: int, entry: Entry) -> TensorInput:
        model = self._plan.sources[source].model
        assert model is not None  # it has the tensor
        return model.tensors[entry.name]

    @property
    def most_bytes(self) -> int:
        return sum(dtype.nbytes(math.prod(shape)) or 0 for _, dtype, shape in self._largest())

    def _largest(self) -> list[Described]:
        described = [(w.name, self._whole_dtype(w), w.entries[0][1].shape) for w in self._plan.whole]
        for product in self._plan.products:
            described += self._described(product, self._rank(product))
        return described

    def _rank(self, product: PlannedProduct) -> int:
        """Of the stored product: one for all that are approximated, so that few need `rank_pattern`."""
        wanted = self._plan.recipe.rank
        if product.coefficients is not None and (wanted is None or product.rank <= wanted):
            return product.rank  # concatenated
        return product.rank if wanted is None else min(wanted, max(min(p.matrix) for p in self._plan.products))

    def _whole_dtype(self, whole: PlannedWhole) -> DType:
        return promoted(entry.dtype for _, entry, _ in whole.entries)

    def _described(self, product: PlannedProduct, rank: int) -> list[Described]:
        """The tensors of a stored product: A, B, then a bias and kohya's alpha, where there are."""
        first = product.first
        experts = _experts(first)
        names = _names(first, self._plan.style)
        ones = first.b.shape[2:]
        described: list[Described] = [
            (names[0], self.dtype, (rank * experts, *first.a.shape[1:])),
            (names[1], self.dtype, (first.b.shape[0], rank * experts, *ones)),
        ]
        if self._biased and first.kind in ("linear", "convolution"):
            described.append((re.sub("weight$", "bias", names[1]), self.dtype, (first.b.shape[0],)))
        if self._plan.style == "kohya":
            described.append((f"{first.module}.alpha", F32, ()))
        return described

    def write(
        self, folder: OutFolder, name: str, progress: Progress | None
    ) -> tuple[tuple[FactorisedModule, ...], int]:
        """(the modules with products, bytes of tensors)"""
        modules, done = [], 0
        metadata = {"format": "pt"} if self._plan.style != "kohya" else {}
        with AdapterWriter(folder.temp(name), folder.name, self._largest(), metadata) as writer:
            wide = [w for w in self._plan.whole if self._whole_dtype(w).bits >= self.dtype.bits]
            for whole in wide:
                self._write_whole(whole, writer)
            for product in self._plan.products:
                modules.append(self._write_product(product, writer))
                done += sum(e.nbytes for m in product.products if m is not None for e in m.tensors)
                if progress is not None:
                    progress(done, self.bytes_read)
            for whole in self._plan.whole:
                if whole not in wide:
                    self._write_whole(whole, writer)
        return tuple(modules), writer.nbytes

    def _write_whole(self, whole: PlannedWhole, writer: AdapterWriter) -> None:
        inputs = [self._input(model, entry) for model, entry, _ in whole.entries]
        dtype = self._whole_dtype(whole)
        offset = writer.place(whole.name, dtype, inputs[0].shape)
        row = None if whole.equal else Combine(tuple(w for _, _, w in whole.entries), sums_to_one=True).row()
        self.reader.write(inputs, row, dtype, writer.fd, offset, writer.path)

    def _write_product(self, product: PlannedProduct, writer: AdapterWriter) -> FactorisedModule:
        pairs = self._factors(product)
        scale = self._scales[product.name]
        if product.coefficients is None:
            from fastinterp.lora.dense import merged_factors

            self.exact, scale = False, 1.0
            made, norm, error = merged_factors(
                self._plan, product, pairs, self._rank(product), cpu_threads(self._threads)
            )
        else:
            scale = scale if self._rank(product) == product.rank and scale is not None else 1.0
            made, norm, error = self._summed(product, pairs, scale)
        stored = [(rounded(b, self.dtype), rounded(a, self.dtype)) for b, a in made]
        if any(s[i] is not m[i] for s, m in zip(stored, made, strict=True) for i in (0, 1)):
            moved = [
                norm_of_product(np.concatenate([b, -b2], axis=1) * scale, np.concatenate([a, a2]))
                for (b, a), (b2, a2) in zip(made, stored, strict=True)
            ]
            error = math.hypot(error, *moved)
        if not math.isfinite(norm):
            raise CheckpointError(f"the factors of {quote(product.label)} hold NaN or Inf", tensor=product.first.a.name)
        rank = stored[0][0].shape[1]
        self.alphas[product.label] = scale * rank
        a, b = _joined(stored)
        described = self._described(product, rank)
        values: list[Array] = [a, b]
        if len(described) > 2 and described[2][0].endswith(".bias"):
            values.append(self._bias(product, scale))
        if self._plan.style == "kohya":
            values.append(np.array(self.alphas[product.label], np.float32))
        for (name, dtype, shape), value in zip(described, values, strict=True):
            writer.add(name, dtype, value.reshape(shape))
        return FactorisedModule(product.label, rank, norm, error)

    def _factors(self, product: PlannedProduct) -> list[list[tuple[Array, Array]] | None]:
        """Of each input (B [out, r], A [r, in]) of each expert, float32; None, where an adapter has none."""
        found: list[list[tuple[Array, Array]] | None] = []
        for (model, _), module in zip(product.target.inputs, product.products, strict=True):
            if module is None:
                found.append(None)
                continue
            a, b = (self.reader.floats([self._input(model, entry)]) for entry in (module.a, module.b))
            found.append(_split(module, a, b))
        return found

    def _summed(
        self, product: PlannedProduct, pairs: Sequence[list[tuple[Array, Array]] | None], scale: float
    ) -> tuple[list[tuple[Array, Array]], float, float]:
        """(factors of each expert, without `scale`; |D|; |D - B A|)"""
        weights = _weights(product)
        used = [(pair, weight) for pair, weight in zip(pairs, weights, strict=True) if pair is not None and weight]
        made, norms, errors = [], [], []
        for expert in range(_experts(product.first)):
            terms = [(*pair[expert], weight / scale) for pair, weight in used]
            if self._rank(product) == product.rank:
                b, a = concatenated(terms)
                norms.append(norm_of_product(b, a) * scale)
            else:
                self.exact = False
                wide = [(b.astype(np.float64), a.astype(np.float64), w) for b, a, w in terms]
                u, s, v = singular(*concatenated(wide))
                b, a = padded(*balanced(u, s, v, self._rank(product)), self._rank(product))
                norms.append(float(np.linalg.norm(s)))
                errors.append(float(np.linalg.norm(s[self._rank(product) :])))
            made.append((b, a))
        return made, math.hypot(*norms), math.hypot(*errors)

    def _bias(self, product: PlannedProduct, scale: float) -> Array:
        total = np.zeros(product.first.b.shape[0], np.float64)
        weights = _weights(product) if product.coefficients is not None else None
        for i, ((model, _), module) in enumerate(zip(product.target.inputs, product.products, strict=True)):
            if module is not None and module.bias is not None:
                if weights is None:
                    method = self._plan.recipe.method.name
                    raise UsageError(
                        f"{module.bias.name} is a bias of an adapter (`lora_bias`), and `{method}` is no weighted sum. "
                        "Use `linear`"
                    )
                total += weights[i] / scale * self.reader.floats([self._input(model, module.bias)])
        return total


def _weights(product: PlannedProduct) -> list[float]:
    """What each b @ a is multiplied by: the weight of its adapter, times the adapter's own scale."""
    assert product.coefficients is not None
    return [0.0 if p is None else p.scale * c for p, c in zip(product.products, product.coefficients, strict=True)]


def _common_scale(plan: AdapterPlan, product: PlannedProduct) -> float | None:
    """The scale of the stored product with which all factors keep their bits, or are negated; None, if there is none.

    It is |w_i s_i|, if that is the same for all i, and a whole number alpha has it: alpha = scale * rank.
    """
    if product.coefficients is None or plan.style == "diffusers":
        scales = set() if product.coefficients is None else {abs(w) for w in _weights(product) if w}
        return 1.0 if scales == {1.0} else None
    scales = {abs(w) for w in _weights(product) if w}
    if len(scales) != 1:
        return None
    scale = scales.pop()
    alpha = float(round(scale * product.rank))
    return scale if alpha and abs(alpha / product.rank - scale) <= 2**-52 * scale else None


def _experts(module: LowRankModule) -> int:
    return module.a.shape[0] // module.rank


def _split(module: LowRankModule, a: Array, b: Array) -> list[tuple[Array, Array]]:
    """(B [out, r], A [r, in]) of each expert: rows of `a` are ordered by expert, columns of `b` by rank."""
    experts = _experts(module)
    a = a.reshape(experts, module.rank, -1)
    b = b.reshape(b.shape[0], module.rank, experts)
    return [(b[:, :, e], a[e]) for e in range(experts)]


def _joined(pairs: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """(a, b) in the order of `_split`."""
    return np.concatenate([a for _, a in pairs]), np.stack([b for b, _ in pairs], axis=2).reshape(len(pairs[0][0]), -1)


def _names(module: LowRankModule, style: str) -> tuple[str, str]:
    """The names of A and B in the output: those in the first adapter, without the name of the adapter itself."""
    if style != "peft":
        return module.a.name, module.b.name
    a, b = (re.sub(r"(lora_(?:embedding_)?[AB])\.(?!weight$)[^.]+", r"\1", x.name) for x in (module.a, module.b))
    return a, b


def _card(plan: AdapterPlan) -> str:
    base = plan.adapters[0].config.get("base_model_name_or_path")
    known = isinstance(base, str) and not exists(base) and hub.parse(base) is not None
    shown = shown_names([plan.recipe])
    names = "\n".join(f"- {quote(shown.model(s.name))}" for s in plan.sources if s.adapter is not None)
    text = f"Merged from adapters, method {quote(plan.recipe.method.name)}:\n\n{names}\n\nThe recipe:\n\n"
    command = "With it as recipe.yml: `fastinterp merge recipe.yml OUT`"
    how = f"{text}```yaml\n{shown.recipe(plan.recipe.text).rstrip()}\n```\n\n{command}"
    return model_card(base if known and not plan.recipe.private else None, how, merged=True)
