"""What a merge did: how fast, and what the output's rounding made of the intended change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fastinterp.messages import counted, plain, seconds, size

if TYPE_CHECKING:
    from fastinterp.checkpoint.output_folder import OutFolder
    from fastinterp.execute.densities import Density
    from fastinterp.execute.jobs import Job
    from fastinterp.execute.rounds import Placed
    from fastinterp.execute.run import Done
    from fastinterp.plan.plan import Plan

COPIES = "all tensors are copies"
_NOTICED = 0.05  # an effective strength off by more than this is worth a warning


@dataclass(frozen=True, slots=True)
class Effect:
    """The effect on one tensor, or on several together.

    The counts of NaN and Inf are exact. The rest comes from sampled chunks: `sampled` of `numel` elements. The change
    is measured from the pivot p: the base, else the first model that is read; D is the change that was asked for,
    before the output's rounding.
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
        """What fraction of the intended change arrived: 1 is exact, 0.24 acts as a quarter of it. None if no change."""
        return self.sum_od / self.sum_dd if self.finite and self.sum_dd > 0 else None

    @property
    def changed_fraction(self) -> float | None:
        return self.changed / self.sampled if self.sampled else None

    @property
    def relative_change(self) -> float | None:
        """|D| / |p|."""
        return math.sqrt(self.sum_dd / self.sum_pp) if self.finite and self.sum_pp > 0 else None

    @staticmethod
    def of(numel: int, stats: Mapping[str, float]) -> Effect:
        """`stats` as the kernels report them."""
        return Effect(
            numel,
            int(stats["sampled"]),
            int(stats["changed"]),
            stats["sum_pp"],
            stats["sum_dd"],
            stats["sum_od"],
            int(stats["nan_in"]),
            int(stats["inf_in"]),
            int(stats["nan_out"]),
            int(stats["inf_out"]),
        )

    @staticmethod
    def total(effects: Iterable[Effect]) -> Effect:
        """All of them as one. A tensor with NaN or Inf in a sampled chunk gives its counts, but no sums."""
        every = [e if e.finite else replace(e, sampled=0, changed=0, sum_pp=0, sum_dd=0, sum_od=0) for e in effects]
        return Effect(*(sum(getattr(e, name) for e in every) for name in Effect.__slots__))

    @property
    def finite(self) -> bool:
        return math.isfinite(self.sum_pp) and math.isfinite(self.sum_dd) and math.isfinite(self.sum_od)

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "strength": self.strength,
            "changed_fraction": self.changed_fraction,
            "relative_change": self.relative_change,
        }


@dataclass
class Findings:
    """What was found on the way to one output, or to some of its tensors.

    effects    of merged and converted tensors
    copied     tensors whose bytes were taken over
    models     numbers of the checkpoints that tensors come from
    densities  model -> tensor -> what thresholds keep
    """

    effects: dict[str, Effect] = field(default_factory=dict)
    copied: list[str] = field(default_factory=list)
    models: set[int] = field(default_factory=set)
    densities: dict[str, dict[str, Density]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """One output of a merge.

    bytes_read and wall_s are those of the whole run, which may have made several outputs from one read.
    """

    output: str
    files: tuple[str, ...]
    tensors: Mapping[str, Effect]  # merged and converted tensors; those whose bytes were taken over are not listed
    copied: tuple[str, ...]  # tensors whose bytes were taken over
    bytes_read: int
    bytes_written: int
    outputs: int
    wall_s: float
    device: str  # and the instruction set: `cpu avx2`. Accelerators stand before it: see device_line
    threads: int
    inputs: int = 0  # models that this output's tensors come from
    densities: Mapping[str, Mapping[str, Density]] = field(default_factory=dict)  # model -> tensor -> what is kept
    merged: int = 0  # elements of all merged tensors
    on_cpu: Mapping[str, int] = field(default_factory=dict)  # beside accelerators: why, and how many tensors
    chosen: str = ""  # why `--device auto` chose the device, if there was a choice
    removed: tuple[str, ...] = ()  # files of an old checkpoint that stood there
    warnings: tuple[str, ...] = field(default=())

    def __repr__(self) -> str:
        """Short; print() shows the summary."""
        return (
            f"<Report of {plain(self.output)}: {counted(len(self.files), 'file')}, {size(self.bytes_written)} written, "
            f"{counted(len(self.warnings), 'warning')}>"
        )

    def __str__(self) -> str:
        return self.summary()

    @property
    def effect(self) -> Effect:
        return Effect.total(self.tensors.values())

    @property
    def gb_per_s(self) -> float:
        """Bytes read and written by the run, in 10^9 a second."""
        return (self.bytes_read + self.bytes_written) / self.wall_s / 1e9 if self.wall_s else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as --json prints them."""
        plain = {k: v for k, v in self.__dict__.items() if k not in ("tensors", "densities", "merged")}
        kept = {}
        if self.densities:
            from fastinterp.execute.densities import as_dict

            kept = as_dict(self.densities, self.merged)
        return {
            **plain,
            "densities": kept,
            "gb_per_s": self.gb_per_s,
            "effect": self.effect.as_dict(),
            "tensors": {name: effect.as_dict() for name, effect in self.tensors.items()},
        }

    def pace(self) -> str:
        """`2.20 GB written, 0.51 s, 8.60 GB/s (cpu avx2, 2 threads)`: of the whole run, rates over bytes in and out."""
        return (
            f"{size(self.bytes_written)} written, {seconds(self.wall_s)}, {size(self.gb_per_s * 1e9)}/s "
            f"({self.device}, {counted(self.threads, 'thread')})"
        )

    def notes(self) -> list[str]:
        """What is not as everybody expects."""
        removed = [f"removed from the old checkpoint: {', '.join(map(plain, self.removed))}"] if self.removed else []
        warnings = [f"warning: {plain(w)}" for w in self.warnings]
        return [*self._unchanged(), *self._kept(), *self._placed(), *warnings, *removed]

    def _kept(self) -> list[str]:
        if not self.densities:
            return []
        from fastinterp.execute.densities import note

        told = note(self.densities, self.merged)
        return [plain(told)] if told else []

    def _placed(self) -> list[str]:
        """Why the work was where it was."""
        told = [plain(self.chosen)] if self.chosen else []
        if self.on_cpu:
            parts = (f"{counted(n, 'tensor')}, {why}" for why, n in self.on_cpu.items())
            told.append(f"on the cpu: {plain('; '.join(parts))}")
        return told

    def _unchanged(self) -> list[str]:
        """Why there is no effect to tell of."""
        total = self.effect
        if not self.tensors:
            return [COPIES]
        if self.inputs == 1 and not any(e.sampled for e in self.tensors.values()):
            return [f"{COPIES}, stored in another dtype"]
        if not total.sampled or total.sum_dd > 0:
            return []
        where = "" if total.sampled == total.numel else f" where they were measured ({_percent(total)} of the elements)"
        return [f"nothing changed: the models are identical{where}"]

    def summary(self) -> str:
        """A few lines for people."""
        lines = [
            f"{plain(self.output)}: {counted(len(self.files), 'file')}, {size(self.bytes_read)} read, {self.pace()}"
        ]
        total = self.effect
        if total.strength is not None and total.changed_fraction is not None:
            change = total.relative_change or 0
            lines.append(
                f"  {total.changed_fraction:.1%} of elements changed, relative change {change:.1e}, "
                f"{total.strength:.3f} of the intended change arrived (measured on {_percent(total)})"
            )
        return "\n".join([*lines, *(f"  {note}" for note in self.notes())])


def device_line(placed: Placed, isa: str) -> str:
    """What computed: `cpu avx2`; `cuda:0 NVIDIA H200 (cuda), cpu avx2 for 3 tensors`."""
    cpu = [f"cpu {isa} for {counted(placed.tensors, 'tensor')}"] if placed.tensors else []
    return ", ".join([*placed.devices, *cpu]) or f"cpu {isa}"


def _percent(total: Effect) -> str:
    return f"{total.sampled / total.numel:.0%}"


def warnings_of(tensors: Mapping[str, Effect], dtype: str, stochastic: bool = False) -> tuple[str, ...]:
    """What the user should know before trusting the output.

    stochastic  rounding has no bias then, and what it adds to a small sample is noise
    """
    found = []
    total = Effect.total(tensors.values())
    strength = total.strength
    if strength is not None and abs(strength - 1) > _NOTICED and not stochastic:
        found.append(
            f"rounding to {dtype} lets {strength:.2f} of the intended change arrive: the models differ by little more "
            "than the spacing of that dtype. Use --rounding stochastic, or --dtype float32"
        )
    if total.nan_in or total.inf_in:
        names = [n for n, e in tensors.items() if e.nan_in or e.inf_in]
        found.append(
            f"the inputs hold {total.nan_in} NaN and {total.inf_in} Inf, first in {names[0]}; "
            f"the output ({dtype}) holds {total.nan_out} and {total.inf_out}"
        )
    elif total.nan_out or total.inf_out:
        names = [n for n, e in tensors.items() if e.nan_out or e.inf_out]
        found.append(f"{total.nan_out} NaN and {total.inf_out} Inf arose in the output ({dtype}), first in {names[0]}")
    return tuple(found)


def report_of(plan: Plan, done: Done, wall_s: float, k: int, folder: OutFolder | None = None) -> Report:
    """Of output k. folder: where it was written; None: it is in memory."""
    return report_on(plan, done, wall_s, k, findings_of(plan, done.jobs, k), folder)


def findings_of(plan: Plan, jobs: Mapping[str, Job], k: int) -> Findings:
    """What the jobs found, of output k."""
    found = Findings()
    for tensor in (t for t in plan.tensors if t.name in jobs):
        job = jobs[tensor.name]
        if tensor.merged:
            found.models |= tensor.origins(job.reads(k))
        for i, density in job.densities(k).items():
            found.densities.setdefault(plan.checkpoints[tensor.inputs[i]].name, {})[tensor.name] = density
        if job.copies(k):
            found.copied.append(tensor.name)
        else:
            found.effects[tensor.name] = Effect.of(tensor.numel, job.stats[k])
    return found


def report_on(
    plan: Plan, done: Done, wall_s: float, k: int, found: Findings, folder: OutFolder | None = None
) -> Report:
    """The report of output k, from what was found."""
    made = {*found.copied, *found.effects}
    dtypes = sorted({str(t.dtype) for t in plan.tensors if t.merged and t.name in made})
    return Report(
        output="memory" if folder is None else folder.name,
        files=() if folder is None else tuple(f.name for f in plan.layouts[k].files),
        tensors=found.effects,
        copied=tuple(found.copied),
        bytes_read=done.bytes_read,
        bytes_written=done.bytes_written,
        outputs=len(plan.recipes),
        wall_s=wall_s,
        device=device_line(done.placed, done.isa),
        on_cpu=done.placed.on_cpu,
        threads=done.threads,
        inputs=len(found.models),
        densities=found.densities,
        merged=sum(t.numel for t in plan.tensors if t.merged),
        removed=() if folder is None else folder.removed,
        warnings=(
            *warnings_of(found.effects, ", ".join(dtypes), plan.recipes[k].rounding == "stochastic"),
            *_importances(plan),
            *(f"a device was given up, and others did its part: {lost}" for lost in done.placed.lost),
            *plan.warnings,
        ),
    )


def _importances(plan: Plan) -> list[str]:
    if not any(recipe.sidecars for recipe in plan.recipes) and not any(t.before for t in plan.tensors):
        return []
    from fastinterp.execute.importances import negative_importances

    return negative_importances(plan)
