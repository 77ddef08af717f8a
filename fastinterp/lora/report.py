"""The report about an adapter that was written: ranks, and how much of the change they hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastinterp.messages import counted, plain, seconds, size, table

_SHOWN = 5  # modules that the summary lists


@dataclass(frozen=True, slots=True)
class FactorisedModule:
    """A change D of a module and the product B A that the adapter has for it. Norms are Frobenius's, in float64.

    name    of the module
    rank    of the product
    norm    |D|
    error   |D - B A|, of the factors as they are stored
    """

    name: str
    rank: int
    norm: float
    error: float

    @property
    def relative_error(self) -> float:
        """|D - B A| / |D|, 0 if D is 0."""
        return self.error / self.norm if self.norm > 0 else 0.0

    @property
    def energy(self) -> float:
        """1 - |D - B A|^2 / |D|^2: the part of the squared norm that is kept."""
        return 1.0 - self.relative_error**2

    def as_dict(self) -> dict[str, Any]:
        return {
            "rank": self.rank, "norm": self.norm, "error": self.error, "relative_error": self.relative_error,
            "energy": self.energy,
        }  # fmt: skip


@dataclass(frozen=True)
class AdapterReport:
    """The report of an adapter that was written. print() shows the summary.

    output    the folder or file
    modules   the modules with products: name, rank, norm of the change and error of the product
    saved     names of modules whose tensors are stored whole
    left_out  names of tensors that differ, but are not in the adapter
    exact     the products are sums of products, not approximations: |D| was not measured
    bytes_read, bytes_written   of the run
    wall_s    time of the run, seconds
    remarks   what was decided without being asked
    warnings  what may not be intended
    removed   files of a checkpoint that the output replaced (`force`)
    replaced  files that others of the same names replaced
    """

    output: str
    modules: tuple[FactorisedModule, ...]
    saved: tuple[str, ...]
    left_out: tuple[str, ...]
    exact: bool
    bytes_read: int
    bytes_written: int
    wall_s: float
    remarks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()

    @property
    def total(self) -> FactorisedModule:
        """All modules as one vector; the rank is the largest."""
        return FactorisedModule(
            "all modules",
            max((m.rank for m in self.modules), default=0),
            math.hypot(*(m.norm for m in self.modules)),
            math.hypot(*(m.error for m in self.modules)),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them. Errors are null where the products are exact."""
        modules = {m.name: {"rank": m.rank} if self.exact else m.as_dict() for m in self.modules}
        return {
            "output": self.output,
            "exact": self.exact,
            **({} if self.exact else {"total": self.total.as_dict()}),
            "modules": modules,
            "modules_to_save": list(self.saved),
            "left_out": list(self.left_out),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "wall_s": self.wall_s,
            "remarks": list(self.remarks),
            "warnings": list(self.warnings),
            "removed": list(self.removed),
            "replaced": list(self.replaced),
        }

    def summary(self) -> str:
        """The report in a few lines of text."""
        ranks = sorted({m.rank for m in self.modules})
        rank = "" if not ranks else f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        modules = f"{counted(len(self.modules), 'module')} of {rank}" if rank else "no module"
        lines = [f"{plain(self.output)}: {modules}, {size(self.bytes_written)} written in {seconds(self.wall_s)}"]
        if self.exact and self.modules:
            lines.append("  exact: the products are concatenated")
        elif self.modules:
            total = self.total
            lines.append(
                f"  {total.energy:.2%} of the energy kept, relative error {total.relative_error:.2g}; the modules with "
                "the largest error:"
            )
            lines += table(_rows(self.modules), "<>>>", indent=4)
        if self.saved:
            lines.append(f"  stored whole: {counted(len(self.saved), 'module')}")
        lines += [f"  {plain(remark)}" for remark in self.remarks]
        lines += [f"  warning: {plain(warning)}" for warning in self.warnings]
        for what, names in (("removed", self.removed), ("replaced", self.replaced)):
            lines += [f"  {what}: {', '.join(map(plain, names))}"] if names else []
        return "\n".join(lines)


def _rows(modules: Sequence[FactorisedModule]) -> list[list[str]]:
    worst = sorted(modules, key=lambda m: -m.relative_error)[:_SHOWN]
    return [
        ["module", "rank", "error", "energy"],
        *([m.name, str(m.rank), f"{m.relative_error:.2g}", f"{m.energy:.2%}"] for m in worst),
    ]
