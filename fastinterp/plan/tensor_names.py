"""Matches the names of one model's tensors with those of another: prefixes, wrappers of modules, older spellings.

Names and shapes alone decide. A pair of names is one tensor if both end alike, and what is in front of that is replaced
in the same way for many of them. Nothing is guessed: where two ways explain as many names, neither is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from fastinterp.messages import counted, plain
from fastinterp.recipe.tensor_groups import HasShape

# Parts of names that modules have which wrap another; they stand anywhere in a name.
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
# Parts of names that say where a model is, not which of its tensors it is: only these may come, go, or move.
_CONTAINERS = _WRAPPERS | frozenset((
    "module", "model", "base_model", "transformer", "language_model", "diffusion_model", "backbone", "bert", "roberta",
    "distilbert", "electra", "albert", "deberta", "gpt_neox", "rwkv", "generator", "discriminator", "network", "net",
    "student", "policy", "llm", "state_dict", "encoder_model", "pretrained_model",
))  # fmt: skip
# Parts of names that say which of several parts of a model it is: none of them stands for another, nor does a number.
_SIBLINGS = frozenset((
    "encoder", "decoder", "text_model", "text_encoder", "text_encoder_2", "text_encoder_3", "vision_model",
    "vision_tower", "vision_encoder", "image_encoder", "visual", "audio_model", "audio_tower", "audio_encoder", "unet",
    "vae", "generator", "discriminator", "student", "teacher", "policy", "critic", "actor", "reward_model", "model_ema",
    "ema_model",
))  # fmt: skip
# Last parts of names, and how torch or transformers write them now.
_SPELLINGS = {
    "gamma": "weight",
    "beta": "bias",
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}
# Modules that older and newer versions of transformers call differently: the name in today's.
_MODULES = {"block_sparse_moe": "mlp"}
_MOST = 64  # candidates for one name, above which it has no say
_RULES = 32  # replaced prefixes of one model that are looked at: those that most names ask for


class Match(msgspec.Struct, frozen=True):
    """The names of one model's tensors in the other model.

    names  own name -> the other's, for all tensors of the model; names that the other does not have are kept, or follow
           the replacement of their prefix
    how    what was done, for people: `prefix `module.` removed (21 tensors)`
    """

    names: Mapping[str, str]
    how: tuple[str, ...]


class _Rule(msgspec.Struct, frozen=True):
    """Names that start with `own` start with `other` in the other model."""

    own: str
    other: str

    def image(self, name: str) -> str:
        return self.other + name[len(self.own) :]

    @property
    def moves_containers(self) -> bool:
        """Whether only parts that say where a model is come, go or move."""
        a, b = self.own.split(".")[:-1], self.other.split(".")[:-1]
        while a and b and a[0] == b[0]:
            a, b = a[1:], b[1:]
        while a and b and a[-1] == b[-1]:
            a, b = a[:-1], b[:-1]
        return _CONTAINERS.issuperset((*a, *b))

    @property
    def swaps_siblings(self) -> bool:
        """Whether it takes one part of a model for another, `encoder.` for `decoder.`, or one layer for another."""
        a, b = ({p for p in s.split(".") if p in _SIBLINGS or p.isdecimal()} for s in (self.own, self.other))
        return bool(a - b and b - a)

    def __str__(self) -> str:
        if not self.own:
            return f"prefix `{self.other}` added"
        return f"prefix `{self.own}` became `{self.other}`" if self.other else f"prefix `{self.own}` removed"


def match_names(own: Mapping[str, HasShape], other: Mapping[str, HasShape]) -> Match | None:
    """How `own` names follow `other`; None, if they are the same, or nothing explains the difference."""
    if own.keys() == other.keys():
        return None
    ours, theirs = _canonical(own), _canonical(other)
    canonical = {name: key for key, name in ours.items()}
    names, how = {}, []
    left = {key: own[name].shape for key, name in ours.items() if key not in theirs}
    free = {key: other[name].shape for key, name in theirs.items() if key not in ours}
    respelled = [name for key, name in ours.items() if key in theirs and theirs[key] != name]
    if respelled:
        how.append(f"{_spelling(respelled, theirs, canonical)} ({counted(len(respelled), 'tensor')})")
    images, rules = _prefixes(left, free, whole=len(left) == len(ours))
    how += [f"{_as_stored(rule, cover, ours, theirs)} ({counted(len(cover), 'tensor')})" for rule, cover in rules]
    taken = {key for key in ours if key not in images}
    modules = {start for key in images for start in _starts(key)}
    for name in own:
        key = canonical[name]
        if key in theirs:
            names[name] = theirs[key]
        elif key in images:
            names[name] = theirs[images[key]]
        else:
            image = _follow(key, [rule for rule, _ in rules], modules)
            names[name] = name if image is None or image in taken or image in theirs else image
    return Match(names, tuple(map(plain, how))) if how and len(set(names.values())) == len(names) else None


def _canonical(names: Iterable[str]) -> dict[str, str]:
    """Name without wrappers, in today's spelling -> the model's own. Where names would be the same, they stay."""
    every = list(names)
    found: dict[str, list[str]] = {}
    for name in every:
        found.setdefault(_respelled(name), []).append(name)
    own = set(every)
    return {
        key if len(same) == 1 and (key not in own or key == name) else name: name
        for key, same in found.items()
        for name in same
    }


def _respelled(name: str) -> str:
    parts = [_MODULES.get(part, part) for part in name.split(".") if part not in _WRAPPERS]
    if len(parts) > 1 and parts[-1] in _SPELLINGS:
        parts[-1] = _SPELLINGS[parts[-1]]
    return ".".join(parts) or name


def _spelling(names: Sequence[str], theirs: Mapping[str, str], canonical: Mapping[str, str]) -> str:
    """How names that are the same in another spelling differ: `_orig_mod.` left out, or `x.gamma` for `x.weight`."""
    example = names[0]
    other = theirs[canonical[example]]
    mine, its = (_WRAPPERS & set(n.split(".")) for n in (example, other))
    if mine and not its:
        left_out = [part for part in example.split(".") if part in mine]
        return " and ".join(f"`{part}.`" for part in dict.fromkeys(left_out)) + " left out"
    return f"`{other}` for `{example}` and the like"


def _as_stored(rule: _Rule, cover: Mapping[str, str], ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """What a rule did to the names as they are stored, where wrappers stand in the prefix: `module._orig_mod.`."""
    key, image = next(iter(cover.items()))
    own, other = ours[key].split("."), theirs[image].split(".")
    while own and other and own[-1] == other[-1]:
        own, other = own[:-1], other[:-1]
    stored = _Rule("".join(f"{part}." for part in own), "".join(f"{part}." for part in other))
    if all(ours[k] == stored.own + theirs[i][len(stored.other) :] for k, i in cover.items()):
        return str(stored)
    wrappers = [part for part in dict.fromkeys(ours[key].split(".")) if part in _WRAPPERS - {*theirs[image].split(".")}]
    return ", ".join([str(rule), *(f"`{part}.` left out" for part in wrappers)])


def _prefixes(
    left: Mapping[str, tuple[int, ...]], free: Mapping[str, tuple[int, ...]], *, whole: bool
) -> tuple[dict[str, str], list[tuple[_Rule, dict[str, str]]]]:
    """(own name -> the other's, the rules by which, each with the names that it explains).

    left, free  names that only this model has, and that only the other has, with their shapes
    whole       the models have no name in common: then any one prefix may stand for any other, but for those of parts
                of one model
    """
    candidates = _candidates(left, free)
    images: dict[str, str] = {}
    rules: list[tuple[_Rule, dict[str, str]]] = []
    used: set[str] = set()
    refused: list[dict[str, str]] = []  # what rules explain that were not taken: a smaller one must not take it either
    while candidates:
        covers = {rule: _cover(rule, left, free, images, used) for rule in candidates}
        covers = {rule: cover for rule, cover in covers.items() if cover}
        best = max(map(len, covers.values()), default=0)
        first = [rule for rule, cover in covers.items() if len(cover) == best]
        candidates = list(covers)
        for rule in first:
            rivals = [*refused, *(covers[r] for r in first if r != rule)]
            allowed = rule.moves_containers or (whole and not rules and 2 * best >= len(left))
            candidates.remove(rule)
            if allowed and not any(_contest(rival, covers[rule]) for rival in rivals):
                images |= covers[rule]
                used |= set(covers[rule].values())
                rules.append((rule, covers[rule]))
                break
            refused.append(covers[rule])
    return images, rules


def _candidates(left: Mapping[str, tuple[int, ...]], free: Mapping[str, tuple[int, ...]]) -> list[_Rule]:
    """The replacements that make a name of this model one of the other, with the same shape."""
    ends: dict[str, list[str]] = {}
    for name in free:
        for end in _ends(name):
            ends.setdefault(end, []).append(name)
    found: Counter[_Rule] = Counter()
    for name, shape in left.items():
        for end in _ends(name):
            others = ends.get(end, [])
            if others and len(others) <= _MOST and ("." in end or end == name or end in others):
                fitting = [other for other in others if fits(name, shape, free[other])]
                found.update(_Rule(name[: -len(end)], other[: -len(end)]) for other in fitting)
                break
    return [rule for rule, _ in found.most_common(_RULES) if rule.own != rule.other and not rule.swaps_siblings]


def _ends(name: str) -> list[str]:
    """`a.b.c`, `b.c`, `c` of `a.b.c`: the longest first."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def fits(name: str, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether shapes are equal, or differ in the number of rows alone, as embeddings do."""
    return a == b or (len(a) == len(b) == 2 and a[1:] == b[1:] and name.endswith(".weight"))


def _cover(
    rule: _Rule, left: Mapping[str, tuple[int, ...]], free: Mapping[str, tuple[int, ...]], images: Mapping[str, str],
    used: set[str],
) -> dict[str, str]:  # fmt: skip
    """The names that a rule explains, and theirs in the other model."""
    start = len(rule.own)
    return {
        name: image
        for name in left
        if name not in images and name.startswith(rule.own)
        and (image := rule.other + name[start:]) in free and image not in used
    }  # fmt: skip


def _contest(a: Mapping[str, str], b: Mapping[str, str]) -> bool:
    """Whether two rules explain the same name of either model."""
    return bool(a.keys() & b.keys() or set(a.values()) & set(b.values()))


def _follow(name: str, rules: Sequence[_Rule], modules: set[str]) -> str | None:
    """The name of a tensor that the other model does not have, with the longest prefix replaced that a rule replaces;
    None, if none does. One that puts something in front of all names is for modules of which others have tensors.
    """
    for rule in sorted(rules, key=lambda rule: -len(rule.own)):
        if name.startswith(rule.own) and (rule.own or name.rpartition(".")[0] in modules):
            return rule.image(name) or None
    return None


def _starts(name: str) -> list[str]:
    """`a`, `a.b` of `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
