"""`explain` of a recipe that merges adapters with each other: what it would read and write, from headers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastinterp.lora.plan import AdapterPlan, PlannedProduct, Source
from fastinterp.messages import counted, plain, table

_SHOWN = 12  # modules that the text lists


@dataclass(frozen=True)
class AdapterExplanation:
    """What `merge_adapters` would make of adapters. print() shows it as `fastinterp explain` does.

    plan  what was decided from headers, for this package alone: `as_dict()` has it in plain values
    """

    plan: AdapterPlan

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as --json prints them."""
        plan, recipe = self.plan, self.plan.recipe
        return {
            "method": recipe.method.name,
            "formula": recipe.formula(),
            "out": "lora",
            "seed": recipe.seed,
            "models": [{"name": source.name, "adapter": _described(source)} for source in plan.sources],
            "modules": {product.label: self._module(product) for product in plan.products},
            "whole": [whole.name for whole in plan.whole],
            "warnings": list(plan.warnings),
            "remarks": list(plan.remarks),
        }

    def _module(self, product: PlannedProduct) -> dict[str, Any]:
        wanted = self.plan.recipe.rank
        exact = product.coefficients is not None and (wanted is None or product.rank <= wanted)
        rank = product.rank if exact or wanted is None else wanted
        ranks = [p.rank for p in product.products if p is not None]
        return {"ranks": ranks, "rank": rank, "exact": exact, "shape": list(product.matrix)}

    def __str__(self) -> str:
        made = self.as_dict()
        every = made["modules"]
        exact = sum(module["exact"] for module in every.values())
        how = f"{exact} concatenated, {len(every) - exact} approximated by singular values"
        lines = [made["formula"], "", f"an adapter of {counted(len(every), 'module')}: {how}"]
        rows = [["module", "ranks", "rank", "[out, in]"]]
        rows += [
            [name, "+".join(map(str, m["ranks"])), f"{m['rank']}{'' if m['exact'] else ' (SVD)'}", str(m["shape"])]
            for name, m in list(every.items())[:_SHOWN]
        ]
        lines += table(rows, "<<<<")
        lines += [f"  and {counted(len(every) - _SHOWN, 'more module')}"] if len(every) > _SHOWN else []
        lines += [f"  stored whole: {plain(name)}" for name in made["whole"]]
        lines += [f"  {plain(remark)}" for remark in made["remarks"]]
        return "\n".join([*lines, *(f"  warning: {plain(warning)}" for warning in made["warnings"])])


def _described(source: Source) -> dict[str, Any] | None:
    """Of an adapter, what `inspect --json` prints of it; None for the base."""
    adapter = None if source.adapter is None else source.adapter.checkpoint.adapter
    return None if adapter is None else adapter.as_dict()
