"""Tries a wheel as a user gets it: `python -m release.try_wheel WHEEL VENV`. Prints its size, or what is wrong with it.

The contents first; then it is installed in the new environment VENV, from wheels alone, and the demo runs there, which
checks every value of four merges with numpy: with no compiler on PATH, without torch, outside of the source tree.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
LICENCES = ("LICENSE", "NOTICE", "csrc/third_party/LICENSE")
MOST_BYTES = 4_000_000  # of a wheel: what is larger has something in it that it should not


def wrong(wheel: Path, root: Path = ROOT) -> list[str]:
    """What is wrong with the contents of a wheel, which the source tree `root` made."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        licences = [name for name in names if ".dist-info/licenses/" in name]
        texts = {archive.read(name) for name in licences}
        native = {name: archive.read(name) for name in names if re.search(r"\.so(\.|$)", name)}
    needed = [file for file in LICENCES if (root / file).exists()]
    found = [f"the licence {file} is not in it" for file in needed if (root / file).read_bytes() not in texts]
    for name in names:
        if name.endswith("/"):
            continue
        top = PurePosixPath(name).parts[0]
        if top != "fastinterp" and not re.fullmatch(r"fastinterp(-[\d.]+\.dist-info|\.libs)", top):
            found.append(f"{name} is neither the package nor its metadata")
        elif not re.search(r"\.(py|pyi|typed|html|css|js|svg)$|\.so(\.|$)", name) and ".dist-info/" not in name:
            found.append(f"{name} is no file of a package")
    if [name for name in native if "/_C." in name] != [name for name in native if name.startswith("fastinterp/")]:
        found.append(f"native code is the extension _C alone, not {', '.join(native)}")
    for name, content in native.items():
        if b"\0.symtab\0" in content or b"\0.debug_info\0" in content:
            found.append(f"{name} is not stripped")
    if not native:
        found.append("it has no native code")
    if wheel.stat().st_size > MOST_BYTES:
        found.append(f"it has {wheel.stat().st_size:,} bytes, and {MOST_BYTES:,} are expected at most")
    return found


def install_and_run(wheel: Path, folder: Path) -> None:
    """Raises: subprocess.CalledProcessError, if a command fails; SystemExit, if torch or a compiler is found."""
    venv.create(folder, clear=True, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--only-binary", ":all:"]
    subprocess.run([*pip, str(wheel)], check=True)
    env = {
        "PATH": str(folder / "bin"),
        "HOME": str(folder),
        "TMPDIR": os.environ.get("TMPDIR", "/tmp"),
        "LANG": "C.UTF-8",
    }
    probe = (
        "import importlib.util, shutil, sys\n"
        "found = [x for x in ('torch', 'safetensors', 'pybind11') if importlib.util.find_spec(x)]\n"
        "found += filter(None, map(shutil.which, ('cc', 'c++', 'gcc', 'g++', 'clang', 'cmake')))\n"
        "import fastinterp, fastinterp._C\n"
        "found += [] if fastinterp.__file__.startswith(sys.prefix) else [fastinterp.__file__]\n"
        "sys.exit(f'not expected here: {found}' if found else 0)"
    )
    commands: tuple[list[str | Path], ...] = (
        [python, "-c", probe],
        [folder / "bin" / "fastinterp", "--version"],
        [folder / "bin" / "fastinterp", "doctor"],
        [python, ROOT / "examples" / "demo.py", "--tiny"],
    )
    for command in commands:
        done = subprocess.run(command, cwd=folder, env=env, check=False, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout + done.stderr, file=sys.stderr)
            done.check_returncode()


def main() -> None:
    """Try the wheel that the command line names."""
    wheel, folder = Path(sys.argv[1]), Path(sys.argv[2])
    if found := wrong(wheel):
        sys.exit("\n".join(f"{wheel.name}: {what}" for what in found))
    install_and_run(wheel.resolve(), folder.resolve())
    with zipfile.ZipFile(wheel) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, {unpacked:,} installed; ran without compiler or torch")


if __name__ == "__main__":
    main()
