"""What a model does: its likelihood on held-out text, what it writes, and how far it is from another model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from examples.paper_path.corpus import corpus
from examples.paper_path.judges import Share, attribute, grammatical
from examples.paper_path.model import Model, encode, model_of, sample

HELD_OUT = 10_000  # added to a seed: its held-out text shares no random numbers with what it was trained on


@dataclass(frozen=True)
class Bench:
    """The same texts to predict, and the same random numbers to write with, for every model of a seed."""

    windows: Mapping[str, Tensor]  # by kind of corpus: i64[windows, n_positions + 1]
    draws: Tensor  # f32[length, samples]

    @staticmethod
    def of(seed: int, *, windows: int, samples: int, width: int = 96) -> Bench:
        """`windows` of mixed text, and a third as many of each pure kind."""
        counts = {"mixed": windows, "pos": windows // 3, "neg": windows // 3}
        kept = {}
        for kind, count in counts.items():
            text = encode(corpus(kind, count + 1, HELD_OUT + seed))  # a review is longer than a window
            kept[kind] = text[: count * (width + 1)].view(count, width + 1).long()
        draws = torch.rand(width - 1, samples, generator=torch.Generator().manual_seed(HELD_OUT + seed))
        return Bench(kept, draws)


@torch.inference_mode()
def log_probabilities(model: Model, windows: Tensor) -> Tensor:
    """f32[bytes, vocabulary] of what follows each byte of the windows."""
    return torch.cat([model(part[:, :-1]).flatten(0, 1).log_softmax(-1) for part in windows.split(64)])


@torch.inference_mode()
def nll(model: Model, windows: Tensor) -> float:
    """Mean negative log-likelihood, nats per byte; summed in float64."""
    total = 0.0
    for part in windows.split(64):
        logits = model(part[:, :-1]).flatten(0, 1)
        total += functional.cross_entropy(logits, part[:, 1:].flatten(), reduction="none").double().sum().item()
    return total / windows[:, 1:].numel()


def evaluate(state: Mapping[str, Tensor], bench: Bench) -> dict[str, Any]:
    """Everything that is measured of one model, as plain values."""
    model = model_of(state)
    texts = sample(model, bench.draws)
    found: dict[str, Any] = {f"nll_{kind}": nll(model, windows) for kind, windows in bench.windows.items()}
    shares = {
        "positive": attribute(texts, "sentiment"),
        "formal": attribute(texts, "register"),
        "grammatical": grammatical(texts),
    }
    for name, share in shares.items():
        found |= _plain(name, share)
    return found | {"sample": texts[0].replace("\n", " / ")}


def _plain(name: str, share: Share) -> dict[str, Any]:
    return {
        name: None if math.isnan(share.share) else share.share,
        f"{name}_error": None if math.isnan(share.error) else share.error,
        f"{name}_log_odds": share.log_odds,
        f"{name}_events": share.events,
    }


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean KL(p || q) in nats, of log-probabilities f32[rows, vocabulary]."""
    return (p.exp() * (p - q)).sum(-1, dtype=torch.float64).mean().item()


@torch.inference_mode()
def against_mixtures(
    ends: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], between: Mapping[float, Mapping[str, Tensor]], bench: Bench
) -> dict[str, Any]:
    """How far each model `between` is from a mixture of the ends' logits, and from one of their probabilities."""
    windows = bench.windows["mixed"][:100]
    first, second = (log_probabilities(model_of(state), windows) for state in ends)
    points = []
    for alpha, state in between.items():
        here = log_probabilities(model_of(state), windows)
        of_logits = ((1 - alpha) * first + alpha * second).log_softmax(-1)
        point = {"alpha": alpha, "kl_logits": divergence(here, of_logits)}
        if 0 <= alpha <= 1:  # beyond the ends it is no probability
            mixture = ((1 - alpha) * first.exp() + alpha * second.exp()).log()
            point["kl_probabilities"] = divergence(here, mixture)
        points.append(point)
    return {"kl_ends": divergence(first, second), "points": points}


def geometry(models: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """Lengths of the task vectors against the base, and cosines between them."""
    flat = {n: torch.cat([t.double().flatten() for t in m.values()]) for n, m in models.items()}
    base = flat["base"]
    moved = {n: x - base for n, x in flat.items() if n != "base"}
    found = {f"length_{n}": float(d.norm() / base.norm()) for n, d in moved.items()}
    names = [n for n in moved if n != "base2"]
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            found[f"cosine_{a}_{b}"] = float(functional.cosine_similarity(moved[a], moved[b], dim=0))
    return found
