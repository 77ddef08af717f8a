"""What tells merges apart: the same fingerprint, the same bytes."""

from __future__ import annotations

import hashlib
import os

from fastinterp._version import __version__
from fastinterp.plan.plan import Plan


def fingerprint(plan: Plan) -> str:
    """A hash of 12 hexadecimal digits over the headers of the output, the version, and the input files."""
    digest = hashlib.blake2b(__version__.encode(), digest_size=6)
    for layout in plan.layouts:
        for file in layout.files:  # their headers hold the recipe, the dtypes, the seed
            digest.update(file.name.encode() + b"\0" + file.header)
    for checkpoint in plan.checkpoints:
        for path in (*checkpoint.files, *checkpoint.adapter_files):
            info = os.stat(path)
            digest.update(f"{path.name} {info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}\0".encode())
    return digest.hexdigest()
