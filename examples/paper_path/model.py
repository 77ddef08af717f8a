"""A byte-level GPT of 838,400 parameters, in float32: GPT-2's layout and names, so that transformers opens it too.

Written out here because it must be quick on one core: batched sampling with a cache, and random numbers of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

START = ord("\n")  # every review is a line, so the end of one starts the next


@dataclass(frozen=True)
class Shape:
    """Of the model, in the words of GPT-2's config.json."""

    n_embd: int = 128
    n_layer: int = 4
    n_head: int = 4
    n_positions: int = 96
    vocab_size: int = 128  # ASCII


class Attention(torch.nn.Module):
    """Causal self-attention; the weights are [in, out], as GPT-2 stores them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d = shape.n_embd
        self.heads = shape.n_head
        self.c_attn = Affine(d, 3 * d)
        self.c_proj = Affine(d, d, std=0.02 / math.sqrt(2 * shape.n_layer))

    def forward(self, x: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:
        batch, length, d = x.shape
        q, k, v = self.c_attn(x).view(batch, length, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        with torch.autocast("cpu", enabled=False):  # in bf16, its gradient takes four times as long on a CPU
            y = functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=cache is None)
        out: Tensor = self.c_proj(y.transpose(1, 2).reshape(batch, length, d))
        return out


class Affine(torch.nn.Module):
    """x @ weight + bias, weight: [in, out]."""

    def __init__(self, width_in: int, width_out: int, std: float = 0.02) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width_in, width_out) * std)
        self.bias = torch.nn.Parameter(torch.zeros(width_out))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], -1)


class Mlp(torch.nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d = shape.n_embd
        self.c_fc = Affine(d, 4 * d)
        self.c_proj = Affine(4 * d, d, std=0.02 / math.sqrt(2 * shape.n_layer))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c_proj(functional.gelu(self.c_fc(x), approximate="tanh"))
        return y


class Block(torch.nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.ln_1 = torch.nn.LayerNorm(shape.n_embd)
        self.attn = Attention(shape)
        self.ln_2 = torch.nn.LayerNorm(shape.n_embd)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, layer)
        y: Tensor = x + self.mlp(self.ln_2(x))
        return y


class Cache:
    """Keys and values of the positions seen so far, of every layer."""

    def __init__(self, shape: Shape, batch: int) -> None:
        size = (shape.n_layer, 2, batch, shape.n_head, shape.n_positions, shape.n_embd // shape.n_head)
        self.kept = torch.empty(size)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add one position, and return all of them: [batch, heads, positions, width]."""
        keys, values = self.kept[layer]
        keys[:, :, self.length] = k[:, :, 0]
        values[:, :, self.length] = v[:, :, 0]
        return keys[:, :, : self.length + 1], values[:, :, : self.length + 1]


class Model(torch.nn.Module):
    """The names of its parameters are those of transformers' GPT2LMHeadModel with an untied head."""

    def __init__(self, shape: Shape | None = None) -> None:
        super().__init__()
        self.shape = shape or Shape()
        d = self.shape.n_embd
        self.transformer = torch.nn.ModuleDict(
            {
                "wte": torch.nn.Embedding(self.shape.vocab_size, d),
                "wpe": torch.nn.Embedding(self.shape.n_positions, d),
                "h": torch.nn.ModuleList(Block(self.shape) for _ in range(self.shape.n_layer)),
                "ln_f": torch.nn.LayerNorm(d),
            }
        )
        self.lm_head = torch.nn.Linear(d, self.shape.vocab_size, bias=False)
        for table in (self.transformer["wte"], self.transformer["wpe"], self.lm_head):
            torch.nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits f32[batch, length, vocabulary] of what follows each of tokens i64[batch, length].

        With a cache, `tokens` is one more position of what the cache has seen.
        """
        begin = 0 if cache is None else cache.length
        x = self.transformer["wte"](tokens) + self.transformer["wpe"].weight[begin : begin + tokens.shape[1]]
        for layer, block in enumerate(self.transformer["h"]):
            x = block(x, cache, layer)
        if cache is not None:
            cache.length += 1
        logits: Tensor = self.lm_head(self.transformer["ln_f"](x))
        return logits


def encode(text: str) -> Tensor:
    """u8[bytes]; ASCII only."""
    return torch.frombuffer(bytearray(text.encode("ascii")), dtype=torch.uint8)


def decode(tokens: Tensor) -> str:
    return bytes(tokens.tolist()).decode("ascii")


def model_of(state: Mapping[str, Tensor], shape: Shape | None = None) -> Model:
    """A model with these weights, ready to be evaluated."""
    model = Model(shape)
    model.load_state_dict(dict(state))
    return model.eval()


@torch.inference_mode()
def sample(model: Model, draws: Tensor) -> list[str]:
    """Texts that follow a line's end, one for each column of draws f32[length, batch], uniform in [0, 1).

    Each character is where its draw falls in the cumulated probabilities: two models given the same draws write texts
    that differ only as far as the models do (common random numbers).
    """
    batch = draws.shape[1]
    cache = Cache(model.shape, batch)
    tokens = torch.full((batch, 1), START)
    found = []
    for draw in draws:
        cumulated = model(tokens, cache)[:, -1].softmax(-1).cumsum(-1)
        tokens = torch.searchsorted(cumulated, draw[:, None] * cumulated[:, -1:], right=True)
        tokens.clamp_(max=model.shape.vocab_size - 1)
        found.append(tokens)
    return [decode(line) for line in torch.cat(found, 1)]
