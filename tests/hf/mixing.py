"""Trained LoRA folders to mix, for the tests of mixtures."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import veneer
from hf.tiny import llama
from veneer.engine import checkpoint

NAMES = ("a", "b", "c")


def stir(model: torch.nn.Module, seed: int, size: float = 0.4) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator))
    return model


def folders(where: Path, names: tuple[str, ...] = NAMES, **options) -> dict[str, str]:
    """name -> a saved LoRA for the tiny Llama, each with other weights."""
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    for seed, name in enumerate(names):
        stir(veneer.get_peft_model(llama(), veneer.LoraConfig(**settings)), seed).save_pretrained(where / name)
    return {name: str(where / name) for name in names}


def deltas(folder: str, scaling: float = 2.0) -> dict[str, Tensor]:
    """layer's path -> s B A."""
    found = checkpoint.read(folder)
    paths = sorted({k.removeprefix("base_model.model.").split(".lora_")[0] for k in found})
    return {
        p: scaling * found[f"base_model.model.{p}.lora_B.weight"] @ found[f"base_model.model.{p}.lora_A.weight"]
        for p in paths
    }
