"""Principal components of rows that arrive in batches: ``peft.utils.incremental_pca``.

Each batch is joined with the components found so far, weighted by their singular values, and one row for the shift of
the mean (Ross et al., 2008): an SVD of that small matrix gives the new components.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class IncrementalPCA:
    """PCA in batches, in float64.

    Args:
        n_components: how many; default: as many as the first batch allows.
        copy: do not write into what is given.
        batch_size: rows that ``fit`` takes at a time; default: five times the number of features.
        svd_driver: cuSOLVER's driver, for tensors on a GPU.
        lowrank: a randomised SVD.
        lowrank_q: rank that it estimates; default: twice ``n_components``.
        lowrank_niter: its power iterations.
        lowrank_seed: its seed.

    Attributes:
        components_: (n_components, n_features), orthonormal rows by falling variance.
        singular_values_, explained_variance_, explained_variance_ratio_: (n_components,).
        mean_, var_: (n_features,), of all rows seen; ``n_samples_seen_`` counts them.
        noise_variance_: mean variance of the directions that are left out.

    Raises:
        ValueError: ``lowrank`` without a usable rank.
    """

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool | None = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ):
        self.n_components, self.copy, self.batch_size, self.svd_driver = n_components, copy, batch_size, svd_driver
        self.lowrank, self.lowrank_q = lowrank, lowrank_q
        self.lowrank_niter, self.lowrank_seed = lowrank_niter, lowrank_seed
        self.n_features_: int | None = None
        if not lowrank:
            return
        if lowrank_q is None:
            if n_components is None:
                raise ValueError("n_components must be specified when using lowrank mode with lowrank_q=None.")
            self.lowrank_q = 2 * n_components
        elif n_components is not None and lowrank_q < n_components:
            raise ValueError("lowrank_q must be greater than or equal to n_components.")

    def fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Take in all rows of ``X`` (n_samples, n_features), batch after batch."""
        if check_input:
            X = self._validate_data(X)
        n, k = X.shape
        self.batch_size = self.batch_size or 5 * k
        for part in self.gen_batches(n, self.batch_size, min_batch_size=self.n_components or 0):
            self.partial_fit(X[part], check_input=False)
        return self

    def partial_fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Take in one batch.

        Raises:
            ValueError: fewer rows than components at the start, or another number of features than before.
        """
        kept = getattr(self, "components_", None), getattr(self, "singular_values_", None)
        first = kept[0] is None
        if check_input:
            X = self._validate_data(X)
        n, k = X.shape
        if first:
            self.mean_: Tensor | None = None
            self.var_: Tensor | None = None
            self.n_samples_seen_ = torch.zeros(1, dtype=torch.int64, device=X.device)
            self.n_features_ = k
            self.n_components = self.n_components or min(n, k)
        if k != self.n_features_:
            raise ValueError(
                "Number of features of the new batch does not match the number of features of the first batch: "
                f"{k} and {self.n_features_}."
            )
        seen = int(self.n_samples_seen_)
        mean, var, total = self._incremental_mean_and_var(X, self.mean_, self.var_, self.n_samples_seen_)
        rows = X - (mean if first else X.mean(0, dtype=torch.float64))
        if not first:
            shift = (seen / int(total) * n) ** 0.5 * (self.mean_ - X.mean(0, dtype=torch.float64))
            rows = torch.vstack([kept[1].view(-1, 1) * kept[0], rows, shift])  # type: ignore[union-attr,operator]
        u, s, vt = self._svd_fn_lowrank(rows) if self.lowrank else self._svd_fn_full(rows)
        u, vt = self._svd_flip(u, vt, u_based_decision=False)
        variance, count = s**2 / (int(total) - 1), self.n_components
        self.n_samples_seen_, self.components_, self.singular_values_ = total, vt[:count], s[:count]
        self.mean_, self.var_ = mean, var
        self.explained_variance_ = variance[:count]
        self.explained_variance_ratio_ = (s**2 / (var * int(total)).sum())[:count]
        rest = variance[count:]
        self.noise_variance_ = rest.mean() if count not in (n, k) and len(rest) else torch.tensor(0.0, device=X.device)
        return self

    def transform(self, X: Tensor) -> Tensor:
        """``X`` (n_samples, n_features) in the directions found: (n_samples, n_components), float64."""
        mean: Any = self.mean_
        return (X - mean) @ self.components_.to(mean).T

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice]:
        """Slices of ``batch_size`` rows; the last takes in what would be a batch under ``min_batch_size``."""
        start = 0
        for _ in range(n // batch_size):
            end = start + batch_size
            if end + min_batch_size > n:
                continue
            yield slice(start, end)
            start = end
        if start < n:
            yield slice(start, n)

    def _validate_data(self, X: Any) -> Tensor:
        X = X if isinstance(X, Tensor) else torch.tensor(X, dtype=torch.float32)
        X = X.clone() if self.copy else X
        n, k = X.shape
        if self.n_components is None:
            return X
        if self.n_components > k:
            raise ValueError(
                f"n_components={self.n_components} invalid for n_features={k}, need more rows than columns for "
                "IncrementalPCA processing."
            )
        if self.n_components > n:
            raise ValueError(
                f"n_components={self.n_components} must be less or equal to the batch number of samples {n}"
            )
        return X

    @staticmethod
    def _incremental_mean_and_var(
        X: Tensor, last_mean: Tensor | None, last_variance: Tensor | None, last_sample_count: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(mean, variance, count) of all rows, from those of the earlier ones and the new ones (Chan et al., 1979)."""
        if not X.shape[0]:
            return last_mean, last_variance, last_sample_count  # type: ignore[return-value]
        n, before = X.shape[0], last_sample_count
        total = before + n
        wide = X.double()
        old_mean = torch.zeros(X.shape[1], dtype=torch.float64, device=X.device) if last_mean is None else last_mean
        old_var = torch.zeros_like(old_mean) if last_variance is None else last_variance
        mean = (before * old_mean + wide.sum(0)) / total
        new_mean = wide.mean(0)
        squares = ((wide - new_mean) ** 2).sum(0) + before * old_var + before * n / total * (old_mean - new_mean) ** 2
        return mean, squares / total, total

    @staticmethod
    def _svd_flip(u: Tensor, v: Tensor, u_based_decision: bool = True) -> tuple[Tensor, Tensor]:
        """Fix the signs of singular vectors: the largest entry of each column of u (or row of v) is positive."""
        if u_based_decision:
            largest = u.abs().argmax(0)
            signs = u[largest, torch.arange(u.shape[1], device=u.device)].sign()
        else:
            largest = v.abs().argmax(1)
            signs = v[torch.arange(v.shape[0], device=v.device), largest].sign()
        return u * signs[: u.shape[1]], v * signs[:, None]

    def _svd_fn_full(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.linalg.svd(X, full_matrices=False, driver=self.svd_driver)

    def _svd_fn_lowrank(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.random.fork_rng(enabled=self.lowrank_seed is not None):
            if self.lowrank_seed is not None:
                torch.manual_seed(self.lowrank_seed)
            u, s, v = torch.svd_lowrank(X, q=self.lowrank_q, niter=self.lowrank_niter)
        return u, s, v.mH
