"""Which kind each layer of a model is, as config.json says it: full or sliding attention, Mamba, dense or experts, ...

Configurations say it by lists with one item per layer, by lists of layer numbers, or by numbers that count layers
(periods, offsets, first layers, last layers). A `Form` is one of these ways: it reads kinds from a configuration, and
proposes changes after which the configuration may say other kinds. Whoever uses it reads again
what came out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from fastinterp.recipe.layer_defaults import (
    FIRST_OF_GROUP,
    FULL,
    LAST_OF_GROUP,
    LINEAR,
    SLIDING,
    WITH_LAYER_TYPES,
    WITH_MLP_LAYER_TYPES,
    Config,
    number,
    type_of,
)

Kinds = list[Any]

DENSE, SPARSE = "dense", "sparse"
_MOST = 256  # periods that are tried


class Form(NamedTuple):
    """One way to say which kind each layer is.

    fact    what the kinds are about: of the forms of one fact, the first that reads something counts
    keys    those of the configuration, for people
    read    (configuration, number of layers) -> the kind of each; None: the configuration does not say it in this way
    tries   (configuration, kinds of all layers) -> changes after which it may say these kinds
    remedy  which layers can be stacked so that one of the changes will do, for people
    part    of models with two stacks, the one that it is about: encoder or decoder
    """

    fact: str
    keys: tuple[str, ...]
    read: Callable[[Config, int], Kinds | None]
    tries: Callable[[Config, Kinds], Iterator[dict[str, Any]]]
    remedy: str = ""
    part: str = ""


def _list(fact: str, key: str) -> Form:
    """One item per layer."""

    def read(config: Config, n: int) -> Kinds | None:
        value = config.get(key)
        return list(value) if isinstance(value, list) and len(value) == n else None

    def tries(_: Config, kinds: Kinds) -> Iterator[dict[str, Any]]:
        yield {key: kinds}

    return Form(fact, (key,), read, tries)


def _numbers(fact: str, key: str, inside: str, outside: str) -> Form:
    """The numbers of the layers of one kind."""

    def read(config: Config, n: int) -> Kinds | None:
        value = config.get(key)
        return [inside if i in value else outside for i in range(n)] if isinstance(value, list) else None

    def tries(_: Config, kinds: Kinds) -> Iterator[dict[str, Any]]:
        yield {key: _where(kinds, inside)}

    return Form(fact, (key,), read, tries)


def _period(fact: str, stem: str, inside: str, outside: str, needs: str = "") -> Form:
    """`stem_period` and `stem_offset`: the number of the first layer of one kind, and the distance of these.

    needs  a number that must be above 1, else all layers are of the other kind
    """
    keys = f"{stem}_period", f"{stem}_offset"

    def read(config: Config, n: int) -> Kinds | None:
        period, offset = (number(config, key) for key in keys)
        if not period or offset is None or type_of(config) == "zamba":  # which counts them from its fourth layer
            return None
        if needs and (number(config, needs) or 0) <= 1:
            return [outside] * n
        return [inside if i % period == offset else outside for i in range(n)]

    def tries(_: Config, kinds: Kinds) -> Iterator[dict[str, Any]]:
        first = next((i for i, kind in enumerate(kinds) if kind == inside), len(kinds))
        for period in _sizes(kinds, first + 1):
            yield dict(zip(keys, (period, first), strict=True))

    return Form(fact, keys, read, tries, f"move layers by multiples of `{keys[0]}`")


def _groups(table: Mapping[str, tuple[str, int, str, str]], last: bool) -> Form:
    """Attention of another kind in the last, or first, layer of each group of as many layers."""
    keys = {key: row for row in table.values() if (key := row[0])}

    def row_of(config: Config) -> tuple[str, int, str, str] | None:
        if (name := type_of(config)) in table:
            return table[name]
        unknown = name not in LAST_OF_GROUP and name not in FIRST_OF_GROUP
        return next((row for key, row in keys.items() if last and unknown and key in config), None)

    def read(config: Config, n: int) -> Kinds | None:
        row = row_of(config)
        if row is None:
            return None
        key, size, one, rest = row
        size = config.get(key, size)
        if not isinstance(size, int) or size < 1:
            return None
        return [one if (i + last) % size == 0 else rest for i in range(n)]

    def tries(config: Config, kinds: Kinds) -> Iterator[dict[str, Any]]:
        row = row_of(config)
        if row is not None and row[0]:
            for size in _sizes(kinds):
                yield {row[0]: size}

    return Form("attention", tuple(keys), read, tries, "move layers by multiples of it")


def _window(config: Config, n: int) -> Kinds | None:
    """Sliding attention from layer `max_window_layers` on."""
    first = number(config, "max_window_layers")
    if first is None or type_of(config) == "qwen2_moe" or "use_sliding_window" not in config:
        return None
    slides = config["use_sliding_window"] and config.get("sliding_window") is not None
    return [SLIDING if slides and i >= first else FULL for i in range(n)]


def _window_of_qwen2_moe(config: Config, n: int) -> Kinds | None:
    if type_of(config) != "qwen2_moe" or (end := number(config, "max_window_layers")) is None:
        return None
    return [SLIDING if config.get("use_sliding_window") and i % 2 == 0 and i < end else FULL for i in range(n)]


def _first_sliding(_: Config, kinds: Kinds) -> Iterator[dict[str, Any]]:
    yield {"max_window_layers": kinds.index(SLIDING) if SLIDING in kinds else len(kinds)}


def _nothing(_: Config, kinds: Kinds) -> Iterator[dict[str, Any]]:
    yield from ()


_LETTERS = {"M": LINEAR, "*": FULL, "E": "moe", "-": "mlp"}  # of Nemotron-H


def _pattern(config: Config, n: int) -> Kinds | None:
    text = config.get("hybrid_override_pattern")
    if not isinstance(text, str) or len(text) != n or not set(text) <= set(_LETTERS):
        return None
    return [_LETTERS[letter] for letter in text]


def _as_pattern(_: Config, kinds: Kinds) -> Iterator[dict[str, Any]]:
    letters = {kind: letter for letter, kind in _LETTERS.items()} | {"mamba": "M", "attention": "*"}
    if all(kind in letters for kind in kinds):
        yield {"hybrid_override_pattern": "".join(letters[kind] for kind in kinds)}


def _attention_types(config: Config, n: int) -> Kinds | None:
    """Of GPT-Neo: [[["global", "local"], 12]]."""
    groups = config.get("attention_types")
    try:
        kinds = [kind for names, times in groups for _ in range(times) for kind in names]  # type: ignore[union-attr]
    except (TypeError, ValueError):
        return None
    return kinds if len(kinds) == n else None


def _as_attention_types(_: Config, kinds: Kinds) -> Iterator[dict[str, Any]]:
    n = len(kinds)
    size = next(k for k in range(1, n + 1) if n % k == 0 and kinds[:k] * (n // k) == kinds)
    yield {"attention_types": [[kinds[:size], n // size]]}


def _cycle(config: Config, n: int) -> Kinds | None:
    """Of RecurrentGemma: `block_types` is repeated."""
    types = config.get("block_types")
    if types is None and type_of(config) == "recurrent_gemma":
        types = ["recurrent", "recurrent", "attention"]
    return (types * n)[:n] if isinstance(types, list) and types else None


def _as_cycle(_: Config, kinds: Kinds) -> Iterator[dict[str, Any]]:
    yield {"block_types": kinds}


def _rope(config: Config, n: int) -> Kinds | None:
    """1: with rotary embedding, 0: without."""
    interval = number(config, "no_rope_layer_interval")
    return [int((i + 1) % interval != 0) for i in range(n)] if interval else None


def _as_rope(_: Config, kinds: Kinds) -> Iterator[dict[str, Any]]:
    for interval in _sizes(kinds):
        yield {"no_rope_layer_interval": interval}


def _dense_listed(config: Config, n: int) -> Kinds | None:
    """Of Qwen: dense if its number is in `mlp_only_layers`, or if it is not at the end of a step."""
    step = number(config, "decoder_sparse_step")
    if not step or "encoder_sparse_step" in config:
        return None
    listed = config.get("mlp_only_layers") or []
    experts = number(config, "num_experts") != 0
    return [SPARSE if experts and i not in listed and (i + 1) % step == 0 else DENSE for i in range(n)]


def _as_dense_listed(config: Config, kinds: Kinds) -> Iterator[dict[str, Any]]:
    dense, step = _where(kinds, DENSE), number(config, "decoder_sparse_step") or 1
    yield {"mlp_only_layers": [i for i in dense if (i + 1) % step == 0]}
    yield {"mlp_only_layers": dense, "decoder_sparse_step": 1}


def _interleaved(config: Config, n: int) -> Kinds | None:
    """Of Llama 4: experts at the end of each step."""
    step = number(config, "interleave_moe_layer_step")
    return [SPARSE if (i + 1) % step == 0 else DENSE for i in range(n)] if step else None


def _as_interleaved(config: Config, kinds: Kinds) -> Iterator[dict[str, Any]]:
    for step in _sizes(kinds):
        yield {"interleave_moe_layer_step": step}
    if type_of(config) == "llama4_text":
        yield {"moe_layers": _where(kinds, SPARSE)}


_SPAN = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")


def _span(config: Config, n: int) -> Kinds | None:
    """Of ERNIE: experts from a first to a last layer, every so many."""
    first, last, interval = (number(config, key) for key in _SPAN)
    if first is None or last is None or not interval:
        return None
    last = n - 1 if last == -1 else last
    return [SPARSE if (i + 1) % interval == 0 and first <= i <= last else DENSE for i in range(n)]


def _as_span(_: Config, kinds: Kinds) -> Iterator[dict[str, Any]]:
    at = _where(kinds, SPARSE) or [len(kinds)]
    for interval in _sizes(kinds):
        yield dict(zip(_SPAN, (at[0], at[-1], interval), strict=True))


def _first_dense(config: Config, n: int) -> Kinds | None:
    """Of DeepSeek: the first layers are dense; of those behind, every so many has experts."""
    first, every = number(config, "first_k_dense_replace"), config.get("moe_layer_freq", 1)
    if first is None or not isinstance(every, int) or every < 1:
        return None
    return [SPARSE if i >= first and i % every == 0 else DENSE for i in range(n)]


def _as_first_dense(_: Config, kinds: Kinds) -> Iterator[dict[str, Any]]:
    yield {"first_k_dense_replace": kinds.index(SPARSE) if SPARSE in kinds else len(kinds)}


def _leading(config: Config, n: int) -> Kinds | None:
    """As many dense layers come first."""
    first = number(config, "num_dense_layers")
    return None if first is None else [DENSE if i < first else SPARSE for i in range(n)]


def _as_leading(_: Config, kinds: Kinds) -> Iterator[dict[str, Any]]:
    yield {"num_dense_layers": kinds.index(SPARSE) if SPARSE in kinds else len(kinds)}


def _steps(part: str) -> Form:
    """Of NLLB-MoE and Switch Transformers, which computes the step from the number of layers with experts."""
    step_key, count_key = f"{part}_sparse_step", f"num_sparse_{part}_layers"

    def read(config: Config, n: int) -> Kinds | None:
        step, count = number(config, step_key), number(config, count_key)
        if step is None or "encoder_sparse_step" not in config:
            return None
        if count is not None:
            step = n // count if count > 0 else n
            return [SPARSE if step and (i % step == 1 or step == 1) else DENSE for i in range(n)]
        return [SPARSE if step and (i + 1) % step == 0 else DENSE for i in range(n)]

    def tries(config: Config, kinds: Kinds) -> Iterator[dict[str, Any]]:
        for step in (0, *_sizes(kinds)):
            counted = {count_key: len(kinds) // step if step else 0} if number(config, count_key) is not None else {}
            yield {step_key: step, **counted}

    return Form("experts", (step_key,), read, tries, f"move layers by multiples of `{step_key}`", part)


def _shared(config: Config, n: int) -> Kinds | None:
    """The last layers use keys and values of a layer before."""
    last = number(config, "num_kv_shared_layers")
    return None if last is None else ["shared" if i >= n - last else "own" for i in range(n)]


def _as_shared(_: Config, kinds: Kinds) -> Iterator[dict[str, Any]]:
    yield {"num_kv_shared_layers": kinds.count("shared")}


_FIRST = "stack the layers so that all dense ones come first"
FORMS = (
    _list("attention", "layer_types"),
    _list("attention", "layers_block_type"),
    Form("attention", ("hybrid_override_pattern",), _pattern, _as_pattern),
    Form("attention", ("attention_types",), _attention_types, _as_attention_types),
    _numbers("attention", "attn_layer_indices", FULL, LINEAR),
    _numbers("attention", "full_attn_idxs", FULL, "conv"),
    _period("attention", "attn_layer", FULL, LINEAR),
    Form("attention", ("block_types",), _cycle, _as_cycle),
    _groups(LAST_OF_GROUP, last=True),
    _groups(FIRST_OF_GROUP, last=False),
    Form("attention", ("max_window_layers",), _window, _first_sliding, "stack the layers with full attention first"),
    Form("attention", ("max_window_layers",), _window_of_qwen2_moe, _nothing),
    _list("rotary embeddings", "no_rope_layers"),
    Form("rotary embeddings", ("no_rope_layer_interval",), _rope, _as_rope, "move layers by multiples of it"),
    _list("experts", "mlp_layer_types"),
    _numbers("experts", "moe_layers", SPARSE, DENSE),
    Form("experts", ("mlp_only_layers", "decoder_sparse_step"), _dense_listed, _as_dense_listed),
    Form("experts", ("interleave_moe_layer_step",), _interleaved, _as_interleaved),
    Form("experts", _SPAN, _span, _as_span, "stack the layers so that those with experts are side by side"),
    Form("experts", ("first_k_dense_replace",), _first_dense, _as_first_dense, _FIRST),
    Form("experts", ("num_dense_layers",), _leading, _as_leading, _FIRST),
    _period("experts", "expert_layer", SPARSE, DENSE, needs="num_experts"),
    _steps("encoder"),
    _steps("decoder"),
    Form("keys and values", ("num_kv_shared_layers",), _shared, _as_shared, "stack the layers that share them last"),
)
FACTS = tuple(dict.fromkeys(form.fact for form in FORMS))
KEYS = frozenset(key for form in FORMS for key in form.keys)


def kinds_of(config: Config, layers: int, fact: str, part: str = "") -> tuple[Form, Kinds] | None:
    """The kind of each layer, and the form that says it; None, if the configuration does not say it."""
    for form in FORMS:
        if form.fact == fact and (not form.part or form.part == part):
            kinds = form.read(config, layers)
            if kinds is not None:
                return form, kinds
    return None


def changes_for(config: Config, form: Form, kinds: Kinds, part: str = "") -> dict[str, Any] | None:
    """Changes after which a configuration says these kinds, none if it does already; None, if there are no such.

    form  the one that says it now
    """
    if form.read(config, len(kinds)) == kinds:
        return _others(config, form, kinds, part)
    every = [*form.tries(config, kinds)]
    if key := _list_of(type_of(config), form.fact):
        every.append({key: kinds})
    for changes in every:
        said = kinds_of({**config, **changes}, len(kinds), form.fact, part)
        if said is not None and said[1] == kinds:
            return _others(config, form, kinds, part) | changes
    return None


def _others(config: Config, chosen: Form, kinds: Kinds, part: str) -> dict[str, Any]:
    """Changes of the forms that do not count here, so that they say the same where they can."""
    changes: dict[str, Any] = {}
    for form in FORMS:
        if form.fact == chosen.fact and form is not chosen and any(config.get(key) is not None for key in form.keys):
            for change in (form.tries(config, kinds)) if (not form.part or form.part == part) else ():
                if form.read({**config, **change}, len(kinds)) == kinds:
                    changes |= change
                    break
    return changes


def _list_of(model_type: str, fact: str) -> str:
    """The key of a list with one item per layer that this model type takes; empty, if it takes none."""
    if fact == "attention":
        return "layers_block_type" if model_type == "zamba" else "layer_types" if model_type in WITH_LAYER_TYPES else ""
    if fact == "experts":
        return "mlp_layer_types" if model_type in WITH_MLP_LAYER_TYPES else ""
    return "no_rope_layers" if fact == "rotary embeddings" and model_type in ("llama4_text", "smollm3") else ""


def _sizes(kinds: Kinds, first: int = 1) -> range:
    """Periods to try: up to one more than there are layers, and to no more than any model has."""
    return range(first, min(len(kinds), _MOST) + 2)


def _where(kinds: Kinds, kind: str) -> list[int]:
    return [i for i, one in enumerate(kinds) if one == kind]
