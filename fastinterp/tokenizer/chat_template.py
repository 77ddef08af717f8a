"""Chat templates: those of models, as text that is never rendered, and some well-known formats in our own words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastinterp.checkpoint.names import TEMPLATES
from fastinterp.checkpoint.regular_file import read_regular
from fastinterp.checkpoint.sidecar_files import refuse_link
from fastinterp.checkpoint.strict_json import parse_object
from fastinterp.errors import CheckpointError
from fastinterp.presence import is_file, is_folder

JINJA, CONFIG, PROCESSOR = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"
_LARGEST = 1 << 26  # bytes

# Formats, not copies: each line of a conversation as the format's publisher documents it.
BUILTIN = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}"
        "{% set ns = namespace(system='') %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set ns.system = message['content'] + '\\n\\n' %}"
        "{% elif message['role'] == 'user' %}"
        "{{ '[INST] ' + ns.system + message['content'] + ' [/INST]' }}{% set ns.system = '' %}"
        "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "alpaca": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% else %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "exaone": (
        "{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
        "{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ '[|endofturn|]\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
}


def template_of(root: Path) -> str | None:
    """The chat template of the model in the folder `root`, or None: where transformers looks, in its order.

    Of several templates it is the one named `default`.
    Raises: CheckpointError, if a file that may hold it is damaged.
    """
    if is_file(root / JINJA):
        refuse_link(root, JINJA)
        path = str(root / JINJA)
        try:
            return read_regular(path, _LARGEST).decode()
        except UnicodeDecodeError:
            raise CheckpointError("the chat template is not UTF-8", file=path) from None
    for name in (CONFIG, PROCESSOR):
        if is_file(root / name):
            refuse_link(root, name)
            path = str(root / name)
            template = parse_object(read_regular(path, _LARGEST).lstrip(), f"`{name}`", path).get("chat_template")
            if isinstance(template, list):
                named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
                template = named.get("default")
            if isinstance(template, str):
                return template
    return None


def template_file(root: Path) -> str | None:
    """The name of the file that has a chat template of the model in the folder `root`, or None.

    Raises: CheckpointError, if a file that may hold one is damaged.
    """
    others = root / TEMPLATES
    for name in (JINJA, CONFIG, PROCESSOR):
        path = str(root / name)
        if is_file(root / name) and (
            name == JINJA or parse_object(read_regular(path, _LARGEST).lstrip(), f"`{name}`", path).get("chat_template")
        ):
            return name
    return others.name if is_folder(others) else None


def most_common(templates: Sequence[str | None]) -> str | None:
    """The template that most models have; of equally common ones the first. None, if no model has one."""
    counts = Counter(t for t in templates if t is not None)
    return max(counts, key=lambda t: counts[t], default=None)


def with_template(files: Mapping[str, bytes | Path], template: str) -> dict[str, bytes | Path]:
    """`files`, the output's by name, with this chat template wherever it is looked for.

    It is stored as chat_template.jinja, which newer software reads first, in tokenizer_config.json, which is all that
    older software reads, and in chat_template.json, if there is one. Other templates that went with the old one stay.
    """
    changed = {**files, JINJA: template.encode("utf-8", "replace")}
    for name in (CONFIG, PROCESSOR):
        if name in changed:
            content = changed[name]
            raw = read_regular(str(content), _LARGEST) if isinstance(content, Path) else content
            table = parse_object(raw.lstrip(), f"`{name}`", str(content) if isinstance(content, Path) else name)
            table["chat_template"] = template
            changed[name] = (json.dumps(table, indent=2) + "\n").encode()
    return changed
