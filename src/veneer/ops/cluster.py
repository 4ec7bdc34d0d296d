"""k-means with a fixed start, so that the same points always fall into the same clusters."""

from __future__ import annotations

import numpy as np

SEED = 123456789
"""Of the draw of the first centres."""


def kmeans(points: np.ndarray, k: int, most: int = 300, tolerance: float = 1e-4) -> np.ndarray:
    """Lloyd's algorithm from k points drawn without replacement.

    Args:
        points: (n, d).
        k: how many clusters, at most n.
        most: iterations.
        tolerance: stop when the centres move less than this share of the points' variance.

    Returns:
        (n,), each point's cluster.
    """
    n = len(points)
    points = points.astype(np.float64)
    points = points - points.mean(0)
    enough = tolerance * points.var(0).mean()
    start = np.random.RandomState(SEED).choice(n, size=k, replace=False, p=np.full(n, 1 / n))
    centres, before = points[start], None
    for _ in range(most):
        nearest = _nearest(points, centres)
        if before is not None and (nearest == before).all():
            break
        new, before = _means(points, nearest, centres), nearest
        moved, centres = ((new - centres) ** 2).sum(), new
        if moved <= enough:
            break
    return _nearest(points, centres)


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return ((centres**2).sum(1) - 2 * points @ centres.T).argmin(1)


def _means(points: np.ndarray, nearest: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The clusters' means; an empty cluster moves to the point that is farthest from its own centre."""
    out = centres.copy()
    far = np.argsort(((points - centres[nearest]) ** 2).sum(-1))[::-1]
    taken = 0
    for c in range(len(centres)):
        own = points[nearest == c]
        if len(own):
            out[c] = own.mean(0)
        else:
            out[c], taken = points[far[taken]], taken + 1
    return out
