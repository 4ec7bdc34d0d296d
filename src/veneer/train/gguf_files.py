"""GGUF, llama.cpp's format: a LoRA adapter, or a merged model made of a GGUF of the base.

llama.cpp rotates neighbouring pairs of q and k where Hugging Face's Llama rotates halves, so the rows of these two
weights, and of their lora_B with them, stand in another order: of each head's (2, d/2) rows it has (d/2, 2). It scales
by alpha / r, with one alpha for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from veneer.train.plain_lora import PlainLora

Array = NDArray[Any]
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2",
    "gemma3_text": "gemma3", "phi3": "phi3", "starcoder2": "starcoder2",
}  # fmt: skip
"""model_type of a Hugging Face config -> llama.cpp's name."""
REORDERED = {"llama"}
KINDS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
"""What changed weights of a merged model may be stored as."""
OWN = ("GGUF.",)  # fields of the file, not of the model


@dataclass(frozen=True)
class Shape:
    """What has to be known of a base to name and order its weights."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int

    def name(self, place: str) -> str:
        """``model.layers.0.self_attn.q_proj`` as ``blk.0.attn_q``.

        Raises:
            ValueError: llama.cpp has no weight for it.
        """
        table = gguf.get_tensor_name_map(_architecture(self.architecture), self.layers)
        found = table.get_name(place)
        if found is None:
            raise ValueError(f"llama.cpp's architecture '{self.architecture}' has no weight for '{place}'.")
        return found

    def rows(self, place: str, matrix: Array) -> Array:
        """The rows of ``matrix`` (out, any) in llama.cpp's order."""
        part = place.rpartition(".")[2]
        if self.architecture not in REORDERED or part not in ("q_proj", "k_proj"):
            return matrix
        heads = self.heads if part == "q_proj" else self.kv_heads
        split = matrix.reshape(heads, 2, -1, matrix.shape[-1])
        return np.ascontiguousarray(split.swapaxes(1, 2).reshape(matrix.shape))


def shape_of_config(config: Any) -> Shape:
    """From a Hugging Face config.

    Raises:
        ValueError: an architecture whose weights we cannot name.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    architecture = ARCHITECTURES.get(text.model_type)
    if architecture is None:
        raise ValueError(
            f"GGUF adapters are written for {', '.join(ARCHITECTURES)}; this base is a '{text.model_type}'. Merge it "
            "with `veneer merge` and convert the merged model with llama.cpp's own script."
        )
    heads = text.num_attention_heads
    return Shape(architecture, text.num_hidden_layers, heads, getattr(text, "num_key_value_heads", None) or heads)


def shape_of_file(path: str | Path) -> Shape:
    """From a GGUF of the base.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no GGUF of a model.
    """
    fields = _open(path).fields
    name = str(fields["general.architecture"].contents())
    if name not in ARCHITECTURES.values():
        raise ValueError(f"'{path}' is a '{name}'; known are {', '.join(dict.fromkeys(ARCHITECTURES.values()))}.")
    heads = int(fields[f"{name}.attention.head_count"].contents())
    key = f"{name}.attention.head_count_kv"
    kv_heads = int(fields[key].contents()) if key in fields else heads
    return Shape(name, int(fields[f"{name}.block_count"].contents()), heads, kv_heads)


def write_adapter(path: str | Path, lora: PlainLora, shape: Shape, kind: str = "f16") -> None:
    """A LoRA adapter for llama.cpp's ``--lora``.

    Args:
        path: the file to write.
        lora: any ranks and scales; what differs from alpha / r goes into B.
        shape: of the base.
        kind: f32, f16 or bf16.

    Raises:
        ValueError: a place that llama.cpp has no weight for.
    """
    even = lora.even()
    tensors: dict[str, Array] = {}
    for place, (a, b) in even.factors.items():
        name = shape.name(place)
        tensors[f"{name}.weight.lora_a"] = a.float().numpy()
        tensors[f"{name}.weight.lora_b"] = shape.rows(place, b.float().numpy())
    writer = gguf.GGUFWriter(str(path), shape.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(even.config["lora_alpha"]))
    base = lora.config.get("base_model_name_or_path")
    if base:
        writer.add_string("general.base_model.0.name", str(base))
    for name, values in tensors.items():
        _add(writer, name, values, KINDS[kind])
    _finish(writer)


def write_merged(path: str | Path, source: str | Path, lora: PlainLora, kind: str = "f16") -> int:
    """The base of ``source`` with the adapter added: its metadata and unchanged tensors as they are.

    Args:
        path: the file to write.
        source: a GGUF of the base, of any quantisation.
        lora: what is added, in float32.
        kind: what changed weights are stored as. To store them as coarsely as the source would round most of a small
            change away.

    Returns:
        How many weights have changed.

    Raises:
        FileNotFoundError: there is no ``source``.
        ValueError: a place that it has no weight for, or one of another shape.
    """
    reader, shape = _open(source), shape_of_file(source)
    places = {f"{shape.name(place)}.weight": place for place in lora.factors}
    missing = sorted(places.keys() - {tensor.name for tensor in reader.tensors})
    if missing:
        raise ValueError(f"'{source}' has no weight {missing[0]}, which the adapter changes.")
    writer = gguf.GGUFWriter(str(path), shape.architecture, use_temp_file=True)
    _copy_fields(reader, writer)
    for tensor in reader.tensors:
        place = places.get(tensor.name)
        if place is None:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        a, b = (factor.float() for factor in lora.factors[place])
        change = shape.rows(place, (lora.scales[place] * torch.mm(b, a)).numpy())
        if change.shape != weight.shape:
            raise ValueError(
                f"{tensor.name} is {_size(weight)} in '{source}', and the adapter was trained on {_size(change)}; they "
                "do not belong together."
            )
        _add(writer, tensor.name, weight + change, KINDS[kind])
    _finish(writer)
    return len(places)


def _add(writer: gguf.GGUFWriter, name: str, values: Array, kind: Kind) -> None:
    if kind in (Kind.F32, Kind.F16):
        writer.add_tensor(name, values.astype(np.float16 if kind == Kind.F16 else np.float32))
        return
    if kind == Kind.Q8_0 and values.shape[-1] % 32:  # its blocks are of 32 values
        kind = Kind.BF16
    writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_fields(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    for name, field in _fields(reader):
        sub = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], sub)


def _fields(reader: gguf.GGUFReader) -> Iterator[tuple[str, Any]]:
    """The metadata; the architecture is written by the writer itself."""
    for name, field in reader.fields.items():
        if not name.startswith(OWN) and name != "general.architecture":
            yield name, field


def _open(path: str | Path) -> gguf.GGUFReader:
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    try:
        reader = gguf.GGUFReader(str(path))
    except Exception as error:  # the reader lets through whatever a broken file makes it trip over
        raise ValueError(f"'{path}' is no GGUF file, or a damaged one ({error}).") from None
    if "general.architecture" not in reader.fields:
        raise ValueError(f"'{path}' does not say its architecture, so it is no model.")
    return reader


def _architecture(name: str) -> Any:
    return next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)


def _size(matrix: Array) -> str:
    return "x".join(map(str, matrix.shape))
