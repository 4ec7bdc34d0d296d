"""Plain LoRA, the one method that every server of models reads: W' = W + s B A at some weights, and nothing else.

``read`` says of an adapter's folder what it holds beyond that; ``PlainLora`` is what is left when it holds nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from veneer.train.inspection import CONFIG_FILE, WEIGHTS_FILE, scale

PREFIX, A_END, B_END = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
SPLITS = ("pissa", "olora", "milora", "corda", "lora_ga", "loftq")
"""Starts that take something out of the base: on the base as it is published, their B A is not the change learnt."""

OPTIONS = {
    "use_dora": "DoRA's magnitudes",
    "modules_to_save": "whole trained modules (modules_to_save)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "lora_bias": "biases of its own (lora_bias)",
    "use_qalora": "QALoRA's pooled inputs",
    "alora_invocation_tokens": "an invocation sequence (alora_invocation_tokens)",
    "arrow_config": "a router (arrow_config)",
    "use_bdlora": "block-diagonal factors",
    "layer_replication": "repeated layers (layer_replication)",
    "target_parameters": "bare parameters (target_parameters)",
}
"""Settings that add to s B A, and what to call that."""


@dataclass
class PlainLora:
    """Factors by place in the base, and the scale that each product is taken with."""

    config: dict[str, Any]
    factors: dict[str, tuple[Tensor, Tensor]]
    """place -> A (r, in), B (out, r)"""
    scales: dict[str, float]

    @property
    def rank(self) -> int:
        """The largest."""
        return max(a.shape[0] for a, _ in self.factors.values())

    @property
    def names(self) -> list[str]:
        """The last parts of the places, each once: ``q_proj``, ``v_proj``."""
        return sorted({place.rpartition(".")[2] for place in self.factors})

    def even(self) -> PlainLora:
        """The same changes with one rank and with the scale alpha / r everywhere, which is all that servers read.

        A lower rank is filled up with zeros, and a scale that differs goes into B.
        """
        rank, first = self.rank, next(iter(self.scales.values()))
        alpha = self.config.get("lora_alpha", rank)
        same = all(a.shape[0] == rank for a, _ in self.factors.values()) and set(self.scales.values()) == {first}
        if not (same and first == alpha / rank):
            alpha = rank
        factors = {}
        for place, (a, b) in self.factors.items():
            gain, missing = self.scales[place] * rank / alpha, rank - a.shape[0]
            b = b if gain == 1 else (b.float() * gain).to(b.dtype)
            factors[place] = (torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing)))
        config = {**self.config, "r": rank, "lora_alpha": alpha, "use_rslora": False}
        config |= {"rank_pattern": {}, "alpha_pattern": {}}
        return PlainLora(config, factors, dict.fromkeys(factors, alpha / rank))

    def narrowed(self, rank: int) -> tuple[PlainLora, float]:
        """The best change of this rank at every place, and the share of the squared norm that it leaves out."""
        factors, lost, whole = {}, 0.0, 0.0
        for place, (a, b) in self.factors.items():
            left, right = torch.linalg.qr(b.double() * self.scales[place]), torch.linalg.qr(a.double().T)
            u, s, vt = torch.linalg.svd(left.R @ right.R.T)  # s B A = Q_B (R_B R_A^T) Q_A^T
            root = s[:rank].sqrt()
            new_a, new_b = (root[:, None] * vt[:rank]) @ right.Q.T, (left.Q @ u[:, :rank]) * root
            factors[place] = (new_a.to(a.dtype).contiguous(), new_b.to(b.dtype).contiguous())
            lost, whole = lost + s[rank:].square().sum().item(), whole + s.square().sum().item()
        config = {**self.config, "r": rank, "lora_alpha": rank, "use_rslora": False}
        config |= {"rank_pattern": {}, "alpha_pattern": {}}
        return PlainLora(config, factors, dict.fromkeys(factors, 1.0)), lost / whole if whole else 0.0

    def write(self, folder: Path) -> None:
        """As ``adapter_config.json`` and ``adapter_model.safetensors``; places are named by their last parts."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {**self.config, "target_modules": self.names, "inference_mode": True, "init_lora_weights": True}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        tensors: dict[str, Tensor] = {}
        for place, (a, b) in self.factors.items():
            tensors |= {PREFIX + place + A_END: a.contiguous(), PREFIX + place + B_END: b.contiguous()}
        save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})


def load(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter's settings and tensors, of any method.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: a file is damaged.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"'{folder}' holds no adapter: there is no {name} in it.")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return config, load_file(folder / WEIGHTS_FILE)
    except Exception as error:  # the tensor format's own error class has no public name
        raise ValueError(f"The adapter in '{folder}' is damaged ({error}).") from None


def read(folder: str | Path) -> PlainLora | list[str]:
    """The adapter of ``folder`` as plain LoRA, or what it holds beyond that, in a few words each.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: a file is damaged.
    """
    config, tensors = load(folder)
    if config.get("peft_type") != "LORA":
        return [f"its method is {config.get('peft_type')}, not LORA"]
    extra = [words for key, words in OPTIONS.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        extra.append(f"trained biases (bias: {config['bias']})")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.split("_niter_")[0] in SPLITS:
        extra.append(f"a base that its start has changed (init_lora_weights: {start})")
    pairs = {name.removesuffix(A_END) for name in tensors if name.endswith(A_END)}
    strange = [n for n in tensors if n.removesuffix(A_END).removesuffix(B_END) not in pairs or tensors[n].dim() != 2]
    if any("lora_embedding_" in name for name in strange):
        extra.append("factors of an embedding")
    elif strange and not extra:
        extra.append(f"tensors such as {strange[0]}")
    if extra or not pairs:
        return [f"it has {words}" for words in extra] or ["it has no factors at all"]
    factors = {n.removeprefix(PREFIX): (tensors[n + A_END], tensors[n + B_END]) for n in sorted(pairs)}
    return PlainLora(config, factors, {place: scale(config, place, a.shape[0]) for place, (a, _) in factors.items()})
