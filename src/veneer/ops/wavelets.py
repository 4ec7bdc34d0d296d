"""Orthogonal wavelets: the filters of Daubechies' family, and one level of the inverse transform in two dimensions."""

from __future__ import annotations

import math
import re
from functools import cache

import numpy as np
import torch
from torch import Tensor

BUILT_IN = 20
"""Daubechies wavelets up to this order are computed here; beyond it, their polynomial's roots lose too many digits."""


@cache
def filters(family: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The synthesis filters (low, high) of a wavelet, each of even length, with unit norm.

    ``haar`` and ``db1`` to ``db20`` are computed; other orthogonal families come from PyWavelets where it is installed.

    Raises:
        ValueError: a name that is no orthogonal wavelet, or one that is not built in while PyWavelets is missing.
    """
    family = "db1" if family == "haar" else family
    found = re.fullmatch(r"db([1-9]\d*)", family)
    if found and int(found[1]) <= BUILT_IN:
        return _pair(daubechies(int(found[1])))
    try:
        import pywt  # type: ignore[import-untyped]
    except ImportError:
        raise ValueError(
            f"The wavelet '{family}' is not built in; use haar or db1 to db{BUILT_IN}, or install PyWavelets."
        ) from None
    if family not in pywt.wavelist(kind="discrete") or not pywt.Wavelet(family).orthogonal:
        raise ValueError(
            f"'{family}' names no orthogonal wavelet; known are db1 to db38, sym2 to sym20, coif1 to coif17."
        )
    return _pair(pywt.Wavelet(family).rec_lo)


def _pair(low: list[float]) -> Pair:
    high = [(-1) ** k * value for k, value in enumerate(reversed(low))]
    return tuple(low), tuple(high)


def daubechies(order: int) -> list[float]:
    """The 2 order low-pass coefficients with ``order`` vanishing moments, of least delay.

    |H|^2 = cos^{2n}(w/2) P(sin^2(w/2)) with P(y) = sum_k C(n-1+k, k) y^k; H takes, of each pair of roots z and 1/z
    with y = (2 - z - 1/z) / 4, the one inside the unit circle (Daubechies, 1988).
    """
    n = order
    y = np.roots([float(math.comb(n - 1 + k, k)) for k in reversed(range(n))]) if n > 1 else np.array([])
    half = 1 - 2 * y.astype(complex)
    z = half + np.sqrt(half * half - 1)
    z = np.where(abs(z) < 1, z, 1 / z)
    h = np.array([1.0])
    for root in [*[-1.0] * n, *z]:
        h = np.convolve(h, [1.0, -root])
    return [float(c) for c in math.sqrt(2) * np.real(h / h.sum())]


Pair = tuple[tuple[float, ...], tuple[float, ...]]
"""The synthesis filters: low and high pass."""


def inverse(quadrants: Tensor, pair: Pair) -> Tensor:
    """One level of the inverse transform along both axes.

    Args:
        quadrants: (2 m, 2 n): averages top left, details along the rows' axis beside them, along the columns' below.
        pair: of length L.

    Returns:
        (2 m - L + 2, 2 n - L + 2).
    """
    (a, v), (h, d) = (half.chunk(2, 1) for half in quadrants.chunk(2, 0))
    return _synthesised(_synthesised(torch.cat([torch.cat([a, h], 1), torch.cat([v, d], 1)]), pair).mT, pair).mT


def _synthesised(t: Tensor, pair: Pair) -> Tensor:
    """Along the first axis: (2 n, N) with averages first -> (2 n - L + 2, N)."""
    halves, length = t.chunk(2, 0), len(pair[0])
    m = len(halves[0]) - length // 2 + 1
    phases = []
    for first in (0, 1):  # even and odd places
        shifts = [(k, (length - 2 - k + first) // 2) for k in range(first, length, 2)]
        phases.append(_sum([(row[k], half[s : s + m]) for row, half in zip(pair, halves) for k, s in shifts]))
    return torch.stack(phases, 1).flatten(0, 1)


def analysed(t: Tensor, pair: Pair) -> Tensor:
    """The adjoint of the synthesis along the first axis, of which an odd length is made even.

    Args:
        t: (k, N).
        pair: of length L.

    Returns:
        (k + L - 2, N), averages first.
    """
    length = len(pair[0])
    padded = torch.nn.functional.pad(t, (0, 0, length - 2, length - 2 + len(t) % 2))
    n = (len(padded) - length) // 2 + 1
    return torch.cat([_sum([(row[k], padded[k : k + 2 * n - 1 : 2]) for k in range(length)]) for row in pair])


def _sum(terms: list[tuple[float, Tensor]]) -> Tensor:
    (weight, t), *rest = terms
    total = t * weight
    for weight, t in rest:
        total = torch.add(total, t, alpha=weight)
    return total


def crossed(rows: Tensor, columns: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Where ``inverse`` reads the entries of its (height, width) quadrants: those off the diagonal change places."""
    m, n = height // 2, width // 2
    return columns // n * m + rows % m, rows // m * n + columns % n
