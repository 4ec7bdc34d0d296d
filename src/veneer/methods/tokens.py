"""Trainable tokens (no paper; PEFT's method of that name, 2025): chosen rows of an embedding, and of a head tied to it.

    W'[rows] = theta        theta (n, dim), starting as a copy of W[rows]; all other rows stay untouched

Cost: none beside the layer's own; the file holds the trained rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Base, Weight
from veneer.core.config import LayerConfig, newer
from veneer.core.registry import auxiliary, method
from veneer.core.sites import EmbeddingSite, LinearSite, Site, sites_for
from veneer.methods.bias import originals


@dataclass
class TrainableTokensConfig(LayerConfig):
    """Which rows train. ``target_modules`` defaults to the model's input embedding.

    Attributes:
        token_indices: the rows.
        init_weights: True starts as the base model, False at random rows.
    """

    modules_to_save: list[str] | None = newer()
    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True

    type: ClassVar[str | None] = "TRAINABLE_TOKENS"

    def check(self) -> None:
        """Refuse an empty list of rows."""
        if not self.token_indices:
            raise ValueError("TrainableTokensConfig.token_indices is empty; name the rows that are to be trained.")


@method("TRAINABLE_TOKENS", TrainableTokensConfig)
class TrainableTokens(Adapter):
    """Trained rows of one weight: of an embedding's table, or of a linear layer's outputs."""

    @classmethod
    def on(cls, site: Site, config: Any, shared: nn.Module | None = None) -> Adapter:
        if not isinstance(site, EmbeddingSite | LinearSite):
            raise ValueError(
                f"Trainable tokens need an embedding or a linear layer, but '{site.path}' is a "
                f"{type(site.module).__name__}."
            )
        adapter = cls(site, config.token_indices, config.init_weights)
        site.adapter = adapter  # type: ignore[union-attr]
        return adapter

    def __init__(self, site: Site, indices: Sequence[int], copy_rows: bool = True):
        super().__init__(site, None)
        embedding = isinstance(site, EmbeddingSite)
        count = site.in_features if embedding else site.out_features
        bad = [i for i in indices if not 0 <= i < count]
        if bad or len(set(indices)) != len(indices):
            raise ValueError(
                f"Token indices of '{site.path}' must be distinct and in [0, {count}); got {bad or list(indices)}."
            )
        table = site.weight.T if embedding else site.weight
        rows = table.detach()[list(indices)].clone().contiguous()
        self.trainable_tokens_delta = nn.Parameter(rows if copy_rows else torch.randn_like(rows))
        self.rows, self.count = tuple(indices), count
        self._index(torch.device("cpu"))

    def _index(self, device: torch.device) -> None:
        indices = torch.tensor(self.rows, device=device)
        place = torch.full((self.count,), -1, device=device)  # row -> its place in theta, or -1
        place[indices] = torch.arange(len(indices), device=device)
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("indices", indices, persistent=False)

    def ready(self) -> None:
        if self.place.is_meta and not self.site.stored.is_meta:  # left empty until a file is read: it has no index
            self._index(self.site.device)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        theta = self.trainable_tokens_delta
        if isinstance(self.site, EmbeddingSite):
            place = self.place[x]  # -1 where the row is not trained
            rows = theta[place.clamp(min=0)] * self.site.scale
            return torch.where((place >= 0).unsqueeze(-1), rows.to(y.dtype), y)
        new = nn.functional.linear(x.to(theta.dtype), theta)
        if self.site.bias is not None:
            new = new + self.site.bias[self.indices]
        return y.index_copy(-1, self.indices, new.to(y.dtype))

    def merged(self, weight: Tensor, bias: Tensor | None) -> Weight:
        theta = self.trainable_tokens_delta.to(weight)
        if isinstance(self.site, EmbeddingSite):
            return weight.index_copy(1, self.indices, theta.T), bias
        return weight.index_copy(0, self.indices, theta), bias


class TiedTokens(TrainableTokens):
    """The same trained rows at a head that shares the embedding's weight; owns nothing."""

    def __init__(self, site: Site, leader: Any):
        Adapter.__init__(self, site, None)
        object.__setattr__(self, "leader", leader)

    def ready(self) -> None:
        """Nothing of its own to make."""

    def __getattr__(self, name: str) -> Any:
        if name in ("trainable_tokens_delta", "place", "indices"):
            return getattr(self.__dict__["leader"], name)
        return super().__getattr__(name)


@auxiliary("trainable_token_indices")
class TokensBesides(TrainableTokens):
    """``trainable_token_indices`` of any method: a list for the input embedding, or module name -> list."""

    @classmethod
    def sites(cls, model: nn.Module, config: Any, own: Sequence[Site], find_named: Callable) -> list[Site]:
        """The named embeddings, and the layers tied to each of them."""
        wanted = config.trainable_token_indices
        if not isinstance(wanted, dict):
            wanted = {_input_embedding(model): wanted}
        sites: list[Site] = []
        for name, indices in wanted.items():
            for target in find_named(model, [name], what="trainable_token_indices"):
                site = sites_for(target.path, target.module)[0]
                site.tokens, site.below = list(indices), "token_adapter"  # type: ignore[attr-defined]
                sites.append(site)
                sites += followers(model, site)
        return sites

    @classmethod
    def on(cls, site: Site, config: Any, shared: nn.Module | None = None) -> Adapter:
        leader = getattr(site, "leader", None)
        if leader is not None:
            return TiedTokens(site, leader.adapter)
        adapter = cls(site, site.tokens)  # type: ignore[attr-defined]
        site.adapter = adapter  # type: ignore[attr-defined]
        return adapter


@auxiliary("token_indices")
class TiedRows(TiedTokens):
    """What the method itself trains in an embedding, at the layers tied to it; saved there again, as the peer does."""

    @classmethod
    def sites(cls, model: nn.Module, config: Any, own: Sequence[Site], find_named: Callable) -> list[Site]:
        """The layers tied to a targeted embedding that are no targets themselves."""
        targeted = {id(site.module) for site in own}
        tied = [f for site in own if isinstance(site, EmbeddingSite) for f in followers(model, site)]
        return [f for f in tied if id(f.module) not in targeted]

    @classmethod
    def on(cls, site: Site, config: Any, shared: nn.Module | None = None) -> Adapter:
        return cls(site, site.leader)  # type: ignore[attr-defined]

    def ready(self) -> None:
        if isinstance(self.leader, Site):  # the leader is built after what follows it
            object.__setattr__(self, "leader", self.leader.adapter)  # type: ignore[attr-defined]

    @property
    def holder(self) -> nn.Module:
        return self.leader


def followers(model: nn.Module, site: Site) -> list[Site]:
    """The sites of the layers that share the very weight of ``site``'s layer; each names it as its ``leader``."""
    weight, found = getattr(site.module, "weight", None), []
    for path, module in originals(model):
        if weight is not None and module is not site.module and module._parameters.get("weight") is weight:
            follower = sites_for(path, module)[0]
            follower.leader = site  # type: ignore[attr-defined]
            found.append(follower)
    return found


def _input_embedding(model: nn.Module) -> str:
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    for path, module in originals(model):
        if (
            module is table
            or (table is None and isinstance(module, nn.Embedding))
            or getattr(table, "base_layer", None) is module
        ):
            return path
    raise ValueError(
        "trainable_token_indices was given as a list, but the model has no input embedding; give a dict of names."
    )
