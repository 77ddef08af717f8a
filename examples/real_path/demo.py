"""The page of `fastinterp explore` between bad reviews and good ones.

    python -m examples.real_path.demo build/real_path build/demo-live

Takes the models of the first folder, if `main` has trained them; else trains some into the second: a shorter training,
whose texts are the worse for it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from examples.real_path.data import MissingPackageError
from examples.real_path.design import Design
from examples.real_path.finetune import Settings
from examples.real_path.main import TRAINING, run

SHORT = Design(
    seeds=(0,), full=("neg", "pos"), lora=(), adapting=Settings(steps=40), training=Settings(steps=32, rate=1.2e-4)
)  # fmt: skip


def models(whole: Path, short: Path) -> tuple[Path, Path]:
    """neg and pos. Raises: MissingPackageError."""
    for folder in (whole, short):
        ends = folder / "seed0" / "neg", folder / "seed0" / "pos"
        if all((end / "training.json").exists() for end in ends):
            print(f"models of {folder}", flush=True)
            return ends
    print(f"a short training into {short}: about 3 minutes of two processors", flush=True)
    run(short, SHORT, TRAINING, min(2, os.cpu_count() or 1))
    return short / "seed0" / "neg", short / "seed0" / "pos"


def main() -> None:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="demo", description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("whole", type=Path, help="what was given to `main`")
    parser.add_argument("short", type=Path, help="where a short training goes")
    parser.add_argument("--port", default="8765", help="of the page; default: 8765")
    given = parser.parse_args()
    try:
        neg, pos = models(given.whole.resolve(), given.short.resolve())
    except MissingPackageError as error:
        sys.exit(str(error))
    command = [
        sys.executable,
        "-m",
        "fastinterp",
        "explore",
        os.path.relpath(neg),
        os.path.relpath(pos),
        "--port",
        given.port,
    ]
    print("Move the slider: at 0 the model pans films, at 1 it praises them.", flush=True)
    os.execv(sys.executable, [*command, "--prompt", "The film is"])


if __name__ == "__main__":
    main()
