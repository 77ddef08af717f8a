"""fastinterp.integrations beside the tools that they stand in for: theirs and ours in turn, with the same result.

python -m benchmarks.tools                                print a table
python -m benchmarks.tools --out benchmarks/results/tools.json     and write every number
python -m benchmarks.tools averaged cat                   only these cases; --scale 0.25 takes smaller models

Before anything is timed, both results are compared. `wall_s` and `cpu_s` (of all threads) have every round. sd-mecha's
case needs sd_mecha, and room for two models and two outputs under --folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastinterp.bench.provenance import provenance
from fastinterp.integrations.torch_ops import get_ema_multi_avg_fn

HIDDEN, INNER, LAYERS, VOCABULARY = 2048, 5632, 22, 32000  # of a Llama of 1.1 billion parameters
DECAY = 0.999


@dataclass
class Case:
    """One comparison.

    theirs, ours  what is timed; each begins from the same state as often as it is called
    same          compares the results, and returns how far they differ, in words
    nbytes        bytes of the models that are read
    copy          moves as many bytes as `ours`, or None
    """

    name: str
    theirs: Callable[[], Any]
    ours: Callable[[], Any]
    same: Callable[[], str]
    nbytes: int
    copy: Callable[[], Any] | None = None
    times: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def measure(self, rounds: int) -> None:
        racers = {"theirs": self.theirs, "ours": self.ours} | ({"copy": self.copy} if self.copy else {})
        for name in racers:
            self.times[name] = {"wall_s": [], "cpu_s": []}
        for _ in range(rounds):
            for name, run in racers.items():
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                self.times[name]["wall_s"].append(time.perf_counter() - wall)
                self.times[name]["cpu_s"].append(time.process_time() - cpu)


# --- torch ------------------------------------------------------------------------------------------------------------


def llama_shapes(scale: float) -> Iterator[tuple[int, ...]]:
    yield VOCABULARY, HIDDEN
    for _ in range(max(1, round(LAYERS * scale))):
        yield from ((HIDDEN, HIDDEN), (256, HIDDEN), (256, HIDDEN), (HIDDEN, HIDDEN))
        yield from ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER), (HIDDEN,), (HIDDEN,))


class Weights(torch.nn.Module):
    def __init__(self, scale: float, dtype: torch.dtype):
        super().__init__()
        shapes = llama_shapes(scale)
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes)


def averaged(scale: float, dtype: torch.dtype, **theirs: Any) -> Case:
    """AveragedModel.update_parameters. Both average into the same memory: a second copy would not fit everywhere."""
    from torch.optim.swa_utils import AveragedModel

    model = Weights(scale, dtype)
    average = AveragedModel(model)
    average.update_parameters(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())

    def update(**functions: Any) -> None:
        average.avg_fn, average.multi_avg_fn = functions.get("avg_fn"), functions.get("multi_avg_fn")
        average.update_parameters(model)

    own = {"multi_avg_fn": get_ema_multi_avg_fn(DECAY)}

    def same() -> str:
        first, start = average.module.weights[1], average.module.weights[1].detach().clone()
        update(**theirs)
        want = first.detach().clone()
        with torch.no_grad():
            first.copy_(start)
        update(**own)
        distance = (first.float() - want.float()).abs().max() / want.float().abs().max()
        if float(distance) > 2.0**-7:
            raise SystemExit(f"AveragedModel: the results differ by {float(distance):.1e}")
        return f"to {float(distance):.0e} of the largest"

    def copy() -> None:
        with torch.no_grad():
            for to, of in zip(average.module.parameters(), model.parameters(), strict=True):
                to.copy_(of)

    kind = next(iter(theirs))
    name = f"AveragedModel, {kind}, {str(dtype).removeprefix('torch.')}"
    return Case(name, partial(update, **theirs), partial(update, **own), same, nbytes, copy)


# --- peft -------------------------------------------------------------------------------------------------------------


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapters(scale: float, kind: str, layers: int, targets: Sequence[str] = LINEAR, count: int = 8) -> Case:
    """add_weighted_adapter on adapters of these linear layers, of a model whose own weights are not looked at."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastinterp.integrations.peft import add_weighted_adapter

    config = LlamaConfig(
        vocab_size=1000, hidden_size=HIDDEN, intermediate_size=INNER, num_attention_heads=32, num_key_value_heads=4,
        num_hidden_layers=max(1, round(layers * scale)), dtype="bfloat16",
    )  # fmt: skip
    names = [f"task{i}" for i in range(count)]
    one = peft.LoraConfig(r=16, target_modules=[*targets], init_lora_weights=False)
    model = peft.get_peft_model(LlamaForCausalLM(config), one, names[0])
    for name in names[1:]:
        model.add_adapter(name, one)
    weights = [0.1 * (i + 1) for i in range(count)]
    nbytes = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "lora_" in n)

    def run(function: Callable[..., Any], keep: bool = False) -> None:
        function(names, weights, "mix", combination_type=kind)
        if not keep:
            model.delete_adapter("mix")

    layer = next(m for n, m in model.named_modules() if n.endswith(f"layers.0.self_attn.{targets[0]}"))
    functions = model.base_model.add_weighted_adapter, partial(add_weighted_adapter, model)

    def same() -> str:
        found = []
        for function in functions:
            run(function, keep=True)
            found.append(layer.get_delta_weight("mix").detach().clone())
            model.delete_adapter("mix")
        distance = float((found[0] - found[1]).abs().max() / found[0].abs().max())
        if distance > 1e-4:
            raise SystemExit(f"peft {kind}: the results differ by {distance:.1e}")
        return f"to {distance:.0e} of the largest"

    matrices = len(targets) * config.num_hidden_layers
    name = f"peft {kind}, {count} adapters of rank 16 on {matrices} matrices"
    return Case(name, partial(run, functions[0]), partial(run, functions[1]), same, nbytes)


# --- sd-mecha ---------------------------------------------------------------------------------------------------------


def weighted_sum(scale: float, folder: Path) -> Case:
    """Two models with SDXL's names and shapes (with `scale`, as many of its tensors), in float16, from file to file."""
    import sd_mecha
    from sd_mecha.extensions import model_configs
    from tqdm import tqdm

    from benchmarks.tools_files import compare, write_model
    from fastinterp.integrations.sd_mecha import merge

    keys = {
        name: tuple(m.shape)
        for name, m in model_configs.resolve("sdxl-sgm").keys().items()
        if m.dtype.is_floating_point
    }
    shapes = dict([*keys.items()][: max(1, round(len(keys) * scale))])
    files = [folder / f"{name}.safetensors" for name in "ab"]
    nbytes = sum(write_model(file, shapes, seed) for seed, file in enumerate(files))
    graph = sd_mecha.weighted_sum(*(sd_mecha.model(file) for file in files), alpha=0.3)
    theirs, ours = folder / "theirs.safetensors", folder / "ours.safetensors"

    def run_theirs() -> None:
        sd_mecha.merge(graph, output=theirs, tqdm=partial(tqdm, disable=True))

    def run_ours() -> None:
        merge(graph, output=ours, force=True)

    def same() -> str:
        run_theirs()
        run_ours()
        return compare(theirs, ours, shapes)

    name = f"sd-mecha weighted_sum of two models of {nbytes / 2e9:.2f} GB"
    return Case(name, run_theirs, run_ours, same, nbytes)


# --- the table --------------------------------------------------------------------------------------------------------


def cases(names: list[str], scale: float, folder: Path) -> Iterator[Case]:
    from torch.optim.swa_utils import get_ema_avg_fn
    from torch.optim.swa_utils import get_ema_multi_avg_fn as torch_multi

    made: dict[str, list[Callable[[], Case]]] = {
        "averaged": [
            partial(averaged, scale, dtype, **functions)
            for dtype in (torch.float32, torch.bfloat16)
            for functions in ({"avg_fn": get_ema_avg_fn(DECAY)}, {"multi_avg_fn": torch_multi(DECAY)})
        ],
        "cat": [partial(adapters, scale, "cat", LAYERS)],
        "linear": [partial(adapters, scale, "linear", LAYERS)],
        "svd": [partial(adapters, scale, "svd", 1, ("q_proj", "k_proj"))],
        "mecha": [partial(weighted_sum, scale, folder)],
    }
    for name in names or made:
        for make in made[name]:
            yield make()


HEAD = (
    "| case | theirs | ours | theirs / ours | of processor time | ours / copy | same result |",
    "|---|---:|---:|---:|---:|---:|---|",
)


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows of cases as they are in a file of results, as Markdown."""
    return [*HEAD, *(row(one["case"], one["times"], one["same"]) for one in found)]


def row(name: str, times: Mapping[str, Mapping[str, Sequence[float]]], same: str) -> str:
    """One row of the table."""
    best = {racer: min(of["wall_s"]) for racer, of in times.items()}
    copy = f"{_ratio(times, 'ours', 'copy', 'wall_s'):.2f}" if "copy" in times else ""
    wall, cpu = (f"{_ratio(times, 'theirs', 'ours', clock):.1f}" for clock in ("wall_s", "cpu_s"))
    return f"| {name} | {_seconds(best['theirs'])} | {_seconds(best['ours'])} | {wall} | {cpu} | {copy} | {same} |"


def _ratio(times: Mapping[str, Mapping[str, Sequence[float]]], of: str, to: str, clock: str) -> float:
    """The median over the rounds of one racer's time over another's."""
    return statistics.median(a / b for a, b in zip(times[of][clock], times[to][clock], strict=True))


def _seconds(wall_s: float) -> str:
    return f"{wall_s:.2f} s" if wall_s >= 1 else f"{wall_s * 1000:.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="averaged, cat, linear, svd, mecha; none: all")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the models, as a fraction")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the files of sd-mecha's case"
    )
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    work = Path(tempfile.mkdtemp(prefix="fastinterp-tools-", dir=asked.folder))
    found = []
    print("\n".join(HEAD), flush=True)
    try:
        for case in cases(asked.names, asked.scale, work):
            same = case.same()
            case.measure(asked.rounds)
            print(row(case.name, case.times, same), flush=True)
            found.append({"case": case.name, "bytes": case.nbytes, "same": same, "times": case.times})
    finally:
        shutil.rmtree(work)
    if asked.out:
        made = {"benchmark": "tools", "scale": asked.scale, "torch": torch.__version__} | provenance(asked.folder)
        asked.out.write_text(json.dumps(made | {"cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
