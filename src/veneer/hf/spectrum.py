"""What an adapter has learnt, by layer: the singular values of its delta, effective rank, ranks to train with.

    effective rank = exp(-sum p_i log p_i),  p_i = S_i / sum S       (Roy, Vetterli, 2007)

From a saved LoRA folder alone, through the QR factors of A and B (O(r^2 (in + out)) a layer), or from a live adapter of
any additive method, through its dense delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Additive, Stacked
from veneer.core.config import PeftConfig
from veneer.engine import checkpoint
from veneer.hf import hub
from veneer.hf.state_dict import tuner_of
from veneer.methods.lora import LoraConfig

SUFFIXES = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))


@dataclass(frozen=True)
class Spectrum:
    """One layer's delta.

    Attributes:
        path: the layer, as in ``rank_pattern``.
        rank: the rank it was trained with; for other methods than LoRA, the number of values.
        values: singular values, falling; of a stack of experts, the root mean square over them.
    """

    path: str
    rank: int
    values: Tensor

    @property
    def norm(self) -> float:
        """Frobenius norm of the delta."""
        return float(self.values.norm())

    @property
    def effective_rank(self) -> float:
        """See the module; 0 for a delta of zero."""
        total = self.values.sum()
        if total <= 0:
            return 0.0
        p = self.values / total
        return float(torch.exp(-torch.special.xlogy(p, p).sum()))

    def needed(self, energy: float) -> int:
        """The smallest rank whose squares hold the share ``energy`` of all squares; at least 1."""
        squares = self.values.double().square().cumsum(0)
        if squares[-1] <= 0:
            return 1
        return int((squares < energy * squares[-1]).sum()) + 1


def of_folder(folder: str | Path) -> list[Spectrum]:
    """The spectra of a saved LoRA, in the order of its layers.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: an adapter of another method, or with DoRA, whose delta depends on the base: load it and use
            ``of_model``.
    """
    folder = hub.resolve(folder)
    config = PeftConfig.read(folder)
    if not isinstance(config, LoraConfig) or config.use_dora:
        what = "a DoRA" if isinstance(config, LoraConfig) else str(config.peft_type)
        raise ValueError(f"'{folder}' holds {what}, whose delta needs the base model; load it and use of_model().")
    tensors = checkpoint.read(folder)
    found = []
    for key in sorted(tensors, key=_natural):
        for down, up in SUFFIXES:
            if key.endswith(down):
                path = key.removesuffix(down).removeprefix(checkpoint.PREFIX)
                found.append(_of_factors(path, tensors[key], tensors[key.removesuffix(down) + up], config))
    return found


def _of_factors(path: str, a: Tensor, b: Tensor, config: LoraConfig) -> Spectrum:
    own: LoraConfig = config.at(path.replace(".base_layer", ""))  # type: ignore[assignment]
    a, b, r = a.float().flatten(1), b.float().flatten(1), own.r
    experts = max(1, a.shape[0] // r)
    a = a.reshape(experts, r, -1)  # a stack keeps its experts' A one after another, their B's columns in turn
    b = b.reshape(b.shape[0], r, experts).permute(2, 0, 1) if b.shape[1] == r * experts else b.expand(1, -1, -1)
    _, r_b = torch.linalg.qr(b)
    _, r_a = torch.linalg.qr(a.mT)
    values = torch.linalg.svdvals(own.scaling * r_b @ r_a.mT)  # (experts, r)
    return Spectrum(path, r, values.square().mean(0).sqrt())


def of_model(model: nn.Module, adapter_name: str = "default") -> list[Spectrum]:
    """The spectra of a live adapter of any additive method.

    Raises:
        ValueError: no such adapter, or one whose effect is no added weight.
    """
    tuner = tuner_of(model)
    found = []
    for path, adapter in tuner.adapters(adapter_name):
        parts: list[Adapter] = list(adapter.each) if isinstance(adapter, Stacked) else [adapter]  # type: ignore[arg-type]
        if not all(isinstance(part, Additive) for part in parts):
            continue
        with torch.no_grad():
            deltas = [_matrices(part) for part in parts]
        values = torch.linalg.svdvals(torch.cat(deltas).float()).square().mean(0).sqrt()
        rank = getattr(parts[0], "r", None)
        found.append(Spectrum(path, int(rank) if isinstance(rank, int) else len(values), values[:rank]))
    if not found:
        raise ValueError(f"Adapter '{adapter_name}' adds to no weight, so there is no spectrum to show.")
    return found


def _matrices(adapter: Adapter) -> Tensor:
    """The delta as (matrices, out, in)."""
    assert isinstance(adapter, Additive)
    delta = adapter.delta_weight()
    return delta if adapter.site.stack else delta.flatten(1)[None]


def suggested_ranks(spectra: Sequence[Spectrum], energy: float = 0.95) -> dict[str, int]:
    """A ``rank_pattern``: for each layer the rank that keeps the share ``energy`` of its delta's squares.

    Raises:
        ValueError: ``energy`` outside (0, 1].
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must lie in (0, 1], not {energy}.")
    return {s.path: s.needed(energy) for s in spectra}


def rows(spectra: Sequence[Spectrum], energy: float = 0.95) -> list[dict[str, str | int | float]]:
    """The table: layer, rank, effective rank, needed rank, norm, largest value; ready for a printer."""
    return [
        {
            "layer": s.path,
            "rank": s.rank,
            "effective": round(s.effective_rank, 2),
            "needed": s.needed(energy),
            "norm": s.norm,
            "largest": float(s.values[0]),
        }
        for s in spectra
    ]


def draw(spectra: Sequence[Spectrum], file: str | Path, energy: float = 0.95) -> None:
    """Two panels: every layer's singular values relative to its largest, and effective beside trained ranks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.5 + 0.16 * len(spectra)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    most = max(len(s.values) for s in spectra)
    image = torch.full((len(spectra), most), float("nan"))
    for i, s in enumerate(spectra):
        image[i, : len(s.values)] = s.values / s.values[0].clamp_min(1e-30)
    shown = left.imshow(image.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    left.set_yticks(range(len(spectra)), [s.path for s in spectra], fontsize=6)
    left.set_xlabel("singular value")
    left.set_title("relative to the layer's largest", fontsize=9)
    figure.colorbar(shown, ax=left, shrink=0.6)
    places = range(len(spectra))
    right.barh(places, [s.effective_rank for s in spectra], height=0.7, color="#3b6ea5", label="effective")
    right.plot([s.needed(energy) for s in spectra], places, "|", color="#c0504d", label=f"for {energy:.0%} of squares")
    right.plot([s.rank for s in spectra], places, ".", color="0.6", markersize=3, label="trained")
    right.set_xlabel("rank")
    right.legend(fontsize=7, frameon=False, loc="lower right")
    figure.savefig(file, dpi=150)


def _natural(key: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in key.split(".")]
