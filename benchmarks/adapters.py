"""A LoRA adapter merged into its base, as whole commands: beside the copy of the base, and beside peft.

python -m benchmarks.adapters                                 print a table
python -m benchmarks.adapters --size 100m --out FILE.json     a smaller model; and write every number
python -m benchmarks.adapters --folder /dev/shm               where base, adapter and outputs are, 3 times the base

Racers take turns, in processes of their own: `fastinterp merge` of the base alone (`passthrough`, a copy), of
base+lora, rank 16 on all linear layers, and a program that does what peft's documentation says: load, attach,
merge_and_unload, save. What both write is compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastinterp.bench.checkpoints import SIZES, Size, write_checkpoints
from fastinterp.bench.provenance import provenance
from fastinterp.bench.race import Racer, race
from fastinterp.errors import FastinterpError

RANK, ALPHA = 16, 32
PEFT = """
import sys, torch, transformers, peft
base, adapter, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def write_adapter(folder: Path, size: Size) -> Path:
    """An adapter of all linear layers, as peft saves one: float32, normal factors."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(1)
    tensors: dict[str, Any] = {}
    for name, shape in size.shapes().items():
        if "proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            for factor, of in (("lora_A", (RANK, shape[1])), ("lora_B", (shape[0], RANK))):
                tensors[f"{module}.{factor}.weight"] = rng.standard_normal(of, np.float32) * np.float32(0.02)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets,
              "base_model_name_or_path": str(folder.parent / "base")}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def same(ours: dict[str, Any], file: Path) -> int:
    """Compare the weights that a racer wrote with those of this package, which the first call is given.

    peft rounds the product to the dtype of the factors, adds it in bfloat16 and rounds: half a unit of the last place
    of bfloat16 beside one rounding here, so neighbours at most. Raises: FastinterpError, if any element is further.
    """
    from safetensors.torch import load_file

    written = load_file(file)
    if not ours:
        ours.update(written)
    for name, tensor in written.items():
        want, got = ours[name].float(), tensor.float()
        if not ((want - got).abs() <= 2.0**-7 * want.abs().clamp(min=2.0**-20)).all():
            raise FastinterpError(f"{name} differs by {(want - got).abs().max():.1e}")
    return sum(tensor.numel() for tensor in written.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--folder", help="where to work; default: the system's for temporary files")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without-peft", action="store_true", help="only the copy and base+lora")
    parser.add_argument("--out", type=Path, help="write every number to this file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        base, *others = write_checkpoints(Path(folder), SIZES[options.size], shard_bytes=1 << 40)
        for other in others:
            (other / "model.safetensors").unlink()
        lora = write_adapter(Path(folder) / "lora", SIZES[options.size])
        work = Path(folder) / "work"
        work.mkdir()
        ours: dict[str, Any] = {}
        racers = []
        for name, model in (("copy", f"{base}"), ("base+lora", f"{base}+{lora}")):
            recipe = work / f"{name}.yml"
            recipe.write_text(json.dumps({"merge_method": "passthrough", "models": [{"model": model}]}))
            command = [sys.executable, "-m", "fastinterp", "merge", str(recipe), str(work / "out"), "--quiet"]
            check = (lambda: 0) if name == "copy" else lambda: same(ours, work / "out" / "model.safetensors")
            racers.append(Racer(name, [*command, f"--threads={options.threads}"], check))
        if not options.without_peft:
            command = [sys.executable, "-c", PEFT, str(base), str(lora), str(work / "out")]
            racers.append(Racer("peft", command, lambda: same(ours, work / "out" / "model.safetensors")))
        files = [base / "model.safetensors", lora / "adapter_model.safetensors"]
        race(racers, files, work, runs=options.runs, cold=False, say=lambda text: print(text, file=sys.stderr))
        ours.clear()
    results = {racer.name: racer.as_dict(racers[0]) for racer in racers}
    print(f"{'':12} {'wall':>8} {'CPU':>8} {'of the copy':>12} {'memory':>10}")
    for name, found in results.items():
        copies = statistics.median(a / b for a, b in zip(found["wall_s"], results["copy"]["wall_s"], strict=True))
        print(
            f"{name:12} {found['median_wall_s']:6.2f} s {found['median_cpu_s']:6.2f} s {copies:11.2f}x "
            f"{found['peak_anon_bytes'] / 1e6:7.0f} MB"
        )
    if options.out:
        options.out.write_text(json.dumps({**provenance(), "size": options.size, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
