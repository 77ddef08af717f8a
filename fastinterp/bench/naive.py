"""The loop that one writes without a tool: load, sum in float32, save. Run as a program of its own: naive.py JOB OUT.

JOB is a JSON file with `files` (names), `models` (folders), `weights`, and `base` (a folder or null).
"""

from __future__ import annotations

import json
import os
import sys

import torch
from safetensors.torch import load_file, save_file


def main(settings: str, out: str) -> None:
    with open(settings, encoding="utf-8") as stream:
        job = json.load(stream)
    os.mkdir(out)
    for file in job["files"]:
        states = [load_file(os.path.join(model, file)) for model in job["models"]]
        base = load_file(os.path.join(job["base"], file)) if job["base"] else None
        merged = {}
        for name, first in states[0].items():
            acc = torch.zeros_like(first, dtype=torch.float32) if base is None else base[name].float()
            for state, weight in zip(states, job["weights"]):  # noqa: B905 # a user's program
                x = state[name].float()
                acc += weight * (x if base is None else x - base[name].float())
            merged[name] = acc.to(first.dtype)
        save_file(merged, os.path.join(out, file), metadata={"format": "pt"})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
