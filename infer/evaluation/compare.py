"""Means with bootstrap confidence intervals over captions, and paired differences from a method that they are held against.

Captions are what is drawn again, with all their seeds: two images of one caption are not independent.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES, LEVEL = 2000, 0.95


@dataclass(frozen=True)
class Estimate:
    """A value and the bounds of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def draws(captions: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """int32 (resamples, captions): how often each caption is in each resample."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(captions, np.full(captions, 1 / captions), size=resamples).astype(np.int32)


def by_caption(values: np.ndarray, caption: np.ndarray, captions: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums and numbers of the finite values (N,) of each caption, float64 (captions,). caption: int (N,), 0..captions-1."""
    finite = np.isfinite(values)
    sums = np.bincount(caption[finite], values[finite].astype(np.float64), captions)
    return sums, np.bincount(caption[finite], minlength=captions).astype(np.float64)


def mean(values: np.ndarray, caption: np.ndarray, drawn: np.ndarray) -> Estimate:
    """The mean of the finite values (N,). drawn: what draws() gives. NaN where there is none."""
    sums, counts = by_caption(values, caption, drawn.shape[1])
    return _interval(_ratio(sums.sum(), counts.sum()), _ratio(drawn @ sums, drawn @ counts))


def difference(
    values: np.ndarray, caption: np.ndarray, others: np.ndarray, of_others: np.ndarray, drawn: np.ndarray
) -> Estimate:
    """mean(values) - mean(others), both over the same drawn captions (paired)."""
    sums, counts = by_caption(values, caption, drawn.shape[1])
    sums_other, counts_other = by_caption(others, of_others, drawn.shape[1])
    value = _ratio(sums.sum(), counts.sum()) - _ratio(sums_other.sum(), counts_other.sum())
    resampled = _ratio(drawn @ sums, drawn @ counts) - _ratio(drawn @ sums_other, drawn @ counts_other)
    return _interval(value, resampled)


def of_sets(measure: Callable[[np.ndarray], float], caption: np.ndarray, drawn: np.ndarray) -> Estimate:
    """A measure of a whole set of images, given the weight of each image (N,): FID, CMMD.

    Images that are drawn twice make a set look farther from another than it is, so the resamples give the interval's
    width, moved to have the value as their mean.
    """
    resampled = np.array([measure(row[caption].astype(np.float64)) for row in drawn])
    value = measure(np.ones(len(caption)))
    return _interval(value, resampled - resampled.mean() + value)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=np.asarray(b) > 0)


def _interval(value: np.ndarray | float, resampled: np.ndarray) -> Estimate:
    kept = resampled[np.isfinite(resampled)]
    if not len(kept):
        return Estimate(float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))
