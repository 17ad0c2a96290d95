"""Seeds that follow from numbers, so that nothing random has to be kept or agreed on."""

from __future__ import annotations

import hashlib

import numpy as np


def seed_of(*numbers: int) -> int:
    """63 bits that depend on all the numbers."""
    digest = hashlib.blake2b(np.array(numbers, np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
