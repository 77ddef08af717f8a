"""The report of a merge: bytes, time, devices, and the part of the intended change that the output's rounding kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from fastinterp.execute.kept import acting, acting_lines, asked_of, kept
from fastinterp.messages import counted, heard, plain, seconds, size

if TYPE_CHECKING:
    from fastinterp.execute.jobs.densities import Density
    from fastinterp.execute.jobs.job import Coefficients, Job, Stats
    from fastinterp.execute.rounds import DeviceUsage
    from fastinterp.execute.run import Done
    from fastinterp.output.folder import OutFolder
    from fastinterp.plan.plan import Plan
    from fastinterp.plan.planned import PlannedTensor

COPIES = "all tensors are copies"
_SAMPLED = 16  # tensors of which the differences of decoded models are sampled
_NOTICED = 0.05  # a strength that differs from 1 by more than this is a warning


@dataclass(frozen=True, slots=True)
class RoundingEffect:
    """How rounding to the output dtype altered the change of one tensor, or of several together.

    numel    number of elements
    sampled  number of those on which what follows was measured, in chunks
    changed  sampled elements whose stored value differs from the stored one of p
    sum_pp   <p, p>, where p is the base, else the first model that is read
    sum_dd   <D, D>, where D is the intended change from p: before rounding
    sum_od   <out - p, D>
    nan_in, inf_in, nan_out, inf_out   numbers of NaN and Inf in the inputs and in the output, of all elements

    Sums are float64.
    """

    numel: int
    sampled: int
    changed: int  # sampled elements whose stored value differs from the stored pivot
    sum_pp: float  # <p, p>
    sum_dd: float  # <D, D>
    sum_od: float  # <out - p, D>
    nan_in: int
    inf_in: int
    nan_out: int
    inf_out: int

    @property
    def strength(self) -> float | None:
        """<out - p, D> / <D, D>, the part of the intended change in the output: 1 is all of it. None if D is 0."""
        return self.sum_od / self.sum_dd if self.finite and self.sum_dd > 0 else None

    @property
    def changed_fraction(self) -> float | None:
        """The part of the sampled elements whose stored value differs from that of p, 0 to 1; or None."""
        return self.changed / self.sampled if self.sampled else None

    @property
    def relative_change(self) -> float | None:
        """|D| / |p|, or None if p is 0."""
        return math.sqrt(self.sum_dd / self.sum_pp) if self.finite and self.sum_pp > 0 else None

    @staticmethod
    def of(numel: int, s: Stats) -> RoundingEffect:
        """From the statistics of one tensor."""
        return RoundingEffect(
            numel, s.sampled, s.changed, s.sum_pp, s.sum_dd, s.sum_od, s.nan_in, s.inf_in, s.nan_out, s.inf_out
        )

    @staticmethod
    def total(effects: Iterable[RoundingEffect]) -> RoundingEffect:
        """The effects on several tensors, added up: of one with NaN or Inf in its samples, the counts of them alone."""
        every = [e if e.finite else replace(e, sampled=0, changed=0, sum_pp=0, sum_dd=0, sum_od=0) for e in effects]
        return RoundingEffect(*(sum(map(attrgetter(name), every)) for name in RoundingEffect.__slots__))

    @property
    def finite(self) -> bool:
        """Whether the sums are: False, if there is NaN or Inf in a sample."""
        return math.isfinite(self.sum_pp) and math.isfinite(self.sum_dd) and math.isfinite(self.sum_od)

    def as_dict(self) -> dict[str, Any]:
        """Plain values: the fields, and what is computed of them."""
        return {
            **asdict(self),
            "strength": self.strength,
            "changed_fraction": self.changed_fraction,
            "relative_change": self.relative_change,
        }


@dataclass
class OutputRecord:
    """What was recorded while the tensors of one output, or some of them, were computed.

    effects    of merged and converted tensors, by name
    copied     names of the tensors whose bytes were copied
    models     indices of the checkpoints that tensors come from
    densities  model -> tensor -> how many elements its thresholds kept
    coefficients  sums that came from the data, as plain values, by tensor: see jobs/job.py
    """

    effects: dict[str, RoundingEffect] = field(default_factory=dict)
    copied: list[str] = field(default_factory=list)
    models: set[int] = field(default_factory=set)
    densities: dict[str, dict[str, Density]] = field(default_factory=dict)
    coefficients: dict[str, Coefficients] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The report of one output of a merge. print() shows the summary, a notebook a table.

    output         its folder or file
    files          names of the files with weights
    tensors        name -> `RoundingEffect` of each tensor that was computed, not copied
    copied         names of the tensors whose bytes were copied
    adapted        names of those in `tensors` to which adapters add: they are sums, also of one model alone
    bytes_read, bytes_written   of the whole run, which may have several outputs
    outputs        number of outputs of the run
    wall_s         time of the run, seconds
    device         what computed: `cpu avx2`
    threads        of the CPU
    inputs         number of models that the tensors come from
    densities      of methods that drop elements: model -> tensor -> how many were to be kept, and were
    merged         number of elements of all tensors that were computed
    on_cpu         with an accelerator: reason -> number of tensors that the CPU computed
    chosen         why `device="auto"` took this one; empty, if there was no choice
    removed        files of the checkpoint that the output replaced
    replaced       files that others of the same names replaced (`force`), which no merge had written there
    warnings       what may be wrong with the output: precision, NaN and Inf, files beside the weights
    remarks        what was decided without being asked: names that were aligned, tensors that were left out
    quantised      model whose codes were decoded -> how large its difference is, in steps of the quantisation
    left_out       reason -> files beside the weights that were not copied
    asked          numbers of the recipe that the change is proportional to, as {"alpha": 0.25}
    resumed        the part of the outputs that an earlier run had finished, 0 to 1; None: it was not resumed
    """

    output: str
    files: tuple[str, ...]
    tensors: Mapping[str, RoundingEffect]
    copied: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    outputs: int
    wall_s: float
    device: str
    threads: int
    inputs: int = 0
    densities: Mapping[str, Mapping[str, Density]] = field(default_factory=dict)
    merged: int = 0
    on_cpu: Mapping[str, int] = field(default_factory=dict)
    chosen: str = ""
    removed: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())
    remarks: tuple[str, ...] = ()
    quantised: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    asked: Mapping[str, float] = field(default_factory=dict)
    adapted: tuple[str, ...] = ()
    resumed: float | None = None

    def __repr__(self) -> str:
        """A short form; print() shows the summary."""
        return (
            f"<Report of {plain(self.output)}: {counted(len(self.files), 'file')}, {size(self.bytes_written)} written, "
            f"{counted(len(self.warnings), 'warning')}>"
        )

    def __str__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        """For notebooks: a table, and the notes."""
        from fastinterp import html

        total = self.effect
        rows = [
            ("files", ", ".join(self.files)),
            ("read, written", f"{size(self.bytes_read)}, {size(self.bytes_written)}"),
            ("time", f"{seconds(self.wall_s)}, {size(self.gb_per_s * 1e9)}/s"),
            ("device", f"{self.device}, {counted(self.threads, 'thread')}"),
        ]
        if total.strength is not None and total.changed_fraction is not None:
            rows += [
                ("elements changed", f"{total.changed_fraction:.1%}"),
                ("relative change", f"{total.relative_change or 0:.1e}"),
                ("intended change that rounding kept", f"{total.strength:.1%}"),
                ("measured on", f"{_percent(total)} of the elements"),
            ]
        return html.heading(self.output) + html.table((), rows) + html.notes(self.notes())

    @cached_property
    def effect(self) -> RoundingEffect:
        """The effect of rounding on all tensors together; `report.effect.strength` is 1.0 where nothing was lost."""
        return RoundingEffect.total(self.tensors.values())

    @property
    def gb_per_s(self) -> float:
        """Bytes read and written by the run, in 10^9 bytes per second."""
        return (self.bytes_read + self.bytes_written) / self.wall_s / 1e9 if self.wall_s else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as --json prints them."""
        fields = {k: v for k, v in self.__dict__.items() if k not in ("tensors", "densities", "merged", "effect")}
        densities = {}
        if self.densities:
            from fastinterp.execute.jobs.densities import as_dict

            densities = as_dict(self.densities, self.merged)
        return {
            **fields,
            "densities": densities,
            "gb_per_s": self.gb_per_s,
            "acting": acting(self.asked, self.effect.strength),
            "effect": self.effect.as_dict(),
            "tensors": {name: effect.as_dict() for name, effect in self.tensors.items()},
        }

    def pace(self) -> str:
        """Speed of the whole run: `2.20 GB written, 0.51 s, 8.60 GB/s (cpu avx2, 2 threads)`, bytes in and out."""
        return (
            f"{size(self.bytes_written)} written, {seconds(self.wall_s)}, {size(self.gb_per_s * 1e9)}/s "
            f"({self.device}, {counted(self.threads, 'thread')})"
        )

    def notes(self) -> list[str]:
        """Lines about the output that not every report has, warnings included."""
        removed = (
            [f"removed from the replaced checkpoint: {', '.join(map(plain, self.removed))}"] if self.removed else []
        )
        if self.replaced:
            removed.append(f"replaced, and not of a merge: {', '.join(map(plain, self.replaced))}")
        warnings = [f"warning: {plain(w)}" for w in self.warnings]
        remarks = [f"note: {plain(remark)}" for remark in self.remarks]
        told = self.resumed is None or heard()  # at the start of the run
        resumed = [] if told or self.resumed is None else [kept_line(self.resumed)]
        first = [*resumed, *self._unchanged()]
        return [*first, *remarks, *self._density_note(), *self._device_notes(), *warnings, *removed]

    def _density_note(self) -> list[str]:
        if not self.densities:
            return []
        from fastinterp.execute.jobs.densities import note

        line = note(self.densities, self.merged)
        return [plain(line)] if line else []

    def _device_notes(self) -> list[str]:
        """The reason for the choice of the device, and why the CPU computed a part."""
        lines = [plain(self.chosen)] if self.chosen else []
        if self.on_cpu:
            parts = (f"{counted(n, 'tensor')}, {why}" for why, n in self.on_cpu.items())
            lines.append(f"on the cpu: {plain('; '.join(parts))}")
        return lines

    def _unchanged(self) -> list[str]:
        """The reason why there is no change to report, if there is none."""
        total = self.effect
        if not self.tensors:
            return [COPIES]
        if self.inputs == 1 and not any(e.sampled for e in self.tensors.values()):
            return [self._of_one_model()]
        if not total.sampled or total.sum_dd > 0:
            return []
        where = "" if total.sampled == total.numel else f" where they were measured ({_percent(total)} of the elements)"
        return [f"nothing changed: the models are identical{where}"]

    def _of_one_model(self) -> str:
        """What became of tensors that are not compared with those of another model."""
        rest = len(self.tensors) - len(self.adapted)
        if not self.adapted:
            return f"{COPIES}, stored in another dtype"
        parts = [f"{counted(len(self.adapted), 'tensor')} computed: the sums of a model and its adapters"]
        parts += [f"{counted(rest, 'tensor')} stored in another dtype"] if rest else []
        parts += [f"{counted(len(self.copied), 'tensor')} copied"] if self.copied else []
        return "; ".join(parts)

    def summary(self) -> str:
        """The report in a few lines of text."""
        lines = [
            f"{plain(self.output)}: {counted(len(self.files), 'file')}, {size(self.bytes_read)} read, {self.pace()}"
        ]
        total = self.effect
        if total.strength is not None and total.changed_fraction is not None:
            change = total.relative_change or 0
            lines.append(
                f"  {total.changed_fraction:.1%} of elements changed, relative change {change:.1e}; "
                f"{kept(total.strength, total.sampled < total.numel)}"
            )
            lines += [f"  {plain(line)}" for line in acting_lines(self.asked, total.strength)]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes())])


def kept_line(share: float) -> str:
    """What a resumed run says: `resumed: 63 % kept`. share: of the bytes of all outputs, 0 to 1"""
    return f"resumed: {int(100 * share)} % kept"


def device_line(usage: DeviceUsage, isa: str) -> str:
    """The devices that computed: `cpu avx2`; `cuda:0 NVIDIA H200 (cuda), cpu avx2 for 3 tensors`."""
    cpu = [f"cpu {isa} for {counted(usage.tensors, 'tensor')}"] if usage.tensors else []
    return ", ".join([*usage.devices, *cpu]) or f"cpu {isa}"


def _percent(total: RoundingEffect) -> str:
    return f"{total.sampled / total.numel:.0%}"


_FINER = "--rounding stochastic (in Python rounding='stochastic'), or --dtype float32 (in Python dtype='float32')"


def warnings_of(
    tensors: Mapping[str, RoundingEffect], dtype: str, stochastic: bool = False, numbers: str = ""
) -> tuple[str, ...]:
    """Warnings about precision, NaN and Inf in an output.

    stochastic  whether rounding was stochastic: it has no bias, so that a strength other than 1 is sampling noise
    numbers     the option that writes numbers, if tensors are stored as codes
    """
    warnings = []
    total = RoundingEffect.total(tensors.values())
    strength = total.strength
    if strength is not None and abs(strength - 1) > _NOTICED and not stochastic:
        warnings.append(
            f"{kept(strength, total.sampled < total.numel).replace('rounding', f'rounding to {dtype}', 1)}: the models "
            "differ by little more than the spacing of that dtype. Use "
            + (f"{numbers}, which writes numbers" if numbers else _FINER)
        )
    if total.nan_in or total.inf_in:
        names = [n for n, e in tensors.items() if e.nan_in or e.inf_in]
        warnings.append(
            f"the inputs hold {total.nan_in} NaN and {total.inf_in} Inf, first in {names[0]}; "
            f"the output ({dtype}) holds {total.nan_out} and {total.inf_out}"
        )
    elif total.nan_out or total.inf_out:
        names = [n for n, e in tensors.items() if e.nan_out or e.inf_out]
        warnings.append(
            f"{total.nan_out} NaN and {total.inf_out} Inf were created in the output ({dtype}), first in {names[0]}"
        )
    return tuple(warnings)


def records_of(plan: Plan, jobs: Mapping[str, Job]) -> list[OutputRecord]:
    """What the jobs recorded about each output."""
    return [record_of(plan, jobs, k) for k in range(len(plan.recipes))]


def record_of(plan: Plan, jobs: Mapping[str, Job], k: int) -> OutputRecord:
    """What the jobs recorded about output k."""
    record = OutputRecord()
    for tensor in plan.tensors:
        job = jobs.get(tensor.name)
        if job is None:
            continue
        sums = job.coefficients(k)
        if sums is not None:
            record.coefficients[tensor.name] = sums
        if tensor.merged:
            record.models |= tensor.origins(job.reads(k))
        for i, density in job.densities(k).items():
            record.densities.setdefault(plan.checkpoints[tensor.checkpoints[i]].name, {})[tensor.name] = density
        if job.copies(k):
            record.copied.append(tensor.name)
        else:
            record.effects[tensor.name] = RoundingEffect.of(tensor.numel, job.stats[k])
    return record


def report_on(
    plan: Plan, done: Done, wall_s: float, k: int, record: OutputRecord, folder: OutFolder | None = None
) -> Report:
    """The report of output k, from its record."""
    from fastinterp.plan.models import is_gguf

    names = {*record.copied, *record.effects}
    adapted = [t.name for t in plan.tensors if t.name in record.effects and _is_adapted(t, record.models)]
    quantised, about, noise = _quantised(plan)
    dtypes = sorted({t.stored_as for t in plan.tensors if t.merged and t.name in names})
    gguf = is_gguf(plan.origin)
    numbers = "--dtype float16 (in Python dtype='float16')" if gguf else "--quantize none (in Python quantize='none')"
    return Report(
        output="memory" if folder is None else folder.name,
        files=() if folder is None else (folder.file,) if folder.file else tuple(f.name for f in plan.layouts[k].files),
        tensors=record.effects,
        copied=tuple(record.copied),
        adapted=tuple(adapted),
        bytes_read=done.bytes_read,
        bytes_written=done.bytes_written,
        outputs=len(plan.recipes),
        wall_s=wall_s,
        device=device_line(done.usage, done.isa),
        on_cpu=done.usage.on_cpu,
        threads=done.threads,
        inputs=len(record.models),
        densities=record.densities,
        merged=sum(t.numel for t in plan.tensors if t.merged),
        removed=() if folder is None else folder.removed,
        replaced=() if folder is None else folder.replaced,
        warnings=(
            *warnings_of(
                record.effects,
                ", ".join(dtypes),
                plan.recipes[k].rounding == "stochastic",
                numbers if any(t.encoding for t in plan.tensors) else "",
            ),
            *_importances(plan),
            *noise,
            *(f"a device failed, and its work was done by others: {lost}" for lost in done.usage.lost),
            *plan.warnings,
            *(plan.lone_file_warnings if folder is not None and folder.file else ()),
        ),
        remarks=(*plan.remarks, *_file_remarks(plan, folder), *about),
        quantised=quantised,
        left_out={} if folder is None or folder.file else plan.files.left_out,
        asked=asked_of(plan.recipes[k]) if not plan.above else {},
    )


def _is_adapted(tensor: PlannedTensor, models: set[int]) -> bool:
    """Whether adapters add to an input of a tensor that comes from these models."""
    return any(one.adapted for one, i in zip(tensor.inputs, tensor.checkpoints, strict=True) if i in models)


def _file_remarks(plan: Plan, folder: OutFolder | None) -> tuple[str, ...]:
    if folder is None:
        return ()
    mended = (folder.mended,) if folder.mended else ()
    return (*mended, *(plan.lone_file_remarks if folder.file else plan.file_remarks))


def _quantised(plan: Plan) -> tuple[dict[str, dict[str, Any]], list[str], list[str]]:
    """(by model, its difference in steps of the quantisation; the same as remarks; warnings), if some are decoded."""
    if not any(i.decoded for t in plan.tensors if t.merged for i in t.inputs if len(t.inputs) > 1):
        return {}, [], []
    from fastinterp.execute.quantised_deltas import about, noise, quantised_deltas

    deltas = quantised_deltas(plan, _SAMPLED)
    names = [checkpoint.name for checkpoint in plan.checkpoints]
    values = {names[i]: {"against": names[base], **delta.as_dict()} for (i, base), delta in deltas.items()}
    return values, about(deltas, names), noise(deltas, plan)


def _importances(plan: Plan) -> list[str]:
    """Warnings about negative importances, if any recipe has side-cars."""
    if not any(recipe.sidecars for recipe in plan.recipes) and not any(t.before for t in plan.tensors):
        return []
    from fastinterp.execute.chunks import negative_importances

    return negative_importances(plan)
