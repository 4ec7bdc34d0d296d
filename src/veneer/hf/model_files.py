"""A PeftModel's adapters on disk and on the hub: saved, loaded beside others, or with their base model."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from veneer.core import lean, registry
from veneer.core.config import CONFIG_NAME, PeftConfig
from veneer.core.root import Root
from veneer.engine import checkpoint
from veneer.hf import card, experts, hub, old_experts
from veneer.hf.model_tree import Tree
from veneer.hf.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from veneer.hf.tuner import meta_to_layers

if TYPE_CHECKING:
    from typing import Self


class Files(Tree):
    """What of a PeftModel reads and writes."""

    @classmethod
    def of_task(cls, task_type: Any) -> Any:
        """The class for a task's models."""
        return cls

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
    ) -> Self:
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
        whole = cls.of_task(config.task_type)(
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
            warnings.warn(report.sentence(), stacklevel=4)
        return report

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Save to a temporary folder and upload it; see ``huggingface_hub.upload_folder`` for the arguments."""
        return hub.push(self, repo_id, **kwargs)

    def create_or_update_model_card(self, output_dir: str) -> None:
        card.write_card(Path(output_dir), self.peft_config, self)


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


def _refuse_offload(asked: bool) -> None:
    if asked:
        raise NotImplementedError("ephemeral_gpu_offload=True is not built in: starts compute where the layer is.")
