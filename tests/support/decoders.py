"""Decoders for tests: C++ that is compiled here and registered by address, as those of csrc/decoders/ are by rows."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Mapping
from pathlib import Path

from fastinterp import _C
from tests.support.devices import cuda_host


def register(source: str, blocks: Mapping[str, tuple[int, int]], folder: Path) -> ctypes.CDLL:
    """Compile `source` and register its functions. They stay until the process ends, and so must what is returned.

    source  C++ that includes decoder.h: functions of linkage "C"
    blocks  function -> elements and bytes of a block
    folder  for the compiled library
    """
    (folder / "decoders.cpp").write_text(source)
    flags = ["-std=c++17", "-shared", "-fPIC", "-O2", "-ffp-contract=off", f"-I{cuda_host.CSRC}"]
    library = folder / "decoders.so"
    command = [*cuda_host._compiler(), *flags, str(folder / "decoders.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    for name, (elements, nbytes) in blocks.items():
        address = ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value
        assert address is not None
        _C.register_decoder(name, address, elements, nbytes)
    return loaded
