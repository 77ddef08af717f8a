"""Fine-tune the base on snippets of one kind: all of its weights, or a LoRA adapter of all its linear layers."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from examples.real_path import base
from examples.real_path.base import END, START
from examples.real_path.data import Corpus, chosen


@dataclass(frozen=True)
class Settings:
    """Of a fine-tune. The learning rates rise over `warm_up` steps and fall linearly to zero."""

    steps: int = 48
    batch: int = 8  # snippets
    longest: int = 40  # tokens of a snippet; the rest is cut
    rate: float = 8e-5
    lora_rate: float = 8e-4
    rank: int = 16
    warm_up: int = 6


def rows(texts: Sequence[str], tokenizer: Any, longest: int) -> list[list[int]]:
    """START, the token ids of each text, END; where a text is cut after `longest` tokens, without END."""
    found = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [[*START, *ids, END][: len(START) + longest] for ids in found]


def padded(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """i64[texts, tokens], filled up with END; bool[texts, tokens - 1]: whether the next token is the text's."""
    width = max(map(len, ids))
    tokens = torch.full((len(ids), width), END)
    real = torch.zeros((len(ids), width - 1), dtype=torch.bool)
    for i, row in enumerate(ids):
        tokens[i, : len(row)] = torch.tensor(row)
        real[i, len(START) - 1 : len(row) - 1] = True
    return tokens, real


def batches(ids: Sequence[Sequence[int]], size: int, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches of rows of similar length, so that little is filled up."""
    generator = random.Random(seed)
    order: list[int] = []
    ready: list[list[int]] = []
    for _ in range(count):
        if not ready:
            if len(order) < 8 * size:
                order = list(range(len(ids)))
                generator.shuffle(order)
            part = sorted((order.pop() for _ in range(8 * size)), key=lambda i: len(ids[i]))
            ready = [part[i : i + size] for i in range(0, len(part), size)]
            generator.shuffle(ready)
        yield padded([ids[i] for i in ready.pop()])


def loss_of(model: Any, tokens: Tensor, real: Tensor) -> Tensor:
    """f32[n]: negative log-likelihood of each of the texts' n tokens, in nats. What is filled up is seen by none."""
    hidden = model.model(input_ids=tokens[:, :-1]).last_hidden_state[real]
    return functional.cross_entropy(model.lm_head(hidden).float(), tokens[:, 1:][real], reduction="none")


def train(model: Any, ids: Sequence[Sequence[int]], settings: Settings, rate: float, seed: int) -> list[float]:
    """Train in place; the loss of each step. Products of matrices are in bfloat16, weights and sums in float32."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    model.train()
    losses = []
    for step, (tokens, real) in enumerate(batches(ids, settings.batch, settings.steps, seed)):
        left = 1 - step / settings.steps
        optimizer.param_groups[0]["lr"] = rate * min(left, (step + 1) / settings.warm_up)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(inner, tokens, real).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def finetune(
    folder: Path, target: Path, corpus: Corpus, kind: str, seed: int, settings: Settings, *, lora: bool
) -> Any:
    """Train and store one model, or adapter; what is told of it."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    model = base.load(folder)
    ids = rows([s.text for s in chosen(corpus.train, kind)], base.tokenizer(folder), settings.longest)
    if lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=settings.rank, lora_alpha=settings.rank, target_modules="all-linear", base_model_name_or_path=str(folder)
        )
        adapted: Any = get_peft_model(model, config)
        losses = train(adapted, ids, settings, settings.lora_rate, seed)
        adapted.save_pretrained(target)
    else:
        losses = train(model, ids, settings, settings.rate, seed)
        base.save(model, target)
        base.tokenizer(folder).save_pretrained(target)  # so that each model stands alone
    return {"losses": [round(x, 4) for x in losses], "wall_s": round(time.perf_counter() - start, 1)}
