"""The Fréchet distance between two sets of features."""

from __future__ import annotations

import numpy as np


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Squared Fréchet (2-Wasserstein) distance between Gaussians fitted to two sets.

    `‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2 (Σ_a^½ Σ_b Σ_a^½)^½)`, all in float64 by symmetric
    eigenvalues: no square root of an asymmetric product, so nothing turns complex.

    Args:
        features_a: [n, F] with n >= 2.
        features_b: [m, F] with m >= 2.

    Returns:
        The distance, >= 0.

    Raises:
        ValueError: other shapes.

    Example:
        >>> import numpy as np
        >>> points = np.array([[0.0], [2.0]])
        >>> round(frechet_distance(points, points + 3.0), 6)
        9.0

    Source: Dowson and Landau 1982; as a metric of generated images, arXiv 1706.08500.
    """
    a, b = (np.asarray(f, dtype=np.float64) for f in (features_a, features_b))
    for name, f in (("features_a", a), ("features_b", b)):
        if f.ndim != 2 or len(f) < 2 or f.shape[1] != a.shape[-1]:
            raise ValueError(f"{name}: got shape {f.shape}, needs [n >= 2, F], one F for both")
    return gaussian_frechet_distance(a.mean(0), _covariance(a), b.mean(0), _covariance(b))


def gaussian_frechet_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """`frechet_distance` from means [F] and covariances [F, F]."""
    values, vectors = np.linalg.eigh(covariance_a)
    # Rounding leaves eigenvalues of a singular covariance at -1e-17; they are zero.
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ covariance_b @ root)
    trace = np.trace(covariance_a) + np.trace(covariance_b)
    trace -= 2.0 * np.sqrt(np.clip(cross, 0.0, None)).sum()
    return float(max(np.square(mean_a - mean_b).sum() + trace, 0.0))


def _covariance(features: np.ndarray) -> np.ndarray:
    return np.atleast_2d(np.cov(features, rowvar=False))
