"""Fetch, train, walk, measure. Every stage keeps what is done already: an interrupted run can be taken up again.

    python -m examples.real_path.main build/real_path              # three seeds
    python -m examples.real_path.main build/real_path-quick --quick

Then `python -m examples.real_path.report FOLDER` judges the results.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from examples.real_path.data import MissingPackageError, fetch
from examples.real_path.design import BASE, PRETRAINED, Design, Point, points
from examples.real_path.finetune import Settings

Job = tuple[str, Callable[..., None], tuple[Any, ...]]  # what is said of it, a function of this module, its arguments
Stage = Callable[[Path, Design], list[Job]]  # what is still to be done


def write(file: Path, value: Any) -> None:
    """As JSON; the file is there as a whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(value) + "\n")
    partial.replace(file)


def read(file: Path) -> Any:
    """None, if there is no such file."""
    return json.loads(file.read_text()) if file.exists() else None


# --- what a worker does ----------------------------------------------------------------------------------------------


def prepare() -> None:
    """A worker computes with one thread: several workers leave fewer processors idle than several threads do."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def convert(folder: Path) -> None:
    from examples.real_path import base

    partial = folder / f"{PRETRAINED}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    base.convert(folder / "packages", partial)
    partial.rename(folder / PRETRAINED)


def adapt(folder: Path, design: Design) -> None:
    """Make the base: it writes film reviews, of all kinds."""
    from examples.real_path.data import corpus
    from examples.real_path.finetune import finetune

    for derived in (BASE, *(f"seed{seed}" for seed in design.seeds)):
        shutil.rmtree(folder / derived, ignore_errors=True)
    snippets = corpus(folder / "packages")
    told = finetune(folder / PRETRAINED, folder / BASE, snippets, "all", 0, design.adapting, lora=False)
    write(folder / BASE / "training.json", {"settings": asdict(design.adapting), **told})


def train(folder: Path, kind: str, seed: int, design: Design, lora: bool) -> None:
    from examples.real_path.data import corpus
    from examples.real_path.finetune import finetune

    target = trained(folder, kind, seed, lora)
    for derived in (target, target.parent / "random"):
        shutil.rmtree(derived, ignore_errors=True)
    weights_file(folder, seed).unlink(missing_ok=True)
    # The control is trained in another order than the models that it is compared with.
    number = 10 * seed + (5 if kind == "shuffled" else 0)
    told = finetune(folder / BASE, target, corpus(folder / "packages"), kind, number, design.training, lora=lora)
    write(target / "training.json", {"settings": asdict(design.training), **told})


def trained(folder: Path, kind: str, seed: int, lora: bool) -> Path:
    return folder / f"seed{seed}" / (f"lora-{kind}" if lora else kind)


def control(folder: Path, seed: int) -> None:
    from examples.real_path.controls import random_end

    own = folder / f"seed{seed}"
    random_end(own / "neg", own / "pos", own / "random", seed)


def weigh(folder: Path, seed: int, design: Design) -> None:
    """What rounding makes of the weights, and whether the ends of the line have their bits."""
    from examples.real_path.controls import ends_are_equal, staircase
    from examples.real_path.design import STAIRS

    ends = [folder / f"seed{seed}" / name for name in ("neg", "pos")]
    found = staircase(ends[0], ends[1], STAIRS if design.whole else (0.25,))
    write(weights_file(folder, seed), {**found, "ends_are_equal": ends_are_equal(ends[0], ends[1])})


def weights_file(folder: Path, seed: int) -> Path:
    return folder / f"seed{seed}" / "weights.json"


@lru_cache(maxsize=1)
def bench_and_model(folder: Path, design: Design, seed: int) -> Any:
    from examples.real_path import base, data, evaluate

    corpus = data.corpus(folder / "packages")
    bench = evaluate.Bench(
        base.tokenizer(folder / PRETRAINED),
        data.judge(folder / "packages"),
        evaluate.random_numbers(design.samples, design.tokens, seed),
        data.held_out(corpus.held_out, design.held_out),
    )
    return bench, base.empty(folder / PRETRAINED)


def measure(folder: Path, point: Point, design: Design) -> None:
    import fastinterp
    from examples.real_path import evaluate

    start = time.perf_counter()
    bench, model = bench_and_model(folder, design, point.seed)
    state = fastinterp.load(point.recipe, threads=1)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:  # which is the embedding
        raise SystemExit(f"{point.recipe} does not fit the model: {missing}, {unexpected}")
    del state
    made = time.perf_counter() - start
    found = {**point.at, **evaluate.measure(model, bench)}
    times = {"made_s": round(made, 2), "wall_s": round(time.perf_counter() - start, 2)}
    write(result_file(folder, point), {"recipe": point.recipe, "design": design.measured, **found, **times})


def result_file(folder: Path, point: Point) -> Path:
    return folder / f"seed{point.seed}" / "results" / point.walk / f"{point.name}.json"


# --- stages ----------------------------------------------------------------------------------------------------------


def converting_jobs(folder: Path, _design: Design) -> list[Job]:
    return (
        [] if (folder / PRETRAINED).exists() else [("the pretrained model, out of its GGUF file", convert, (folder,))]
    )


def adapting_jobs(folder: Path, design: Design) -> list[Job]:
    done = is_trained(folder / BASE, design.adapting)
    return [] if done else [("the base: the pretrained model, on reviews of all kinds", adapt, (folder, design))]


def is_trained(model: Path, settings: Settings) -> bool:
    told = read(model / "training.json")
    return told is not None and told["settings"] == asdict(settings)


def training_jobs(folder: Path, design: Design) -> list[Job]:
    models = [(kind, seed, False) for seed in design.seeds for kind in design.full]
    models += [(kind, seed, True) for seed in design.seeds for kind in design.lora]
    return [
        (f"seed {seed}: {'LoRA ' if lora else ''}{kind}", train, (folder, kind, seed, design, lora))
        for kind, seed, lora in models
        if not is_trained(trained(folder, kind, seed, lora), design.training)
    ]


def is_measured(folder: Path, point: Point, design: Design) -> bool:
    found = read(result_file(folder, point))
    return found is not None and found["recipe"] == point.recipe and found["design"] == design.measured


def weighing_jobs(folder: Path, design: Design) -> list[Job]:
    jobs: list[Job] = []
    for seed in design.seeds:
        if design.whole and not (folder / f"seed{seed}" / "random" / "model.safetensors").exists():
            jobs.append((f"seed {seed}: a random direction", control, (folder, seed)))
        if read(weights_file(folder, seed)) is None:
            jobs.append((f"seed {seed}: weights after rounding", weigh, (folder, seed, design)))
    return jobs


def measuring_jobs(folder: Path, design: Design) -> list[Job]:
    found = [p for seed in design.seeds for p in points(design, folder, seed)]
    return [
        (f"seed {p.seed}: {p.walk} {p.name}", measure, (folder, p, design))
        for p in found
        if not is_measured(folder, p, design)
    ]


TRAINING: tuple[Stage, ...] = (converting_jobs, adapting_jobs, training_jobs)
MEASURING: tuple[Stage, ...] = (weighing_jobs, measuring_jobs)


def run(folder: Path, design: Design, stages: Sequence[Stage], workers: int) -> None:
    """Stage after stage, the jobs of each side by side; a line for each. Raises: what a job raises."""
    fetch(folder / "packages")
    os.environ["TQDM_DISABLE"] = "1"  # of the workers: bars of several would mix
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), prepare) as pool:
        for stage in stages:
            start, jobs = time.perf_counter(), stage(folder, design)
            waiting = {pool.submit(function, *arguments): said for said, function, arguments in jobs}
            try:
                for done, future in enumerate(as_completed(waiting), 1):
                    future.result()
                    wall = time.perf_counter() - start
                    name = stage.__name__.removesuffix("_jobs")
                    print(f"  {name} {done} of {len(jobs)}, {wall:.0f} s: {waiting[future]}", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def walk(folder: Path, design: Design, workers: int) -> None:
    """Every stage, and a note of what it took, and where. Raises: MissingPackageError."""
    import torch

    from fastinterp.bench.provenance import provenance

    start, before = time.perf_counter(), (read(folder / "run.json") or {}).get("wall_s", 0)
    try:
        run(folder, design, (*TRAINING, *MEASURING), workers)
    finally:
        spent = round(before + time.perf_counter() - start)
        machine = provenance() | {"torch": torch.__version__}
        write(folder / "run.json", {"design": asdict(design), "wall_s": spent, "workers": workers, "machine": machine})


def main() -> None:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="main", description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where packages, models and results come; 1.5 GB a seed")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2; --quick: 0")
    parser.add_argument("--quick", action="store_true", help="25 steps, three alphas")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="default: one for each processor")
    given = parser.parse_args()
    design = Design.quick() if given.quick else Design()
    if given.seeds:
        design = replace(design, seeds=tuple(given.seeds))
    try:
        walk(given.folder.resolve(), design, min(given.workers, 4))
    except MissingPackageError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
