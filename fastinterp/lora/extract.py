"""`extract_lora`: a fine-tune as an adapter of its base, by singular value decompositions of what it changed."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from fastinterp.arguments import Checkpoint, path_of
from fastinterp.backends.registry import cpu_threads
from fastinterp.checkpoint.names import listing, names_file, quote
from fastinterp.checkpoint.sidecar_files import CONFIG, json_or_empty
from fastinterp.errors import CheckpointError, ShapeError, UsageError
from fastinterp.lora.adapter_files import (
    PREFIX,
    WEIGHTS_FILE,
    AdapterWriter,
    Described,
    adapter_config,
    model_card,
    rounded,
    write_small_files,
)
from fastinterp.lora.algebra import (
    ITERATIONS,
    OVERSAMPLING,
    STREAM,
    Blocks,
    balanced,
    padded,
    randomised_svd,
    rank_for_energy,
)
from fastinterp.lora.changes import norms_of_changes, pair_of, plan_change, shapes_of
from fastinterp.lora.parts import Parts, divide, is_transposed, modules_of
from fastinterp.lora.peft_rules import modules_to_save, target_modules
from fastinterp.lora.report import AdapterReport, FactorisedModule
from fastinterp.lora.tensors import COPY, TensorReader
from fastinterp.messages import counted
from fastinterp.ops.combine import Row, philox_key
from fastinterp.ops.dtypes import DTYPE_NAMES, DType, parse_dtype
from fastinterp.output.address import uploads
from fastinterp.output.earlier import key_of
from fastinterp.output.folder import OutFolder
from fastinterp.plan.inputs import TensorInput
from fastinterp.plan.plan import Plan
from fastinterp.presence import exists
from fastinterp.progress import Progress, callback_of
from fastinterp.recipe.references import ModelRef
from fastinterp.recipe.renaming import shortened

MAX_RANK = 1 << 14
_EXPERT = re.compile(r"\.experts\.\d+\.")  # a module of one expert
# Modules that transformers calls otherwise than checkpoints do: peft looks for the names of transformers.
_RENAMED = re.compile(r"embed_out|.*\.attention\.attention\.(?:query|key|value)|(?:.*\.)?vision_tower\..*")
_LARGE = 1 << 20  # bytes of a tensor that is worth a warning if it is stored whole
_DELTA = Row(0, 0.0, ((1, 1.0),))  # x1 - x0, rounded once to float32


@uploads
def extract_lora(
    finetune: Checkpoint,
    base: Checkpoint,
    out: str | os.PathLike[str],
    *,
    rank: int,
    energy: float | None = None,
    seed: int = 0,
    dtype: str = "float32",
    whole_modules: bool = True,
    threads: int | None = None,
    force: bool = False,
    durable: bool = False,
    progress: Progress | bool | None = None,
) -> AdapterReport:
    """Write what a fine-tune changed in its base as a LoRA adapter of peft into the folder `out`.

    finetune, base  checkpoints with the same tensors, in any form that is read
    rank       of the product for each weight of a linear layer or convolution that differs; with `energy` the largest
    energy     above 0, at most 1: of each module the smallest rank whose singular values have this part of the squared
               Frobenius norm of its change
    seed       of the random matrices, 0..2**64-1
    dtype      of the factors
    whole_modules  store modules whole, as the fine-tune has them, whose tensors differ and have no factors: embeddings,
               output layers, norms; and biases. False: leave them out, which is a warning
    threads    None: one per CPU, at most 32. The bytes do not depend on it where numpy's BLAS uses one thread, as the
               command line sees to; else, and on another kind of processor or with another BLAS, the last bits may
    force      replace an adapter that is there
    durable    as of `merge`
    progress   as of `merge`

    The change of one module at a time is in memory, float32, as are blocks of it: for an m x n weight 4 m n bytes, and
    8 (rank + 16) (m + n) bytes a few times. What is stored whole is streamed. The randomised decomposition reads
    the change 6 times (16 further columns, 2 power iterations).
    Raises: UsageError, CheckpointError (ShapeError, if the two differ in their tensors), StorageError, OutputError.
    """
    start, shown = time.perf_counter(), callback_of(progress)
    how = _How(*_checked(rank, energy, seed, dtype), threads=cpu_threads(threads))
    target = path_of(out, "out")
    if names_file(target):
        raise UsageError(f"an adapter is a folder: it needs its adapter_config.json. Give {quote(target[:-12])}")
    names = path_of(base, "base"), path_of(finetune, "finetune")
    plan = plan_change(*names)
    with ExitStack() as stack:
        files = stack.enter_context(ExitStack())
        inputs = {t.name: pair_of(plan, t) for t in plan.tensors}
        reader = TensorReader(plan.checkpoints, (x for pair in inputs.values() for x in pair), files, threads)
        total = 2 * sum(x.nbytes for t in plan.tensors for x in inputs[t.name] if t.merged)
        norms = norms_of_changes(plan, inputs, reader, _part(shown, 0, total))
        config = json_or_empty(plan.checkpoints[0].root / CONFIG)
        parts = divide(shapes_of(plan), norms.keys(), config, whole=whole_modules)
        if not parts.factors:
            if parts.absorbed:
                raise CheckpointError(
                    f"every layer that could have factors is in a module of which other tensors differ, too, and which "
                    f"peft can only save whole: {listing(parts.absorbed)}. To leave those tensors out: "
                    "--no-modules-to-save (in Python whole_modules=False)",
                    file=names[1],
                )
            raise CheckpointError(
                f"no weight of a linear layer or convolution differs from the base's, but {listing(norms)}: there is "
                "nothing for factors, and peft has no adapter without them",
                file=names[1],
            )
        left_out = _left_out(parts, norms, whole=whole_modules)
        run = _Extraction(plan, inputs, parts, norms, config, how, reader)
        key = key_of((names, rank, energy, seed, how.dtype, whole_modules), plan.inputs)
        folder = stack.enter_context(
            OutFolder(
                target, plan.inputs, force=force, durable=durable, needed=run.most_bytes, names=(WEIGHTS_FILE,),
                merge=key,
            )
        )  # fmt: skip
        if folder.finished:  # an earlier run died in its last step: its report is not known
            folder.anew()
        modules, written = run.write(folder, _part(shown, total // 2, total))
        reader.refuse_changed()
        write_small_files(folder, run.config(modules, names[0]), _card(names, how, modules))
        files.close()  # of the inputs: what fails there fails before the output is in place
        folder.commit()
    return AdapterReport(
        folder.name, modules, tuple(parts.saved), left_out, False, total, written, time.perf_counter() - start,
        (*plan.remarks, *run.remarks()), (*plan.warnings, *run.warnings(names[0], left_out)),
        folder.removed, folder.replaced,
    )  # fmt: skip


@dataclass(frozen=True)
class _How:
    """The arguments about factors, checked."""

    rank: int
    energy: float | None
    seed: int
    dtype: DType
    threads: int


def _checked(rank: object, energy: object, seed: object, dtype: object) -> tuple[int, float | None, int, DType]:
    """Raises: UsageError."""
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise UsageError(f"`rank` must be a whole number in 1..{MAX_RANK}, got {rank!r}")
    if energy is not None and (isinstance(energy, bool) or not isinstance(energy, (int, float)) or not 0 < energy <= 1):
        raise UsageError(f"`energy` must be a number above 0 and at most 1, got {energy!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise UsageError(f"`seed` must be a whole number in 0..2**64-1, got {seed!r}")
    found = parse_dtype(dtype) if isinstance(dtype, str) else None
    if found is None or found.bits < 16:
        names = ", ".join(name for name in DTYPE_NAMES if "float8" not in name)
        raise UsageError(f"`dtype` must be one of {names}, got {dtype!r}")
    return rank, None if energy is None else float(energy), seed, found


def _left_out(parts: Parts, norms: Mapping[str, float], *, whole: bool) -> tuple[str, ...]:
    """The names of tensors that differ, and are not in the adapter.

    Raises: ShapeError, if there is one that peft has no place for, though all are wanted.
    """
    stored = {name for tensors in parts.saved.values() for name in tensors.values()} | set(parts.biases)
    stored |= {f"{module}.weight" for module in parts.factors}
    left = tuple(name for name in norms if name not in stored)
    if whole and left:
        raise ShapeError(
            f"an adapter of peft has no place for {counted(len(left), 'tensor')} that differ: {listing(left)}. They "
            "belong to no module but the whole model. To leave them out: --no-modules-to-save "
            "(in Python whole_modules=False)",
            tensor=left[0],
        )
    return left


def _part(progress: Progress | None, before: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, _: progress(min(before + done, total), total)


class _Extraction:
    """The adapter of one fine-tune: what is written of it, in which order."""

    def __init__(
        self, plan: Plan, inputs: Mapping[str, Sequence[TensorInput]], parts: Parts, norms: Mapping[str, float],
        config: Mapping[str, Any], how: _How, reader: TensorReader,
    ):  # fmt: skip
        self._plan, self._inputs, self._parts, self._norms = plan, inputs, parts, norms
        self._config, self._how, self._reader = config, how, reader
        whole = [(name, of) for tensors in parts.saved.values() for name, of in tensors.items()]
        whole += [(f"{name.removesuffix('.bias')}.base_layer.bias", name) for name in parts.biases]
        self._whole = sorted(((PREFIX + name, inputs[of][1]) for name, of in whole), key=lambda x: -x[1].dtype.bits)
        self._largest = [(name, x.dtype, x.shape) for name, x in self._whole]
        # One rank for all, unless energy chooses: peft needs it where transformers fuses modules as it loads them.
        self._rank = min(how.rank, max(min(_matrix(self._shape(module))) for module in parts.factors))
        for module in parts.factors:
            shape = self._shape(module)
            self._largest += _described(module, how.dtype, shape, self._rank)

    @property
    def most_bytes(self) -> int:
        """The size of the weights file, if every module has the rank that was asked for."""
        return sum(dtype.nbytes(math.prod(shape)) or 0 for _, dtype, shape in self._largest)

    def write(self, folder: OutFolder, progress: Progress | None) -> tuple[tuple[FactorisedModule, ...], int]:
        """(the modules with factors, bytes of tensors)"""
        modules, done = [], 0
        path = folder.temp(WEIGHTS_FILE)
        # Wider elements come first, so that all are aligned to their own width.
        wide = [x for x in self._whole if x[1].dtype.bits >= self._how.dtype.bits]
        with AdapterWriter(path, folder.name, self._largest, {"format": "pt"}) as writer:
            self._write_whole(wide, writer)
            for module in self._parts.factors:
                modules.append(self._factorise(module, writer))
                done += sum(x.nbytes for x in self._inputs[f"{module}.weight"])
                if progress is not None:
                    progress(done, done)
            self._write_whole(self._whole[len(wide) :], writer)
        return tuple(modules), writer.nbytes

    def _write_whole(self, tensors: Sequence[tuple[str, TensorInput]], writer: AdapterWriter) -> None:
        for name, tensor in tensors:
            offset = writer.place(name, tensor.dtype, tensor.shape)
            if tensor.numel:
                self._reader.write(
                    [tensor], COPY if tensor.merges else None, tensor.dtype, writer.fd, offset, writer.path
                )

    def _factorise(self, module: str, writer: AdapterWriter) -> FactorisedModule:
        name, how, shape = f"{module}.weight", self._how, self._shape(module)
        delta = self._reader.floats(self._inputs[name], _DELTA)
        blocks = Blocks(delta.reshape(delta.shape[0], -1), how.threads)
        u, s, v = randomised_svd(blocks, how.rank, philox_key(how.seed, STREAM, name))
        norm = self._norms[name]
        rank = self._rank if how.energy is None else rank_for_energy(s, how.energy, norm * norm, how.rank)
        b, a = (rounded(x, how.dtype) for x in padded(*balanced(u, s, v, rank), rank))
        error = math.sqrt(blocks.residual(b, a))
        if is_transposed(module, self._config):
            b, a = a.T, b.T
        for (entry, dtype, of), values in zip(_described(module, how.dtype, shape, rank), (a, b), strict=True):
            writer.add(entry, dtype, values.reshape(of))
        return FactorisedModule(module, rank, norm, error)

    def _shape(self, module: str) -> tuple[int, ...]:
        """Of its weight, [out, in, ...]."""
        shape = self._inputs[f"{module}.weight"][0].shape
        return shape[::-1] if is_transposed(module, self._config) else shape

    def config(self, modules: Sequence[FactorisedModule], base: str) -> dict[str, Any]:
        """adapter_config.json."""
        parts, ranks = self._parts, {m.name: m.rank for m in modules}
        path, _, revision = base.rpartition("@") if "@" in base and not exists(base) else (base, "", "")
        every = modules_of(t.name for t in self._plan.tensors)
        return adapter_config(
            ranks, ranks, target_modules(every, ranks) if ranks else [], base=path, task=parts.task,
            saved=modules_to_save(sorted({*every, *parts.saved}), list(parts.saved), list(ranks)),
            fan_in_fan_out=any(is_transposed(module, self._config) for module in ranks),
            bias="lora_only" if parts.biases else "none", more={"revision": revision} if revision else {},
        )  # fmt: skip

    def warnings(self, base: str, left_out: Sequence[str]) -> list[str]:
        """base: as it was named"""
        warnings = []
        if ModelRef.of(base).adapters:
            warnings.append(
                f"the adapter belongs to {base}, and its configuration names that: peft loads it into the merged "
                "model, which `fastinterp merge` writes"
            )
        if left_out:
            verb = "differs, and is" if len(left_out) == 1 else "differ, and are"
            warnings.append(f"{counted(len(left_out), 'tensor')} {verb} not in the adapter: {listing(left_out)}")
        if self._how.energy is not None and any(_EXPERT.search(module) for module in self._parts.factors):
            warnings.append(
                "its experts are one by one, and transformers fuses them as it loads them: with --energy their ranks "
                "differ, and peft may not load the adapter. Without --energy all have one rank"
            )
        stored = [*self._parts.factors, *(name.removeprefix(PREFIX).rpartition(".")[0] for name, _ in self._whole)]
        if renamed := [module for module in stored if _RENAMED.fullmatch(module)]:
            warnings.append(
                f"transformers has other names than the checkpoint for {listing(renamed)}, and peft may not find them: "
                "their part of the adapter would be lost. Behind its base (`base+adapter`) here the adapter is whole"
            )
        experts = [name for name, tensor in self._whole if len(tensor.shape) == 3 and tensor.nbytes > _LARGE]
        if experts:
            warnings.append(
                f"{counted(len(experts), 'tensor')} of three dimensions, as of fused experts, got no factors, and are "
                f"stored whole: {listing(experts)}"
            )
        return warnings

    def remarks(self) -> list[str]:
        absorbed = self._parts.absorbed
        if not absorbed:
            return []
        return [
            f"{counted(len(absorbed), 'module')} stored whole instead of as factors, because they lie in modules that "
            f"are: {listing(absorbed)}"
        ]


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _described(module: str, dtype: DType, shape: tuple[int, ...], rank: int) -> list[Described]:
    """The two factors of a weight [out, in, ...]: A [rank, in, ...] and B [out, rank, 1, ...]."""
    ones = (1,) * (len(shape) - 2)
    return [
        (f"{PREFIX}{module}.lora_A.weight", dtype, (rank, *shape[1:])),
        (f"{PREFIX}{module}.lora_B.weight", dtype, (shape[0], rank, *ones)),
    ]


def _card(names: tuple[str, str], how: _How, modules: Sequence[FactorisedModule]) -> str:
    from fastinterp.checkpoint import hub

    total = AdapterReport("", tuple(modules), (), (), False, 0, 0, 0.0).total
    energy = "" if how.energy is None else f", energy {how.energy:g}"
    base = None if exists(names[0]) or hub.parse(names[0]) is None else names[0].partition("@")[0]
    shown = shortened(names)
    text = (
        f"Extracted from {quote(shown[1])}, a fine-tune of {quote(shown[0])}: rank {how.rank}{energy}, "
        f"seed {how.seed}, randomised SVD ({OVERSAMPLING} further columns, {ITERATIONS} power iterations). It keeps "
        f"{total.energy:.4%} of the squared norm of the changes of {counted(len(modules), 'module')}."
    )
    return model_card(base, text)
