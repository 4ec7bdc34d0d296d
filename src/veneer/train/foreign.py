"""Flags of PEFT's SFT example and of scripts around it, as our settings, each with a word on what became of it."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.train import rows as files

SEVEN = "q_proj,k_proj,v_proj,o_proj,down_proj,up_proj,gate_proj"

SAME = {  # their flag -> our key, value as it is
    "model_name_or_path": "model.path",
    "trust_remote_code": "model.trust_remote_code",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "packing": "data.packing",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "eval.batch_size",
    "gradient_accumulation_steps": "train.accumulate",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "learning_rate": "train.learning_rate",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.clip",
    "optim": "train.optimizer",
    "seed": "train.seed",
    "dataloader_num_workers": "train.workers",
    "eval_steps": "eval.every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep",
    "logging_steps": "log.every",
    "output_dir": "output.dir",
    "overwrite_output_dir": "output.overwrite",
}
IGNORED = {  # their flag -> why nothing follows from it
    "add_special_tokens": "BOS is put once where the tokenizer wants it, the end token is always learnt",
    "append_concat_token": "every row ends with its end token",
    "use_reentrant": "gradient checkpointing is always the non-reentrant one, right for frozen bases",
    "use_unsloth": "there is one engine",
    "bnb_4bit_quant_storage_dtype": "it matters for sharded training only",
    "log_level": "what is logged is settled by log.progress",
    "logging_strategy": "log.every settles it",
    "save_strategy": "train.save_every settles it",
    "hub_private_repo": "nothing is uploaded",
    "hub_strategy": "nothing is uploaded",
    "dataset_kwargs": "rows are prepared here",
    "dataset_num_proc": "rows are prepared in one process",
    "remove_unused_columns": "rows hold what the model reads",
    "ddp_find_unused_parameters": "adapters are always used",
    "do_train": "it trains",
    "do_eval": "held-out rows are always evaluated",
    "run_name": "the output folder names the run",
    "tf32": "torch's own default stands",
    "dataset_text_field": "",
    "group_by_length": "",
}
LORA = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
}


@dataclass
class Translation:
    """Settings for ``config.load``, and a line on each flag that did not simply change its name."""

    sets: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    resume: bool = False


def translate(flags: dict[str, Any], adapter: str | None = None) -> Translation:
    """Foreign flags as our settings.

    Args:
        flags: their names without dashes, and values as typed.
        adapter: an ``adapter_config.json`` that stands in place of the ``lora_*`` flags.

    Raises:
        ValueError: flags that nobody knows, all of them with suggestions; or what cannot be done here.
    """
    _refuse_unknown(flags)
    done = Translation()
    for flag, value in flags.items():
        if flag in SPECIAL:
            SPECIAL[flag](flags, value, done)
        elif flag in SAME:
            done.sets[SAME[flag]] = value
        elif IGNORED.get(flag):
            done.notices.append(f"--{flag} {value} has no effect: {IGNORED[flag]}.")
    _adapter(flags, adapter, done)
    if "save_steps" in flags and "eval_steps" not in flags:
        done.sets["eval.every"] = flags["save_steps"]
        done.notices.append("Held-out loss is taken with every checkpoint, so that the best one is kept.")
    return done


def truth(value: Any) -> bool:
    """``True``, ``true``, ``1``, ``yes`` and a bare flag."""
    return str(value).lower() in ("true", "1", "yes", "")


def _refuse_unknown(flags: dict[str, Any]) -> None:
    known = [*SAME, *IGNORED, *SPECIAL, *LORA, "use_peft_lora"]
    unknown = [flag for flag in flags if flag not in known]
    if unknown:
        lines = []
        for flag in unknown:
            near = difflib.get_close_matches(flag, known, 1, 0.6)
            lines.append(f"--{flag}" + (f" (did you mean --{near[0]}?)" if near else ""))
        raise ValueError(f"There {'is no flag' if len(lines) == 1 else 'are no flags'} {', '.join(lines)}.")


def _adapter(flags: dict[str, Any], adapter: str | None, done: Translation) -> None:
    given = {ours: flags[theirs] for theirs, ours in LORA.items() if theirs in flags}
    if adapter:
        done.sets["adapter"] = adapter
        done.sets |= {f"adapter.{key}": _targets(value) for key, value in given.items()}
        return
    if "use_peft_lora" in flags and not truth(flags["use_peft_lora"]):
        raise ValueError("--use_peft_lora False asks for training all weights, which is not done here; leave it out.")
    if "use_peft_lora" not in flags:
        done.notices.append("An adapter is trained: LoRA, as with --use_peft_lora True.")
    values = {"r": 64, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": SEVEN, **given}
    done.sets |= {"adapter.method": "lora", **{f"adapter.{key}": _targets(value) for key, value in values.items()}}


def _targets(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) and "," in value else value


def _dataset(flags: dict[str, Any], name: str, done: Translation) -> None:
    """``--dataset_name`` with ``--splits``: of a folder the files named after the split, of a hub id its split."""
    splits = [part.strip() for part in str(flags.get("splits", "train")).split(",")]
    path = Path(name)

    def of(split: str) -> list[str]:
        if path.is_dir():
            return [str(p) for p in sorted(path.iterdir()) if p.stem.startswith(split) and p.suffix in files.READERS]
        return [f"{name}:{split}"] if not path.exists() else [name] if split.startswith("train") else []

    train = [one for split in splits if split.startswith("train") for one in of(split)] or [name]
    held = [one for split in splits if not split.startswith("train") for one in of(split)]
    done.sets["data.train"] = train
    if held:
        done.sets["data.eval"] = held
    else:
        done.notices.append("There is no test split, so some rows of the training data are held out; see data.holdout.")
    field_name = flags.get("dataset_text_field")
    if field_name and field_name != "text":
        done.sets |= _text_field(train[0], field_name, done)


def _text_field(name: str, field_name: str, done: Translation) -> dict[str, Any]:
    path = Path(name)
    first = next(iter(files.read(path)), {}) if path.is_file() else {field_name: ""}
    if isinstance(first, dict) and field_name in first and not isinstance(first[field_name], list):
        return {"data.format": "text", "data.columns": {"text": field_name}}
    done.notices.append(f"The rows have no text column '{field_name}'; their format is told by the columns they have.")
    return {}


def _template(flags: dict[str, Any], value: str, done: Translation) -> None:
    if value == "none":
        done.notices.append(
            "--chat_template_format none: the tokenizer's own template is used where the data need one."
        )
    else:
        done.sets["model.chat_template"] = value


def _dtype(flags: dict[str, Any], value: str, done: Translation) -> None:
    done.sets["model.dtype"] = value


def _half(name: str) -> Callable[[dict[str, Any], Any, Translation], None]:
    def apply(flags: dict[str, Any], value: Any, done: Translation) -> None:
        if truth(value):
            done.sets["model.dtype"] = name

    return apply


def _flash(flags: dict[str, Any], value: Any, done: Translation) -> None:
    if not truth(value):
        return
    if importlib.util.find_spec("flash_attn"):
        done.sets["model.attention"] = "flash_attention_2"
    else:
        done.notices.append("--use_flash_attn: the package flash_attn is not installed; torch's own attention is used.")


def _four_bit(flags: dict[str, Any], value: Any, done: Translation) -> None:
    if truth(value):
        done.sets["model.quantize"] = flags.get("bnb_4bit_quant_type", "nf4")


def _eight_bit(flags: dict[str, Any], value: Any, done: Translation) -> None:
    if truth(value):
        done.sets["model.quantize"] = "int8"


def _nested(flags: dict[str, Any], value: Any, done: Translation) -> None:
    done.sets["model.double_quant"] = truth(value)


def _strategy(flags: dict[str, Any], value: str, done: Translation) -> None:
    if value == "no":
        done.sets["data.holdout"] = 0
    elif value == "epoch":
        done.notices.append("--eval_strategy epoch: held-out loss is taken about five times in a run; see eval.every.")


def _steps(flags: dict[str, Any], value: Any, done: Translation) -> None:
    if int(value) > 0:
        done.sets["train.steps"] = value


def _push(flags: dict[str, Any], value: Any, done: Translation) -> None:
    if truth(value):
        done.notices.append("--push_to_hub: nothing is uploaded by itself; afterwards: hf upload NAME OUTPUT_DIR.")


def _report_to(flags: dict[str, Any], value: str, done: Translation) -> None:
    done.sets["log.report_to"] = [] if value in ("none", "all") else [part.strip() for part in value.split(",")]


def _resume(flags: dict[str, Any], value: Any, done: Translation) -> None:
    done.resume = str(value).lower() not in ("false", "none")


def _nothing(flags: dict[str, Any], value: Any, done: Translation) -> None:
    """A flag that another one's translation reads."""


SPECIAL: dict[str, Callable[[dict[str, Any], Any, Translation], None]] = {
    "dataset_name": _dataset,
    "splits": _nothing,
    "chat_template_format": _template,
    "torch_dtype": _dtype,
    "dtype": _dtype,
    "bnb_4bit_compute_dtype": _dtype,
    "bnb_4bit_quant_type": _nothing,
    "bf16": _half("bfloat16"),
    "fp16": _half("float16"),
    "use_flash_attn": _flash,
    "use_4bit_quantization": _four_bit,
    "use_8bit_quantization": _eight_bit,
    "use_nested_quant": _nested,
    "eval_strategy": _strategy,
    "evaluation_strategy": _strategy,
    "max_steps": _steps,
    "push_to_hub": _push,
    "report_to": _report_to,
    "resume_from_checkpoint": _resume,
}
