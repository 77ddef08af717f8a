"""The page's requests, read from JSON that is not trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LONGEST = 4096  # tokens of a text
_LARGEST = 1e6  # of a slider's value
_PAGE = 64  # most characters of a page's name
_MESSAGES = 200  # most earlier messages of a conversation
_ROLES = ("user", "assistant")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A request for one text.

    page     which page asks: a name that each makes for itself
    turn     grows with every request of a page: a later one cancels an earlier one
    alphas   values of the sliders, by name
    sampled  draw tokens by `temperature` and `seed`; else the most likely one each time (greedy)
    length   most tokens of the text
    history  (role, text) of the earlier messages of a conversation; empty, if it is none
    """

    page: str
    turn: int
    alphas: Mapping[str, float]
    prompt: str
    sampled: bool
    seed: int
    length: int
    temperature: float
    history: tuple[tuple[str, str], ...] = ()


def read_generation(document: Any, names: Sequence[str], most_tokens: int) -> GenerationRequest:
    """A request for a text. names: of the sliders. Raises: ValueError, with what is wrong."""
    values = read_alphas(document, names)
    prompt, page = document.get("prompt"), document.get("page")
    if not isinstance(prompt, str) or not isinstance(document.get("sampled"), bool):
        raise ValueError("`prompt` must be text, and `sampled` true or false")
    if not isinstance(page, str) or not 0 < len(page) <= _PAGE:
        raise ValueError(f"`page` must be a text of 1 to {_PAGE} characters")
    return GenerationRequest(
        page=page,
        turn=_whole(document.get("turn"), "turn", 0, 2**53),
        alphas=values,
        prompt=_unicode(prompt, "prompt"),
        sampled=document["sampled"],
        seed=_whole(document.get("seed"), "seed", 0, 2**32),
        length=_whole(document.get("length"), "length", 1, most_tokens),
        temperature=_number(document.get("temperature"), "temperature", 0.01, 100),
        history=_history(document.get("history", [])),
    )


def read_alphas(document: Any, names: Sequence[str]) -> dict[str, float]:
    """The values of the sliders in a request. Raises: ValueError, with what is wrong."""
    if not isinstance(document, dict) or not isinstance(document.get("alphas"), dict):
        raise ValueError("a request is an object with `alphas`")
    alphas = document["alphas"]
    if sorted(alphas) != sorted(names):
        raise ValueError(f"`alphas` must be {', '.join(names)}, got {', '.join(map(repr, alphas)) or 'none'}"[:200])
    return {name: _number(alphas[name], name, -_LARGEST, _LARGEST) for name in names}


def read_folder(document: Any) -> str:
    """The folder in a request to save a checkpoint. Raises: ValueError, with what is wrong."""
    folder = document.get("folder")
    if not isinstance(folder, str) or not folder.strip():
        raise ValueError("`folder` must be the name of a new folder")
    if "\0" in folder:
        raise ValueError("`folder` must not have a NUL in it")
    return _unicode(folder.strip(), "folder")


def _history(messages: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list) or len(messages) > _MESSAGES:
        raise ValueError(f"`history` must be a list of at most {_MESSAGES} messages")
    found = []
    for i, message in enumerate(messages):
        role = _ROLES[i % 2]
        if not isinstance(message, dict) or message.get("role") != role or not isinstance(message.get("content"), str):
            raise ValueError(f"message {i + 1} of `history` must be an object with role {role} and a text `content`")
        found.append((role, _unicode(message["content"], "history")))
    if len(found) % 2:
        raise ValueError("`history` must end with a message of the assistant")
    return tuple(found)


def _unicode(text: str, what: str) -> str:
    surrogate = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
    if surrogate is not None:
        raise ValueError(f"`{what}` is not valid Unicode text: character {surrogate + 1} is a surrogate. Remove it")
    return text


def _number(value: Any, name: str, low: float, high: float) -> float:
    is_nan = isinstance(value, float) and math.isnan(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or is_nan:
        raise ValueError(f"`{name}` must be a number, got {value!r}"[:200])
    if not low <= value <= high:  # before float(): an integer may be beyond it
        shown = repr(value) if len(repr(value)) < 40 else f"{repr(value)[:20]}..."
        raise ValueError(f"`{name}` must be in {low:.10g}..{high:.10g}, got {shown}")
    return float(value)


def _whole(value: Any, name: str, low: int, high: int) -> int:
    number = _number(value, name, low, high)
    if number != int(number):
        raise ValueError(f"`{name}` must be a whole number, got {value!r}")
    return int(number)
