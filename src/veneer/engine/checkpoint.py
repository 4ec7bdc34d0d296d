"""Adapters on disk: place + the adapter's own key, in safetensors; loaded strictly, straight into place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from veneer.core import lean, registry
from veneer.core.adapter import Adapter
from veneer.core.config import PeftConfig
from veneer.core.files import write_bytes
from veneer.core.parts import parts_of
from veneer.engine.load_report import LoadReport as LoadReport
from veneer.engine.tuner import Tuner

PREFIX = "base_model.model."
SHARED_PREFIX = "base_model."
SAFE_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
STATE_NAME = "adapter_training_state.safetensors"


def prompt_tensors(prompt: nn.Module) -> dict[str, Tensor]:
    """A prompt's tensors under their file keys."""
    return prompt.outgoing() if hasattr(prompt, "outgoing") else dict(prompt.state_dict())


def holders(tuner: Tuner, name: str) -> Iterator[tuple[str, nn.Module, Adapter | None]]:
    """(key prefix, module whose state_dict is saved, its adapter) for everything that one adapter saves."""
    own = SHARED_PREFIX if name in tuner.prompts else PREFIX  # the peer's prompts stand right at the base model
    for place, adapter in tuner.adapters(name):
        yield own + (place + "." if place else ""), adapter.holder, adapter
    if name in tuner.shared:
        yield SHARED_PREFIX, tuner.shared[name], None


def config(tuner: Tuner, name: str, convert: bool = True) -> PeftConfig:
    """The settings that go with ``tensors``."""
    own = tuner.configs[name]
    build = registry.of(str(own.peft_type)).build
    if not convert or not issubclass(build, Adapter):
        return own
    return build.original_config(own, [adapter for _, adapter in tuner.adapters(name)])


def tensors(
    tuner: Tuner, name: str, convert: bool = True, values: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """One adapter's tensors under their keys on disk; the adapter's name is in none of them.

    Args:
        tuner: the tuner that holds the adapter.
        name: the adapter.
        convert: where a start replaced base weights, give the adapter in the form that fits the original base.
        values: live tensor -> the one to take in its stead (gathered from shards, say).

    Raises:
        ValueError: no such adapter, or a tensor that is empty (a shard whose parts are elsewhere).
    """
    out: dict[str, Tensor] = {}
    for prefix, holder, adapter in holders(tuner, name):
        own = {key: values(value) if values else value for key, value in holder.state_dict().items()}
        if adapter is not None:
            own = adapter.outgoing(adapter.original_form(own) if convert else own)
        out |= {prefix + key: value for key, value in own.items()}
    if name in tuner.prompts:
        out |= {k: values(v) if values else v for k, v in prompt_tensors(tuner.prompts[name]).items()}
    empty = [key for key, value in out.items() if value.numel() == 0]
    if empty:
        raise ValueError(
            f"The tensor {empty[0]} is empty: its parts lie on other processes; gather them before saving."
        )
    return out


class Write(NamedTuple):
    """A tensor of a file, and the live one that takes its values."""

    holder: nn.Module
    key: str
    live: Tensor
    value: Tensor

    def do(self) -> None:
        """Copy into the live tensor; one on the meta device is replaced."""
        value = parts_of(self.live, self.value)
        if not self.live.is_meta:
            self.live.copy_(value)
            return
        path, _, leaf = self.key.rpartition(".")
        owner: Any = self.holder
        for part in path.split(".") if path else ():
            owner = owner._modules[part]
        if leaf in owner._parameters:
            if value.dtype is not self.live.dtype and self.live.is_floating_point():
                value = value.to(self.live.dtype)
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=self.live.requires_grad)
        else:
            owner._buffers[leaf] = value


def put(
    tuner: Tuner, name: str, found: dict[str, Tensor], strict: bool = True, ignore_mismatched_sizes: bool = False
) -> LoadReport:
    """Put tensors under file keys into one adapter.

    Args:
        tuner: the tuner that holds the adapter.
        name: the adapter.
        found: file key -> tensor.
        strict: refuse a file that does not fit exactly; nothing is changed then.
        ignore_mismatched_sizes: leave tensors of another shape out instead of refusing.

    Raises:
        ValueError: strict, and something is missing, unexpected or mis-shaped; the sentence says what and why.
    """
    report, left = LoadReport(), dict(found)
    writes: list[Write] = []
    longest_first = sorted(holders(tuner, name), key=lambda h: -len(h[0]))
    for prefix, holder, adapter in longest_first:
        expected = lean.saved(holder)
        if not expected:
            continue
        mine = {k[len(prefix) :]: left.pop(k) for k in _own_keys(prefix, left, expected, adapter)}
        mine = adapter.incoming(mine) if adapter is not None else mine
        expected = lean.saved(holder)  # incoming may have taken the file's layout
        report.missing_keys += [prefix + k for k in expected if k not in mine]
        report.unexpected_keys += [prefix + k for k in mine if k not in expected]
        for key, value in mine.items():
            if key in expected and expected[key].shape != value.shape:
                report.mismatched_keys.append((prefix + key, tuple(value.shape), tuple(expected[key].shape)))
            elif key in expected:
                writes.append(Write(holder, key, expected[key], value))
    if name in tuner.prompts:
        _put_prompt(tuner.prompts[name], left, report, writes)
    report.unexpected_keys += list(left)
    report.judge(name, strict, ignore_mismatched_sizes)
    _refuse_conflicts(writes, name)
    with torch.no_grad():
        for write in writes:
            write.do()
    with tuner.disabled():  # the base's own weights are in place, from which a start's are derived
        for _, _, adapter in longest_first:
            if adapter is not None:
                adapter.ready()
    tuner.refresh(name)
    report.loaded = len(writes)
    return report


def _own_keys(prefix: str, left: dict[str, Tensor], expected: dict[str, Tensor], adapter: Adapter | None) -> list[str]:
    if adapter is None:
        return [prefix + k for k in expected if prefix + k in left]
    exact = [prefix + k for k in adapter.outgoing(dict(expected)) if prefix + k in left]
    return exact or [
        k
        for k in left
        if k.startswith(prefix) and "." not in k[len(prefix) :].removesuffix(".weight").removesuffix(".bias")
    ]


def _refuse_conflicts(writes: list[Write], name: str) -> None:
    """Layers that share a tensor must find the same values in the file: the last one would win in silence."""
    seen: dict[int, Write] = {}
    for write in writes:
        first = seen.setdefault(id(write.live), write)
        if first is not write and not torch.equal(first.value, write.value):
            raise ValueError(
                f"Adapter '{name}' shares one tensor between layers here, but the file has different values for it "
                f"({first.key}); it was likely trained with other names in target_modules. Nothing was loaded."
            )


def _put_prompt(prompt: nn.Module, left: dict[str, Tensor], report: LoadReport, writes: list[Write]) -> None:
    own = {k: left.pop(k) for k in list(left)}
    own = prompt.incoming(own) if hasattr(prompt, "incoming") else own
    expected = lean.saved(prompt)  # incoming may have taken the file's layout
    report.missing_keys += [k for k in expected if k not in own]
    for key, value in own.items():
        if key not in expected:
            left[key] = value
        elif expected[key].shape != value.shape:
            report.mismatched_keys.append((key, tuple(value.shape), tuple(expected[key].shape)))
        else:
            writes.append(Write(prompt, key, expected[key], value))


def write(folder: str | Path, found: dict[str, Tensor], safe: bool = True) -> Path:
    """Write tensors into an adapter folder, atomically; equal tensors give equal bytes.

    Raises:
        OSError: the disk is full or not writable; a file that stood there before is untouched.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {k: v.detach().to("cpu").contiguous() for k, v in sorted(found.items())}
    seen: dict[int, str] = {}
    for key, value in plain.items():
        if value.data_ptr() in seen and value.numel():
            plain[key] = value.clone()
        seen[plain[key].data_ptr()] = key
    path = folder / (SAFE_NAME if safe else BIN_NAME)
    if safe:
        write_bytes(path, lambda temporary: save_file(plain, temporary, metadata={"format": "pt"}))
    else:
        write_bytes(path, lambda temporary: torch.save(plain, temporary))
    return path


def read(folder: str | Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors of an adapter folder: memory-mapped safetensors, or a ``.bin`` of plain tensors only.

    Raises:
        FileNotFoundError: the folder holds neither.
        ValueError: the file is truncated or malformed.
    """
    folder = Path(folder)
    path = folder / SAFE_NAME
    if path.is_file():
        try:
            return _mapped(path) if str(device) == "cpu" else load_file(path, str(device))
        except Exception as error:
            raise ValueError(f"{path} is truncated or no safetensors file: {error}.") from error
    path = folder / BIN_NAME
    if path.is_file():
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:
            raise ValueError(f"{path} cannot be read as plain tensors (weights_only=True): {error}.") from error
    raise FileNotFoundError(
        f"{folder} holds neither {SAFE_NAME} nor {BIN_NAME}, so there are no adapter weights to load."
    )


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def _mapped(path: Path) -> dict[str, Tensor]:
    """A file's tensors as views of its memory map: of many small ones, safetensors' own way takes four times as long.

    Its own reader checks the file first; another dtype, or a tensor that does not lie straight, is left to it.
    """
    with safe_open(path, framework="pt") as file, open(path, "rb") as raw:
        start = 8 + int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(start - 8))
        header.pop("__metadata__", None)
        data = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
        found = {}
        for key, entry in header.items():
            dtype, at = DTYPES.get(entry["dtype"]), start + entry["data_offsets"][0]
            if dtype is None or at % dtype.itemsize:
                found[key] = file.get_tensor(key)
            else:
                found[key] = torch.empty(0, dtype=dtype).set_(data, at // dtype.itemsize, entry["shape"])  # type: ignore[call-overload]
        return found


def write_training_state(folder: str | Path, tuner: Tuner) -> None:
    """Write what the methods have gathered between steps (AdaLoRA's scores), where there is any."""
    found = {
        f"{name}/{place}/{key}": value.detach().cpu().contiguous()
        for name in tuner.configs
        for place, adapter in tuner.adapters(name)
        for key, value in adapter.training_state().items()
    }
    if found:
        write_bytes(Path(folder) / STATE_NAME, lambda temporary: save_file(found, temporary))


def read_training_state(folder: str | Path, tuner: Tuner) -> None:
    """Give the methods back what an earlier run had gathered, if that run wrote any."""
    path = Path(folder) / STATE_NAME
    if not path.is_file():
        return
    with safe_open(path, framework="pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    for name in tuner.configs:
        for place, adapter in tuner.adapters(name):
            prefix = f"{name}/{place}/"
            adapter.resume({k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)})
