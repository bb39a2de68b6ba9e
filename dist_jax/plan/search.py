"""The largest batch that fits, in few compilations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Trial:
    """What was learnt of one size.

    Attributes:
      size: clips per chip.
      fits: whether the compiler found room.
      needed: bytes; None where the compiler did not say.
    """

    size: int
    fits: bool
    needed: float | None


def largest_fitting(
    attempt: Callable[[int], Trial],
    first: int,
    limit: float,
    *,
    granule: int = 1,
    tolerance: float = 0.06,
    most: int = 8,
) -> list[Trial]:
    """Tries sizes until the largest that fits and the smallest that does not are close.

    Memory grows about linearly with the batch, so a line through two trials tells where to look.

    Args:
      attempt: compiles for a number of clips per chip.
      first: where to start.
      limit: bytes that are allowed.
      granule: sizes are multiples of it.
      tolerance: gap that is accepted, as a share of the size that fits.
      most: trials at most.

    Returns:
      The trials in order.
    """
    trials: list[Trial] = []
    size = max(granule, first // granule * granule)
    while len(trials) < most:
        trials.append(attempt(size))
        fitting = max((t.size for t in trials if t.fits), default=0)
        failing = min((t.size for t in trials if not t.fits), default=math.inf)
        if failing - fitting <= max(granule, tolerance * fitting):
            break
        guess = _guess(trials, limit)
        if guess is None:
            guess = 2 * size if math.isinf(failing) else (fitting + failing) / 2
        # A little below the line, and strictly between what is known.
        low, high = fitting + granule, failing - granule
        size = int(min(max(guess // granule * granule, low), high))
    return trials


def _guess(trials: list[Trial], limit: float) -> float | None:
    """Where a line through the two trials nearest to the limit meets it."""
    known = sorted((t for t in trials if t.needed is not None), key=lambda t: abs(t.needed - limit))
    if len(known) == 1:
        return known[0].size * limit / max(known[0].needed, 1.0)
    if len(known) < 2 or known[0].needed == known[1].needed:
        return None
    a, b = known[:2]
    slope = (b.needed - a.needed) / (b.size - a.size)
    if slope <= 0:
        return None
    return a.size + (limit - a.needed) / slope


def best(trials: list[Trial]) -> int | None:
    """The largest size that fitted; None if none did."""
    return max((t.size for t in trials if t.fits), default=None)
