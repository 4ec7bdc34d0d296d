"""The peer's words on an adapted layer: what other libraries read, call and check there."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from veneer.core import quant, registry
from veneer.core.adapter import Adapter, Additive
from veneer.core.sites import Site
from veneer.engine.adapted import Adapted, State
from veneer.engine.tuner import Tuner
from veneer.hf import shown


class PeftLayer(shown.Shows, Adapted):
    """An adapted layer that answers to the method names people call on PEFT's layers."""

    def __init__(self, base_layer: nn.Module, site: Site, state: State, tuner: Tuner):
        super().__init__(base_layer, site, state)
        self.__dict__["_owner"] = _Weak(tuner)

    @property
    def _tuner(self) -> Tuner | None:
        return self.__dict__["_owner"].get()

    def _own(self, name: str) -> Adapter:
        return self.adapters[name]  # type: ignore[return-value]

    # ---- choosing -------------------------------------------------------------------------------------------------
    @property
    def active_adapters(self) -> list[str]:
        return list(self.state.active)

    @property
    def active_adapter(self) -> list[str]:
        return list(self.state.active)

    @property
    def disable_adapters(self) -> bool:
        return not self.state.enabled

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters of the model on or off; there is one switch for all its layers."""
        tuner = self._tuner
        if tuner is not None:
            tuner.set_enabled(enabled)
        else:
            self.state.enabled = enabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters active; which are is one list for all layers of the model."""
        names, tuner = tuple(_listed(adapter_names)), self._tuner
        if tuner is not None and self.state.active != names and all(n in tuner.configs for n in names):
            tuner.set_active(*names, trainable=not inference_mode)
        elif tuner is None:
            self.state.active = names
        for name in self.adapters:
            self.set_requires_grad(name, name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in _listed(adapter_names):
            if name in self.adapters:
                adapter = self._own(name)
                for key, parameter in adapter.named_parameters():
                    parameter.requires_grad_(requires_grad and key not in adapter.fixed)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None = None) -> None:
        """Take one adapter out of this layer; it is gone from the model when it is gone from all layers."""
        if adapter_name not in self.adapters:
            return
        if adapter_name in self.merged_names:
            self.unmerge()
        self.set_gain(adapter_name, 1.0)
        del self.adapters[adapter_name]
        self.settle()
        tuner = self._tuner
        if tuner is None:
            return
        left = tuner._hosts.get(adapter_name, [])
        left[:] = [host for host in left if host is not self]
        if not left and adapter_name in tuner.configs and adapter_name not in tuner.prompts:
            tuner.delete(adapter_name)

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        return next((name for name in _listed(adapter_name) if name in self.adapters), None)

    def _get_available_adapters(self) -> set[str]:
        return set(self.adapters)

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.adapters)

    # ---- strength ---------------------------------------------------------------------------------------------------
    @property
    def scaling(self) -> _Scalings:
        """adapter -> its factor now; assigning an entry changes the strength."""
        if not self.each("scaling"):
            raise AttributeError("scaling")
        return _Scalings(self)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Have the adapter act ``scale`` times as strongly as it was trained."""
        if adapter in self.adapters:
            self.set_gain(adapter, scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters."""
        for name in self.state.active:
            if name in self.adapters and scale != 1:
                self.set_gain(name, self.gains.get(name, 1.0) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of the active adapters by ``scale``, or, without one, set it back."""
        for name in self.state.active:
            if name in self.adapters:
                self.set_gain(name, 1.0 if scale is None else self.gains.get(name, 1.0) / scale)

    # ---- merging ----------------------------------------------------------------------------------------------------
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Fold adapters (default: the active ones) into this layer alone.

        Raises:
            ValueError: an adapter without a weight, or with ``safe_merge`` a result that is not finite.
        """
        names = [n for n in (adapter_names or self.state.active) if n in self.adapters]
        names = [n for n in names if n not in self.merged_names and self._own(n).replacement() is None]
        if not names and self.merged_names:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
        self.fold_in(names, check=safe_merge)
        self._tell()

    def unmerge(self) -> None:
        """Put the layer's own weight back."""
        if not self.merged_names:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        self.fold_out()
        self._tell()

    def _tell(self) -> None:
        tuner = self._tuner
        if tuner is not None:
            tuner._merged_hosts = [host for host in tuner._all_hosts(innermost_first=True) if host.merged_names]

    @property
    def merged(self) -> bool:
        return bool(self.merged_names)

    @property
    def merged_adapters(self) -> list[str]:
        return list(self.merged_names)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What a merge of this adapter adds to the weight, in the layer's own layout."""
        own = self._own(adapter)
        weight, bias = self.site.weight.float(), self.site.bias
        delta = own.delta_weight() if isinstance(own, Additive) else own.merged(weight, bias)[0] - weight
        gain = self._gain(adapter)
        return self.site._stored_form(delta if gain is None else gain * delta)

    def get_base_weight(self) -> Tensor:
        """The base layer's weight, unpacked, in the layer's own layout."""
        return quant.dense(self.get_base_layer(), self.site.stored)

    # ---- what is here -----------------------------------------------------------------------------------------------
    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """The attributes that hold trained tensors."""
        found = [key.partition(".")[0] for adapter in self.adapters.values() for key, _ in adapter.named_parameters()]
        return tuple(dict.fromkeys(found))

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """The attributes that hold an adapter's numbers."""
        return tuple(name for name in ("r", "lora_alpha", "alpha", "scaling", "lora_dropout") if self.each(name))

    @property
    def quantization_backend(self) -> str | None:
        row = quant.backend(self.get_base_layer())
        return None if row is None else row.name

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return adapter_name in self.adapters and isinstance(self.adapters[adapter_name], Additive)

    def each(self, leaf: str) -> Any:
        """adapter -> its attribute ``leaf``; for modules and tensors, shared ones too, a view that is a module."""
        held = shown.view(self.adapters, leaf)
        if held is None:
            sharing = {name: a.shared for name, a in self.adapters.items() if isinstance(a.shared, nn.Module)}
            held = shown.view(sharing, leaf)
        return _Named(super().each(leaf)) if held is None else held

    def __getattr__(self, name: str) -> Any:
        if name in _WRAPPER_NAMES:  # only where there are copies: their absence tells others what this is not
            found = dict(shown.children(self)).get(name) if "_modules" in self.__dict__ else None
            if found is None:
                raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
            return found
        if name == "token_indices":
            return shown.rows_trained(self.adapters)
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = None if name.startswith("__") else self._said(name)
            if found is None:
                raise
            return found

    def _said(self, name: str) -> Any:
        """What the peer's layers say besides: settings by adapter, and for LoRA the places that are empty here."""
        tuner = self._tuner if "_owner" in self.__dict__ else None
        if tuner is None or "adapters" not in self._modules:
            return None
        own = {n: tuner.configs[n].at(self.site.path) for n in self.adapters if n in tuner.configs}
        if name in SETTINGS:
            found = {n: getattr(config, name) for n, config in own.items() if hasattr(config, name)}
            return _Named(found) if found else None
        if name in LORA_PLACES and any(str(config.peft_type) in ("LORA", "ADALORA") for config in own.values()):
            return nn.ModuleDict()
        return None

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float = 8, config: Any = None, **kwargs: Any) -> None:
        """Give this layer alone one more LoRA.

        Raises:
            ValueError: the adapter has this layer already, or it cannot sit here.
        """
        tuner = self._tuner
        if tuner is None or adapter_name in self.adapters:
            raise ValueError(f"'{self.site.path}' cannot get the adapter '{adapter_name}': it has it already.")
        wanted = copy.copy(config) if config is not None else copy.copy(next(iter(tuner.configs.values())))
        vars(wanted).update(r=r, lora_alpha=lora_alpha, target_modules=[self.site.path])
        tuner.add(adapter_name, wanted, only={self.site.path})

    def __repr__(self) -> str:
        return repr(shown.Named(self._get_name(), dict(self.named_children())))

    def _get_name(self) -> str:
        return module_type(self)

    # ---- the tree ----------------------------------------------------------------------------------------------------
    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules inside as others know them; see ``veneer.hf.shown``."""
        return shown.children(self)

    def shown_name(self, key: str) -> str:
        return shown.name_of(self, key)


SETTINGS = ("r", "lora_alpha", "alpha", "use_dora", "use_rslora", "lora_bias")
"""Fields of configs that layers are asked for, adapter by adapter."""
LORA_PLACES = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_WRAPPER_NAMES = (shown.COPY, shown.ORIGINAL, shown.TOKENS)


def module_type(host: Adapted) -> str:
    """``lora.Linear`` and the like: the methods here and the class of the layer, or the peer's name for a helper."""
    adapters = list(host.adapters.values())
    helpers = {type(a) for a in adapters} & set(registry.AUXILIARY.values())
    if adapters and len(helpers) == len({type(a) for a in adapters}):
        options = {build: option for option, build in registry.AUXILIARY.items()}
        return "+".join(sorted(_WRAPPERS.get(options[h], h.__name__) for h in helpers))
    methods = {
        row.peft_type.lower() for row in registry.METHODS.values() if any(isinstance(a, row.build) for a in adapters)
    } or {type(a).__name__ for a in adapters}
    return f"{'+'.join(sorted(methods)) or 'none'}.{type(host.get_base_layer()).__name__}"


_WRAPPERS = {"modules_to_save": "ModulesToSaveWrapper", "trainable_token_indices": "TrainableTokensWrapper"}


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


class _Weak:
    """A reference to a layer's tuner that a copy of the layer alone does not drag along."""

    def __init__(self, target: Tuner | None):
        self.target = None if target is None else weakref.ref(target)

    def get(self) -> Tuner | None:
        return None if self.target is None else self.target()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Weak:
        return _Weak(memo.get(id(self.get())))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Weak, (None,)


class _Named(dict):
    """A dict whose string keys can be read as attributes, as those of a ``ModuleDict`` can."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class _Scalings(MutableMapping):
    """adapter -> scaling of one layer, written through to the layer's gains."""

    def __init__(self, layer: PeftLayer):
        self.layer = layer

    def __getitem__(self, name: str) -> Any:
        return self.layer.each("scaling")[name] * self.layer.gains.get(name, 1.0)

    def __setitem__(self, name: str, value: Any) -> None:
        own = self.layer.each("scaling")[name]
        if own:
            self.layer.set_gain(name, value / own)
        else:
            self.layer.adapters[name].scaling = value
            self.layer.settle()

    def __delitem__(self, name: str) -> None:
        raise TypeError("An adapter's scaling cannot be deleted; set it to 0 to silence the adapter.")

    def __iter__(self) -> Iterator[str]:
        return iter(self.layer.each("scaling"))

    def __len__(self) -> int:
        return len(self.layer.each("scaling"))

    def __repr__(self) -> str:
        return repr(dict(self))
