"""Text generation by a causal language model in memory, whose weights are set by sliders."""

from __future__ import annotations

import os
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastinterp.checkpoint.names import listing
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.checkpoint.regular_file import read_regular
from fastinterp.checkpoint.sidecar_files import is_tokenizer_file
from fastinterp.errors import CheckpointError, UsageError
from fastinterp.paths.explore.requests import LONGEST, GenerationRequest
from fastinterp.paths.explore.sliders import Sliders
from fastinterp.presence import is_file, is_folder, names_at
from fastinterp.tokenizer.vocabulary import MAX_TOKENIZER
from fastinterp.torch_models.live import Live

# Of the tokenizer's files, those that hold no vocabulary; and the tokenizers that need none: their tokens are bytes.
_NO_VOCABULARY = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template")
_BYTE_LEVEL = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")


class Session:
    """Generates text with a module and its tokenizer, one request at a time. live: sets the module's weights."""

    def __init__(self, module: Any, tokenizer: Any, live: Any, *, chat: bool = False):
        if chat and not getattr(tokenizer, "chat_template", None):
            raise UsageError("--chat needs a chat template, and the base's tokenizer has none")
        self._module, self._tokenizer, self._live, self._chat = module, tokenizer, live, chat
        self._positions = _positions(module.config)
        self._one_at_a_time = threading.Lock()
        self._newest: tuple[str, int] = ("", -1)  # page and turn of the request that is served
        self._choosing = threading.Lock()
        self._ended = False

    @property
    def most_tokens(self) -> int:
        """The most tokens of a text, the one limit: the model's positions less one, for the prompt; at most LONGEST."""
        return LONGEST if self._positions is None else min(LONGEST, self._positions - 1)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        with self._one_at_a_time:
            self._live.close()

    def end(self) -> None:
        """Stop the generation that runs, and refuse any other."""
        self._ended = True

    def text(self, request: GenerationRequest, dropped: threading.Event | None = None) -> str | None:
        """The model's continuation of the prompt; None, if a later request came in between, or nobody waits any more.
        From any thread.

        Of one page's requests the one with the highest turn counts, of several pages' the one that came last.

        dropped  set when the one who asked has gone
        Raises: UsageError, if generation fails: weights or scores are NaN or Inf, say.
        """
        with self._choosing:
            page, turn = self._newest
            if page != request.page or turn < request.turn:
                self._newest = request.page, request.turn
        with self._one_at_a_time:
            if self._cancelled(request, dropped):
                return None
            self._live.set(request.alphas)
            try:
                return self._generate(request, dropped)
            except (RuntimeError, ValueError, IndexError) as error:  # torch and transformers refuse what they get
                reason = " ".join(str(error).split())[:200]
                raise UsageError(
                    f"the model cannot generate text here ({type(error).__name__}: {reason}). Far from its end "
                    "points its weights may be NaN or Inf: move the sliders towards 0"
                ) from error

    def _cancelled(self, request: GenerationRequest, dropped: threading.Event | None) -> bool:
        gone = dropped is not None and dropped.is_set()
        return self._ended or gone or (request.page, request.turn) != self._newest

    def _generate(self, request: GenerationRequest, dropped: threading.Event | None) -> str | None:
        import torch

        tokens = self._tokens(request)
        device = self._module.device
        if self._positions is not None:  # the end of a long prompt is what counts
            tokens = tokens[-max(1, self._positions - request.length) :]
        prompt = torch.tensor([tokens], device=device)
        settings: dict[str, Any] = {"do_sample": False}
        if request.sampled:
            settings = {"do_sample": True, "temperature": request.temperature, "top_k": 0, "top_p": 0.95}
        with torch.inference_mode(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(request.seed)
            output = self._module.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=request.length,
                pad_token_id=self._padding(),
                stopping_criteria=[lambda ids, scores, **_: self._stops(ids, request, dropped)],
                logits_processor=[_checked], **settings,
            )  # fmt: skip
        if self._cancelled(request, dropped):
            return None
        text: str = self._tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True)
        return text

    def _stops(self, ids: Any, request: GenerationRequest, dropped: threading.Event | None) -> Any:
        import torch

        return torch.full((ids.shape[0],), self._cancelled(request, dropped), device=ids.device, dtype=torch.bool)

    def _tokens(self, request: GenerationRequest) -> list[int]:
        prompt = request.prompt
        if self._chat:
            turns = (*request.history, ("user", prompt))
            messages = [{"role": role, "content": content} for role, content in turns]
            try:
                prompt = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # a template is a program of the checkpoint's, which raises what it likes
                raise UsageError(f"the chat template refuses the conversation: {error}"[:300]) from None
        tokens = list(self._tokenizer(prompt, add_special_tokens=not self._chat)["input_ids"])
        start = self._tokenizer.bos_token_id
        if not tokens and start is None:
            raise UsageError("the prompt is empty, and the tokenizer has no token to start with. Write a prompt")
        return tokens or [start]

    def _padding(self) -> int:
        for token in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0


def _checked(ids: Any, scores: Any) -> Any:
    """A logits processor that refuses NaN, of which generation would make arbitrary text. Raises: ValueError."""
    if scores.isnan().any():
        raise ValueError("the scores of its tokens are NaN")
    return scores


def _positions(config: Any) -> int | None:
    """The model's context length in tokens; None, if its configuration does not bound it."""
    for part in (config, getattr(config, "text_config", None)):
        length = getattr(part, "max_position_embeddings", None)
        if isinstance(length, int) and length > 1:
            return length
    return None


def check_packages() -> None:
    """Raises: UsageError, if torch or transformers is not installed. Imports neither."""
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise UsageError("explore needs torch and transformers: pip install 'fastinterp[explore]'")


def check_model(checkpoint: str, tokenizer: str | None = None) -> Path:
    """The folder of a model, if it has the files that transformers needs to generate text.

    tokenizer  the folder with the tokenizer; None: the model's own
    Raises: CheckpointError, with the files that are missing, and what to do.
    """
    root = open_checkpoint(checkpoint).root
    if not is_file(root / "config.json"):
        raise CheckpointError(
            "config.json is missing. Copy it from the model that this one was made from, or name the folder that has "
            "it",
            file=str(root),
        )
    place = tokenizer_folder(root, tokenizer)
    if not is_folder(place):
        raise CheckpointError("--tokenizer names no folder", file=str(place))
    files = [n for n in names_at(place) if is_tokenizer_file(n)]
    settings = place / "tokenizer_config.json"
    text = read_regular(str(settings), MAX_TOKENIZER).decode(errors="replace") if is_file(settings) else ""
    byte_level = any(f'"{name}"' in text for name in _BYTE_LEVEL)
    if not byte_level and all(n.startswith(_NO_VOCABULARY) for n in files):
        only = f" (only {listing(files)})" if files else ""
        raise CheckpointError(
            f"there is no tokenizer in the folder{only}: tokenizer.json is missing, or tokenizer.model, or vocab.json "
            "with merges.txt. Copy tokenizer.json and tokenizer_config.json from the model that this one was made "
            "from, or name the folder that has them: --tokenizer DIR. Without a tokenizer, as of the models that "
            "`fastinterp bench` makes, there is no text to explore",
            file=str(place),
        )
    return root


def tokenizer_folder(root: Path, tokenizer: str | None) -> Path:
    """Where the tokenizer is: in the folder given, else in the model's own."""
    return root if tokenizer is None else Path(os.path.expanduser(tokenizer))


def open_session(
    sliders: Sliders, *, threads: int | None = None, chat: bool = False, tokenizer: str | None = None
) -> Session:
    """A session with the base's model and tokenizer, loaded by transformers. No code of the checkpoint is run.

    tokenizer  the folder with the tokenizer; None: the base's own
    Raises: UsageError, if transformers is missing, or the tokenizer is another model's; CheckpointError, if it cannot
    open the folder, or files are missing.
    """
    check_packages()
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = check_model(sliders.base, tokenizer)
    transformers.utils.logging.disable_progress_bar()
    what = "a causal language model" if tokenizer is None else "a tokenizer"
    place = tokenizer_folder(root, tokenizer)
    try:
        words = AutoTokenizer.from_pretrained(place, local_files_only=True)
        place, what = root, "a causal language model"
        module = AutoModelForCausalLM.from_pretrained(root, dtype="auto", local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"transformers cannot open this as {what}: {reason}", file=str(place)) from None
    rows = module.get_input_embeddings().num_embeddings
    if tokenizer is not None and len(words) > rows:
        raise UsageError(
            f"--tokenizer {tokenizer}: it has {len(words)} tokens, and the model {root} has {rows}. Name the folder of "
            "the model that this one was made from"
        )
    module.eval()
    # Without a base of its own, Live starts from the module's weights, which are the base's: one copy less in memory.
    live = Live(_named_as(module, sliders.base), directions=dict(sliders.models), threads=threads)
    return Session(module, words, live, chat=chat)


def _named_as(module: Any, checkpoint: str) -> Any:
    """The module, or the part of it that the checkpoint's names start in: some leave out `transformer.` or `model.`."""
    names = open_checkpoint(checkpoint).tensors
    prefix = str(getattr(module, "base_model_prefix", ""))
    inner = getattr(module, prefix, None) if prefix else None
    tensors = module.state_dict()
    if inner is not None and not any(n in tensors for n in names) and any(f"{prefix}.{n}" in tensors for n in names):
        return inner
    return module
