"""Randomness as a function: every draw depends on (seed, purpose, index) alone, never on earlier draws.

No generator state is kept anywhere, so a resumed run, another number of loader workers, or drawing
10,000 samples first and 50,000 later gives the same numbers.
"""

import hashlib

import numpy as np


def derive(seed: int, purpose: str, *index: int) -> int:
    """A 63-bit integer that depends on its arguments alone; different arguments give unrelated values."""
    digest = hashlib.sha256(repr((seed, purpose, *index)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """A fresh NumPy generator for (seed, purpose, index)."""
    return np.random.Generator(np.random.PCG64(derive(seed, purpose, *index)))
