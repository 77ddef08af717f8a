"""The dtypes of numpy, with those of ml_dtypes, that are the storage dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from fastinterp.ops.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, F64

NUMPY = {
    F64: np.dtype(np.float64),
    F32: np.dtype(np.float32),
    F16: np.dtype(np.float16),
    BF16: np.dtype(ml_dtypes.bfloat16),
    F8_E4M3: np.dtype(ml_dtypes.float8_e4m3fn),
    F8_E5M2: np.dtype(ml_dtypes.float8_e5m2),
}
