"""Readers of files that anybody may have written, fed with damaged ones: a result, or an error of fastinterp's own.

    python -m tests.attacks.fuzz TARGET [-runs=N] [options of libFuzzer]

mutates files of one kind, guided by the branches that they reach: with atheris, which `make fuzz` installs. Inputs that
end otherwise are kept in build/fuzz/TARGET/crashes, one for each line that raised, with the traceback; those that reach
something new in build/fuzz/TARGET/corpus. tests/attacks/corpus/TARGET.zip is the part of both that the tests replay;
`python -m tests.attacks.fuzz TARGET --keep` makes it anew.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from fastinterp.errors import FastinterpError
from tests.attacks.targets import TARGETS, Target

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "fuzz"
LIMIT_S = 20  # an input that takes longer is one that hangs
LIMIT_MB = 2048
_KEPT, _KEPT_BYTES = 60, 4096  # inputs of a corpus in the tree, and the most bytes of each


def attempt(target: Target, folder: Path, data: bytes) -> FastinterpError | None:
    """Read one input. Any other exception than fastinterp's own leaves this function: it is a mistake."""
    try:
        target.read(folder, data)
    except FastinterpError as error:
        if str(error):
            return error
        raise AssertionError("an error without a message") from error
    return None


def members(path: Path) -> list[tuple[str, bytes]]:
    """Name and content of what an archive holds, if there is one."""
    if not path.exists():
        return []
    with zipfile.ZipFile(path) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def corpus(name: str) -> list[bytes]:
    """The inputs of a target that are kept in the tree."""
    return [data for _, data in members(HERE / "corpus" / f"{name}.zip")]


_WORDS = (
    b"",
    b"\0",
    b"\xff" * 8,
    b"-1",
    b"1e999",
    b"NaN",
    b'"',
    b"{",
    b"[",
    b"\\ud800",
    b"18446744073709551616",
    b"null",
)
_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**53, 2**64, 1e308, 0.5, math.inf, math.nan, "", "x", "\ud800", "../x", "a\0b", [], {},
           [0], ["x", "x"], [[]], {"": {}}, "\x1b[31m", "\u202e")  # fmt: skip


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a value with every key of it."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [pair for key in keys for pair in [(value, key), *_nodes(value[key])]]


def damaged_json(data: bytes, random: Random) -> bytes | None:
    """JSON with other values, keys or parts; None if it is none."""
    try:
        value = json.loads(data)
        nodes = _nodes(value)
    except (ValueError, RecursionError):
        return None
    if not nodes:
        return None
    for _ in range(random.randint(1, 3)):
        (holder, key), (other, place) = random.choice(nodes), random.choice(nodes)
        try:
            what = random.randint(0, 4)
            if what <= 1:
                holder[key] = random.choice(_VALUES)
            elif what == 2:
                del holder[key]
            elif what == 3:
                holder[key] = json.loads(json.dumps(other[place]))
            elif isinstance(holder, dict):
                holder[str(random.choice(_VALUES)) + random.choice((key, ""))] = holder.pop(key)
            else:
                holder.append(random.choice(_VALUES))
        except (KeyError, IndexError, RecursionError):  # of a part that is no longer there
            pass
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return None


def damaged(seeds: Sequence[bytes], random: Random) -> bytes:
    """A damaged copy of one: bytes changed, removed, repeated, or replaced by some of another; or parts of JSON."""
    chosen = random.choice(seeds)
    if random.randint(0, 1) and (found := damaged_json(chosen, random)):
        return found
    data = bytearray(chosen)
    for _ in range(random.randint(1, 4)):
        at = random.randint(0, len(data))
        to = min(len(data), at + random.choice((1, 1, 2, 4, 8, 30)))
        other = random.choice(seeds)
        start = random.randint(0, len(other))
        changes = (
            random.randbytes(to - at),
            random.choice(_WORDS),
            b"",
            bytes(data[at:to]) * 2,
            other[start : start + 40],
        )
        data[at:to] = random.choice(changes)
    return bytes(data)


def fuzz(name: str, options: Sequence[str]) -> None:
    """Never returns: libFuzzer ends the process. The library is instrumented, so it may not be loaded before."""
    import atheris

    with atheris.instrument_imports(include=["fastinterp"]):
        import fastinterp.api
        import fastinterp.checkpoint.gguf_model
        import fastinterp.checkpoint.lora
        import fastinterp.checkpoint.pytorch.file
        import fastinterp.inspect.check
        import fastinterp.inspect.describe
        import fastinterp.inspect.explain
        import fastinterp.paths.report
        import fastinterp.tokenizer.files  # noqa: F401
    target = TARGETS[name]
    place = BUILD / name
    for part in ("corpus", "crashes"):
        (place / part).mkdir(parents=True, exist_ok=True)
    for number, data in enumerate([*target.seeds, *corpus(name)]):
        (place / "corpus" / f"seed-{number}").write_bytes(data)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:

        def one_input(data: bytes) -> None:
            try:
                attempt(target, Path(folder), data)
            except Exception as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                crash = place / "crashes" / f"{type(error).__name__}-{Path(frame.filename).stem}-{frame.lineno}"
                if not crash.exists():
                    crash.write_bytes(data)
                    crash.with_suffix(".txt").write_text(traceback.format_exc())

        def mutated(data: bytes, most: int, seed: int) -> bytes:
            random = Random(seed)
            found = damaged_json(data, random) if random.randint(0, 1) else None
            return found if found and len(found) <= most else atheris.Mutate(data, most)

        limits = [
            f"-timeout={LIMIT_S}",
            f"-rss_limit_mb={LIMIT_MB}",
            f"-artifact_prefix={place}/crashes/",
            "-max_len=8192",
        ]
        arguments = [sys.argv[0], *limits, "-print_final_stats=1", *options, str(place / "corpus")]
        atheris.Setup(arguments, one_input, custom_mutator=mutated)
        atheris.Fuzz()


def keep(name: str) -> None:
    """Make the corpus of the tree: some of the inputs that reached something new, of all lengths, and all crashes."""
    place, kept = BUILD / name, HERE / "corpus" / f"{name}.zip"
    before = [data for member, data in members(kept) if member.startswith("crash")]
    crashes = [path.read_bytes() for path in sorted((place / "crashes").glob("*")) if path.suffix != ".txt"]
    found = sorted((path.read_bytes() for path in (place / "corpus").iterdir()), key=lambda data: (len(data), data))
    found = [data for data in found if len(data) <= _KEPT_BYTES]
    found = found[:: max(1, -(-len(found) // _KEPT))]
    kept.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(kept, "w") as archive:
        for number, data in enumerate(dict.fromkeys([*before, *crashes])):
            archive.writestr(zipfile.ZipInfo(f"crash-{number:03d}"), data, zipfile.ZIP_DEFLATED)
        for number, data in enumerate(found):
            archive.writestr(zipfile.ZipInfo(f"{number:03d}"), data, zipfile.ZIP_DEFLATED)
    print(f"{name}: {len(found)} inputs, {kept.stat().st_size:,} bytes")


if __name__ == "__main__":
    if sys.argv[2:] == ["--keep"]:
        keep(sys.argv[1])
    else:
        fuzz(sys.argv[1], sys.argv[2:])
