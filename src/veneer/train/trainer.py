"""transformers' Trainer, taught three things: loss per learnt token, adapters as checkpoints, whole checkpoints."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from veneer.hf import heads
from veneer.train import adapters, distributed, packing
from veneer.train.flat import FlatAdamW
from veneer.train.tokens import IGNORED

Losses = Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, Tensor]]
"""(model, batch) -> (sum of the losses of what is learnt, how much that is)."""
WHOLE = "complete.json"
"""The last file of a checkpoint: one without it was cut off while it was written."""


class Collate:
    """Rows to a right-padded batch. Padding is told by place: a pad token that is also the end token stays learnt.

    Args:
        pad: fills up ``input_ids``.
        multiple: lengths are rounded up to it.
        dtype: of the mask that keeps packed rows apart.
    """

    def __init__(self, pad: int, multiple: int = 1, dtype: torch.dtype = torch.float32):
        self.pad, self.multiple, self.dtype = pad, multiple, dtype

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        """``input_ids``, ``labels``, ``attention_mask``, and for packed rows ``position_ids``."""
        length = max(len(row["input_ids"]) for row in rows)
        length = -(-length // self.multiple) * self.multiple

        def column(name: str, filler: int) -> Tensor:
            return torch.tensor([row[name] + [filler] * (length - len(row[name])) for row in rows])

        batch = {"input_ids": column("input_ids", self.pad), "labels": column("labels", IGNORED)}
        if "segments" in rows[0]:
            segments = column("segments", 0)
            batch["attention_mask"] = packing.block_mask(segments, self.dtype)
            batch["position_ids"] = packing.positions(segments)
        else:
            lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
            batch["attention_mask"] = (torch.arange(length) < lengths).long()
        return batch

    def tokens(self, batch: dict[str, Tensor]) -> int:
        """How many tokens a batch holds, for the speed that is shown."""
        mask = batch["attention_mask"]
        return int(mask.sum() if mask.dim() == 2 else (batch["input_ids"] != self.pad).sum())


def takes_kept_logits(model: nn.Module) -> bool:
    """Whether the base can leave out the logits of positions that nobody asks for."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    prompts = any(getattr(c, "is_prompt_learning", False) for c in getattr(model, "peft_config", {}).values())
    return "logits_to_keep" in inspect.signature(base.forward).parameters and not prompts


def token_losses(model: nn.Module, batch: dict[str, Tensor], keep: bool, chunked: bool = True) -> tuple[Tensor, Tensor]:
    """(sum of -log p over the learnt tokens, their number).

    Args:
        model: a causal language model.
        batch: what ``Collate`` gives; ``input_ids`` and ``labels`` are (batch, length).
        keep: compute logits only where some row has something to learn.
        chunked: take the logits a chunk of tokens at a time, where the model's head allows it (``heads.whole``).
    """
    inputs = {k: v for k, v in batch.items() if k != "labels"} | {"use_cache": False}
    targets = batch["labels"][:, 1:]
    if keep:
        places = (targets != IGNORED).any(0).nonzero().squeeze(1)
        inputs, targets = inputs | {"logits_to_keep": places}, targets[:, places]
    length = None if keep else batch["labels"].shape[1]
    if chunked:
        log_p = heads.label_log_probs(model, targets, length, **inputs)
        if log_p is not None:
            return -log_p.sum(), (targets != IGNORED).sum()
    logits = model(**inputs).logits
    logits = logits if length is None else logits[:, -length:-1]
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, (targets != IGNORED).sum()


@torch.no_grad()
def held_out_loss(
    model: nn.Module, rows: list[dict[str, Any]], collate: Any, batch_size: int, losses: Losses | None = None
) -> float:
    """Mean loss per learnt token over all ``rows``, whatever the batches.

    Args:
        model: in any mode, which is kept.
        rows: with ``input_ids``.
        collate: rows to a batch.
        batch_size: rows in a batch.
        losses: default: ``token_losses``.
    """
    training = model.training
    losses = losses or partial(token_losses, keep=takes_kept_logits(model))
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))  # alike lengths together: less padding
    for start in range(0, len(ordered), batch_size):
        batch = {k: v.to(device) for k, v in collate(ordered[start : start + batch_size]).items()}
        loss, tokens = losses(model, batch)
        total, count = total + loss.item(), count + int(tokens)
    model.train(training)
    return total / max(count, 1)


class AdapterCheckpoints:
    """What every trainer of adapters does otherwise than transformers' own: stand before it in a class' bases.

    ``tokens_seen`` counts what was trained on, for the speed that is shown.
    """

    tokens_seen = 0

    def __init__(self, *args: Any, **kwargs: Any):
        base = (args[0] if args else kwargs["model"]).get_base_model()
        told = getattr(base, "is_quantized", False) and not getattr(base, "_hf_peft_config_loaded", False)
        if told:  # the Trainer refuses packed bases unless it is told, in its own words, that adapters sit on them
            base._hf_peft_config_loaded = True
        super().__init__(*args, **kwargs)
        if told:
            base._hf_peft_config_loaded = False

    @property
    def adapted(self: Any) -> Any:
        """The model with its adapter, without what spreads it over processes."""
        return self.accelerator.unwrap_model(self.model)

    def penalised(self: Any, loss: Tensor) -> Tensor:
        """The loss with the adapter's own penalty."""
        extra = adapters.penalty(self.adapted)
        return loss if extra is None else loss + extra / self.current_gradient_accumulation_steps

    def _clip_grad_norm(self: Any, model: nn.Module) -> Any:
        flat = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(flat, FlatAdamW) and self.args.world_size == 1:
            return flat.clip_grad_norm_(self.args.max_grad_norm)  # one pass, where torch makes one a parameter
        return super()._clip_grad_norm(model)  # type: ignore[misc]

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.adapted.save_pretrained(str(folder))

    def _build_accelerator_args(self: Any, **kwargs: Any) -> dict[str, Any]:
        own = super()._build_accelerator_args(**kwargs)  # type: ignore[misc]
        if distributed.is_spread(self.model):
            own.pop("parallelism_config", None)  # accelerate has no part in how the model is cut up
        return own

    def create_accelerator_and_postprocess(self: Any) -> None:
        """Make accelerate's part, which has nothing to do for a model that is cut up already."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        self.replicas = distributed.settle(self.accelerator, self.model)

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter; every process calls this, for where tensors are cut up all of them gather."""
        folder = Path(output_dir or self.args.output_dir)
        self.adapted.save_pretrained(str(folder), is_main_process=self.args.should_save)

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        if not distributed.is_spread(self.model):
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        distributed.save_optimiser(self.optimizer, output_dir, self.args.should_save)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        if checkpoint is None or not distributed.is_spread(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        distributed.load_optimiser(self.optimizer, checkpoint)
        state = torch.load(Path(checkpoint) / SCHEDULER_NAME, map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(state)

    def _save_checkpoint(self: Any, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.accelerator.wait_for_everyone()  # for a checkpoint is whole when every process has written its own
        if self.args.should_save:
            adapters.save_training_state(self.adapted, folder)
            (folder / WHOLE).write_text(json.dumps({"step": self.state.global_step}))

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapters.restore(self.adapted, resume_from_checkpoint)
        adapters.load_training_state(self.adapted, resume_from_checkpoint)

    def _load_best_model(self: Any) -> None:
        adapters.restore(self.adapted, self.state.best_model_checkpoint)


class AdapterTrainer(AdapterCheckpoints, Trainer):
    """The loop for adapters over rows of features.

    Args:
        args: the Trainer's own.
        losses: (sum of the losses, how much is learnt) of a batch.
        measure: called with the trainer, gives the figures on the held-out rows.
        kwargs: the Trainer's own.
    """

    def __init__(self, *args: Any, losses: Losses, measure: Callable[[Any], dict[str, float]], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # our loss divides by the tokens of the whole accumulated step
        self.losses, self.measure = losses, measure

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Sum over what is learnt / how much the whole step learns, plus the adapter's own penalty."""
        self.tokens_seen += self.data_collator.tokens(inputs)
        total, count = self.losses(model, inputs)
        loss = total / (num_items_in_batch if num_items_in_batch is not None else count.clamp(min=1))
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.replicas
        return self.penalised(loss)

    def evaluate(  # type: ignore[override]
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Figures over all held-out rows, so that they do not depend on how the rows fall into batches."""
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.measure(self).items()}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def checkpoints(folder: str | Path) -> list[Path]:
    """The whole checkpoints in ``folder``, oldest first."""
    found: Iterable[Path] = Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    whole = [path for path in found if (path / WHOLE).is_file()]
    return sorted(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]))
