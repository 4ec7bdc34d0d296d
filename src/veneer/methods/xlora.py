"""X-LoRA: Mixture of Low-Rank Adapter Experts (Buehler, Buehler, 2024, arXiv:2402.07148).

    h = the model's last hidden state with every expert at a constant strength (default 0: the base)    (B, T, D)
    sigma = softmax(c(h) / tau)                                                                         (B, T, L, n)
    y_l = W_l x + sum_i sigma_{t,l,i} s_i B_i A_i x

c is a linear map, or a perceptron of ``xlora_depth`` layers; it alone trains, unless ``use_trainable_adapters``. One
call costs two passes through the model, and the first sees the whole text: there is no key-value cache to go on from,
so ``generate`` runs without one. The effect depends on the input and cannot be merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import PeftConfig, TaskType
from veneer.core.prompt import sizes
from veneer.core.registry import method
from veneer.core.root import PerLayer, Root


@dataclass
class XLoraConfig(PeftConfig):
    """Settings of X-LoRA. ``adapters`` maps a name for each expert to its folder.

    Attributes:
        hidden_size: the model's width; filled in.
        adapters: name: folder of each expert.
        enable_softmax: turn the scores into shares.
        enable_softmax_topk: take the softmax again among the chosen ones.
        layerwise_scalings: one set of shares for each layer; False: one for all.
        xlora_depth: layers of the classifier c.
        xlora_size: its width, where it has more than one layer.
        xlora_dropout_p: its dropout.
        use_trainable_adapters: the experts train too.
        softmax_temperature: tau.
        top_k_lora: keep this many experts a token; None: all.
        scaling_pass_value: strength of the experts in the first pass.
        global_scaling_weight: factor on all shares.
    """

    hidden_size: int | None = None
    adapters: dict[str, str] | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float | None = 0.0
    global_scaling_weight: float = 1.0

    type: ClassVar[str | None] = "XLORA"

    def check(self) -> None:
        """Refuse a mixture of nothing, and numbers that make no sense."""
        if not self.adapters:
            raise ValueError("X-LoRA mixes trained LoRA adapters: give adapters={name: folder, ...}.")
        if self.task_type == TaskType.SEQ_2_SEQ_LM:
            raise ValueError(
                "X-LoRA reads one text, and an encoder-decoder has two; mix its adapters by method='mole'."
            )
        if self.xlora_depth < 1 or self.xlora_size < 1 or self.softmax_temperature <= 0:
            raise ValueError(
                "xlora_depth, xlora_size and softmax_temperature must be positive, but are "
                f"{self.xlora_depth}, {self.xlora_size} and {self.softmax_temperature}."
            )
        _check_top_k(self.top_k_lora, len(self.adapters))


@method("XLORA", XLoraConfig)
class XLora(Root):
    """The classifier, the layers it governs, and what it said last."""

    public = frozenset(
        {
            "set_topk_lora", "set_global_scaling_weight", "get_global_scaling_weight", "set_scaling_pass_value",
            "get_latest_scalings", "get_scalings_log", "get_bucketed_scalings_log", "enable_scalings_logging",
            "disable_scalings_logging", "clear_scalings_log",
        }
    )  # fmt: skip

    @classmethod
    def folders(cls, config: XLoraConfig) -> dict[str, str]:
        return dict(config.adapters or {})

    @classmethod
    def on(cls, model: nn.Module, config: Any, hosts: dict[str, Any], configs: dict[str, PeftConfig]) -> XLora:
        members = tuple(config.adapters)
        for name in members:
            if name not in configs:
                raise ValueError(f"The expert '{name}' is not in the model; load it first, under this name.")
            if str(configs[name].peft_type) != "LORA":
                raise ValueError(f"X-LoRA mixes LoRA adapters, but '{name}' is {configs[name].peft_type}.")
        layers = [path for path, host in hosts.items() if any(name in host.adapters for name in members)]
        for path in layers:
            if not hosts[path].site.maps_input:
                raise ValueError(
                    f"X-LoRA weighs experts token by token, which the bare parameter '{path}' does not allow; train "
                    "the experts without target_parameters."
                )
        return cls(model, config, layers)

    def __init__(self, model: nn.Module, config: XLoraConfig, layers: list[str]):
        super().__init__()
        width = sizes(model).width
        if config.hidden_size not in (None, width):
            raise ValueError(f"XLoraConfig.hidden_size is {config.hidden_size}, but the model's is {width}.")
        config.hidden_size = width
        lead = next(model.parameters())
        self.at_device, self.at_dtype = lead.device, lead.dtype
        self.config, self.layers = config, layers
        self.members = tuple(config.adapters or ())
        self.trains_members = config.use_trainable_adapters
        self.internal_xlora_classifier = _Classifier(config, width, len(self.members), len(layers))
        self._latest: Tensor | None = None
        self._log: list[Tensor] = []
        self._logging = False

    def first_pass(self) -> dict[str, float]:
        value = self.config.scaling_pass_value
        value = 1 / len(self.members) if value is None else value
        return dict.fromkeys(self.members, value) if value else {}

    def gains(self, hidden: Tensor) -> dict[str, PerLayer]:
        sigma = self._latest = self.scalings(hidden)
        if self._logging:
            self._log.append(sigma.detach())
        sigma = self.chosen(sigma) * self.config.global_scaling_weight
        return {
            name: {path: sigma[:, :, at, i, None] for at, path in enumerate(self.layers)}
            for i, name in enumerate(self.members)
        }

    def scalings(self, hidden: Tensor) -> Tensor:
        """(batch, length, layers, experts): the classifier's answer, before any top-k."""
        lead = next(self.internal_xlora_classifier.parameters())
        logits = self.internal_xlora_classifier(hidden.to(lead)).unflatten(-1, (-1, len(self.members)))
        sigma = (logits.float() / self.config.softmax_temperature).softmax(-1) if self.config.enable_softmax else logits
        return sigma.expand(-1, -1, len(self.layers), -1)

    def chosen(self, sigma: Tensor) -> Tensor:
        """``sigma`` with all but the k largest at zero; ``enable_softmax_topk``: a second softmax over those."""
        k = self.config.top_k_lora
        if k is None:
            return sigma
        kept = torch.zeros_like(sigma, dtype=torch.bool).scatter(-1, sigma.topk(k, dim=-1).indices, True)
        if self.config.enable_softmax_topk:
            return sigma.masked_fill(~kept, -torch.inf).softmax(-1)
        return sigma * kept

    # ---- what the peer's users call -----------------------------------------------------------------------------
    def set_topk_lora(self, value: int | None) -> None:
        """Use the k likeliest experts of each token and layer; None: all."""
        _check_top_k(value, len(self.members))
        self.config.top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        """Multiply every scaling by ``weight``."""
        self.config.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        return self.config.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Strength of every expert in the first pass; None: one divided by their number."""
        self.config.scaling_pass_value = value

    def get_latest_scalings(self) -> Tensor | None:
        """(batch, length, layers, experts) of the last call."""
        return self._latest

    def enable_scalings_logging(self) -> None:
        """Keep the scalings of every call from now on."""
        self._logging = True

    def disable_scalings_logging(self) -> None:
        self._logging = False

    def get_scalings_log(self) -> list[Tensor]:
        return list(self._log)

    def clear_scalings_log(self) -> None:
        self._log.clear()

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """Text length -> (numbers of the calls with it, their scalings)."""
        buckets: dict[int, tuple[list[int], list[Tensor]]] = {}
        for call, sigma in enumerate(self._log):
            calls, kept = buckets.setdefault(sigma.shape[1], ([], []))
            calls.append(call)
            kept.append(sigma)
        return buckets


class _Classifier(nn.Module):
    """depth 1: one linear layer; else linear, ReLU, dropout, ..., linear, under the peer's numbering."""

    def __init__(self, config: XLoraConfig, width: int, experts: int, layers: int):
        super().__init__()
        out = experts * (layers if config.layerwise_scalings else 1)
        parts: list[nn.Module] = []
        for _ in range(config.xlora_depth - 1):
            parts += [nn.Linear(width, config.xlora_size), nn.ReLU(), nn.Dropout(config.xlora_dropout_p)]
            width = config.xlora_size
        self.layers = nn.Sequential(*parts, nn.Linear(width, out))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layers(hidden)


def _check_top_k(k: int | None, experts: int) -> None:
    if k is not None and not 1 <= k <= experts:
        raise ValueError(f"top_k_lora={k} must lie between 1 and the number of experts, {experts}.")
