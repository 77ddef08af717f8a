"""`extract-lora`: the command that writes a fine-tune as an adapter of its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastinterp.cli import grammar, options
from fastinterp.cli.blas import one_blas_thread
from fastinterp.cli.merge import outcome_of


@click.command()
@click.argument("finetune")
@click.argument("outs", nargs=-1, metavar="[OUT]")
@click.option("--base", required=True, metavar="CKPT", help="The checkpoint that FINETUNE was made from.")
@click.option(
    "--rank", type=click.IntRange(1), required=True, metavar="R",
    help="Rank of the factors of each weight; with --energy the largest.",
)  # fmt: skip
@grammar.out_option("The output folder, in place of OUT.")
@click.option(
    "--energy", type=float, metavar="E",
    help="Per module the smallest rank that keeps this part of the change's squared norm: above 0, at most 1, as 0.99.",
)  # fmt: skip
@click.option(
    "--modules-to-save/--no-modules-to-save", "whole_modules", default=True,
    help="Store what differs and has no factors whole: embeddings, heads, norms, biases. Or leave it out, and warn. "
    "Default: store it.",
)  # fmt: skip
@click.option("--dtype", default="float32", show_default=True, metavar="NAME", help="Dtype of the factors.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of the random matrices.")
@options.threads
@click.option(
    "--force",
    is_flag=True,
    help="Replace an adapter in the output folder, and files of the names that are written (README.md). The report "
    "names what was removed or replaced.",
)
@options.durable
@options.offline
@options.quiet
@options.as_json
def extract_lora(
    finetune: str, outs: tuple[str, ...], named_out: str | None, base: str, quiet: bool, as_json: bool, **settings: Any
) -> None:  # fmt: skip
    """Write a fine-tune as a LoRA adapter of its base.

    FINETUNE and CKPT are checkpoints with the same tensors. Each weight of a linear layer or convolution that differs
    becomes two factors, by a randomised singular value decomposition of FINETUNE - CKPT; what differs else is stored
    whole. OUT is a folder that peft loads. The report has the error, |D - B A| / |D| of the changes D, of all
    and for each module (--json).

    \b
    Example:
      fastinterp extract-lora tuned/ adapter/ --base base/ --rank 32
      fastinterp extract-lora tuned/ adapter/ --base base/ --rank 64 --energy 0.9
    """
    one_blas_thread()
    from fastinterp.cli import progress
    from fastinterp.lora.extract import extract_lora as extract
    from fastinterp.messages import plain

    options.refuse_ranks("extract-lora")
    out = grammar.only_output(outs, named_out, "extract-lora FINETUNE --base CKPT --rank R")
    with outcome_of([Path(out)]), progress.shown(quiet or as_json) as shown:
        report = extract(finetune, base, out, progress=shown, **settings)
    if as_json:
        options.say_json(report.as_dict())
    elif quiet:
        for warning in report.warnings:
            options.tell(plain(f"{report.output}: warning: {warning}"))
    else:
        options.say(report.summary())
