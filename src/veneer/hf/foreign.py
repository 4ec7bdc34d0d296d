"""LoRA files of other tools: kohya's and diffusers' keys, read into and written from ours.

    kohya                 lora_unet_down_blocks_0_attn_to_q.lora_down.weight, .lora_up.weight, .alpha
    diffusers             unet.down_blocks.0.attn.to_q.lora_A.weight, .lora_B.weight [, .alpha]
    diffusers, older      unet.down_blocks.0.attn.to_q.lora.down.weight, .lora.up.weight
    diffusers, oldest     unet.down_blocks.0.attn.processor.to_q_lora.down.weight, .up.weight

The scale of all of them is alpha / rank, with alpha = rank where there is none. kohya's names have lost their dots, so
reading them takes the model.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from veneer.core.patterns import nearest
from veneer.engine.checkpoint import PREFIX
from veneer.methods.lora import LoraConfig

Tensors = dict[str, Tensor]
LEAVES = {
    "lora_down.weight": "A", "lora_up.weight": "B", "lora_A.weight": "A", "lora_B.weight": "B",
    "lora.down.weight": "A", "lora.up.weight": "B", "alpha": "alpha",
}  # fmt: skip


def from_kohya(tensors: Tensors, model: nn.Module, prefix: str = "lora_unet") -> tuple[LoraConfig, Tensors]:
    """A kohya file as an adapter of ``model``.

    Args:
        tensors: the file's tensors; those under other prefixes (text encoders) are left for another call.
        model: the base model, without adapters, that the names belong to.
        prefix: ``lora_unet``, ``lora_te``, ``lora_te1``, ``lora_te2`` ...

    Returns:
        A config, and tensors under the keys of ``adapter_model.safetensors``.

    Raises:
        ValueError: no tensor has the prefix, a name fits no module or two, or a kind of tensor we do not know.
    """
    paths = defaultdict(list)
    for path, _ in model.named_modules():
        paths[path.replace(".", "_")].append(path)

    def resolve(flat: str) -> str:
        found = paths.get(flat, [])
        if len(found) != 1:
            near = ", ".join(nearest(flat, paths, 3))
            what = f"fits {' and '.join(found)}" if found else f"fits no module; nearest: {near}"
            raise ValueError(f"The name '{prefix}_{flat}' in the file {what}.")
        return found[0]

    mine = {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(prefix + "_")}
    return _adapter(mine, resolve, prefix)


def from_diffusers(tensors: Tensors, prefix: str = "unet") -> tuple[LoraConfig, Tensors]:
    """A diffusers file as an adapter of the part that ``prefix`` names (``unet``, ``transformer``, ``text_encoder``).

    Raises:
        ValueError: no tensor has the prefix, or a kind of tensor we do not know.
    """
    mine = {}
    for key, value in tensors.items():
        if key.startswith(prefix + "."):
            key = re.sub(r"\.processor\.(to_\w+?)_lora\.(down|up)\.weight$", r".\1.lora.\2.weight", key)
            mine[re.sub(r"\.to_out\.lora\.", ".to_out.0.lora.", key)[len(prefix) + 1 :]] = value
    return _adapter(mine, lambda path: path, prefix)


def to_kohya(config: LoraConfig, tensors: Tensors, prefix: str = "lora_unet") -> Tensors:
    """Our tensors (file keys) under kohya's names, with each layer's alpha.

    Raises:
        ValueError: the adapter has tensors that the format cannot hold (magnitudes, biases, saved modules).
    """
    out = {}
    for path, part, value in _ours(tensors):
        flat = f"{prefix}_{path.replace('.', '_')}"
        out[f"{flat}.lora_{'down' if part == 'A' else 'up'}.weight"] = value
        if part == "A":
            out[f"{flat}.alpha"] = _alpha(config, path, value)
    return out


def to_diffusers(config: LoraConfig, tensors: Tensors, prefix: str = "unet") -> Tensors:
    """Our tensors (file keys) under diffusers' names, with each layer's alpha.

    Raises:
        ValueError: the adapter has tensors that the format cannot hold.
    """
    out = {}
    for path, part, value in _ours(tensors):
        out[f"{prefix}.{path}.lora_{part}.weight"] = value
        if part == "A":
            out[f"{prefix}.{path}.alpha"] = _alpha(config, path, value)
    return out


def _alpha(config: LoraConfig, path: str, down: Tensor) -> Tensor:
    """What over the rank gives this layer's scale, for rsLoRA too."""
    return torch.tensor(float(config.at(path).scaling * down.shape[0]))


def _ours(tensors: Tensors) -> list[tuple[str, str, Tensor]]:
    found = []
    for key, value in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key.removeprefix(PREFIX))
        if match is None:
            raise ValueError(
                f"The tensor '{key}' has no place in this format, which holds plain lora_A and lora_B only."
            )
        found.append((match[1], match[2], value))
    return found


def _adapter(tensors: Tensors, resolve: Callable[[str], str], prefix: str) -> tuple[LoraConfig, Tensors]:
    if not tensors:
        raise ValueError(f"No tensor of the file has the prefix '{prefix}'.")
    layers: dict[str, Tensors] = defaultdict(dict)
    for key, value in tensors.items():
        leaf = next((leaf for leaf in LEAVES if key.endswith("." + leaf)), None)
        if leaf is None:
            raise ValueError(f"'{prefix}: {key}' is no plain LoRA tensor; LoHa, LoKr and DoRA files are not read here.")
        layers[resolve(key[: -len(leaf) - 1])][LEAVES[leaf]] = value
    lame = [path for path, parts in layers.items() if not {"A", "B"} <= parts.keys()]
    if lame:
        raise ValueError(f"The file holds only one of the two factors of '{lame[0]}'.")
    ranks = {path: parts["A"].shape[0] for path, parts in layers.items()}
    alphas = {path: float(parts["alpha"]) if "alpha" in parts else float(ranks[path]) for path, parts in layers.items()}
    r, alpha = _most_common(ranks), _most_common(alphas)
    config = LoraConfig(
        r=int(r),
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=sorted(layers),
        rank_pattern={f"^{re.escape(p)}": n for p, n in ranks.items() if n != r},
        alpha_pattern={f"^{re.escape(p)}": a for p, a in alphas.items() if a != alpha},  # type: ignore[misc]
    )
    ours = {f"{PREFIX}{path}.lora_{part}.weight": parts[part] for path, parts in layers.items() for part in "AB"}
    return config, ours


def _most_common(values: Mapping[str, float]) -> float:
    return Counter(values.values()).most_common(1)[0][0]
