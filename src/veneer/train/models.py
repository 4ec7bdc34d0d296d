"""Base models and tokenizers, loaded with the dtype, threads and device that suit the machine."""

from __future__ import annotations

import copy
import difflib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from veneer.core.backends import keep_layout
from veneer.core.nf4_linear import quantize_model
from veneer.hf import packed_base  # has transformers read bases that were saved packed, too
from veneer.train.config import Model

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
}


def quiet() -> None:
    """Leave the terminal to our own progress and sentences."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def device_of(model: Model) -> torch.device:
    """The device to use: the one asked for, else an accelerator, else the CPU.

    Raises:
        ValueError: the device does not exist here.
    """
    if model.device == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        return torch.empty(0, device=model.device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"model.device '{model.device}' cannot be used here: {str(error).splitlines()[0]}") from None


def dtype_of(model: Model, device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it fast, else float32: on plain CPUs bfloat16 is the slower one."""
    if model.dtype != "auto":
        return getattr(torch, model.dtype)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


def threads(wanted: int | str) -> int:
    """Set torch's thread count; ``auto`` counts the cores this process may use, quota included."""
    if wanted == "auto":
        if "OMP_NUM_THREADS" in os.environ:
            return torch.get_num_threads()
        wanted = min(torch.get_num_threads(), _cores())
    torch.set_num_threads(int(wanted))
    return int(wanted)


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, max(1, round(int(limit) / int(period))))
    return cores


def load_config(model: Model) -> Any:
    """The base's config.

    Raises:
        OSError: no such folder or id, in one sentence.
    """
    return _loading(model, model.path, lambda: AutoConfig.from_pretrained(model.path, **_common(model)))


def load_tokenizer(model: Model) -> Any:
    """The tokenizer, with ``model.chat_template`` in place if one is named.

    Raises:
        OSError: no such folder or id, or no such template file.
    """
    path = model.tokenizer or model.path
    tokenizer = _loading(model, path, lambda: AutoTokenizer.from_pretrained(path, **_common(model)))
    if model.chat_template:
        file = Path(model.chat_template)
        if model.chat_template not in TEMPLATES and not file.is_file():
            raise FileNotFoundError(
                f"There is no chat template '{file}' (model.chat_template): name a file, or {' or '.join(TEMPLATES)}."
            )
        tokenizer.chat_template = TEMPLATES.get(model.chat_template) or file.read_text(encoding="utf-8")
    return tokenizer


def load_model(
    model: Model,
    dtype: torch.dtype | None = None,
    auto: str = "AutoModelForCausalLM",
    config: Any = None,
    dense: Sequence[str] = (),
    more: dict[str, Any] | None = None,
) -> nn.Module:
    """The base model on its device, in evaluation mode.

    Args:
        model: which model, and how.
        dtype: in place of ``model.dtype``.
        auto: transformers' class that loads it.
        config: the base's config where it is not the stored one, such as one that names classes.
        dense: layers that quantisation leaves alone, such as a head that trains.
        more: what else ``from_pretrained`` is told.

    Raises:
        OSError: no such folder or id.
        ValueError: the device, or an attention implementation, cannot be used here.
    """
    device = device_of(model)
    options = _common(model) | {"dtype": dtype or dtype_of(model, device)} | (more or {})
    if model.attention != "auto":
        options["attn_implementation"] = model.attention
    if config is not None:
        options["config"] = copy.deepcopy(config)  # which the loaded model keeps and changes
    if dense:
        options["ignore_mismatched_sizes"] = True  # a stored head of other classes gives way to a new one
    packs = model.quantize != "none" and not _built_in(model, device)
    if packs:
        options |= {"quantization_config": _quantization(model, options["dtype"], dense), "device_map": {"": device}}
    loaded = _loading(model, model.path, lambda: getattr(transformers, auto).from_pretrained(model.path, **options))
    if packs:
        keep_layout(loaded)
        return loaded.eval()
    if model.quantize != "none":
        loaded = quantize_model(loaded, skip=_unpacked(loaded, dense), double_quant=model.double_quant)
    return loaded.to(device).eval()


def _built_in(model: Model, device: torch.device) -> bool:
    """Whether our own NF4 serves: everywhere but on CUDA with bitsandbytes, whose kernels are the faster ones there."""
    return model.quantize == "nf4" and not (device.type == "cuda" and importlib.util.find_spec("bitsandbytes"))


def _quantization(model: Model, dtype: torch.dtype, dense: Sequence[str]) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"model.quantize {model.quantize} needs the package bitsandbytes: pip install bitsandbytes.")
    # Names given here take the place of those that transformers leaves alone by itself.
    skipped = {"llm_int8_skip_modules": [*dense, "lm_head"]} if dense else {}
    if model.quantize == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, **skipped)
    return transformers.BitsAndBytesConfig(
        **skipped,
        load_in_4bit=True,
        bnb_4bit_quant_type=model.quantize.removeprefix("bnb-"),
        bnb_4bit_use_double_quant=model.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def meta_model(
    model: Model, config: Any, dtype: torch.dtype, auto: str = "AutoModelForCausalLM", dense: Sequence[str] = ()
) -> nn.Module:
    """The model without its weights: names and shapes only."""
    with torch.device("meta"):
        skeleton = getattr(transformers, auto).from_config(
            config, dtype=dtype, trust_remote_code=model.trust_remote_code
        )
    four_bit = model.quantize in ("nf4", "bnb-nf4", "fp4")  # which take the same bytes, whoever packs them
    if not four_bit:
        return packed_base.make_room(skeleton, getattr(config, "quantization_config", None))
    return quantize_model(skeleton, skip=_unpacked(skeleton, dense), double_quant=model.double_quant)


def _unpacked(model: nn.Module, dense: Sequence[str]) -> list[str]:
    """Layers that stay as they are: the named ones, and those whose weight's dtype the model looks at (T5's wo)."""
    return [*dense, *(getattr(model, "_keep_in_fp32_modules", None) or [])]


def _common(model: Model) -> dict[str, Any]:
    return {"revision": model.revision, "trust_remote_code": model.trust_remote_code}


def _loading(model: Model, path: str, load: Any) -> Any:
    if not Path(path).exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        parent = Path(path).parent
        near = difflib.get_close_matches(
            Path(path).name, [p.name for p in parent.iterdir()] if parent.is_dir() else [], 1
        )
        raise FileNotFoundError(
            f"There is no model folder '{path}'" + (f"; did you mean {parent / near[0]}?" if near else ".")
        )
    try:
        return load()
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"The model '{path}' could not be loaded: {reason}") from error


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest, of the device on CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows, and only here
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory(device: torch.device) -> int:
    """Bytes in use now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory(device)
