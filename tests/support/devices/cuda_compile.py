"""What nvcc makes of the CUDA sources: machine code for every architecture, its report, and the code as text."""

from __future__ import annotations

import os
import re
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tests.support import build_cache

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
HEADERS = sorted(CSRC.rglob("*.h"))
# Each takes minutes: `make cuda-check` names all that the build knows.
ARCHITECTURES = tuple(os.environ.get("FASTINTERP_CUDA_ARCHITECTURES", "90").split(","))
# As CMakeLists.txt has them for `make werror`, and a report.
FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror")
FLAGS_OF_PTXAS = ("-Xptxas=-v", "-Xptxas=-warn-spills")


@cache
def compiled(source: Path) -> tuple[Path, str]:
    """An object file for every architecture, and what the assembler reports.

    Raises: RuntimeError, with all that nvcc said.
    """
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    targets.append(f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
    flags = [*FLAGS, *FLAGS_OF_PTXAS, *targets]
    key = build_cache.key(["nvcc"], flags, [source, *HEADERS])
    target = build_cache.BUILD / "cuda_check" / f"{source.stem}-{key}.o"

    def compile_to(report: Path) -> None:
        report.write_text(build_cache.run(["nvcc", *flags, "-c", str(source), "-o", str(target)]))

    report = build_cache.made(target.with_suffix(".txt"), compile_to)
    return target, report.read_text()


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
    text = build_cache.run([tool, "-sass", "-arch", f"sm_{architecture}", str(made)])
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
    return build_cache.run([tool, "-ptx", str(made)])
