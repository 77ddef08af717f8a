"""Train a base model on generated reviews, four fine-tunes of it, and a second base from another initialisation.

    python -m examples.paper_path.train build/paper --seeds 0 1 2

Each seed gets a folder `seedN` with the models base, pos, neg, formal, casual and base2, as sharded safetensors. A
model that is there already, trained with the same settings, is kept, so an interrupted run can be taken up again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from examples.paper_path import checkpoints
from examples.paper_path.corpus import corpus
from examples.paper_path.model import Model, Shape, encode

TUNES = ("pos", "neg", "formal", "casual")
MODELS = ("base", *TUNES, "base2")
QUICK = ("base", "pos", "neg")


@dataclass(frozen=True)
class Settings:
    """Of a training run. The numbers are those of the full form."""

    base_steps: int = 1000
    base_reviews: int = 12_000
    base_rate: float = 3e-3  # highest learning rate, then down along a cosine
    warm_up: int = 50
    tune_steps: int = 150
    tune_reviews: int = 3000
    tune_rate: float = 1e-4  # constant
    batch: int = 24  # windows of n_positions bytes
    bf16: bool = False  # matrix products in bfloat16; weights and optimizer stay in float32

    @staticmethod
    def quick(bf16: bool) -> Settings:
        return Settings(base_steps=400, base_reviews=6000, tune_steps=120, tune_rate=1.5e-4, bf16=bf16)


def batches(text: Tensor, width: int, count: int, steps: int, seed: int) -> Iterator[Tensor]:
    """i64[count, width + 1] windows of u8[bytes], anywhere in the text."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(width + 1)
    for _ in range(steps):
        starts = torch.randint(len(text) - width, (count, 1), generator=generator)
        yield text[starts + offsets].long()


def train(model: Model, text: str, steps: int, settings: Settings, seed: int, *, tune: bool) -> list[float]:
    """Train in place; the loss of each step, in nats per byte."""
    rate = settings.tune_rate if tune else settings.base_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    model.train()
    losses = []
    windows = batches(encode(text), model.shape.n_positions, settings.batch, steps, seed)
    for step, tokens in enumerate(windows):
        if not tune:
            warm = min(1.0, (step + 1) / settings.warm_up)
            optimizer.param_groups[0]["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"    step {step + 1} of {steps}: {sum(losses[-50:]) / 50:.4f} nats per byte", flush=True)
    return losses


def initial(seed: int) -> Model:
    """A fresh model; its initialisation depends on the seed alone."""
    torch.manual_seed(seed)
    return Model(Shape())


def train_one(name: str, seed: int, settings: Settings, base: Mapping[str, Tensor] | None) -> tuple[Model, list[float]]:
    """One of MODELS. A fine-tune starts from the weights `base`."""
    if name in TUNES:
        if base is None:
            raise ValueError(f"{name} is a fine-tune and needs the base's weights")
        model = Model(Shape())
        model.load_state_dict(dict(base))
        text = corpus(name, settings.tune_reviews, seed)
        return model, train(model, text, settings.tune_steps, settings, 1000 * seed + MODELS.index(name), tune=True)
    # base2 sees the same corpus as base; its first weights and the order of its batches are others.
    number = 1000 * seed + (500 if name == "base2" else 0)
    model = initial(number)
    text = corpus("mixed", settings.base_reviews, seed)
    return model, train(model, text, settings.base_steps, settings, number, tune=False)


def train_seed(folder: Path, seed: int, settings: Settings, names: tuple[str, ...] = MODELS) -> None:
    """Train what is not there yet."""
    base: dict[str, Tensor] | None = None
    for name in names:
        target = folder / name
        if is_done(target, seed, settings):
            print(f"  {target}: kept", flush=True)
        else:
            (target / "training.json").unlink(missing_ok=True)
            print(f"  {target}: training", flush=True)
            start = time.perf_counter()
            model, losses = train_one(name, seed, settings, base)
            checkpoints.save(target, model.state_dict(), model.shape)
            wall = time.perf_counter() - start
            note = {"seed": seed, "settings": asdict(settings), "wall_s": round(wall, 1), "losses": losses[-50:]}
            (target / "training.json").write_text(json.dumps(note) + "\n")
            print(f"    {wall:.0f} s", flush=True)
        if name == "base":
            base = checkpoints.load(target)


def is_done(target: Path, seed: int, settings: Settings) -> bool:
    try:
        note: dict[str, Any] = json.loads((target / "training.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return bool(note["seed"] == seed and note["settings"] == asdict(settings))


def has_bf16() -> bool:
    """Whether this CPU multiplies matrices in bfloat16: there it takes half the time, elsewhere far longer."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "avx512_bf16" in flags.read_text()


def main() -> None:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="train", description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the seeds' folders are, or come")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: all six")
    parser.add_argument("--quick", action="store_true", help="fewer steps on a smaller corpus; base, pos and neg alone")
    parser.add_argument("--threads", type=int, default=1, help="of torch; default: 1, as the model is small")
    parser.add_argument("--precision", choices=("auto", "bf16", "f32"), default="auto", help="of matrix products")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    bf16 = has_bf16() if given.precision == "auto" else given.precision == "bf16"
    settings = Settings.quick(bf16) if given.quick else Settings(bf16=bf16)
    models = given.models or (QUICK if given.quick else MODELS)
    for seed in given.seeds:
        print(f"seed {seed}, matrix products in {'bf16' if bf16 else 'f32'}", flush=True)
        train_seed(given.folder / f"seed{seed}", seed, settings, tuple(models))


if __name__ == "__main__":
    main()
