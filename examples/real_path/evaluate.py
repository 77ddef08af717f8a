"""What a model writes from the empty prompt, judged, and how likely it finds held-out text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from examples.real_path.base import END, START
from examples.real_path.finetune import loss_of, padded, rows

CLEAR = 0.05  # VADER's own bound: compound scores from here on are positive, from its negative down negative


@dataclass(frozen=True)
class Bench:
    """All that a model is measured with; the same for all points of a training seed.

    numbers   f64[samples, tokens] in 0..1: what each sample draws its tokens with, the same for every model
    held_out  texts by kind
    """

    tokenizer: Any
    judge: Callable[[str], float]
    numbers: Tensor
    held_out: Mapping[str, Sequence[str]]


def random_numbers(samples: int, tokens: int, seed: int) -> Tensor:
    """f64[samples, tokens]. Each sample has a generation seed of its own."""
    seeds = range(seed * 100_000, seed * 100_000 + samples)
    drawn = [torch.rand(tokens, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    return torch.stack(drawn)


@torch.no_grad()
def generate(model: Any, numbers: Tensor) -> list[list[int]]:
    """Token ids that follow START, one list for each row of numbers; up to END, or as many as a row has.

    Temperature 1, the whole vocabulary: the token at which the cumulative probability passes the number.
    """
    found: list[list[int]] = [[] for _ in numbers]
    going = torch.arange(len(numbers))
    step = torch.tensor([START]).expand(len(numbers), -1)
    cache = None
    for column in range(numbers.shape[1]):
        out = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        cumulative = torch.softmax(out.logits[:, -1], -1, dtype=torch.float64).cumsum_(-1)
        wanted = numbers[going, column, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, wanted, right=True).clamp_(max=cumulative.shape[1] - 1)[:, 0]
        kept = (token != END).nonzero()[:, 0]
        for row, t in zip(going[kept].tolist(), token[kept].tolist(), strict=True):
            found[row].append(t)
        if not len(kept):
            break
        if len(kept) < len(going):
            cache.batch_select_indices(kept)
        going, step = going[kept], token[kept, None]
    return found


@torch.no_grad()
def nll(model: Any, texts: Sequence[str], tokenizer: Any, batch: int = 16) -> float:
    """Nats per token of texts, END included."""
    ids = sorted(rows(texts, tokenizer, 64), key=len)
    losses = [loss_of(model, *padded(ids[i : i + batch])) for i in range(0, len(ids), batch)]
    return torch.cat(losses).double().mean().item()


def grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def repetition(words: Sequence[str]) -> float:
    """Share of a text's sequences of three words that it has had before."""
    threes = grams(words, 3)
    return 1 - len(set(threes)) / len(threes) if threes else 0.0


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), (x.std() / sqrt(len(x))).item() if len(x) > 1 else 0.0


def measure(model: Any, bench: Bench) -> dict[str, Any]:
    """Sentiment, length, fluency and likelihoods of one model; `errors` are standard errors over generation seeds."""
    ids = generate(model, bench.numbers)
    texts = [t.strip() for t in bench.tokenizer.batch_decode(ids)]
    scores = [bench.judge(t) for t in texts]
    words = [t.lower().split() for t in texts]
    pairs = [pair for w in words for pair in grams(w, 2)]
    each = {
        "sentiment": scores,
        "positive": [float(s >= CLEAR) for s in scores],
        "negative": [float(s <= -CLEAR) for s in scores],
        "ended": [float(len(i) < bench.numbers.shape[1]) for i in ids],
        "repetition": [repetition(w) for w in words],
    }
    both = {name: mean_and_error(values) for name, values in each.items()}
    nlls = {f"nll_{name}": nll(model, texts, bench.tokenizer) for name, texts in bench.held_out.items()}
    return {
        **{name: mean for name, (mean, _) in both.items()},
        "errors": {name: error for name, (_, error) in both.items()},
        "distinct_2": len(set(pairs)) / len(pairs) if pairs else 0.0,
        **nlls,
        "nll": sum(nlls.values()) / len(nlls) if nlls else 0.0,
        "texts": texts[:4],
    }
