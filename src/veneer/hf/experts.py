"""Trained LoRAs as they lie in their folders, checked for whether they can be mixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
from torch import Tensor

from veneer.core.config import CONFIG_NAME, PeftConfig
from veneer.engine import checkpoint
from veneer.engine.tuner import Tuner
from veneer.hf import hub
from veneer.methods.lora_config import VARIANTS_BY_FIELD, LoraConfig
from veneer.methods.mole import Mole, MoleConfig

_KEY = regex.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<half>[AB])\.weight")


@dataclass
class Expert:
    """A trained LoRA as it lies on the disk."""

    folder: Path
    config: LoraConfig

    def factors(self) -> dict[str, dict[str, Tensor]]:
        """layer's path -> {"A": (r, in), "B": (out, r)}.

        Raises:
            ValueError: the file holds something else than the factors of layers.
        """
        out: dict[str, dict[str, Tensor]] = {}
        for key, value in checkpoint.read(self.folder).items():
            found = _KEY.fullmatch(key)
            if found is None or value.dim() != 2:
                raise ValueError(
                    f"{self.folder} holds '{key}' {tuple(value.shape)}, which is no LoRA factor of a linear layer; "
                    "mix adapters of linear layers."
                )
            out.setdefault(found["path"], {})[found["half"]] = value
        return out


def read(adapters: Mapping[str, str | Path]) -> dict[str, Expert]:
    """Look at every folder, and refuse what cannot be mixed.

    Raises:
        ValueError: nothing to mix, an adapter that is no plain LoRA, or adapters of different bases.
    """
    if not adapters:
        raise ValueError("Nothing to mix: give adapters={name: folder, ...}.")
    experts = {}
    for name, where in adapters.items():
        folder = hub.resolve(str(where))
        config = PeftConfig.read(folder)
        if not isinstance(config, LoraConfig):
            raise ValueError(f"'{name}' ({folder}) is {config.peft_type}; only LoRA adapters can be mixed.")
        extra = [f for f in (*VARIANTS_BY_FIELD, *_NOT_MIXED) if getattr(config, f)]
        if extra or config.bias != "none":
            raise ValueError(f"'{name}' ({folder}) uses {(extra or ['bias'])[0]}; only plain LoRA can be mixed.")
        experts[name] = Expert(folder, config)
    bases = {Path(e.config.base_model_name_or_path).name for e in experts.values() if e.config.base_model_name_or_path}
    if len(bases) > 1:
        raise ValueError(f"The adapters were trained on different base models: {', '.join(sorted(bases))}.")
    return experts


def beside(config: PeftConfig, folder: Path) -> dict[str, Path]:
    """The adapters that Arrow's router chooses from, where they lie in its own folder: name -> folder."""
    arrow: Any = getattr(config, "arrow_config", None)
    names = [*(arrow.task_adapter_names or ()), *(arrow.gks_adapter_names or ())] if arrow is not None else []
    return {name: folder / name for name in names if (folder / name / CONFIG_NAME).is_file()}


_NOT_MIXED = ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "lora_bias")


# ---- into a MoLE ----------------------------------------------------------------------------------------------------
Held = dict[str, tuple[Expert, dict[str, dict[str, Tensor]]]]
"""expert -> what its folder is, and its factors by layer."""


def completed(config: PeftConfig) -> Held:
    """The experts that a mixture's settings name, which these are completed from; empty for any other settings.

    Raises:
        ValueError: see ``read`` and ``Expert.factors``.
    """
    if not isinstance(config, MoleConfig) or not config.adapters:
        return {}
    held = {name: (e, e.factors()) for name, e in read(config.adapters).items()}
    config.experts = list(held)
    config.r = max(pair["A"].shape[0] for _, layers in held.values() for pair in layers.values())
    config.target_modules = {path for _, layers in held.values() for path in layers}
    return held


def hold(tuner: Tuner, name: str, held: Held) -> None:
    """Put the experts' factors into a freshly planted mixture.

    Raises:
        ValueError: an expert of another base.
    """
    for place, adapter in tuner.adapters(name):
        if isinstance(adapter, Mole):
            adapter.hold([_fitting(adapter, e, layers.get(place), place) for e, layers in held.values()])


def _fitting(gated: Mole, expert: Expert, pair: dict[str, Tensor] | None, place: str) -> tuple[Tensor, Tensor] | None:
    if pair is None:
        return None
    a, b = pair["A"], pair["B"]
    if a.shape[1] != gated.mole_A.shape[2] or b.shape[0] != gated.mole_B.shape[1]:
        wanted = (gated.mole_B.shape[1], gated.mole_A.shape[2])
        raise ValueError(
            f"{expert.folder} was trained on another base: its '{place}' is {(b.shape[0], a.shape[1])}, here {wanted}."
        )
    return a, expert.config.at(place).scaling * b.float()  # type: ignore[attr-defined]
