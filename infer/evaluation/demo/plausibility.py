"""Physical plausibility of a picture, as far as the detector can tell it honestly. Each check is yes or no for an image.

    rests     every object stands on the floor or on a flat top, or is hidden below by something nearer; none ends on the
              wall, in the sky, or on what carries nothing
    order     of two things on the floor, the one whose foot is lower in the picture is nearer: by the depth that goes with
              the picture (co-generated where there is one, the detector's own otherwise)
    single    nothing is there twice: every object of a plain scene has a colour of its own (of those that look like one)
    whole     every object looks like one shape (a melted one looks like two)

Not measured: shadows. A detector that only ever saw right shadows explains wrong ones away, and a rule on brightness
confuses them with dark floors. What a check says of real renderings, which pass by construction, is its own error.
"""

from collections.abc import Sequence

import numpy as np

from extract.world.vocabulary import SMALL_ENOUGH, SUPPORTS
from infer.evaluation.demo.layout import Found, holds, joined
from infer.evaluation.demo.pixel_net import PLACES, Seen

CHECKS = ("rests", "order", "single", "whole")

SURE = 0.5
"""Mean probability of an object's shape above which it looks like one."""
FOOT = 0.06
"""Feet further apart than this share of the picture's height tell which of two things is nearer."""
NEARER = 1.05
"""Ratio of depths that may still be the wrong way round, for errors of depth."""
BENEATH_PX = 2


def plausibility(seen: Seen, found: Sequence[Found], depth_m: np.ndarray | None = None) -> dict[str, float]:
    """CHECKS of one picture, 1 or 0; NaN where there is nothing to check. depth_m: (h, w) at the detector's size."""
    depth = seen.depth_m if depth_m is None else depth_m
    found = joined(found)
    low = [one for one in found if not any(holds("on top of", one, other) for other in found if other is not one)]
    pairs = [_ordered(a, b, depth) for i, a in enumerate(low) for b in low[i + 1 :]]
    known = [fits for fits in pairs if fits is not None]
    colours = [one.colour for one in found if one.sure > SURE]
    return {
        "rests": _share(all(_rests(one, found, seen) for one in found), bool(found)),
        "order": _share(all(known), bool(known)),
        "single": _share(len(set(colours)) == len(colours), bool(found)),
        "whole": _share(all(one.sure > SURE for one in found), bool(found)),
    }


def _share(passed: bool, checked: bool) -> float:
    return float(passed) if checked else float("nan")


def _rests(one: Found, found: Sequence[Found], seen: Seen) -> bool:
    """Whether what lies directly under the object's lowest parts can carry it, or hides it."""
    height = one.mask.shape[0]
    columns = np.flatnonzero(one.mask.any(axis=0))
    lowest = height - 1 - one.mask[::-1].argmax(axis=0)[columns]
    feet = lowest >= lowest.max() - max(1, round(0.1 * height))
    rows, columns = lowest[feet] + BENEATH_PX, columns[feet]
    inside = rows < height
    if not inside.all():
        return True  # it goes on below the picture
    places = seen.shape[: len(PLACES), rows, columns]
    votes = {place: float(places[i].sum()) for i, place in enumerate(PLACES)}
    others = [(float(other.mask[rows, columns].sum()), other) for other in found if other is not one]
    most, other = max(others, key=lambda pair: pair[0], default=(0.0, None))
    if other is None or most <= max(votes.values()):
        return votes["floor"] >= max(votes.values())
    carries = other.shape in SUPPORTS and one.shape in SMALL_ENOUGH and holds("on top of", one, other)
    return carries or other.depth_m < one.depth_m


def _ordered(a: Found, b: Found, depth_m: np.ndarray) -> bool | None:
    """Whether the depths of two things fit their feet; None where the feet do not tell."""
    if abs(a.bottom - b.bottom) < FOOT:
        return None
    near, far = (a, b) if a.bottom > b.bottom else (b, a)
    return float(np.median(depth_m[near.mask])) < NEARER * float(np.median(depth_m[far.mask]))
