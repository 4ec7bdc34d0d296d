"""Statistics of rows that arrive in batches: the leading directions of their covariance, and the covariance itself."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.factor import top_svd


class RunningSvd:
    """The leading right singular vectors of all rows seen so far, about their running mean (Ross et al., 2008).

    Each batch X (n, k) is joined with what was kept of the N rows before it: the singular vectors times their values,
    and one row sqrt(N n / (N + n)) (mean_before - mean_X) for the shift of the mean. Twice as many vectors are kept as
    are asked for, so that little of what is cut off now would have mattered later.

    Attributes:
        directions: (components, k), orthonormal rows, by falling variance.
        variance: (components,), of each direction.
        ratio: (components,), its share in the variance of the rows.
    """

    def __init__(self, components: int):
        self.components = components
        self.count = 0
        self.mean: Tensor | None = None
        self.kept: Tensor | None = None
        self.squares = 0.0
        self.directions: Tensor | None = None
        self.turned = 1.0
        """The smallest |cosine| between a direction and its estimate before the last batch is 1 - ``turned``."""

    def add(self, x: Tensor) -> None:
        """Take in rows ``x`` (n, k); float32 inside."""
        x = x.detach().float()
        n, mean = len(x), x.mean(0)
        rows = [x - mean]
        if self.mean is not None and self.kept is not None:
            shift = (self.count * n / (self.count + n)) ** 0.5 * (self.mean - mean)
            rows += [self.kept, shift[None]]
            self.squares += float(shift.square().sum())
            mean = self.mean + (mean - self.mean) * (n / (self.count + n))
        self.squares += float(rows[0].square().sum())
        self.count, self.mean = self.count + n, mean
        stacked = torch.cat(rows)
        _, s, v = top_svd(stacked, min(2 * self.components, *stacked.shape), tolerance=1e-4)
        self.kept = s[:, None] * v.T
        before, self.directions, self.values = self.directions, v.T[: self.components], s[: self.components]
        if before is not None and before.shape == self.directions.shape:
            self.turned = 1 - float((before * self.directions).sum(1).abs().min())

    @property
    def variance(self) -> Tensor:
        return self.values.square() / max(1, self.count - 1)

    @property
    def ratio(self) -> Tensor:
        return self.values.square() / max(self.squares, 1e-30)


class RunningCovariance:
    """C = the mean over samples of X^T X, each X (n, k) divided by its largest entry; float32, on X's device."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Take in one sample ``x`` (n, k).

        Raises:
            ValueError: values that are not finite.
        """
        x = x.detach().float()
        top = x.abs().max()
        if not torch.isfinite(top):
            raise ValueError("A layer's calibration input is not finite; run the base model in float32 or bfloat16.")
        x = x / top.clamp_min(1e-30)
        product = x.T @ x
        self.sum = product if self.sum is None else self.sum.add_(product)
        self.count += 1

    @property
    def mean(self) -> Tensor:
        assert self.sum is not None
        return self.sum / self.count


def inverted(c: Tensor, damping: float = 0.01, close: float = 0.05) -> tuple[Tensor, Tensor]:
    """(C + delta I, its inverse) in float64; delta = ``damping`` mean(diag C), doubled until it inverts well."""
    c = c.double()
    eye = torch.eye(len(c), dtype=c.dtype, device=c.device)
    delta = damping * c.diagonal().mean().clamp_min(1e-30)
    while True:
        damped = c + delta * eye
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < close:
            return damped, inverse
        delta = 2 * delta
