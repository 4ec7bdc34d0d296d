"""QA-LoRA: Quantization-Aware LoRA (Xu et al., 2023, arXiv:2309.14717).

    W' = W + s B A P        P (in/g, in) averages the input over groups of g neighbours; A (r, in/g), B (out, r)

The delta is constant inside a group, so that it can be folded into the zero points of a weight quantised in groups of
g. On a float layer the same delta is merged as it is. Cost: as LoRA, with in/g in place of in for A.
"""

from __future__ import annotations

from torch import Tensor, nn

from veneer.core.sites import Site
from veneer.methods.lora import Factors, Lora, LoraConfig, LoraWeight
from veneer.ops.lowrank import lowrank


@Lora.variant("use_qalora")
class QaLora(Lora):
    """LoRA on group means of the input."""

    def make_factors(self, site: Site, config: LoraConfig) -> None:
        g = self.group = config.qalora_group_size
        if site.kernel:
            raise ValueError(f"QA-LoRA groups the inputs of linear layers, which the convolution '{site.path}' is not.")
        if g <= 0 or site.in_features % g:
            raise ValueError(
                f"qalora_group_size={g} does not divide the {site.in_features} inputs of '{site.path}'; choose "
                "one that does, or exclude the layer."
            )
        super().make_factors(site, config)
        self.lora_A = nn.Linear(site.in_features // g, self.lora_A.out_features, bias=False)

    def factors(self) -> Factors:
        a, b = super().factors()
        return a.repeat_interleave(self.group, 1) / self.group, b

    def branch(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        a, b = super().factors()
        means = x.unflatten(-1, (-1, self.group)).mean(-1)  # (..., in/g)
        return lowrank(means, a, b, self.scaling, dropout, self.lora_B.bias)


class QaLoraWeight(QaLora, LoraWeight):
    """QA-LoRA on a bare parameter or a stack of experts."""


QaLora.parameter = QaLoraWeight
