"""PeftModel: a transformers (or any) model with adapters, under the API people know."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import veneer.methods  # noqa: F401 - enters the methods into the registry
from veneer.core import lean, registry
from veneer.core.config import CONFIG_NAME, PeftConfig, TaskType
from veneer.core.prompt import Prompt
from veneer.core.root import Root
from veneer.engine import checkpoint
from veneer.engine.adapted import BASE, Adapted
from veneer.hf import card, experts, hub, old_experts, prompted_generation, prompts, sharded, shown, status, ties
from veneer.hf.architectures import input_table
from veneer.hf.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from veneer.hf.tuner import meta_to_layers, tuner_class

HEADS = {
    TaskType.SEQ_CLS: ["classifier", "score"],
    TaskType.TOKEN_CLS: ["classifier", "score"],
    TaskType.QUESTION_ANS: ["qa_outputs"],
}
"""Freshly initialised heads of a task, which train and are saved along with the adapter."""


TASK_CLASSES: dict[str, type[PeftModel]] = {}
"""task_type -> the class for it; ``veneer.hf.tasks`` enters them."""


class PeftModel(shown.Shows):
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
        self.register_forward_pre_hook(_route, with_kwargs=True)
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

    # ---- running ----------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        """The adapted model. ``adapter_names``: one adapter per row of the batch, ``"__base__"`` for none."""
        if adapter_names != ROUTED and (adapter_names is not None or not torch.compiler.is_compiling()):
            self.base_model.route(adapter_names)
        return self._run(args, kwargs)

    def _run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        prompt = self.active_prompt if len(self.base_model.prompts) else None
        if prompt is not None:
            return prompts.forward(self, prompt, args, kwargs)
        return self.base_model(*args, **kwargs)

    @property
    def active_prompt(self) -> Prompt | None:
        """The prompt that is read before the text now, if one is active."""
        if not self.base_model.state.enabled:
            return None
        route = self.base_model.state.route
        for name in self.active_adapters if route is None else dict.fromkeys(route):
            if name in self.base_model.prompts:
                return self.base_model.prompts[name]  # type: ignore[return-value]
        return None

    def generate(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """``generate`` of the base model with the adapters on; beams of a row follow the row's adapter."""
        self.base_model.route(adapter_names)
        try:
            prompt = self.active_prompt
            if prompt is not None:
                return prompted_generation.generate(self, prompt, args, kwargs)
            if any(name in self.base_model.roots for name in self.active_adapters):
                kwargs["use_cache"] = False  # each call reads the whole text, see veneer.engine.root
            return self.base_model.model.generate(*args, **kwargs)
        finally:
            self.base_model.route(None)

    def get_base_model(self) -> nn.Module:
        """The model inside (with the adapters in place; see ``unload`` to have it without)."""
        return self.base_model.model

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Turn checkpointing on in the base, with inputs that carry gradients although the base is frozen."""
        self.base_model.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs or {"use_reentrant": False}, **kwargs
        )
        self._inputs_require_grad()

    def _inputs_require_grad(self) -> None:
        table = input_table(self.base_model.model)
        if table is not None and "_veneer_grad_hook" not in table.__dict__:
            handle = table.register_forward_hook(_require_grad)
            table.__dict__["_veneer_grad_hook"] = handle

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        self._inputs_require_grad()
        return model

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

    # ---- files ------------------------------------------------------------------------------------------------------
    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | os.PathLike | None = None,
        convert: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write adapters: "default" into the folder itself, others into sub-folders of their names.

        Of a model that processes share (FSDP2, ZeRO-3) every process calls this, for the tensors are gathered.

        Args:
            save_directory: the folder; made if need be.
            safe_serialization: safetensors; False writes ``adapter_model.bin``.
            selected_adapters: names; default: all.
            save_embedding_layers: "auto" saves embeddings when they were resized or are adapted themselves.
            is_main_process: False: gather, but write nothing.
            path_initial_model_for_weight_conversion: accepted as the peer has it; not read, for what it is needed for
                is known: the adapter is converted (see ``convert``).
            convert: write an adapter whose start replaced base weights (PiSSA, OLoRA, CorDA, LoRA-GA, ...) as a plain
                LoRA of rank 2r for the original base. False keeps the tensors as they are, which fit the base only
                after the same start was made on it again.
            kwargs: ``state_dict``: take tensors from there instead of from the model.

        Raises:
            ValueError: ``save_directory`` is a file, an unknown adapter, or tensors whose parts cannot be gathered.
            OSError: the disk is full; what stood there before is untouched.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"Provided path ({folder}) should be a directory, not a file.")
        names = list(selected_adapters) if selected_adapters is not None else list(self.peft_config)
        if not set(names) <= set(self.peft_config):
            raise ValueError(
                "You passed an invalid `selected_adapters` argument: this model has the adapters "
                f"{list(self.peft_config)}, not all of {names}."
            )
        convert = convert or path_initial_model_for_weight_conversion is not None
        written: dict[str, PeftConfig] = {}
        for name in names:
            tensors = get_peft_model_state_dict(
                self,
                kwargs.get("state_dict"),
                adapter_name=name,
                save_embedding_layers=save_embedding_layers,
                convert=convert,
            )
            if not is_main_process:
                continue
            own = folder if name == "default" else folder / name
            checkpoint.write(own, tensors, safe_serialization)
            written[name] = checkpoint.config(self.base_model, name, convert)
            written[name].write(own)
        if is_main_process:
            card.write_card(folder, written, self)

    @classmethod
    @lean.unswept()
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> PeftModel:
        """A base model with a saved adapter on it.

        Args:
            model: the base model.
            model_id: an adapter's folder, or a hub id.
            adapter_name: the name it gets here.
            is_trainable: whether it trains on.
            config: settings instead of the folder's own.
            autocast_adapter_dtype: float32 adapters over a half-precision base.
            ephemeral_gpu_offload: not built in; True is refused.
            low_cpu_mem_usage: build the adapter on the meta device and put the file's tensors in.
            key_mapping: regular expression -> replacement, applied to the file's keys after their prefix.
            strict: refuse a file that does not fit exactly.
            kwargs: ``subfolder``, ``revision``, ``token``, ``cache_dir``, ``ignore_mismatched_sizes``, ...

        Raises:
            FileNotFoundError: the folder or repository holds no adapter.
            ValueError: no such folder or hub id, or the file does not fit the model; the sentence says how.
        """
        _refuse_offload(ephemeral_gpu_offload)
        if config is not None and not isinstance(config, PeftConfig):
            raise ValueError(f"The input config must be a PeftConfig, got {type(config)}.")
        folder = hub.resolve(model_id, kwargs.get("subfolder"), **hub.arguments(kwargs))
        config = config if config is not None else PeftConfig.read(folder)
        config, tensors = _adopted(model, copy.deepcopy(config), folder, key_mapping, is_trainable)
        _own_members(config, folder)
        config.inference_mode = not is_trainable
        if config.is_prompt_learning and is_trainable:
            config.inference_mode = False
        build = TASK_CLASSES.get(str(config.task_type), PeftModel) if cls is PeftModel else cls
        whole = build(
            model,
            config,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
        try:
            whole._load_tensors(tensors, adapter_name, strict, kwargs)
            whole._load_beside(config, folder)
        except BaseException:
            whole.base_model.unload()
            raise
        if not is_trainable:
            whole.eval()
        return whole

    @lean.unswept()
    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> checkpoint.LoadReport:
        """Load a saved adapter beside the others, inactive (or into an adapter of that name that exists).

        The arguments are those of ``from_pretrained``. ``torch_device`` is taken for callers of the peer: a tensor
        always goes to the device of its layer.

        Returns:
            What was loaded; with ``strict=False`` also what did not fit.

        Raises:
            FileNotFoundError, ValueError: as ``from_pretrained``; the model is as it was then.
        """
        _refuse_offload(ephemeral_gpu_offload)
        folder = hub.resolve(model_id, kwargs.get("subfolder"), **hub.arguments(kwargs))
        fresh = adapter_name not in self.peft_config
        config, tensors = _adopted(self.base_model.model, PeftConfig.read(folder), folder, key_mapping, is_trainable)
        if fresh:
            _own_members(config, folder)
            config.inference_mode = not is_trainable
            self._add(adapter_name, config, low_cpu_mem_usage, autocast_adapter_dtype)
        try:
            report = self._load_tensors(tensors, adapter_name, strict, kwargs)
            self._load_beside(self.peft_config[adapter_name], folder)
        except BaseException:
            if fresh:
                self.base_model.delete(adapter_name)
            raise
        if is_trainable:
            self.base_model.set_trainable(adapter_name, True)
        return report

    def _load_beside(self, config: PeftConfig, folder: Path) -> None:
        """Load the adapters that a router was saved together with, where they are not here yet."""
        for name, where in experts.beside(config, folder).items():
            if name not in self.peft_config:
                self.load_adapter(where, name)

    def _load_tensors(
        self, tensors: dict[str, torch.Tensor], name: str, strict: bool, kwargs: dict[str, Any]
    ) -> checkpoint.LoadReport:
        report = set_peft_model_state_dict(
            self, tensors, name, ignore_mismatched_sizes=kwargs.get("ignore_mismatched_sizes", False), strict=strict
        )
        meta_to_layers(self.base_model, name)
        if not strict and not report.clean:
            warnings.warn(report.sentence(), stacklevel=3)
        return report

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Save to a temporary folder and upload it; see ``huggingface_hub.upload_folder`` for the arguments."""
        return hub.push(self, repo_id, **kwargs)

    def create_or_update_model_card(self, output_dir: str) -> None:
        card.write_card(Path(output_dir), self.peft_config, self)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Every parameter of the model by its live name, tied ones by their first alone."""
        found = super().state_dict(*args, **kwargs)
        whole = not args and kwargs.get("destination") is None and not kwargs.get("prefix")
        return ties.once(self, found) if whole else found

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(ties.completed(self, state_dict), strict, assign)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The base model and, where there are prompts, ``prompt_encoder`` with them by name."""
        if "base_model" not in self._modules:
            return
        if len(self.base_model.prompts):
            yield "prompt_encoder", self.prompt_encoder
        yield "base_model", self.base_model

    def shown_name(self, key: str) -> str:
        start = "base_model.prompts."
        return "prompt_encoder." + key.removeprefix(start) if key.startswith(start) else key

    @property
    def prompt_encoder(self) -> nn.ModuleDict:
        """adapter -> its prompt, for prompt methods.

        Raises:
            AttributeError: the model has no prompt.
        """
        if not len(self.base_model.prompts):
            raise AttributeError(f"This {type(self).__name__} has no prompt, hence no prompt_encoder.")
        return shown.ShownModules(dict(self.base_model.prompts.items()))

    def get_prompt_embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        """The rows of a prompt, (length, width), as its file holds them."""
        return get_peft_model_state_dict(self, adapter_name=adapter_name)["prompt_embeddings"]

    @property
    def prompt_tokens(self) -> dict[str, torch.Tensor]:
        """adapter -> the numbers of its virtual tokens."""
        halves = {n: self.peft_config[n].num_transformer_submodules or 1 for n in self.base_model.prompts}
        return {n: torch.arange(p.length * halves[n]) for n, p in self.base_model.prompts.items()}

    @property
    def word_embeddings(self) -> nn.Module:
        """The base model's table of token embeddings."""
        return self.base_model.model.get_input_embeddings()

    # ---- the rest falls through -------------------------------------------------------------------------------------
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or name.startswith("__"):
                raise
            return getattr(self.base_model, name)


ROUTED = "routed"
"""What ``adapter_names`` says once the rows have been routed."""


@torch.compiler.disable
def _route(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Route a batch's rows before the forward: a compiled one would be bound to the names it was called with."""
    names = kwargs.get("adapter_names")
    if names is not None:
        _require_routable(model, names, args, kwargs)
    model.base_model.route(names)
    return args, kwargs if names is None else kwargs | {"adapter_names": ROUTED}


def _require_routable(model: Any, names: Sequence[str], args: tuple, kwargs: dict[str, Any]) -> None:
    """One known adapter for each row.

    Raises:
        ValueError: another number of names than rows, or names that no adapter has.
    """
    unknown = sorted({name for name in names if name != BASE and name not in model.base_model.configs})
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; there is no adapter named "
            f"'{unknown[0]}', this model has: {', '.join(model.base_model.configs)}."
        )
    given = [*args, *(kwargs.get(name) for name in ("input_ids", "inputs_embeds"))]
    batch = next((value.shape[0] for value in given if isinstance(value, torch.Tensor) and value.dim()), len(names))
    if len(names) != batch:
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {batch} respectively."
        )


def _adopted(
    model: nn.Module, config: PeftConfig, folder: Path, key_mapping: dict[str, str] | None, training: bool
) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """The settings and tensors of a folder as they fit ``model``, whose experts may have been fused since."""
    return old_experts.adopted(model, config, hub.renamed(checkpoint.read(folder), key_mapping), training)


def _own_members(config: Any, folder: Path) -> None:
    """Take a mixture's members from inside its own folder, where they were saved with it."""
    if issubclass(registry.of(str(config.peft_type)).build, Root):
        for name in config.adapters:
            if (folder / name / CONFIG_NAME).is_file():
                config.adapters[name] = str(folder / name)


def _has(model: nn.Module, name: str) -> bool:
    return any(path == name or path.endswith("." + name) for path, _ in model.named_modules())


def _checkpoints(model: nn.Module) -> bool:
    """Whether the base recomputes activations; transformers renamed the property in 5.23."""
    asked = getattr(model, "is_activation_checkpointing", None)
    return bool(getattr(model, "is_gradient_checkpointing", False) if asked is None else asked)


def _require_grad(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    if torch.is_grad_enabled() and output.is_floating_point():
        output.requires_grad_(True)


def _refuse_offload(asked: bool) -> None:
    if asked:
        raise NotImplementedError("ephemeral_gpu_offload=True is not built in: starts compute where the layer is.")
