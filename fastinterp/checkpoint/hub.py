"""Checkpoints named by their id on the Hugging Face Hub: from the local cache, else downloaded into it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from fastinterp.checkpoint.names import GGUF, OTHER_WEIGHTS, PICKLES, WEIGHTS
from fastinterp.errors import CheckpointError

# From the top folder: weights, and the small files that may belong to a model, its code among them, which is never run.
ALLOW = (
    "*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.spm", "*.vocab", "*.bpe", "*.codes",
    "*.yaml", "*.yml", "*.py", "tokenizer*", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "README.md",
)  # fmt: skip
# What libraries load of files of torch.save, in place of .safetensors files.
PICKLED = (
    *(f"{stem}{ending}" for stem in ("pytorch_model", "diffusion_pytorch_model") for ending in (".bin", "-*-of-*.bin")),
    "open_clip_pytorch_model.bin", "adapter_model.bin", "pytorch_lora_weights.bin", "learned_embeds.bin",
)  # fmt: skip
IGNORE = ("*/*", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.gguf", "*.onnx")

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_FILES = (WEIGHTS, *PICKLES, GGUF, *OTHER_WEIGHTS)
_ID = re.compile(rf"({_PART}(?:/{_PART})?)(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?")


def parse(name: str) -> tuple[str, str | None] | None:
    """`org/name@revision` -> (id, revision or None); None if `name` cannot be a Hub id.

    `./x`, `/x`, `a/b/c` and names of files of weights are paths, never ids.
    """
    match = _ID.fullmatch(name)
    if not match or "--" in match[1] or ".." in match[1] or match[1].endswith(_FILES):
        return None
    return match[1], match[2]


def fetch(
    repo: str, revision: str | None = None, folders: Sequence[str] = ("",), pickled: bool = False
) -> Path:  # fmt: skip
    """The local folder with the model `repo`; downloads what the cache lacks unless HF_HUB_OFFLINE is set.

    folders  those of the repository that are wanted; empty: its top folder
    pickled  files of torch.save are wanted, by their usual names, and nothing else

    Raises: CheckpointError, if huggingface_hub is missing, or the Hub and the cache cannot give the model.
    """
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub import errors as hub_errors
    except ImportError:
        raise CheckpointError(
            "this needs the Hub's client. Install it: pip install huggingface_hub", file=repo
        ) from None

    patterns = PICKLED if pickled else ALLOW
    allow = [f"{folder}/{pattern}".lstrip("/") for folder in folders for pattern in patterns]
    ignore = [] if pickled else list(IGNORE[1:])
    ignore += ["*/*"] if folders == ("",) else []

    def get(offline: bool) -> Path:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=allow,
                ignore_patterns=ignore,
                local_files_only=offline,
            )
        )

    offline = constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        return get(offline)
    except hub_errors.RevisionNotFoundError:
        problem = f"it has no revision `{revision}`"
    except hub_errors.GatedRepoError:
        problem = "it is gated: ask for access on its page, then run `hf auth login`"
    except hub_errors.RepositoryNotFoundError:
        problem = "the Hub has no such model, or it is private (then run `hf auth login`)"
    except hub_errors.HFValidationError as error:
        problem = f"it is not a valid id: {error}"
    except Exception as error:  # the client's HTTP library (requests, httpx) differs by version, and so do its errors
        if not offline:
            try:
                return get(offline=True)  # proxies and broken connections do not make the client try its cache
            except Exception:
                pass
        cached = "HF_HUB_OFFLINE is set and" if offline else f"the Hub cannot be reached ({_first_line(error)}), and"
        problem = f"{cached} the local cache ({constants.HF_HUB_CACHE}) does not hold it in full."
    raise CheckpointError(problem, file=repo)


def _first_line(error: Exception) -> str:
    """What it says, without the names of Python classes in front."""
    lines = re.sub(r"(Got: )?(\w+(Error|Exception): )*", "", str(error).strip(), count=1).splitlines()
    return lines[0][:200] if lines else "no details"
