"""The settings of LoRA, and the tables in which its variants and starts announce themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from veneer.core.config import LayerConfig, newer
from veneer.methods import lora_options as options


@dataclass
class LoraConfig(LayerConfig):
    """Settings of LoRA and its variants, with the peer's field names and defaults.

    Attributes:
        r: rank of the change.
        lora_alpha: the change is scaled by alpha / r.
        lora_dropout: dropout on what the change reads, in training.
        use_rslora: scale by alpha / sqrt(r) instead (rsLoRA).
        init_lora_weights: True (B zero), False (both random), "gaussian", or a start: pissa, pissa_niter_N, olora,
            milora, mica, orthogonal, loftq, eva, corda, lora_ga.
        rank_pattern: name or regex of layers: their own rank.
        alpha_pattern: name or regex of layers: their own alpha.
        megatron_config: settings of Megatron's parallel layers, which are recognised by it.
        megatron_core: the module that holds their classes.
        loftq_config: settings of the start "loftq".
        eva_config: settings of the start "eva".
        corda_config: settings of the start "corda".
        lora_ga_config: settings of the start "lora_ga".
        use_dora: train the magnitudes of the weight's columns apart from their direction (DoRA).
        velora_config: keep compressed activations for backward (VeLoRA).
        monteclora_config: average over sampled factors while training (MonteCLoRA).
        kasa_config: a truncated base and singular values of its own for the change (KaSA).
        use_bdlora: block-diagonal factors, for serving on several devices (BD-LoRA).
        arrow_config: route each token among several trained LoRAs without training a router (Arrow).
        alora_invocation_tokens: act only from this token sequence on (aLoRA).
        use_qalora: pool the input in groups, so that the change merges into a group-wise quantised weight (QA-LoRA).
        qalora_group_size: the size of those groups.
        layer_replication: ranges (start, end) of blocks that make a deeper model, each copy with its own LoRA.
        runtime_config: settings of this process, never saved.
        lora_bias: give B a bias.

    Raises:
        ValueError: options that exclude each other.
        TypeError: a nested config that is neither its class nor a dict.
        NotImplementedError: at ``get_peft_model``, an option whose method is not built in.
    """

    r: int = 8
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = newer(False)
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    megatron_config: dict | None = newer()
    megatron_core: str | None = newer("megatron.core")
    loftq_config: options.LoftQConfig | dict = newer({})
    eva_config: options.EvaConfig | None = newer()
    corda_config: options.CordaConfig | None = newer()
    lora_ga_config: options.LoraGAConfig | None = newer()
    use_dora: bool = newer(False)
    velora_config: options.VeloraConfig | None = newer()
    monteclora_config: options.MontecloraConfig | None = newer()
    kasa_config: options.KasaConfig | None = newer()
    use_bdlora: options.BdLoraConfig | None = newer()
    arrow_config: options.ArrowConfig | None = newer()
    alora_invocation_tokens: list[int] | None = newer()
    use_qalora: bool = newer(False)
    qalora_group_size: int = newer(16)
    layer_replication: list[tuple[int, int]] | None = newer()
    runtime_config: options.LoraRuntimeConfig = field(
        default_factory=options.LoraRuntimeConfig, metadata={"never_saved": True}
    )
    lora_bias: bool = newer(False)

    type: ClassVar[str | None] = "LORA"
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
    nested: ClassVar[dict[str, type]] = options.NESTED

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_bias and (self.init_lora_weights not in (True, False) or self.use_dora):
            raise ValueError("lora_bias=True works with init_lora_weights True or False only, and not with use_dora.")
        if self.init_lora_weights == "loftq" and not self.loftq_config:
            raise ValueError("init_lora_weights='loftq' needs loftq_config=LoftQConfig(...).")
        if self.use_dora and self.megatron_config:
            raise ValueError("use_dora=True does not work with megatron_config.")

    def check(self) -> None:
        """Refuse what cannot be honoured, before anything is planted."""
        ranks = [self.r, *self.rank_pattern.values()]
        for r in ranks:
            if not isinstance(r, int) or r <= 0:
                raise ValueError(f"`r` should be a positive integer value but the value passed is {r!r}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), not {self.lora_dropout}.")
        chosen = [f for f in VARIANTS_BY_FIELD if getattr(self, f)]
        unbuilt = [f for f in chosen if f not in VARIANTS]
        if unbuilt:
            raise NotImplementedError(
                f"LoraConfig({unbuilt[0]}=...) asks for {VARIANTS_BY_FIELD[unbuilt[0]]}, which is not built in yet."
            )
        if self.layer_replication and not self.replicates:
            raise NotImplementedError("LoraConfig(layer_replication=...) is not built in yet.")
        if self.runtime_config.ephemeral_gpu_offload:
            raise NotImplementedError(
                "LoraRuntimeConfig(ephemeral_gpu_offload=True) is not built in: starts compute where the layer is."
            )
        start = self.init_lora_weights
        family = start.split("_niter_")[0] if isinstance(start, str) else "gaussian"
        if family in KNOWN_STARTS and family not in STARTS:
            raise NotImplementedError(f"init_lora_weights='{start}' is not built in yet.")
        if family != "gaussian" and family not in STARTS:
            known = ", ".join(["gaussian", *sorted(STARTS)])
            raise ValueError(f"Unknown initialization init_lora_weights={start!r}; known are True, False, {known}.")

    replicates: ClassVar[bool] = False
    """Set by the module that builds ``layer_replication``."""

    @property
    def scaling(self) -> float:
        """s, for this rank and alpha."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


VARIANTS_BY_FIELD = {
    "use_dora": "DoRA (arXiv:2402.09353)",
    "use_qalora": "QA-LoRA (arXiv:2309.14717)",
    "alora_invocation_tokens": "aLoRA (arXiv:2504.12397)",
    "kasa_config": "KaSA (arXiv:2412.06071)",
    "velora_config": "VeLoRA (arXiv:2405.17991)",
    "monteclora_config": "MonteCLoRA (arXiv:2411.04358)",
    "use_bdlora": "BD-LoRA (arXiv:2510.23346)",
    "arrow_config": "Arrow routing (arXiv:2405.11157)",
}
VARIANTS: dict[str, type] = {}
"""Config field -> the class that serves it, as its module announced it."""
KINDS: dict[str, type] = {}
"""Kind of site -> the class that serves it, for kinds that have a module of their own."""
KNOWN_STARTS = ("pissa", "olora", "milora", "mica", "orthogonal", "loftq", "eva", "corda", "lora_ga")

Start = Callable[[Any, LoraConfig], None]
STARTS: dict[str, Start] = {}
"""Name of a start -> what sets A and B (and may ``rebase``). Modules of starts add to it with ``start``."""


def start(name: str) -> Callable[[Start], Start]:
    """Register a start for ``init_lora_weights=name``."""

    def enter(function: Start) -> Start:
        STARTS[name] = function
        return function

    return enter
