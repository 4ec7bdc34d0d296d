"""FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees (AAAI 2026, doi:10.1609/aaai.v40i31.39813).

    W = U diag(l) V^T        V (in, in) one for all layers of a category, U (out, in) with columns of norm 1
    W' = U (diag(l') + S) V^T        l' (in,) starts as l; S sparse, off the diagonal, trained from zero

V comes from the joint factorisation of the category's weights W_1 ... W_N (a category is a last name in the layers'
paths): stacked, [W_1; ...; W_N] = Q R, and V = R^T Z with Z the eigenvectors of the mean of (Q_i^T Q_i + alpha)^-1, or,
where the stack's rank is deficient, its right singular vectors. V is in the file; U and l follow from W and V.
Cost of a training step over the frozen layer's 4 N in out FLOPs for N tokens: 4 in^2 out for the change, 2 N in out for
its gradient, 2 in^2 out for V's share of that, and 2 out for each entry; in eval the sum is built once and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import LayerConfig
from veneer.core.registry import method
from veneer.core.sites import Site
from veneer.methods.entries import Entries
from veneer.methods.sides import columns, input_dropout
from veneer.ops.entries import at_entries, turned


@dataclass
class FrodConfig(LayerConfig):
    """Settings of FRoD. ``progressbar`` is read, and shows nothing: no start here takes long.

    Attributes:
        projection_prng_key: seed of the places of S.
        save_projection: must be True: a factorisation has other signs on another machine.
        frod_dropout: dropout on what the change reads, in training.
        init_weights: True starts as the base model, False at random values.
        sparse_rate: share of the entries that S has.
        regularization_alpha: alpha of the joint factorisation.
        progressbar: read from files; shows nothing.
        runtime_offload_base_weight: True is refused: the layer's own weight runs here too.
    """

    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: float = 0.0
    init_weights: bool = True
    sparse_rate: float = 0.01
    regularization_alpha: float = 0.001
    progressbar: bool = True
    runtime_offload_base_weight: bool = False

    type: ClassVar[str | None] = "FROD"

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        if not 0 <= self.sparse_rate <= 1:
            raise ValueError(f"sparse_rate must lie in [0, 1], not {self.sparse_rate}.")
        if not self.save_projection:
            raise ValueError(
                "save_projection=False is not supported for FRoD: a factorisation has other signs on another machine, "
                "so V must be in the file."
            )
        if self.runtime_offload_base_weight:
            raise ValueError("runtime_offload_base_weight=True is not supported: the layer's own weight runs here too.")


class Categories(nn.Module):
    """V, and the places of S, for each category of layers."""

    def __init__(self, config: FrodConfig, sites: Sequence[Site]):
        super().__init__()
        self.frod_V, self.frod_s_indices, self.frod_s_size = nn.Module(), nn.Module(), nn.Module()
        by_name: dict[str, list[Site]] = {}
        for site in sites:
            by_name.setdefault(self.category(site), []).append(site)
        for number, (name, own) in enumerate(by_name.items()):
            widths = {columns(s) for s in own}
            if len(widths) > 1:
                raise ValueError(
                    f"FRoD shares one matrix among the layers called '{name}', but they have {sorted(widths)} inputs; "
                    "adapt those of one width only."
                )
            weights = [m for s in own for m in (s.weight.unbind(0) if s.stack else [s.weight])]
            v = joint([w.detach().flatten(1) for w in weights], config.regularization_alpha)
            self.frod_V.register_buffer(name, v)
            self.frod_s_indices.register_buffer(name, self.off_diagonal(len(v), config, number))
            self.frod_s_size.register_buffer(name, torch.tensor(v.shape))

    @staticmethod
    def category(site: Site) -> str:
        """The last name of the layer's path that is no number, with the parameter's where there is one."""
        site = getattr(site, "whole", site)
        names = [n for n in site.path.split(".") if not n.isdigit()]
        last = names[-1] if names else "layer"
        return f"{last}_{site.parameter.replace('.', '_')}" if site.parameter else last

    @staticmethod
    def off_diagonal(size: int, config: FrodConfig, number: int) -> Tensor:
        """(2, n) different places off the diagonal."""
        n = min(int(config.sparse_rate * size * size), size * (size - 1))
        generator = torch.Generator().manual_seed(config.projection_prng_key + number)
        flat = torch.randperm(size * (size - 1), generator=generator)[:n]
        row, column = flat // max(size - 1, 1), flat % max(size - 1, 1)
        return torch.stack([row, column + (column >= row).long()])

    def of(self, site: Site) -> tuple[Tensor, Tensor]:
        """V and the places of S for one layer."""
        name = self.category(site)
        return getattr(self.frod_V, name), getattr(self.frod_s_indices, name)


def joint(weights: Sequence[Tensor], alpha: float) -> Tensor:
    """V (in, in), invertible. In float32, step by step as the peer, which does not read U off a file's V."""
    stacked = torch.cat([w.float() for w in weights])
    width = stacked.shape[1]
    values = torch.linalg.svdvals(stacked)
    if len(stacked) < width or values[-1] <= 1e-6 * values[0]:  # directions that no weight uses
        return torch.linalg.svd(stacked, full_matrices=True).Vh.mT.contiguous()
    q, r = torch.linalg.qr(stacked)
    each = q.split([len(w) for w in weights])
    eye = torch.eye(width, dtype=r.dtype, device=r.device)
    mean = sum(torch.linalg.inv(q_i.mT @ q_i + alpha * eye) for q_i in each) / len(each)
    return (r.mT @ torch.linalg.eigh(mean).eigenvectors).contiguous()


@method("FROD", FrodConfig)
class Frod(Entries):
    """The weight's own factors, with the middle one trained."""

    takes_shared = True
    again = False

    @classmethod
    def plan(cls, config: FrodConfig, sites: Sequence[Site]) -> Categories:
        return Categories(config, sites)

    def __init__(self, site: Site, config: FrodConfig, shared: Categories):
        super().__init__(site, config)
        self.frod_dropout = input_dropout(site, config.frod_dropout, "frod_dropout")
        v, places = shared.of(site)
        u, scale = self.split(v)
        self.register_buffer("frod_U", u, persistent=False)
        self.register_buffer("start", scale, persistent=False)
        self.frod_lambda_l = nn.Parameter(scale.clone())
        values = torch.zeros(places.shape[1]) if config.init_weights else 0.01 * torch.randn(places.shape[1])
        self.frod_lambda_s_values = nn.Parameter(values)

    def split(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """U (out, in) and l (in,) with W = U diag(l) V^T."""
        w = self.site.weight.detach().flatten(1).double()
        u = torch.linalg.solve(v.double().to(w.device), w.mT).mT  # W V^-T
        scale = u.norm(dim=0)
        return (u / scale.clamp_min(1e-12)).float(), scale.float()

    def ready(self) -> None:
        v, _ = self.shared.of(self.site)
        if v.is_meta or self.frod_lambda_l.is_meta:
            return
        u, scale = self.split(v)  # V may have come from a file
        self.frod_U, self.start = u.to(self.frod_lambda_l), scale.to(self.frod_lambda_l)

    @property
    def dense(self) -> bool:  # type: ignore[override]
        return not (self.training and self.frod_dropout.p)

    @property
    def places(self) -> Tensor:  # type: ignore[override]
        """Of diag(l' - l), and of S."""
        places = self.shared.of(self.site)[1]
        return torch.cat([torch.arange(len(self.start), device=places.device).expand(2, -1), places], 1)

    def values(self) -> Tensor:
        return torch.cat([self.frod_lambda_l - self.start, self.frod_lambda_s_values])

    def matrix(self, values: Tensor) -> Tensor:
        v, _ = self.shared.of(self.site)
        middle = values.new_zeros(v.shape).index_put(tuple(self.places), values, accumulate=True)
        return self.frod_U @ middle @ v.mT

    def gradient(self, g: Tensor, x: Tensor) -> Tensor:
        v, _ = self.shared.of(self.site)
        return at_entries(turned(self.frod_U), v.mT @ (x.mT @ g), *self.places)

    def delta(self, x: Tensor) -> Tensor:
        return super().delta(self.frod_dropout(x) if x.is_floating_point() else x)
