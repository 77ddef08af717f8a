"""A causal language model in memory, its weights moved by sliders, and what it writes."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastinterp.checkpoint.names import listing
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.checkpoint.sidecar_files import is_tokenizer_file
from fastinterp.errors import CheckpointError, UsageError
from fastinterp.paths.explore.sliders import Sliders

LONGEST = 4096  # tokens of a text
# Of the tokenizer's files, those that hold no vocabulary; and the tokenizers that need none: their tokens are bytes.
_NO_VOCABULARY = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template")
_OF_BYTES = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")


@dataclass(frozen=True, slots=True)
class Wish:
    """One text to make.

    turn    grows with every wish: a later one stops an earlier one
    sampled draw tokens by `temperature` and `seed`; else the likeliest each time
    length  of the text, in tokens at most
    """

    turn: int
    alphas: Mapping[str, float]
    prompt: str
    sampled: bool
    seed: int
    length: int
    temperature: float


class Session:
    """A module, its tokenizer, and `live`, which puts weights into the module: `live.set(alphas)`."""

    def __init__(self, module: Any, tokenizer: Any, live: Any, *, chat: bool = False):
        if chat and not getattr(tokenizer, "chat_template", None):
            raise UsageError("--chat needs a chat template, and the base's tokenizer has none")
        self._module, self._tokenizer, self._live, self._chat = module, tokenizer, live, chat
        self._positions = _positions(module.config)
        self._one_at_a_time = threading.Lock()
        self._newest = -1
        self._ended = False

    @property
    def most_tokens(self) -> int:
        """That a text may have: the model's positions but one, for the prompt; or LONGEST."""
        return LONGEST if self._positions is None else min(LONGEST, self._positions - 1)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        with self._one_at_a_time:
            self._live.close()

    def end(self) -> None:
        """Stop the text that is being made, and make no more."""
        self._ended = True

    def text(self, wish: Wish) -> str | None:
        """What the model writes after the prompt, `most_tokens` at most, or None if a later wish came in between.

        From any thread.
        Raises: UsageError, if it cannot write: its weights, or what they make of the prompt, are no numbers.
        """
        self._newest = max(self._newest, wish.turn)
        with self._one_at_a_time:
            if self._late(wish):
                return None
            self._live.set(wish.alphas)
            try:
                return self._written(wish)
            except (RuntimeError, ValueError, IndexError) as error:  # torch and transformers refuse what they get
                reason = " ".join(str(error).split())[:200]
                raise UsageError(
                    f"the model cannot write here ({type(error).__name__}: {reason}). Far from its ends its numbers "
                    "may be NaN or Inf: move the sliders towards 0"
                ) from error

    def _late(self, wish: Wish) -> bool:
        return self._ended or wish.turn < self._newest

    def _written(self, wish: Wish) -> str | None:
        import torch

        tokens = self._tokens(wish.prompt)
        device = self._module.device
        length = min(wish.length, self.most_tokens)
        if self._positions is not None:  # the end of a long prompt is what counts
            tokens = tokens[-max(1, self._positions - length) :]
        given = torch.tensor([tokens], device=device)
        settings: dict[str, Any] = {"do_sample": False}
        if wish.sampled:
            settings = {"do_sample": True, "temperature": wish.temperature, "top_k": 0, "top_p": 0.95}
        with torch.inference_mode(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(wish.seed)
            found = self._module.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=length, pad_token_id=self._padding(),
                stopping_criteria=[lambda ids, scores, **_: self._stops(ids, wish)],
                logits_processor=[_checked], **settings,
            )  # fmt: skip
        if self._late(wish):
            return None
        text: str = self._tokenizer.decode(found[0, len(tokens) :], skip_special_tokens=True)
        return text

    def _stops(self, ids: Any, wish: Wish) -> Any:
        import torch

        return torch.full((ids.shape[0],), self._late(wish), device=ids.device, dtype=torch.bool)

    def _tokens(self, prompt: str) -> list[int]:
        if self._chat:
            messages = [{"role": "user", "content": prompt}]
            prompt = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        found = list(self._tokenizer(prompt, add_special_tokens=not self._chat)["input_ids"])
        start = self._tokenizer.bos_token_id
        if not found and start is None:
            raise UsageError("the prompt is empty, and the tokenizer has no token to start with. Write a prompt")
        return found or [start]

    def _padding(self) -> int:
        for found in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id):
            if found is not None:
                return int(found)
        return 0


def _checked(ids: Any, scores: Any) -> Any:
    """Of NaN the likeliest token is any, and text would come all the same."""
    if scores.isnan().any():
        raise ValueError("the scores of its tokens are NaN")
    return scores


def _positions(config: Any) -> int | None:
    """How many tokens the model can look at; None, if its configuration does not bound them."""
    for part in (config, getattr(config, "text_config", None)):
        found = getattr(part, "max_position_embeddings", None)
        if isinstance(found, int) and found > 1:
            return found
    return None


def check_model(checkpoint: str) -> Path:
    """The folder of a model, in which there is what transformers needs to write text with it.

    Raises: CheckpointError, with the files that are missing, and what to do.
    """
    root = open_checkpoint(checkpoint).root
    remedy = "Copy {} from the model that this one was made from, or name the folder that has it"
    if not (root / "config.json").is_file():
        raise CheckpointError(f"config.json is missing. {remedy.format('it')}", file=str(root))
    there = [n for n in sorted(os.listdir(root)) if is_tokenizer_file(n)]
    settings = root / "tokenizer_config.json"
    of_bytes = settings.is_file() and any(f'"{name}"' in settings.read_text("utf-8", "replace") for name in _OF_BYTES)
    if not of_bytes and all(n.startswith(_NO_VOCABULARY) for n in there):
        only = f" (only {listing(there)})" if there else ""
        raise CheckpointError(
            f"there is no tokenizer in the folder{only}: tokenizer.json is missing, or tokenizer.model, or vocab.json "
            f"with merges.txt. {remedy.format('tokenizer.json and tokenizer_config.json')}",
            file=str(root),
        )
    return root


def open_session(sliders: Sliders, *, threads: int | None = None, chat: bool = False) -> Session:
    """The base's model and tokenizer, as transformers has them; no code of a model is run.

    Raises: UsageError, if transformers is missing; CheckpointError, if it cannot open the folder, or files are missing.
    """
    try:
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UsageError("explore needs torch and transformers: pip install 'fastinterp[explore]'") from None
    from fastinterp.torch_models.live import Live

    root = check_model(sliders.base)
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(root, local_files_only=True)
        module = AutoModelForCausalLM.from_pretrained(root, dtype="auto", local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"transformers cannot open this as a causal language model: {said}", file=str(root)
        ) from None
    module.eval()
    # Without a base of its own, Live starts from the module's weights, which are the base's: one copy less in memory.
    live = Live(_named_as(module, sliders.base), directions=dict(sliders.models), threads=threads)
    return Session(module, tokenizer, live, chat=chat)


def _named_as(module: Any, checkpoint: str) -> Any:
    """The module, or the part of it that the checkpoint's names start in: some leave out `transformer.` or `model.`."""
    names = open_checkpoint(checkpoint).tensors
    prefix = str(getattr(module, "base_model_prefix", ""))
    inner = getattr(module, prefix, None) if prefix else None
    own = module.state_dict()
    if inner is not None and not any(n in own for n in names) and any(f"{prefix}.{n}" in own for n in names):
        return inner
    return module
