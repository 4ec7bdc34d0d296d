"""Adapter settings: dataclasses with the fields, names and defaults of ``adapter_config.json``."""

from __future__ import annotations

import copy
import dataclasses
import enum
import inspect
import json
import warnings
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.core import registry
from veneer.core.errors import NotFound
from veneer.core.files import write_text
from veneer.core.patterns import nearest, search_suffix
from veneer.core.registry import PeftType

CONFIG_NAME = "adapter_config.json"
PEFT_VERSION = "0.21.2"
"""The version of the peer whose file format and public API these files follow."""


class TaskType(str, enum.Enum):
    """What the adapted model is for; decides the ``PeftModelFor...`` class."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"

    def __str__(self) -> str:
        return self.value


def newer(default: Any = None, **kwargs: Any) -> Any:
    """A field that is left out of the file at its default, so that older readers understand the file."""
    metadata = {"newer": True}
    if isinstance(default, dict | list | set):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata, **kwargs)
    return field(default=default, metadata=metadata, **kwargs)


class _Checked(type):
    """Answers an unknown field with its nearest names, before the dataclass would say less."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in _names(cls):
                near = nearest(name, sorted(_names(cls)))
                hint = f"; did you mean {' or '.join(near)}?" if near else "."
                raise TypeError(f"{cls.__name__} has no field '{name}' (unexpected keyword argument){hint}")
        return super().__call__(*args, **kwargs)

    @property
    def __signature__(cls) -> inspect.Signature:
        """The fields: what ``inspect`` would not see behind this class's own call."""
        own = inspect.signature(cls.__init__)
        return own.replace(parameters=list(own.parameters.values())[1:], return_annotation=cls)


@dataclass
class PeftConfig(metaclass=_Checked):
    """One adapter's settings.

    ``PeftConfig.read(folder)`` and ``config.write(folder)`` map it to ``adapter_config.json`` and back; keys of a newer
    writer that this version does not know are kept and written again.

    Attributes:
        task_type: what the model is for: CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, TOKEN_CLS, QUESTION_ANS or
            FEATURE_EXTRACTION.
        peft_type: the method's name in the file; the config class sets it.
        auto_mapping: class and module of the base model, written for models without a task, so that a loader can build
            it.
        peft_version: version of the writer, as the file says it.
        base_model_name_or_path: the base model's hub id or folder; written at save.
        revision: the base model's revision on the hub.
        inference_mode: freeze the adapter where it is planted; files are written with True.

    Raises:
        ValueError: an invalid ``task_type`` or an unknown ``peft_type``.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, str] | None = None
    peft_version: str | None = newer()
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    type: ClassVar[str | None] = None
    """The ``peft_type`` a subclass stands for."""

    if TYPE_CHECKING:  # each method adds fields of its own

        def __getattr__(self, name: str) -> Any: ...

    patterns: ClassVar[dict[str, str]] = {}
    """pattern field -> the field whose value it sets for one layer."""
    nested: ClassVar[dict[str, Any]] = {}
    """field -> the dataclass its dict form is turned into."""
    is_prompt_learning: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.unknown: dict[str, Any] = {}
        self.from_file = False  # whether its words are another's, which may name modules of more than one model
        if self.task_type is not None and str(self.task_type) not in list(map(str, TaskType)):
            raise ValueError(
                f"Invalid task type: '{self.task_type}'. task_type must be one of {', '.join(map(str, TaskType))}."
            )
        if self.task_type is not None:
            self.task_type = TaskType(str(self.task_type))
        if self.type is not None:
            self.peft_type = PeftType.add(self.type)
        elif self.peft_type is not None:
            self.peft_type = registry.of(self.peft_type).peft_type
        for name, cls in self.nested.items():
            setattr(self, name, self._as(cls, name, getattr(self, name)))

    def _as(self, cls: Any, name: str, value: Any) -> Any:
        if isinstance(value, dict) and (value or name == "runtime_config"):
            return cls(**value)
        if value and not isinstance(value, cls):
            raise TypeError(f"{name} must be a {cls.__name__} or a dict, not {type(value).__name__}.")
        return value

    def check(self) -> None:
        """Refuse settings that cannot work; called before an adapter is made. Override to add a method's rules."""

    # ---- one layer's settings -------------------------------------------------------------------------------------
    def at(self, path: str) -> PeftConfig:
        """The settings for the layer at ``path``: ``rank_pattern`` and its kin resolved, here alone."""
        changes: dict[str, Any] = {}
        for pattern_field, target in self.patterns.items():
            for key, value in (getattr(self, pattern_field, None) or {}).items():
                if search_suffix(key, path):
                    changes[target] = value
                    break
        if not changes:
            return self
        one = copy.copy(self)
        for name, value in changes.items():
            setattr(one, name, value)
        return one

    # ---- files ----------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Every field that a file may hold, as plain data, in the order of declaration."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if not f.metadata.get("never_saved")}

    def file_dict(self) -> dict[str, Any]:
        """What the file holds: newer fields only where they are set, sets as sorted lists."""
        out = dict(self.unknown)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.metadata.get("newer") and _is_default(f, value):
                continue
            if not f.metadata.get("never_saved"):
                out[f.name] = _plain(value)
        return out

    def write(self, folder: str | Path, inference_mode: bool = True) -> None:
        """Write ``adapter_config.json`` into ``folder``: atomically, byte for byte the same for equal settings.

        Args:
            folder: made if need be.
            inference_mode: what the file says of it; a saved adapter is there to be used.

        Raises:
            TypeError: a field holds something JSON cannot hold; nothing is written then.
        """
        version = self.peft_version or PEFT_VERSION
        values = self.file_dict() | {"inference_mode": inference_mode, "peft_version": version}
        try:
            text = json.dumps(values, indent=2, sort_keys=True)
        except TypeError as error:
            bad = [k for k, v in values.items() if not _is_json(v)]
            raise TypeError(f"The config fields {bad} cannot be written as JSON: {error}.") from error
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_text(Path(folder) / CONFIG_NAME, text)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """``write`` under the name people know, with ``inference_mode`` as it is.

        Raises:
            AssertionError: ``save_directory`` is a file.
        """
        assert not Path(save_directory).is_file(), f"Provided path ({save_directory}) should be a directory, not a file"
        self.write(save_directory, self.inference_mode)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "the config") -> PeftConfig:
        """Build the config class that ``values['peft_type']`` names.

        Raises:
            ValueError: no or an unknown ``peft_type``, or one that is not the class this was called on.
        """
        values = dict(values)
        kind = values.get("peft_type") or cls.type
        if kind is None:
            if cls is PeftConfig or "task_type" in values:
                return PeftConfig(**{k: v for k, v in values.items() if k in _names(PeftConfig)})
            raise ValueError(f"{source} names no peft_type, so its method is unknown.")
        found = registry.of(kind).config
        if cls.type is not None and found is not cls:
            raise ValueError(
                f"{source} is for {kind}, but {cls.__name__} was asked to read it; use {found.__name__} or PeftConfig."
            )
        values.pop("runtime_config", None)
        names = _names(found)
        unknown = {k: values.pop(k) for k in list(values) if k not in names}
        if unknown:
            written = values.get("peft_version")
            hint = f" (written by version {written})" if written else ""
            warnings.warn(
                f"Unexpected keyword arguments {sorted(unknown)} for class {found.__name__} in {source}{hint}: these "
                "are ignored, but kept and written again.",
                stacklevel=3,
            )
        config = found(**values)
        config.unknown = unknown
        config.from_file = True
        return config

    @classmethod
    def from_json_file(cls, path: str | Path, **kwargs: Any) -> dict[str, Any]:
        """The plain dict of a config file.

        Raises:
            ValueError: the file is not valid JSON or not an object.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a JSON object, not a {type(values).__name__}.")
        return values

    @classmethod
    def read(cls, folder: str | Path) -> PeftConfig:
        """Read ``adapter_config.json`` from ``folder``; the class is picked by its ``peft_type``.

        Raises:
            FileNotFoundError: the folder has no such file.
            ValueError: the file is malformed.
        """
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            raise NotFound(
                f"Can't find '{CONFIG_NAME}' at '{folder}': it holds no {CONFIG_NAME}, so it is not an adapter folder."
            )
        try:
            return cls.from_dict(cls.from_json_file(path), source=str(path))
        except TypeError as error:
            raise ValueError(f"{path} has a malformed field: {error}.") from error

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read the config of an adapter: a local folder or a hub id. See ``veneer.hf.hub`` for the hub arguments."""
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        if not folder.is_dir():
            from veneer.core.files import fetch  # the hub is reached through a hook that hf fills in

            folder = fetch(str(pretrained_model_name_or_path), CONFIG_NAME, subfolder=subfolder, **kwargs).parent
        config = cls.read(folder)
        for name in [k for k in kwargs if k in _names(type(config))]:
            setattr(config, name, kwargs[name])
        return config

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """The config class for ``kwargs['peft_type']``, built from the rest."""
        return cls.from_dict(kwargs)


@dataclass
class LayerConfig(PeftConfig):
    """Settings of methods that sit at layers: where to sit, what else to train. The engine serves them all.

    Attributes:
        target_modules: layers to sit at: names (path ends), one regex over whole paths, or "all-linear"; None takes the
            usual layers of a known architecture.
        exclude_modules: of these, the layers to leave out; names or one regex.
        modules_to_save: modules that are trained whole and saved with the adapter, such as a new head.
        layers_to_transform: only the blocks with these indices.
        layers_pattern: name of the list that holds the blocks, if it is not found by itself.
        target_parameters: paths of bare parameters, such as those of fused experts.
        trainable_token_indices: rows of the embedding to train: a list, or a dict from an embedding's name to its rows.
        ensure_weight_tying: train and save what is tied to an embedding together with it.
        bias: which of the base's biases train: "none", "all", or this method's own layers' (such as "lora_only").
        fan_in_fan_out: the layer stores (in, out), as transformers' Conv1D; known layers are recognised without it.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = newer()
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = newer()
    layers_pattern: list[str] | str | None = newer()
    target_parameters: list[str] | None = newer()
    trainable_token_indices: list[int] | dict[str, list[int]] | None = newer()
    ensure_weight_tying: bool = newer(False)
    bias: str = newer("none")
    fan_in_fan_out: bool = newer(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                setattr(self, name, set(value))
        if isinstance(self.modules_to_save, tuple | set):
            self.modules_to_save = sorted(self.modules_to_save)
        if isinstance(self.target_parameters, str):
            raise TypeError(f"target_parameters must be a list of names, not the str '{self.target_parameters}'.")
        for name in ("layers_to_transform", "layers_pattern"):
            if (
                isinstance(self.target_modules, str)
                and self.target_modules != "all-linear"
                and getattr(self, name) is not None
            ):
                raise ValueError(f"{name} cannot be used when target_modules is a str (a regex); give a list of names.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform to be set as well.")
        own = f"{(self.type or 'x').lower()}_only"
        if self.bias not in ("none", "all") and not self.bias.endswith("_only"):
            raise ValueError(f"bias must be 'none', 'all' or '{own}', not '{self.bias}'.")


def _names(cls: type) -> set[str]:
    return {f.name for f in fields(cls)}


def _plain(value: Any) -> Any:
    if isinstance(value, PeftType):
        return value.value
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(_plain(v) for v in value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if hasattr(value, "items") and hasattr(value, "keys"):  # OmegaConf's DictConfig and its like
        return {k: _plain(v) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return value


def _is_default(f: dataclasses.Field, value: Any) -> bool:
    default = f.default_factory() if f.default_factory is not MISSING else f.default
    return bool(value == default)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
