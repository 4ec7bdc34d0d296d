"""LLaMA-Adapter (Zhang, Han, Liu, Gao, Zhou, Hu, Yan, Lu, Li, Qiao, 2023, arXiv:2303.16199).

    y = attention(x) + W_o (g softmax(Q K_p^T / sqrt(d)) V_p)        K_p = W_k P, V_p = W_v P, P (length, dim)

On the top ``adapter_layers`` attention modules. Q is the module's own query with its rotary positions; the prompt P has
none. Its softmax is apart from the text's, in float32, and the gate g (one number a layer) starts at zero, so the start
is the base. (GPT-2 as the file format has it: without W_o.) Cost: one more query projection, and ``length`` more keys.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.adapter import Adapter, Base
from veneer.core.config import PeftConfig
from veneer.core.registry import method
from veneer.core.sites import Site

ROTARY = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
"""Attention classes with q_proj, k_proj, v_proj, o_proj and rotary positions of two halves."""
JOINT = ("GPT2Attention",)
"""Attention classes with one projection for queries, keys and values."""


@dataclass
class AdaptionPromptConfig(PeftConfig):
    """Settings of LLaMA-Adapter. ``target_modules`` is the name of the attention modules, known for known families.

    Attributes:
        target_modules: name of the attention modules; known for known families.
        adapter_len: length of the prompt in each layer.
        adapter_layers: how many layers, from the top.

    Raises:
        ValueError: at ``get_peft_model``: no length or number of layers.
    """

    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None

    type: ClassVar[str | None] = "ADAPTION_PROMPT"
    is_adaption_prompt: ClassVar[bool] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "target_modules" and isinstance(value, str) and re.fullmatch(r"[\w.]+", value):
            value = [value]  # a name, which for other methods would be a regular expression
        super().__setattr__(name, value)

    def file_dict(self) -> dict[str, Any]:
        """A single name is written as such."""
        values = super().file_dict()
        if isinstance(values["target_modules"], list) and len(values["target_modules"]) == 1:
            values["target_modules"] = values["target_modules"][0]
        return values

    def check(self) -> None:
        """Refuse numbers that are none."""
        for name in ("adapter_len", "adapter_layers"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, not {getattr(self, name)!r}.")


@method("ADAPTION_PROMPT", AdaptionPromptConfig)
class AdaptionPrompt(Adapter):
    """Gated attention to a prompt beside a layer's own attention."""

    whole_modules = True
    reads_call = True

    @classmethod
    def among(cls, config: Any, sites: list[Site]) -> list[Site]:
        if len(sites) < config.adapter_layers:
            raise ValueError(
                f"adapter_layers={config.adapter_layers}, but the model has {len(sites)} attention modules; "
                f"{', '.join(site.path for site in sites[-3:])} are the last."
            )
        return sites[-config.adapter_layers :]

    def __init__(self, site: Site, config: Any):
        super().__init__(site, config)
        kind = type(site.module).__name__
        if kind not in ROTARY + JOINT:
            raise ValueError(
                f"LLaMA-Adapter reads an attention module's own projections, and those of '{site.path}' "
                f"({kind}) are not known to it; known are {', '.join(ROTARY + JOINT)}. Use PREFIX_TUNING instead."
            )
        width = site.module.embed_dim if kind in JOINT else site.module.q_proj.in_features
        self.adaption_prompt = nn.Parameter(torch.randn(1, config.adapter_len, width))
        self.adaption_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, base: Base, call: tuple[tuple, dict[str, Any]] = ((), {})) -> Any:
        y = base(x)
        attended = y[0] if isinstance(y, tuple) else y
        prompt = self.adaption_prompt.to(attended.dtype)
        q, k, v, out = self._projected(x, prompt, call[1])
        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (batch, heads, text, length)
        weights = F.softmax(scores.float(), dim=-1).to(attended.dtype)
        extra = self.adaption_gate.to(attended.dtype) * (weights @ v)
        new = attended + out(extra.transpose(1, 2).flatten(2)).to(attended.dtype)
        return (new, *y[1:]) if isinstance(y, tuple) else new

    def _projected(self, x: Tensor, prompt: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Any]:
        """(query, the prompt's keys, its values, the output projection): (batch, heads, tokens, head_dim) each."""
        m = self.site.module
        if type(m).__name__ in JOINT:

            def heads(t: Tensor) -> Tensor:
                return t.unflatten(-1, (m.num_heads, -1)).transpose(1, 2)

            q = m.c_attn(x).chunk(3, -1)[0]
            _, k, v = m.c_attn(prompt).chunk(3, -1)
            return heads(q), heads(k), heads(v), nn.Identity()

        def normed(name: str, t: Tensor) -> Tensor:
            t = t.unflatten(-1, (-1, m.head_dim))
            norm = getattr(m, name, None)
            return (t if norm is None else norm(t)).transpose(1, 2)

        q, k = normed("q_norm", m.q_proj(x)), normed("k_norm", m.k_proj(prompt))
        v = m.v_proj(prompt).unflatten(-1, (-1, m.head_dim)).transpose(1, 2)
        cos, sin = (t.unsqueeze(1).to(q.dtype) for t in kwargs["position_embeddings"])
        half = q.shape[-1] // 2
        turned = torch.cat([-q[..., half:], q[..., :half]], -1)
        bias = getattr(m.o_proj, "bias", None)  # the layer itself has added it already
        return q * cos + turned * sin, k, v, m.o_proj if bias is None else lambda t: m.o_proj(t) - bias
