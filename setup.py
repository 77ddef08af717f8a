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
    """Lets CMake make the one extension module, where setuptools wants it: a wheel's folder or the source tree."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            *(tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]
        # Compiler, flags and paths are looked up anew each time: they change, and those of an isolated build are gone
        # after it. Not by --fresh, which would drop the compiled objects too.
        for stale in (build / "CMakeCache.txt", *build.glob("CMakeFiles/*/CMakeCXXCompiler.cmake")):
            stale.unlink(missing_ok=True)
        for command in (configure, [tool("cmake"), "--build", str(build)]):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                raise ExecError(f"exit status {error.returncode} of: {' '.join(command)}") from error
        if not target.exists():
            raise ExecError(f"CMake finished, but made no {target}")


setup(ext_modules=[Extension("fastinterp._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
