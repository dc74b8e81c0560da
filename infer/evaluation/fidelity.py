"""How close a set of images is to another one, on feature vectors: FID and CMMD, in float64.

    FID    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))                     (Heusel et al., 2017)
    CMMD   1000 (mean k(a, a') + mean k(b, b') - 2 mean k(a, b)),  k(x, y) = exp(-|x - y|^2 / (2 * 10^2))
                                                                                        (Jayasumana et al., 2024)

Both take weights (how often each row counts), so that a bootstrap draws rows without copying them. CMMD is the biased
estimator over all pairs, as in its paper: 0 for equal sets. Its sigma of 10 is for features of unit length (CLIP); for
the demo detector's features both measures work on `standardised` ones, in which sigma = 10 is about the distance of two
images.
"""

from dataclasses import dataclass

import numpy as np

SIGMA, SCALE = 10.0, 1000.0  # of the CMMD paper


@dataclass(frozen=True)
class Standard:
    """Mean and deviation of each feature over a reference set, float64 (F,)."""

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, reference: np.ndarray) -> "Standard":
        """From features (N, F)."""
        x = reference.astype(np.float64)
        return cls(x.mean(axis=0), np.maximum(x.std(axis=0), 1e-6))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features (N, F) in units of the reference's deviations, float64."""
        return (features.astype(np.float64) - self.mean) / self.deviation


def fid(
    a: np.ndarray, b: np.ndarray, weights_a: np.ndarray | None = None, weights_b: np.ndarray | None = None
) -> float:
    """The Frechet distance of the Gaussians of features a (N, F) and b (M, F). weights: (N,) and (M,), >= 0."""
    mean_a, cov_a = _moments(a, weights_a)
    mean_b, cov_b = _moments(b, weights_b)
    # tr (A B)^(1/2) = sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def _moments(x: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean (F,) and unbiased covariance (F, F)."""
    x = x.astype(np.float64)
    w = np.ones(len(x)) if weights is None else weights.astype(np.float64)
    mean = w @ x / w.sum()
    centred = x - mean
    return mean, (centred * w[:, None]).T @ centred / (w.sum() - 1)


@dataclass(frozen=True)
class Kernels:
    """The kernel values among two sets: aa (N, N), ab (N, M), and the mean of those of b among themselves."""

    aa: np.ndarray
    ab: np.ndarray
    bb_mean: float

    def cmmd(self, weights: np.ndarray | None = None) -> float:
        """CMMD of the two sets. weights: (N,) of the rows of a."""
        w = np.ones(len(self.aa)) if weights is None else weights.astype(np.float64)
        w = w / w.sum()
        return float(SCALE * (w @ self.aa @ w + self.bb_mean - 2 * (w @ self.ab.mean(axis=1))))


def kernels(a: np.ndarray, b: np.ndarray, sigma: float = SIGMA) -> Kernels:
    """The Gaussian kernel among features a (N, F) and b (M, F)."""
    return Kernels(_kernel(a, a, sigma), _kernel(a, b, sigma), float(_kernel(b, b, sigma).mean()))


def cmmd(a: np.ndarray, b: np.ndarray, sigma: float = SIGMA) -> float:
    """CMMD of features a (N, F) and b (M, F)."""
    return kernels(a, b, sigma).cmmd()


def _kernel(x: np.ndarray, y: np.ndarray, sigma: float) -> np.ndarray:
    x, y = x.astype(np.float64), y.astype(np.float64)
    squared = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None] - 2 * x @ y.T
    return np.asarray(np.exp(-np.maximum(squared, 0) / (2 * sigma**2)))
