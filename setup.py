"""Builds the extension module with CMake and Ninja. Everything else about the package stands in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """The path of a build tool: this environment's own, even where it is not activated, else the one on PATH."""
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=places)
    if found is None:
        raise ExecError(f"{name} is needed to build fastinterp, and was not found: python -m pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Lets CMake make the extension modules, where setuptools wants them: a wheel's folder or the source tree.

    They come of one build. fastinterp._cuda is made where there is a CUDA compiler; the environment's FASTINTERP_CUDA
    says otherwise by 0, and by 1 that it is an error if there is none. FASTINTERP_CUDA_ARCHITECTURES=80,90 builds it
    for these compute capabilities alone; FASTINTERP_WERROR=1 takes warnings as errors.
    """

    def build_extension(self, ext: Extension) -> None:
        if ext.name != "fastinterp._C":
            return
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            *(tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DFASTINTERP_CUDA={os.environ.get('FASTINTERP_CUDA', 'auto')}",
            f"-DFASTINTERP_WERROR={os.environ.get('FASTINTERP_WERROR', '0')}",
            f"-DFASTINTERP_CUDA_ARCHITECTURES={os.environ.get('FASTINTERP_CUDA_ARCHITECTURES', '')}",
        ]
        # Compiler, flags and paths are looked up anew each time: they change, and those of an isolated build are gone
        # after it. Not by --fresh, which would drop the compiled objects too.
        for stale in (build / "CMakeCache.txt", *build.glob("CMakeFiles/*/CMake*Compiler.cmake")):
            stale.unlink(missing_ok=True)
        _remove_cuda(target.parent)
        for command in (configure, [tool("cmake"), "--build", str(build)]):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                raise ExecError(f"exit status {error.returncode} of: {' '.join(command)}") from error
        if not target.exists():
            raise ExecError(f"CMake finished, but made no {target}")

    def copy_extensions_to_source(self) -> None:
        _remove_cuda(ROOT / "fastinterp")
        super().copy_extensions_to_source()


def _remove_cuda(folder: Path) -> None:
    """Remove a former fastinterp._cuda: this build may be one without it."""
    for former in folder.glob("_cuda.*.so"):
        former.unlink()


setup(
    ext_modules=[Extension("fastinterp._C", sources=[]), Extension("fastinterp._cuda", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
