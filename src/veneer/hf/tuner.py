"""The tuner under the method names people know: ``LoraModel`` and its siblings are this class with a method's name."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from veneer.core import lean, registry
from veneer.core.config import PeftConfig
from veneer.core.root import Root
from veneer.core.sites import Site
from veneer.engine.blueprint import Pairs
from veneer.engine.combine import add_weighted_adapter
from veneer.engine.packed_merge import REQUANTIZE, MergeReport
from veneer.engine.targets import ALL_LINEAR, walk
from veneer.engine.tuner import Tuner
from veneer.hf import megatron, shown
from veneer.hf.architectures import default_targets, present
from veneer.hf.layer_face import PeftLayer
from veneer.hf.quantised import dequantized, way_of
from veneer.hf.read_weights import ReadLayer, readers, refuse_unreadable
from veneer.hf.replicate import Replication, check_agrees, ranges_of, replicate


class PeftTuner(shown.Shows, Tuner):
    """A model with adapters, as ``LoraModel(model, config, "default")`` makes it.

    Args:
        model: the base model; wrapped in place.
        config: an adapter's config, or a dict name -> config, or None to add adapters later.
        adapter_name: its name.
        low_cpu_mem_usage: leave the adapter's tensors on the meta device until weights are loaded.

    Raises:
        ValueError: see ``Tuner.add``.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PeftConfig | dict[str, PeftConfig] | None = None,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ):
        super().__init__(model)
        self.replication: Replication | None = None
        self._read: dict[str, str] = {}
        configs = config if isinstance(config, dict) else {adapter_name: config} if config is not None else {}
        for name, one in configs.items():
            self.inject(name, one, low_cpu_mem_usage=low_cpu_mem_usage, autocast_adapter_dtype=autocast_adapter_dtype)
        if configs:
            first = next(iter(configs))
            self.set_active(first, trainable=not configs[first].inference_mode)

    def inject(self, name: str, config: PeftConfig, *, low_cpu_mem_usage: bool = False, **kwargs: Any) -> None:
        """``add`` after the model family's defaults were filled in."""
        megatron.allow(config)
        deepened = self._deepen(name, config)
        try:
            fill_defaults(self.model, config)
            own = self.add(name, config, device="meta" if low_cpu_mem_usage else None, **kwargs)
        except BaseException:
            if deepened:
                self._undeepen()
            raise
        if getattr(config, "target_modules", None) == ALL_LINEAR:
            config.target_modules = names_of(self.model, [site.path for site in own])  # type: ignore[attr-defined]

    def _accept(self, pairs: Pairs, config: PeftConfig) -> None:
        self._read = readers(self.model, dict.fromkeys(site.path for site, _ in pairs))
        refuse_unreadable(pairs, self._read, training=not config.inference_mode)

    def _wrapped(self, layer: nn.Module, site: Site) -> PeftLayer:
        kind = ReadLayer if site.path in self._read else PeftLayer
        return kind(layer, site, self.state, self)

    # ---- layer replication ------------------------------------------------------------------------------------------
    def _deepen(self, name: str, config: PeftConfig) -> bool:
        """Replicate the layers that ``config`` asks for, unless the model has them already."""
        check_agrees(self.replication, config, name, self.configs)
        ranges = ranges_of(config)
        if ranges is None or self.replication is not None:
            return False
        self.replication = replicate(self.model, ranges)
        return True

    def _undeepen(self, merged: bool = False) -> None:
        if self.replication is not None:
            self.replication.unshare() if merged else self.replication.undo()
        self.replication = None

    def delete(self, name: str) -> None:
        super().delete(name)
        if not self.configs:
            self._undeepen()

    def unload(self, *, merge: bool = False, **kwargs: Any) -> nn.Module:
        model = super().unload(merge=merge, **kwargs)
        self._undeepen(merged=merge)
        return model

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.configs

    @property
    def prefix(self) -> str:
        """What the parameter names of this method start with."""
        kind = next(iter(self.configs.values())).peft_type if self.configs else "LORA"
        return parameter_prefix(str(kind))

    # ---- choosing ---------------------------------------------------------------------------------------------------
    @property
    def active_adapters(self) -> list[str]:
        return list(self.state.active)

    @property
    def active_adapter(self) -> list[str]:
        return list(self.state.active)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.set_active(*names, trainable=not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out. Was it the only active one, then the first of those that are left becomes active.

        Raises:
            ValueError: no such adapter.
        """
        if adapter_name not in self.configs:
            raise ValueError(f"Adapter {adapter_name} does not exist; this model has: {', '.join(self.configs)}.")
        inherits = adapter_name in self.state.active and adapter_name not in self.roots
        self.delete(adapter_name)
        if inherits and not self.state.active and self.configs:
            heir = next(iter(self.configs))
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {heir}.",
                stacklevel=2,
            )
            self.set_active(heir)

    @property
    def targeted_module_names(self) -> list[str]:
        """The paths of the layers that are adapted, in the order of the model; copies and trained rows not counted."""
        return [path for path, parameter in self._targeted() if parameter is None]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The paths of the parameters that are adapted by themselves (``target_parameters``)."""
        return [f"{path}.{parameter}" for path, parameter in self._targeted() if parameter is not None]

    def _targeted(self) -> list[tuple[str, str | None]]:
        helpers = tuple(registry.AUXILIARY.values())
        held = (h for h in self._all_hosts() if any(not isinstance(a, helpers) for a in h.adapters.values()))
        return [(h.site.path, h.site.parameter if h.site.kind == "parameter" else None) for h in held]

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.set_trainable(name, requires_grad)

    def enable_adapter_layers(self) -> None:
        self.set_enabled(True)

    def disable_adapter_layers(self) -> None:
        self.set_enabled(False)

    # ---- merging ----------------------------------------------------------------------------------------------------
    def merge_adapter(
        self,
        adapter_names: Iterable[str] | None = None,
        safe_merge: bool = True,
        keep: Any = None,
        quantized: Any = None,
    ) -> MergeReport:
        """Merge in place; undone by ``unmerge_adapter``. ``keep="cpu"`` parks the original weights there meanwhile.

        ``quantized``: what becomes of packed layers, as in ``merge_and_unload``.
        """
        wanted = tuple(adapter_names or self.state.active)
        self._require(*wanted)
        if wanted and set(wanted) <= set(self.merged):
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
        return self.merge(*(adapter_names or ()), check=safe_merge, keep=keep, quantized=way_of(self.model, quantized))

    def unmerge_adapter(self) -> None:
        """Put the base's own weights back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: Sequence[str] | None = None,
        quantized: Any = None,
    ) -> nn.Module:
        """The base model with the adapters' effect in its weights; see ``Tuner.unload``.

        Args:
            progressbar: ignored.
            safe_merge: refuse a merge that is not finite.
            adapter_names: which adapters; default: the active ones.
            quantized: for a quantised base: "dequantize" (the default; the whole model is an ordinary one then),
                "requantize" (its layers stay packed, and the sum is rounded), or the original weights: a folder of
                safetensors or a mapping layer path -> (out, in), to which the change is added. What was done, and the
                measured error, come as a warning.
        """
        way = way_of(self.model, quantized)
        merged = self.unload(merge=True, names=adapter_names, check=safe_merge, quantized=way)
        if way != REQUANTIZE:
            merged = dequantized(merged, way)
        return self._without_marks(merged)

    def _without_marks(self, model: nn.Module) -> nn.Module:
        for mark in ("peft_config", "_hf_peft_config_loaded"):
            model.__dict__.pop(mark, None)
        return model

    # ---- algebra and training ---------------------------------------------------------------------------------------
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        **options: Any,
    ) -> dict[str, float]:
        """Add a plain LoRA that combines others; see ``veneer.engine.combine`` for types and options.

        Returns:
            layer -> the relative error that the result's rank costs there.

        Raises:
            ValueError: members that cannot be combined, an unknown type, or a name that is taken.
        """
        if adapters and all(str(self.configs[n].peft_type) == "IA3" for n in adapters if n in self.configs):
            return self._add_weighted_factors(adapters, weights, adapter_name)
        for ignored in ("svd_full_matrices", "svd_driver"):  # the sum's factors decide; no dense SVD is made
            options.pop(ignored, None)
        return add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, **options)

    def _add_weighted_factors(self, adapters: Sequence[str], weights: Sequence[float], name: str) -> dict[str, float]:
        """IA3's sum, which is one of factors: l = sum_i w_i l_i at every layer of the first; where one has none, 1."""
        self._require(*adapters)
        self.inject(name, copy.copy(self.configs[adapters[0]]))
        for host in self.hosts(name):
            own = host.adapters[name].state_dict()
            for key, value in own.items():
                one = torch.ones_like(value)
                each = [host.adapters[n].state_dict()[key] if n in host.adapters else one for n in adapters]
                value.copy_(sum(w * v for w, v in zip(weights, each)))
        return {}

    def update_and_allocate(self, global_step: int) -> None:
        """``after_step`` under AdaLoRA's name: call it after ``optimizer.step()``, before gradients are cleared."""
        self.after_step(global_step)

    # ---- the tree ----------------------------------------------------------------------------------------------------
    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules inside as others know them: what the layers of an adapter share stands beside the model."""
        yield "model", self.model
        yield from shown.leaves({name: m for name, m in self.shared.items() if not isinstance(m, Root)})
        for kept in ("shared", "prompts"):
            held = {n: m for n, m in getattr(self, kept).items() if kept == "prompts" or isinstance(m, Root)}
            if held:
                yield kept, shown.Holder(held)

    def shown_name(self, key: str) -> str:
        if not key.startswith("shared."):
            return key
        _, name, rest = key.split(".", 2)
        return key if isinstance(self.shared[name], Root) else shown.leaf_name(name, rest)

    def get_model_config(self, model: nn.Module) -> dict[str, Any]:
        config = getattr(model, "config", {"model_type": "custom"})
        return config.to_dict() if hasattr(config, "to_dict") else dict(config)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "shared", "roots") or name.startswith("__"):
                raise
        for root in self.roots.values():
            if name in root.public:
                return getattr(root, name)
        shared = shown.view({n: m for n, m in self.shared.items() if not isinstance(m, Root)}, name)
        if shared is not None:
            return shared
        return getattr(self.model, name)


def names_of(model: nn.Module, paths: list[str]) -> set[str]:
    """Names that select exactly these layers: their last parts where that is unambiguous, else the whole paths.

    Readers of an adapter (serving engines among them) want the names themselves, not a rule.
    """
    leaves = {path.rpartition(".")[2] for path in paths}
    selected = {path for path, _ in walk(model) if path.rpartition(".")[2] in leaves}
    return leaves if selected == set(paths) else set(paths)


def fill_defaults(model: nn.Module, config: Any) -> None:
    """Set the target modules that this model family is adapted at by default, where the config names none.

    Raises:
        ValueError: an unknown family, with what to set.
    """
    if not hasattr(config, "target_modules") or config.target_modules is not None:
        return
    if getattr(config, "target_parameters", None):
        return
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    known = config.places if hasattr(config, "places") else functools.partial(default_targets, str(config.peft_type))
    found = known(model_type) if model_type else None
    if found is None:
        raise ValueError(
            f"Please specify target_modules: there is no default for {config.peft_type} on the model type "
            f"'{model_type}'. For example target_modules='all-linear', or a list of names from model.named_modules()."
        )
    found = present(model, found)
    config.target_modules = set(found) if not isinstance(found, str) else found


TUNER_NAMES = {
    "LORA": "LoraModel", "ADALORA": "AdaLoraModel", "ADAMSS": "AdamssModel", "ADAPTION_PROMPT": "AdaptionPromptModel",
    "BOFT": "BOFTModel", "BEFT": "BeftModel", "C3A": "C3AModel", "DEFT": "DeftModel", "DELORA": "DeloraModel",
    "FOURIERFT": "FourierFTModel", "FROD": "FrodModel", "GLORA": "GloraModel", "GRALORA": "GraloraModel",
    "HRA": "HRAModel", "HIRA": "HiraModel", "IA3": "IA3Model", "LN_TUNING": "LNTuningModel", "LILY": "LilyModel",
    "LOHA": "LoHaModel", "LOKR": "LoKrModel", "MISS": "MissModel", "OFT": "OFTModel", "OSF": "OSFModel",
    "PEANUT": "PeanutModel", "POLY": "PolyModel", "PSOFT": "PsoftModel", "PVERA": "PveraModel",
    "RANDLORA": "RandLoraModel", "ROAD": "RoadModel", "SHADOW": "ShadowModel", "SHIRA": "ShiraModel",
    "SUPERTUNING": "SupertuningModel", "TINYLORA": "TinyLoraModel", "TRAINABLE_TOKENS": "TrainableTokensModel",
    "UNILORA": "UniLoraModel", "VBLORA": "VBLoRAModel", "VERA": "VeraModel", "WAVEFT": "WaveFTModel",
    "XLORA": "XLoraModel",
}  # fmt: skip


PREFIXES = {"ADALORA": "lora_", "LOHA": "hada_", "VERA": "vera_lambda_", "PVERA": "pvera_lambda_"}
"""What a method's parameter names start with, where it is not ``<peft_type>_``."""


def parameter_prefix(peft_type: str) -> str:
    """What the parameter names of a method start with."""
    return PREFIXES.get(peft_type, f"{peft_type.lower()}_")


@functools.cache
def tuner_class(peft_type: str) -> type[PeftTuner]:
    """The class under a method's own name (``LoraModel`` for ``"LORA"``)."""
    name = TUNER_NAMES.get(peft_type, PeftTuner.__name__)
    return (
        PeftTuner
        if name == "PeftTuner"
        else type(name, (PeftTuner,), {"__doc__": PeftTuner.__doc__, "__module__": __name__})
    )


def __getattr__(name: str) -> Any:
    for peft_type, known in TUNER_NAMES.items():
        if known == name:
            if peft_type not in registry.METHODS:
                raise AttributeError(f"{name} stands for the method {peft_type}, which is not built in yet.")
            return tuner_class(peft_type)
    raise AttributeError(f"module {__name__} has no attribute {name}")


def meta_to_layers(tuner: Tuner, name: str) -> None:
    """Give tensors that are still on the meta device real, empty storage where their layer is."""
    for host in tuner.hosts(name):
        for module in lean.inside(host.adapters[name]):
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for key, value in table.items():
                    if value is not None and value.is_meta:
                        empty = torch.empty_like(value, device=host.site.device)
                        table[key] = (
                            nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
                        )
