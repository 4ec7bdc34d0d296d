"""SHADOW (Li, Li, Lee, Li, Xie, Li, 2026, arXiv:2604.19254): read and refused, not run.

    h_l' = h_l + alpha W_u W_d drop(h_l - s_l)        s_{l+1} = (1 - g) s_l + g T(h),  g = sigmoid(G(h))

The state s comes out of a small copy of the model. What is published does not settle how that copy is made from a
given base, which of its states starts s, or how it caches while generating, so an adapter run by guesses would not be
the one that was trained. Its settings can be read, shown and written; ``get_peft_model`` says this in a sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from veneer.core.adapter import Adapter
from veneer.core.config import LayerConfig
from veneer.core.registry import method


@dataclass
class ShadowConfig(LayerConfig):
    """Settings of SHADOW, as its files have them.

    Attributes:
        r: rank.
        shadow_alpha: alpha.
        shadow_dropout: dropout on the difference of the states.
        init_weights: start of W_u.
        shadow_model: what the small copy is made from.
        shadow_num_hidden_layers: its layers.
        shadow_hidden_size: its width.
        shadow_num_attention_heads: its heads.
        shadow_intermediate_size: its feed-forward width.
        share_embeddings: whether it reads the base's embeddings.
        update_hidden_size: width of T and G.
        auxiliary_loss_weight: weight of the copy's own loss.

    Raises:
        NotImplementedError: at ``get_peft_model``, always.
    """

    r: int = 8
    shadow_alpha: float = 0.1
    shadow_dropout: float = 0.2
    init_weights: bool = True
    shadow_model: str = "mirror"
    shadow_num_hidden_layers: int | None = None
    shadow_hidden_size: int | None = None
    shadow_num_attention_heads: int | None = None
    shadow_intermediate_size: int | None = None
    share_embeddings: bool = True
    update_hidden_size: int | None = None
    auxiliary_loss_weight: float = 0.05

    type: ClassVar[str | None] = "SHADOW"

    def check(self) -> None:
        """Refuse: see the module."""
        raise NotImplementedError(
            "SHADOW adapters cannot be run: what is published of the method leaves open how its small shadow model is "
            "made and cached, and a guess would not be the adapter that was trained. Use LoRA or a bottleneck adapter."
        )


@method("SHADOW", ShadowConfig)
class Shadow(Adapter):
    """Never built."""
