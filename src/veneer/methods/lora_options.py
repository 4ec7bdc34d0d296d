"""The nested settings that ``LoraConfig`` carries for its variants and starts: plain data, checked when made."""

from __future__ import annotations

from dataclasses import dataclass


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and value <= 0:
            raise ValueError(f"{type(owner).__name__}.{name} must be positive, not {value}.")


@dataclass
class LoraRuntimeConfig:
    """Settings of a run, never saved. ``ephemeral_gpu_offload`` is not built in; True is refused."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoftQConfig:
    """LoftQ: bits of the quantised base and number of alternations (arXiv:2310.08659)."""

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass
class EvaConfig:
    """EVA: rank budget factor rho >= 1, convergence threshold tau in [0, 1] (arXiv:2410.07170)."""

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1:
            raise ValueError(f"EvaConfig.rho must be at least 1, not {self.rho}.")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"EvaConfig.tau must lie in [0, 1], not {self.tau}.")


@dataclass
class CordaConfig:
    """CorDA: "ipm" adapts the leading components of W C, "kpm" the trailing ones (arXiv:2406.05223)."""

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        if self.corda_method not in ("ipm", "kpm"):
            raise ValueError(f"CordaConfig.corda_method must be 'ipm' or 'kpm', not '{self.corda_method}'.")


@dataclass
class LoraGAConfig:
    """LoRA-GA: which singular vectors of the gradient A and B take, and their scale (arXiv:2407.05000)."""

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        if self.direction not in ("ArBr", "A2rBr", "ArB2r", "random"):
            raise ValueError(f"LoraGAConfig.direction must be ArBr, A2rBr, ArB2r or random, not '{self.direction}'.")
        if self.scale not in ("stable", "weight_svd", "gd_scale", "unit"):
            raise ValueError(f"LoraGAConfig.scale must be stable, weight_svd, gd_scale or unit, not '{self.scale}'.")
        _positive(self, "stable_gamma")


@dataclass
class VeloraConfig:
    """VeLoRA: groups and scale of the compressed activations (arXiv:2405.17991)."""

    num_groups: int = 64
    scale: float = 1.0
    init_type: str = "batch_average"

    def __post_init__(self) -> None:
        _positive(self, "num_groups", "scale")
        if self.init_type not in ("batch_average", "batch_average_once", "random"):
            raise ValueError(
                f"VeloraConfig.init_type '{self.init_type}' is none of batch_average, batch_average_once, random."
            )


@dataclass
class ArrowConfig:
    """Arrow: experts per token and temperature of the training-free router (arXiv:2405.11157)."""

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = None
    gks_adapter_names: list[str] | None = None
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        _positive(self, "top_k", "router_temperature")


@dataclass
class KasaConfig:
    """KaSA: weights of the two regularisers (arXiv:2412.06071)."""

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        if self.beta < 0 or self.gamma < 0:
            raise ValueError(f"KasaConfig.beta and gamma must not be negative, but are {self.beta} and {self.gamma}.")


@dataclass
class MontecloraConfig:
    """MonteCLoRA: the sampler's size and strength (arXiv:2411.04358)."""

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        _positive(self, "num_samples", "dirichlet_prior", "buffer_size")


@dataclass
class BdLoraConfig:
    """BD-LoRA: modules with a block-diagonal A, those with a block-diagonal B, number of blocks (arXiv:2510.23346)."""

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        both = set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ())
        if both:
            raise ValueError(f"BdLoraConfig names {sorted(both)} for both A and B; each module takes one of them.")


NESTED = {
    "runtime_config": LoraRuntimeConfig,
    "loftq_config": LoftQConfig,
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "velora_config": VeloraConfig,
    "arrow_config": ArrowConfig,
    "kasa_config": KasaConfig,
    "monteclora_config": MontecloraConfig,
    "use_bdlora": BdLoraConfig,
}
