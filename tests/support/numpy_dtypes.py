"""The dtypes of numpy, with those of ml_dtypes, that are the storage dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from fastinterp.ops.dtypes import MERGING

NUMPY = {d: np.dtype(d.library_name if d.in_numpy else getattr(ml_dtypes, d.library_name)) for d in MERGING}
