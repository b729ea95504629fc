"""What tests need of numpy that the oldest accepted one lacks."""

from __future__ import annotations

import numpy as np
import pytest

versioned_dlpack = pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.1.0",
    reason="numpy before 2.1 has no DLPack that says whether memory is read-only",
)
