"""Numbers for the blocks of a U-Net as one value: `{blocks: [...]}`, 26 of them for Stable Diffusion 1.5, 20 for SDXL.

The order is that of "merge block weighted" tools: BASE, IN00, IN01, ..., M00, OUT00, OUT01, ... BASE is for all that is
in no block: text encoders, the VAE, and the U-Net's embeddings of time and labels. Layers behind the last block belong
to it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import msgspec

from fastinterp.messages import shown
from fastinterp.recipe.document import Document

KEY = "blocks"
BASE, MIDDLE = "BASE", "M00"
_AFTER = "OUT"  # the block of the layers behind the last one, whatever its number is
_LABELS = "labels"  # the embedding of SDXL's labels, which Stable Diffusion 1.5 does not have
_SIDES = {26: (12, "Stable Diffusion 1.5 and 2"), 20: (9, "SDXL")}  # count of numbers: blocks on each side, and whose

# Names of the original checkpoints, with any prefix; and of diffusers, which has its U-Net in a file of its own.
_ORIGINAL = re.compile(
    r"(?:^|diffusion_model\.)(?:(input_blocks|output_blocks)\.(\d+)|(middle_block)|(out)|(label_emb))\."
)
_DIFFUSERS = re.compile(
    r"(?:^|unet\.)(?:(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)|(mid_block)|"
    r"(conv_in)|(conv_norm_out|conv_out)|(add_embedding))\."
)


class BlockFilter(msgspec.Struct, frozen=True):
    """The filter of one block.

    block  `IN04`, say
    last   whether it is the last one, which what is behind it belongs to
    """

    block: str
    last: bool = False

    def matches(self, tensor: str) -> bool:
        found = block_of(tensor)
        return found == self.block or (self.last and found == _AFTER)

    def __str__(self) -> str:
        return self.block


class ForeignBlock(BlockFilter, frozen=True):
    """Matches a tensor that the other kind of model has: the numbers are not for this one.

    message  what is wrong
    """

    message: str = ""


@lru_cache(maxsize=8192)
def block_of(tensor: str) -> str:
    """The block that a tensor is in, by its name: `IN04`, `M00`, `OUT11`; `BASE`, if it is in none."""
    original = _ORIGINAL.search(tensor)
    if original:
        side, number, middle, out, _ = original.groups()
        if side:
            return f"{'IN' if side == 'input_blocks' else 'OUT'}{int(number):02}"
        return MIDDLE if middle else _AFTER if out else _LABELS
    diffusers = _DIFFUSERS.search(tensor)
    if diffusers is None:
        return BASE
    side, block, kind, layer, middle, first, last, _ = diffusers.groups()
    if side == "down":
        return f"IN{3 * (int(block) + 1) if kind == 'downsamplers' else 1 + 3 * int(block) + int(layer):02}"
    if side == "up":
        return f"OUT{3 * int(block) + (2 if kind == 'upsamplers' else int(layer)):02}"
    return MIDDLE if middle else "IN00" if first else _AFTER if last else _LABELS


def expanded(document: Document, raw: Any, path: str) -> list[tuple[BlockFilter | None, Any, str]]:
    """Filter, value and path of each number of `raw`, a list or text with commas; BASE last, as the value of all else.

    Raises: RecipeError with path and line.
    """
    at = f"{path}.{KEY}"
    numbers = [part.strip() for part in raw.split(",")] if isinstance(raw, str) else raw
    if not isinstance(numbers, list) or len(numbers) not in _SIDES:
        got = f"{len(numbers)} of them" if isinstance(numbers, list) else shown(raw)
        if got in ("25 of them", "19 of them"):
            got += ". Put the number of all that is in no block (BASE) before them"
        raise document.error(
            "`blocks` takes 26 numbers (BASE, IN00 to IN11, M00, OUT00 to OUT11) for Stable Diffusion 1.5, or 20 "
            f"(BASE, IN00 to IN08, M00, OUT00 to OUT08) for SDXL, got {got}",
            at,
        )
    side, whose = _SIDES[len(numbers)]
    names = [f"IN{i:02}" for i in range(side)] + [MIDDLE] + [f"OUT{i:02}" for i in range(side)]
    paths = [at if isinstance(raw, str) else f"{at}[{i}]" for i in range(len(numbers))]
    base, *others = zip(numbers, paths, strict=True)
    cases: list[tuple[BlockFilter | None, Any, str]] = [
        (BlockFilter(name, last=name == names[-1]), number, where)
        for name, (number, where) in zip(names, others, strict=True)
    ]
    wrong = f"{len(numbers)} numbers are for {whose}, but"
    if len(numbers) == 26:
        cases.append((ForeignBlock(_LABELS, message=f"{wrong} this tensor is SDXL's: give 20"), base[0], at))
    else:
        foreign = (f"{kind}{i:02}" for kind in ("IN", "OUT") for i in range(9, 12))
        message = f"{wrong} this tensor is in a block beyond: give 26"
        cases += [(ForeignBlock(block, message=message), base[0], at) for block in foreign]
    return [*cases, (None, *base)]
