"""What a rewrite may do to the numbers; verification picks its tolerance from it."""

from __future__ import annotations

import enum


class Numerics(enum.IntEnum):
    """Ordered by how much may change, so that the class of a whole run is the `max` of its parts."""

    EXACT = 0
    """Bit-equal outputs for every input, signed zeros and non-finite values included."""

    REORDERED = 1
    """The same real-valued function; floating-point operations are reassociated or fused."""

    LOSSY = 2
    """An approximation under an error budget: pruning, quantisation, casting."""
