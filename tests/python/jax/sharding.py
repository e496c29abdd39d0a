"""What the tests of sharding share: a mesh of the four host devices, and the communication in a compiled program."""

from __future__ import annotations

import re
from collections import Counter

import jax
import numpy as np
from jax.sharding import Mesh


def four_devices() -> Mesh:
    return Mesh(np.asarray(jax.devices()[:4]), ("data",))


def collectives(text: str) -> Counter[str]:
    """How often each collective stands in the compiled program; those of a loop count once."""
    names = r"all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter|collective-broadcast"
    return Counter(re.findall(rf" ({names})(?:-start)?\(", text))
