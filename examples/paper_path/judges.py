"""Exact judges of a text: which side its attribute words are on, and whether its sentences are in the grammar.

Nothing is learned and nothing is estimated here, so a judge is never wrong; what varies is the texts it is given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from examples.paper_path import corpus as words
from examples.paper_path.corpus import FORMS, fillers


@dataclass(frozen=True)
class Share:
    """A share with its standard error. Events in one text are not independent of each other: texts are."""

    share: float  # NaN where there are no events
    error: float
    hits: int
    events: int

    @staticmethod
    def of(counts: Iterable[tuple[int, int]]) -> Share:
        """`counts`: hits and events of each text. The error is that of a ratio of sums over independent texts."""
        pairs = list(counts)
        hits, events = sum(h for h, _ in pairs), sum(n for _, n in pairs)
        if events == 0:
            return Share(math.nan, math.nan, 0, 0)
        share = hits / events
        return Share(share, math.sqrt(sum((h - share * n) ** 2 for h, n in pairs)) / events, hits, events)

    @property
    def log_odds(self) -> float:
        """Half an event is added to each side, so that none of them is infinite (Haldane, Anscombe)."""
        return math.log((self.hits + 0.5) / (self.events - self.hits + 0.5))


# --- attributes ------------------------------------------------------------------------------------------------------

SIDES: dict[str, tuple[str, str]] = {"sentiment": ("positive", "negative"), "register": ("formal", "casual")}
_TABLES = {
    "sentiment": (words.ADJECTIVES, words.VERBS),
    "register": (words.SINGULAR, words.PLURAL, words.CONNECTIVES),
}


@cache
def _phrases(attribute: str, side: str) -> re.Pattern[str]:
    """Every phrase of a side, as whole words."""
    found = [p for table in _TABLES[attribute] for p in table[side]]
    return re.compile(rf"\b(?:{'|'.join(sorted(found, key=len, reverse=True))})\b")


def attribute(texts: Iterable[str], name: str) -> Share:
    """Of the words that carry `sentiment` (or `register`), the share on its first side: positive (formal)."""
    first, other = (_phrases(name, side) for side in SIDES[name])
    counts = ((len(first.findall(text)), len(other.findall(text))) for text in texts)
    return Share.of((a, a + b) for a, b in counts)


# --- grammar ---------------------------------------------------------------------------------------------------------


@cache
def _sentences() -> tuple[tuple[tuple[tuple[str, ...], ...], ...], ...]:
    """Every form with and without a connective: its slots, each as phrases, each as words."""
    slots = {s: tuple(tuple(p.split()) for p in fillers(s)) for s in {s for form in FORMS for s in form}}
    connectives = tuple((*p[:-1], p[-1] + ",") for p in (c.split() for c in fillers("connective")))
    plain = [tuple(slots[s] for s in form) for form in FORMS]
    return (*plain, *((connectives, *form) for form in plain))


def is_sentence(text: str) -> bool:
    """Whether `text`, without its full stop, is a sentence of the grammar."""
    return any(_match(text.split(" "), form, cut=False) for form in _sentences())


def is_beginning(text: str) -> bool:
    """Whether some sentence of the grammar begins with `text`, which may end within a word."""
    return text == "" or any(_match(text.split(" "), form, cut=True) for form in _sentences())


def _match(given: Sequence[str], form: Sequence[Sequence[tuple[str, ...]]], *, cut: bool) -> bool:
    places = {0}  # how many words the slots so far may have taken
    for phrases in form:
        following = set()
        for place in places:
            rest = len(given) - place
            for phrase in phrases:
                if tuple(given[place : place + len(phrase)]) == phrase:
                    following.add(place + len(phrase))
                if cut and 0 < rest <= len(phrase) and _begins(phrase, given[place:]):
                    return True
        places = following
        if not places:
            return False
    return not cut and len(given) in places


def _begins(phrase: Sequence[str], given: Sequence[str]) -> bool:
    last = len(given) - 1
    return all(phrase[i] == given[i] for i in range(last)) and phrase[last].startswith(given[last])


def sentences(text: str) -> tuple[int, int]:
    """How many sentences of a text are in the grammar, and how many there are.

    The text starts at the start of a review and may end anywhere. Its last sentence, if it is cut off, is not counted
    as long as it could still become a sentence; else it counts as a wrong one. A review without an end, or without
    anything in it, counts as one wrong sentence.
    """
    *whole, last = text.split("\n")
    right = total = 0
    for line in whole:
        good, found, tail = _line(line)
        right, total = right + good, total + found + (tail != "" or found == 0)
    good, found, tail = _line(last)
    possible = is_beginning(tail.removeprefix(" ") if found else tail)
    return right + good, total + found + (not possible)


def _line(line: str) -> tuple[int, int, str]:
    """Right sentences, all sentences, and what follows the last full stop."""
    *pieces, tail = line.split(".")
    right = 0
    for n, piece in enumerate(pieces):
        right += is_sentence(piece.removeprefix(" ")) and piece.startswith(" ") == (n > 0)
    return right, len(pieces), tail


def grammatical(texts: Iterable[str]) -> Share:
    """The share of right sentences."""
    return Share.of(map(sentences, texts))
