"""AutoPeftModel: an adapter's folder or id in, its base model with the adapter on it out."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, ClassVar

from safetensors import safe_open
from torch import nn

from veneer.core.config import PeftConfig
from veneer.engine.checkpoint import SAFE_NAME
from veneer.hf import embeddings, hub
from veneer.hf.tasks import PeftModel, task_class

PARENTS = ("transformers", "diffusers", "lerobot", "megatron_core")
"""The libraries that a config's ``auto_mapping`` may name: a file never chooses what else is imported."""

BASES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""Task -> transformers' class for the base model."""

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")

_OURS = frozenset(
    {
        "autocast_adapter_dtype", "ephemeral_gpu_offload", "low_cpu_mem_usage", "key_mapping", "strict", "subfolder",
        "ignore_mismatched_sizes",
    }
)  # fmt: skip
"""Arguments of the adapter's loading; all others are the base model's."""


class AutoPeftModel:
    """Finds the base model by the adapter's config. Not to be made; call ``from_pretrained``."""

    task: ClassVar[str | None] = None

    def __init__(self, *args: Any, **kwargs: Any):
        raise OSError(f"{type(self).__name__} is made with {type(self).__name__}.from_pretrained(path_or_id) only.")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The base model that an adapter names, with the adapter on it.

        A tokenizer stored beside the adapter tells the vocabulary: the base's embeddings are resized to it.

        Args:
            pretrained_model_name_or_path: the adapter's folder or hub id.
            adapter_name: the name the adapter gets.
            is_trainable: whether it trains on.
            config: settings instead of the folder's own.
            revision: the adapter's revision on the hub; the base's stands in the config.
            kwargs: ``subfolder``, ``strict``, ... for the adapter, ``token``, ``cache_dir``, ... for both, everything
                else (``dtype``, ``device_map``, ``trust_remote_code``, ...) for the base model.

        Raises:
            FileNotFoundError: no such adapter.
            ValueError: another task than this class is for, or a base model that cannot be told.
        """
        own = {k: v for k, v in kwargs.items() if k in _OURS and k != "subfolder"}
        where = hub.arguments(kwargs) | ({"revision": revision} if revision else {})
        folder = hub.resolve(str(pretrained_model_name_or_path), kwargs.get("subfolder"), **where)
        config = config if config is not None else PeftConfig.read(folder)
        build = cls._base_class(config)
        if not config.base_model_name_or_path:
            raise ValueError(
                f"The config of '{pretrained_model_name_or_path}' names no base model (base_model_name_or_path); load "
                "the base yourself and call PeftModel.from_pretrained(base, path)."
            )
        others = {k: v for k, v in kwargs.items() if k not in _OURS and k != "use_auth_token"}
        if config.revision:
            others["revision"] = config.revision
        base = build.from_pretrained(config.base_model_name_or_path, **others)
        resize_embeddings(base, folder)
        return task_class(config).from_pretrained(base, str(folder), adapter_name, is_trainable, config, **own)

    @classmethod
    def _base_class(cls, config: PeftConfig) -> Any:
        task = str(config.task_type) if config.task_type is not None else None
        if cls.task is not None and task is not None and task != cls.task:
            right = next(c.__name__ for c in CLASSES if c.task == task)
            raise ValueError(f"This adapter is for {task}, but {cls.__name__} is for {cls.task}; use {right}.")
        if cls.task is None and task is None:
            return _by_mapping(config)
        import transformers

        return getattr(transformers, BASES[cls.task or task or ""])


def _by_mapping(config: PeftConfig) -> Any:
    """The class that ``auto_mapping`` names, out of one of the few libraries that may be named.

    Raises:
        ValueError: no mapping, or one to another library or to no model class.
    """
    mapping = config.auto_mapping or {}
    library, name = mapping.get("parent_library"), mapping.get("base_model_class")
    if not library or not name:
        raise ValueError(
            "The adapter's config has neither a task_type nor an auto_mapping, so the class of its base model cannot "
            "be told; load the base yourself and call PeftModel.from_pretrained(base, path)."
        )
    root = str(library).split(".")[0].replace("-", "_")
    if root not in PARENTS:
        raise ValueError(
            f"The adapter's config wants its base model from the library '{library}', which is none of "
            f"{', '.join(PARENTS)}; nothing was imported. If you trust it, load the base yourself and call "
            "PeftModel.from_pretrained(base, path)."
        )
    found = getattr(importlib.import_module(root), str(name), None)
    if not (isinstance(found, type) and hasattr(found, "from_pretrained")):
        raise ValueError(f"{root} has no model class '{name}', which the adapter's config names as its base model's.")
    return found


def resize_embeddings(base: Any, folder: Path) -> None:
    """Give the base the vocabulary the adapter was trained with.

    That is the size of an embedding table in the adapter's file, else of a longer tokenizer stored beside it. A shorter
    tokenizer says nothing: many models pad their tables.
    """
    if not hasattr(base, "resize_token_embeddings"):
        return
    have = base.get_input_embeddings().weight.shape[0]
    rows = _rows_in_file(base, folder) or max(have, _tokenizer_length(folder))
    if rows != have:
        base.resize_token_embeddings(rows)


def _rows_in_file(base: nn.Module, folder: Path) -> int | None:
    path = folder / SAFE_NAME
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
        for table in embeddings.tables(base):
            for key in table.file_keys():
                if key in keys:
                    return int(file.get_slice(key).get_shape()[0])
    return None


def _tokenizer_length(folder: Path) -> int:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return 0
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """``AutoPeftModel`` for causal language models."""

    task = "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """``AutoPeftModel`` for encoder-decoder language models."""

    task = "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """``AutoPeftModel`` for sequence classifiers."""

    task = "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """``AutoPeftModel`` for token classifiers."""

    task = "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """``AutoPeftModel`` for extractive question answering."""

    task = "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """``AutoPeftModel`` for encoders that give embeddings."""

    task = "FEATURE_EXTRACTION"


CLASSES = (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForFeatureExtraction,
)
