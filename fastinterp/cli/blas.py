"""How many threads numpy's BLAS uses: one, for results that do not depend on their number."""

from __future__ import annotations

import os
import sys

# By which BLAS libraries are told how many threads to use, before numpy is imported.
_BLAS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def one_blas_thread() -> None:
    """Let numpy's BLAS use one thread per call, as long as numpy is not imported: results do not depend on their
    number then, and blocks of a matrix are multiplied by threads of this program.
    """
    if "numpy" not in sys.modules:
        os.environ.update(dict.fromkeys(_BLAS, "1"))
