"""What nvcc makes of the CUDA sources: machine code for every architecture, its report, and the code as text."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90", "100")
# As CMakeLists.txt has them for `make werror`, and a report.
FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror")
FLAGS_OF_PTXAS = ("-Xptxas=-v", "-Xptxas=-warn-spills")


def compiled(source: Path) -> tuple[Path, str]:
    """An object file for every architecture, and what the assembler reports. Kept in build/ until a source changes.

    Raises: RuntimeError, with all that nvcc said.
    """
    made, report, status = _compiled(source)
    if status:
        raise RuntimeError(report)
    return made, report


@cache
def _compiled(source: Path) -> tuple[Path, str, int]:
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    targets.append(f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
    command = ["nvcc", *FLAGS, *FLAGS_OF_PTXAS, *targets, "-c", str(source)]
    key = hashlib.sha256(repr((command, _run(["nvcc", "--version"]))).encode())
    for path in (source, *sorted([*CSRC.glob("*.h"), *(CSRC / "cuda").glob("*.h")])):
        key.update(path.read_bytes())
    folder = ROOT / "build" / "cuda_check"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{source.stem}-{key.hexdigest()[:16]}.o"
    report = made.with_suffix(".txt")
    if not report.exists():
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode:
            return made, f"{' '.join(command)}\n{done.stdout}{done.stderr}", done.returncode
        report.write_text(done.stdout + done.stderr)
    return made, report.read_text(), 0


def cuobjdump() -> str | None:
    """The tool that turns machine code into text: CUDA's, or the one in Triton's package."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(inside) if inside.exists() else None


@cache
def machine_code(made: Path, architecture: str) -> dict[str, list[str]]:
    """The instructions of each kernel in an object file, by its mangled name."""
    tool = cuobjdump()
    assert tool is not None
    text = _run([tool, "-sass", "-arch", f"sm_{architecture}", str(made)])
    kernels: dict[str, list[str]] = {}
    for part in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        kernels[name.strip()] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)", body)
    return kernels


@cache
def ptx(made: Path) -> str:
    """The portable code in an object file, of the newest architecture."""
    tool = cuobjdump()
    assert tool is not None
    return _run([tool, "-ptx", str(made)])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr
