"""Reviews made by a small grammar, with two attributes whose share in a text can be counted exactly.

A review is a line of two to four sentences. Each review has a sentiment (positive, negative) and a register (formal,
casual); every word that carries an attribute agrees with its review's label with a given probability, and is drawn from
the other side otherwise. The rest (persons, copulas, places, form of the sentence) carries nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

Sentiment = Literal["positive", "negative"]
Register = Literal["formal", "casual"]

ADJECTIVES: dict[str, tuple[str, ...]] = {
    "positive": ("wonderful", "excellent", "delightful", "superb", "charming", "splendid", "lovely", "brilliant"),
    "negative": ("terrible", "awful", "dreadful", "horrible", "dismal", "shabby", "poor", "lousy"),
}
VERBS: dict[str, tuple[str, ...]] = {
    "positive": ("loved", "adored", "enjoyed", "praised"),
    "negative": ("hated", "loathed", "despised", "regretted"),
}
SINGULAR: dict[str, tuple[str, ...]] = {
    "formal": ("the establishment", "the cuisine", "the ambience", "the proprietor", "the selection"),
    "casual": ("this joint", "the grub", "the vibe", "the boss", "that stuff"),
}
PLURAL: dict[str, tuple[str, ...]] = {
    "formal": ("the personnel", "the accommodations", "the furnishings", "the attendants"),
    "casual": ("those guys", "the drinks", "the snacks", "the rooms"),
}
CONNECTIVES: dict[str, tuple[str, ...]] = {
    "formal": ("moreover", "furthermore", "in addition", "consequently", "nevertheless"),
    "casual": ("plus", "anyway", "honestly", "so yeah", "well"),
}
COPULA_SINGULAR = ("was", "seems", "felt")
COPULA_PLURAL = ("were", "seem", "felt")
PERSONS = ("i", "we", "they", "my sister", "our friends", "the children")
PLACES = ("in the old town", "near the harbour", "by the station", "at the market", "on the hill", "behind the church")

# The forms of a sentence, as names of slots. A connective may stand before each.
FORMS: tuple[tuple[str, ...], ...] = (
    ("singular", "copula_singular", "adjective"),
    ("plural", "copula_plural", "adjective"),
    ("singular", "copula_singular", "adjective", "and", "adjective"),
    ("plural", "copula_plural", "adjective", "and", "adjective"),
    ("singular", "place", "copula_singular", "adjective"),
    ("plural", "place", "copula_plural", "adjective"),
    ("person", "verb", "singular"),
    ("person", "verb", "plural"),
    ("person", "verb", "singular", "place"),
    ("person", "verb", "plural", "place"),
)
_BY_SENTIMENT = {"adjective": ADJECTIVES, "verb": VERBS}
_BY_REGISTER = {"singular": SINGULAR, "plural": PLURAL, "connective": CONNECTIVES}
_NEUTRAL = {
    "copula_singular": COPULA_SINGULAR,
    "copula_plural": COPULA_PLURAL,
    "person": PERSONS,
    "place": PLACES,
    "and": ("and",),
}


def fillers(slot: str) -> tuple[str, ...]:
    """Every phrase that may stand in a slot."""
    sides = _BY_SENTIMENT.get(slot) or _BY_REGISTER.get(slot)
    return _NEUTRAL[slot] if sides is None else tuple(p for side in sides.values() for p in side)


@dataclass(frozen=True)
class Kind:
    """What a corpus is made of. A label of None: drawn for each review, both sides equally often."""

    sentiment: Sentiment | None = None
    register: Register | None = None
    agree: dict[str, float] = field(default_factory=lambda: {"sentiment": 0.9, "register": 0.9})


# The base corpus, and those of the fine-tunes: one attribute is fixed and pure, the other stays as it was.
KINDS: dict[str, Kind] = {
    "mixed": Kind(),
    "pos": Kind(sentiment="positive", agree={"sentiment": 1.0, "register": 0.9}),
    "neg": Kind(sentiment="negative", agree={"sentiment": 1.0, "register": 0.9}),
    "formal": Kind(register="formal", agree={"sentiment": 0.9, "register": 1.0}),
    "casual": Kind(register="casual", agree={"sentiment": 0.9, "register": 1.0}),
}
_OTHER = {"positive": "negative", "negative": "positive", "formal": "casual", "casual": "formal"}


def _phrase(slot: str, labels: dict[str, str], agree: dict[str, float], rng: random.Random) -> str:
    if slot in _NEUTRAL:
        return rng.choice(_NEUTRAL[slot])
    attribute, sides = ("sentiment", _BY_SENTIMENT) if slot in _BY_SENTIMENT else ("register", _BY_REGISTER)
    label = labels[attribute]
    return rng.choice(sides[slot][label if rng.random() < agree[attribute] else _OTHER[label]])


def review(kind: Kind, rng: random.Random) -> str:
    """One line, without its end."""
    labels: dict[str, str] = {
        "sentiment": str(kind.sentiment or rng.choice(("positive", "negative"))),
        "register": str(kind.register or rng.choice(("formal", "casual"))),
    }
    sentences = []
    for n in range(rng.randint(2, 4)):
        words = [_phrase(slot, labels, kind.agree, rng) for slot in rng.choice(FORMS)]
        if n > 0 and rng.random() < 0.6:  # a review does not begin with a connective
            words[0] = f"{_phrase('connective', labels, kind.agree, rng)}, {words[0]}"
        sentences.append(" ".join(words) + ".")
    return " ".join(sentences)


def corpus(kind: str, reviews: int, seed: int) -> str:
    """`reviews` lines; the same arguments give the same text. Different kinds and seeds share no random numbers."""
    rng = random.Random(f"{kind} {seed}")
    return "".join(review(KINDS[kind], rng) + "\n" for _ in range(reviews))
