"""What is known of arrays while a program is traced."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def concrete(array: Any) -> np.ndarray | None:
    """The values of an array, or None while it is traced and has none yet."""
    try:
        return np.asarray(array)
    except jax.errors.TracerArrayConversionError:
        return None
