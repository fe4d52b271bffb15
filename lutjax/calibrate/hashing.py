"""Fingerprints of arrays, so that results on disk are not taken for those of other weights."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np


def content_hash(tree: Any) -> str:
    """SHA-256 of the shapes, dtypes and bytes of all arrays in a pytree.

    >>> content_hash(np.zeros(2)) == content_hash(np.zeros(2))
    True
    >>> content_hash(np.zeros(2)) == content_hash(np.ones(2))
    False
    """
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
