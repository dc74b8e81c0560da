"""Learning rates as fractions of their peak: the one cosine of all trainings."""

import math

FLOOR = 0.01
"""Where the cosine ends."""


def cosine(fraction: float) -> float:
    """From 1 at fraction 0 down to FLOOR at fraction 1."""
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * fraction))


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Linear from 1 / warmup to 1 over the first `warmup` steps, then a cosine down to FLOOR at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return cosine((step - warmup) / max(1, steps - warmup))
