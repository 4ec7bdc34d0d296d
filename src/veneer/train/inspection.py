"""What an adapter's folder says about itself, without its base: size, ranks, norms, layers that learnt nothing."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PAIRS = [("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")]


@dataclass
class Layer:
    """One adapted place. Norm and effective rank are of its weight's change, where that is a product of factors."""

    place: str
    shape: str
    norm: float
    rank: int | None = None
    effective_rank: float | None = None


@dataclass
class Inspection:
    """An adapter's folder, read."""

    folder: str
    config: dict[str, Any]
    base: str | None
    method: str
    parameters: int
    bytes: int
    dtypes: list[str]
    layers: list[Layer] = field(default_factory=list)

    @property
    def dead(self) -> list[Layer]:
        """Places whose change is exactly zero: they learnt nothing."""
        return [layer for layer in self.layers if layer.norm == 0]


def inspect(folder: str | Path) -> Inspection:
    """Read ``adapter_config.json`` and the tensors beside it.

    Raises:
        FileNotFoundError: no adapter there; names an adapter nearby if there is one.
        ValueError: the config or the tensors are damaged.
    """
    folder = Path(folder)
    config_file, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if not config_file.is_file():
        raise FileNotFoundError(f"There is no {CONFIG_FILE} in '{folder}'{_nearby(folder)}")
    if not weights.is_file():
        raise FileNotFoundError(f"There is no {WEIGHTS_FILE} in '{folder}', only its config.")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{config_file}:{error.lineno} is not valid JSON ({error.msg}).") from None
    try:
        with safe_open(weights, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the format's own error class has no public name
        raise ValueError(f"'{weights}' is damaged or not a safetensors file ({error}).") from None
    return Inspection(
        folder=str(folder),
        config=config,
        base=config.get("base_model_name_or_path"),
        method=str(config.get("peft_type", "?")),
        parameters=sum(t.numel() for t in tensors.values()),
        bytes=weights.stat().st_size,
        dtypes=sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
        layers=layers(tensors, config),
    )


def _nearby(folder: Path) -> str:
    if not folder.exists():
        names = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = difflib.get_close_matches(folder.name, names, 1)
        return (
            f": there is no such folder; did you mean '{folder.parent / near[0]}'?"
            if near
            else ": there is no such folder."
        )
    inner = sorted(folder.glob(f"*/{CONFIG_FILE}"))
    return f"; look into '{inner[0].parent}'." if inner else "."


def layers(tensors: dict[str, Tensor], config: dict[str, Any]) -> list[Layer]:
    """One row a place, in the order of its numbers; low-rank pairs as products, everything else by its own norm."""
    left = dict(tensors)
    found: list[Layer] = []
    for a_end, b_end in PAIRS:
        for name in [n for n in tensors if n.endswith(a_end)]:
            stem = name[: -len(a_end)]
            if stem + b_end in left:
                a, b = left.pop(name), left.pop(stem + b_end)
                place = _place(stem)
                found.append(_product(place, a, b, scale(config, place, a.shape[0])))
    rest: dict[str, list[Tensor]] = {}
    for name, tensor in left.items():
        rest.setdefault(_place(name.rpartition(".")[0]), []).append(tensor)
    for place, group in rest.items():
        shape = " ".join("x".join(map(str, t.shape)) or "1" for t in group[:3])
        norm = sum(t.double().square().sum().item() for t in group) ** 0.5
        found.append(Layer(place, shape, norm))
    return sorted(found, key=lambda layer: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", layer.place)])


def _place(name: str) -> str:
    return name.removeprefix("base_model.model.").rstrip(".")


def _product(place: str, a: Tensor, b: Tensor, scaling: float) -> Layer:
    """Singular values of s B A from two small QR decompositions: those of R_B R_A^T."""
    rank = a.shape[0]
    A, B = a.double().flatten(1), b.double().transpose(0, 1).flatten(1).T  # (r, in), (out, r)
    values = torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.T).R.T) * abs(scaling)
    norm = values.square().sum().sqrt().item()
    shape = f"{'x'.join(map(str, b.shape))} · {'x'.join(map(str, a.shape))}"
    return Layer(place, shape, norm, rank, _effective_rank(values) if norm else 0.0)


def _effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli, 2007)."""
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


def scale(config: dict[str, Any], place: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA; alphas of single places by their patterns."""
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", place):
            alpha = value
            break
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
