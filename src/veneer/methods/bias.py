"""bias="all" and bias="<method>_only": trained bias vectors (BitFit: Ben Zaken et al., 2022, arXiv:2106.10199).

b' = b_trained        for every bias of the model, or for those of the adapted layers
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.registry import auxiliary
from veneer.core.sites import OpaqueSite, Site


@auxiliary("bias")
class Bias(Adapter):
    """Trained bias vectors of one module, standing in for its own."""

    keeps_dtype = True
    whole_modules = True

    @classmethod
    def sites(cls, model: nn.Module, config: Any, own: Sequence[Site], find_named: Callable) -> list[Site]:
        """Every module with a bias ("all"), or the adapted ones among them."""
        if config.bias == "all":
            inside_mha = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
            pairs = [(p, m) for p, m in originals(model) if id(m) not in inside_mha]
        else:
            pairs = list({site.path: (site.path, site.module) for site in own}.values())
        sites = [OpaqueSite(path, module) for path, module in pairs if bias_names(module)]
        if not sites:
            raise ValueError(
                f"bias='{config.bias}' was asked for, but no such layer of {type(model).__name__} has a bias."
            )
        return sites  # type: ignore[return-value]

    def __init__(self, site: Site, config: Any):
        super().__init__(site, config)
        self.bias = nn.ParameterDict(
            {
                name.replace(".", "__"): nn.Parameter(site.module.get_parameter(name).detach().clone())
                for name in bias_names(site.module)
            }
        )

    def overrides(self) -> dict[str, Tensor]:
        return {name.replace("__", "."): value for name, value in self.bias.items()}

    def outgoing(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key.removeprefix("bias.").replace("__", "."): value for key, value in tensors.items()}

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"bias." + key.replace(".", "__"): value for key, value in tensors.items()}


def bias_names(module: nn.Module) -> list[str]:
    """The names of a module's own bias vectors."""
    if isinstance(module, nn.MultiheadAttention):
        return [n for n in ("in_proj_bias", "out_proj.bias") if n.split(".")[0] and module.in_proj_bias is not None]
    own = module._parameters.get("bias")
    return ["bias"] if isinstance(own, Tensor) else []


def originals(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of the base model as it was before wrapping."""
    found: list[tuple[str, nn.Module]] = []

    def walk(module: nn.Module, path: str) -> None:
        while getattr(module, "is_adapted", False):
            module = module.base_layer  # type: ignore[assignment]
        found.append((path, module))
        for name, child in module.named_children():
            walk(child, f"{path}.{name}" if path else name)

    walk(model, "")
    return found
