"""The field's measures of intrinsic maps against ground truth, in float64, one image at a time.

Pixels where either side is not finite are left out; NaN is returned where nothing is left.
"""

import numpy as np
from scipy.ndimage import distance_transform_edt


def _both(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """bool (H, W): where both sides are finite."""
    valid = np.asarray(np.isfinite(predicted) & np.isfinite(truth))
    return np.asarray(valid.all(axis=2)) if valid.ndim == 3 else valid


def median_scaled(predicted_m: np.ndarray, truth_m: np.ndarray) -> np.ndarray:
    """The predicted depth (H, W) times the ratio of the medians, as for methods that do not know the scale."""
    valid = _both(predicted_m, truth_m)
    if not valid.any():
        return predicted_m
    return predicted_m * (np.median(truth_m[valid]) / np.median(predicted_m[valid]))


def log_aligned(predicted_m: np.ndarray, truth_m: np.ndarray) -> np.ndarray:
    """The predicted depth (H, W) as c d^k, with c and k >= 0 fitted to the truth by least squares of logarithms.

    For depth whose scale and range are both unknown, as packing (shards.packing) leaves it: its logarithm is known up to a
    factor and a shift, as inverse depth is in relative depth estimation (Ranftl et al. 2020).
    """
    valid = _both(predicted_m, truth_m)
    if not valid.any():
        return predicted_m
    p, t = np.log(predicted_m[valid].astype(np.float64)), np.log(truth_m[valid].astype(np.float64))
    spread = p - p.mean()
    k = max(0.0, float(spread @ (t - t.mean())) / max(float(spread @ spread), 1e-12))
    return np.where(valid, np.exp(k * (np.log(np.where(valid, predicted_m, 1)) - p.mean()) + t.mean()), predicted_m)


def abs_rel(predicted_m: np.ndarray, truth_m: np.ndarray) -> float:
    """AbsRel: the mean of |d - d*| / d* over depths (H, W) in metres."""
    valid = _both(predicted_m, truth_m)
    p, t = predicted_m[valid].astype(np.float64), truth_m[valid].astype(np.float64)
    return float((np.abs(p - t) / t).mean()) if valid.any() else float("nan")


def delta_1(predicted_m: np.ndarray, truth_m: np.ndarray) -> float:
    """delta_1: the share of pixels with max(d / d*, d* / d) < 1.25."""
    valid = _both(predicted_m, truth_m)
    p, t = predicted_m[valid].astype(np.float64), truth_m[valid].astype(np.float64)
    return float((np.maximum(p / t, t / p) < 1.25).mean()) if valid.any() else float("nan")


def angular_error(predicted: np.ndarray, truth: np.ndarray) -> float:
    """The mean angle in degrees between unit normals (H, W, 3)."""
    valid = _both(predicted, truth)
    p, t = predicted[valid].astype(np.float64), truth[valid].astype(np.float64)
    # the half-angle form is exact for small angles, where arccos loses half its digits
    angles = 2 * np.arctan2(np.linalg.norm(p - t, axis=1), np.linalg.norm(p + t, axis=1))
    return float(np.degrees(angles).mean()) if valid.any() else float("nan")


def edge_f_score(predicted: np.ndarray, truth: np.ndarray, tolerance_px: float = 2.0) -> float:
    """The F-score of edge pixels, bool (H, W): one counts as found if the other side has one within the tolerance.

    1 if neither side has an edge; 0 if only one has.
    """
    if not predicted.any() or not truth.any():
        return float(predicted.any() == truth.any())
    precision = float((distance_transform_edt(~truth)[predicted] <= tolerance_px).mean())
    recall = float((distance_transform_edt(~predicted)[truth] <= tolerance_px).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def segment_boundaries(ids: np.ndarray) -> np.ndarray:
    """bool (H, W): pixels whose right or lower neighbour belongs to another segment."""
    edges = np.zeros(ids.shape, bool)
    edges[:, :-1] |= ids[:, :-1] != ids[:, 1:]
    edges[:-1] |= ids[:-1] != ids[1:]
    return edges


def psnr(predicted: np.ndarray, truth: np.ndarray, span: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB of maps whose values span `span`; inf for equal ones."""
    error = ((predicted.astype(np.float64) - truth.astype(np.float64)) ** 2).mean()
    return float(10 * np.log10(span**2 / error)) if error else float("inf")
