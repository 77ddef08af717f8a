"""Which modules of a model peft changes and saves for an adapter_config.json, and configurations that say just that.

Names are those of modules in the model without peft: `model.layers.0.self_attn.q_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

# What peft saves as a whole for a task, whatever `modules_to_save` says: names that the module's ends with.
SAVED_BY_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_SEQ_TO_SEQ = ("t5", "bart", "pegasus", "marian", "m2m_100", "led", "prophetnet", "blenderbot")


def task_type(config: dict[str, Any]) -> str | None:
    """peft's `task_type` of a model, from its config.json; None, if it has none that is known."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    if name.endswith("ForConditionalGeneration") and str(config.get("model_type")).endswith(_SEQ_TO_SEQ):
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)


def saved_with(modules: Iterable[str], wanted: Collection[str], task: str | None = None) -> list[str]:
    """Those of `modules` that peft saves as a whole if `modules_to_save` is `wanted`: whose names end so.

    An end need not begin behind a dot: `norm` is also the end of `input_layernorm`.
    """
    ends = (*wanted, *SAVED_BY_TASK.get(task or "", ()))
    return [name for name in modules if ends and name.endswith(ends)]


def modules_to_save(modules: Collection[str], wanted: Collection[str], targets: Collection[str]) -> list[str]:
    """`modules_to_save` by which peft saves just the modules `wanted`: the last parts of names, where that is enough.

    peft changes no module that has one of these names among the parts of its own, so none of `targets` may.
    """
    ends = sorted({name.rpartition(".")[2] for name in wanted})
    hidden = any(part in ends for name in targets for part in name.split("."))
    return sorted(wanted) if hidden or set(saved_with(modules, ends)) != set(wanted) else ends


def target_modules(modules: Collection[str], wanted: Collection[str]) -> list[str] | str:
    """`target_modules` by which peft changes just the modules `wanted`, of all that it may change.

    The last parts of names, where all modules with such a name are wanted; else whole names; and a regular expression,
    where a whole name is the end of another one.
    """
    wanted, others = set(wanted), set(modules) - set(wanted)
    ends = {name.rpartition(".")[2] for name in wanted}
    if not any(name.rpartition(".")[2] in ends for name in others):
        return sorted(ends)
    if not any(name.endswith(f".{one}") for one in wanted for name in others):
        return sorted(wanted)
    return f"^({'|'.join(re.escape(name) for name in sorted(wanted))})$"


def patterns(values: dict[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """`rank_pattern` or `alpha_pattern` of modules whose value is not the default's: regular expressions.

    A name that is the end of another module's is anchored, so that it is not taken for that.
    """
    return {
        f"^{name}" if any(other.endswith(f".{name}") for other in modules) else name: value
        for name, value in values.items()
    }
