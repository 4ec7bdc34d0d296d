"""PeftModel: a transformers (or any) model with adapters, under the API people know."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

import veneer.methods  # noqa: F401 - enters the methods into the registry
from veneer.core import lean, registry
from veneer.core.config import PeftConfig, TaskType
from veneer.core.root import Root
from veneer.engine.adapted import Adapted
from veneer.hf import experts, sharded, status
from veneer.hf.model_calls import Calls, route
from veneer.hf.model_files import Files
from veneer.hf.tuner import tuner_class

HEADS = {
    TaskType.SEQ_CLS: ["classifier", "score"],
    TaskType.TOKEN_CLS: ["classifier", "score"],
    TaskType.QUESTION_ANS: ["qa_outputs"],
}
"""Freshly initialised heads of a task, which train and are saved along with the adapter."""


TASK_CLASSES: dict[str, type[PeftModel]] = {}
"""task_type -> the class for it; ``veneer.hf.tasks`` enters them."""


class PeftModel(Calls, Files):
    """A base model with named adapters.

    Args:
        model: the base model; wrapped in place, its parameters are frozen.
        peft_config: the first adapter's settings.
        adapter_name: the first adapter's name.
        autocast_adapter_dtype: adapters in float32 over a half-precision base (default), else in the base's dtype.
        low_cpu_mem_usage: leave the adapter's tensors on the meta device until weights are loaded.

    Raises:
        ValueError: a config that does not fit the model; the model is as it was then.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ):
        super().__init__()
        self.register_forward_pre_hook(route, with_kwargs=True)
        if not isinstance(peft_config, PeftConfig):
            raise TypeError(f"peft_config must be a config such as LoraConfig, not a {type(peft_config).__name__}.")
        if any(isinstance(module, Adapted) for module in lean.inside(model)):
            warnings.warn(
                "You are trying to modify a model with PEFT for a second time: it has adapters already. To have one "
                "more beside them, call add_adapter; to start again, .unload() first.",
                stacklevel=2,
            )
        build = tuner_class(str(peft_config.peft_type))
        self.base_model: Any = build(model)
        self.autocast_adapter_dtype = autocast_adapter_dtype
        checkpoints = _checkpoints(model)  # asked of each module: while there are few of them
        self._add(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)
        self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
        if checkpoints:
            self._inputs_require_grad()
        config = getattr(model, "config", None)
        if getattr(config, "pretraining_tp", 1) not in (1, None):
            config.pretraining_tp = 1  # split base matmuls would bypass the wrapped layers

    @classmethod
    def of_task(cls, task_type: Any) -> type[PeftModel]:
        return TASK_CLASSES.get(str(task_type), cls) if cls is PeftModel else cls

    # ---- adapters ---------------------------------------------------------------------------------------------------
    def _add(self, name: str, config: Any, low_cpu_mem_usage: bool, autocast: bool) -> None:
        base = self.base_model.model
        sharded.refuse_late(self)
        self._add_members(config)
        held = experts.completed(config)
        if config.task_type is None and config.auto_mapping is None:
            config.auto_mapping = {
                "base_model_class": type(base).__name__,
                "parent_library": type(base).__module__.split(".")[0],
            }
        name_or_path = getattr(getattr(base, "config", None), "_name_or_path", None) or base.__dict__.get(
            "name_or_path"
        )
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = name_or_path or None
        heads = [h for h in HEADS.get(config.task_type, ()) if _has(base, h)]  # type: ignore[call-overload]
        if heads:
            config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *HEADS[config.task_type]]))  # type: ignore[index]
        planted = config
        if heads and len(heads) < len(HEADS[config.task_type]):  # type: ignore[index]
            planted = copy.copy(config)
            missing = [h for h in HEADS[config.task_type] if h not in heads]  # type: ignore[index]
            planted.modules_to_save = [m for m in config.modules_to_save or [] if m not in missing]
        self.base_model.inject(name, planted, low_cpu_mem_usage=low_cpu_mem_usage, autocast_adapter_dtype=autocast)
        try:
            if held:
                experts.hold(self.base_model, name, held)
        except BaseException:
            self.base_model.delete(name)
            raise
        if planted is not config:
            vars(config).update({k: v for k, v in vars(planted).items() if k != "modules_to_save"})
            self.base_model.configs[name] = config

    def _add_members(self, config: Any) -> None:
        """Load the adapters that a mixture governs, where they are not here yet."""
        build = registry.of(str(config.peft_type)).build
        added: list[str] = []
        try:
            for member, folder in build.folders(config).items() if issubclass(build, Root) else ():
                if member not in self.peft_config:
                    self.load_adapter(folder, member, is_trainable=False)
                    added.append(member)
        except BaseException:
            for member in added:
                self.base_model.delete(member)
            raise

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add one more adapter, inactive, with fresh tensors.

        Raises:
            ValueError: the name is taken or bad, or the config does not fit; nothing is changed then.
        """
        self._add(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter (or several, whose effects compose in this order) active."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take one adapter out; the last one can go too. Was it the only active one, the next takes its place."""
        self.base_model.delete_adapter(adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within: exactly the base model."""
        with self.base_model.disabled():
            yield

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.base_model.configs

    @property
    def active_adapter(self) -> str | list[str]:
        active = self.base_model.active_adapters
        return active[0] if len(active) == 1 else active

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    @property
    def peft_type(self) -> Any:
        """The method of the first active adapter, else of the first."""
        name = next(iter(self.active_adapters or self.peft_config))
        return self.peft_config[name].peft_type

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapters[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        return bool(self.active_adapters) and self.base_model.state.enabled

    @property
    def modules_to_save(self) -> set[str] | None:
        names = {m for config in self.peft_config.values() for m in getattr(config, "modules_to_save", None) or ()}
        return names or None

    # ---- counting ---------------------------------------------------------------------------------------------------
    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameter counts; packed 4-bit parameters count as what they stand for."""
        return status.count(self)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / max(total, 1):.4f}"
        )

    def get_layer_status(self) -> list:
        return status.get_layer_status(self)

    def get_model_status(self) -> Any:
        return status.get_model_status(self)

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.base_model.model, "dtype", None)


def _has(model: nn.Module, name: str) -> bool:
    return any(path == name or path.endswith("." + name) for path, _ in model.named_modules())


def _checkpoints(model: nn.Module) -> bool:
    """Whether the base recomputes activations; transformers renamed the property in 5.23."""
    asked = getattr(model, "is_activation_checkpointing", None)
    return bool(getattr(model, "is_gradient_checkpointing", False) if asked is None else asked)
