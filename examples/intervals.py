"""Wilson's interval: how sure a measured share is."""

from __future__ import annotations

import math


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval that holds the true share with 95 % (Wilson, "Probable Inference, the Law of
    Succession, and Statistical Inference", 1927); it stays within 0 and 1, also for few or no hits.
    """
    if not 0 <= hits <= count or not count:
        raise ValueError(f"wilson({hits}, {count}): hits out of at least one trial.")
    share, spread = hits / count, z * z / count
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    # Exact at both ends, where rounding would leave the share itself outside.
    low = (middle - half) / (1 + spread) if hits else 0.0
    high = (middle + half) / (1 + spread) if hits < count else 1.0
    return low, high
