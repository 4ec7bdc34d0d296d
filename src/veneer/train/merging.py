"""An adapter folded into its base, with a certificate: what is saved answers as the adapted model did."""

from __future__ import annotations

import gc
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from veneer.train.evaluate import Session

PROMPTS = [
    "The capital of France is",
    "def add(a, b):\n    return",
    "Explain in one sentence why the sky is blue.",
    "1, 1, 2, 3, 5, 8,",
    "Once upon a time there was a",
    "Translate to German: Good morning.",
    "Der Zug nach München fährt",
    "A list of three fruits:",
]
# Mean KL divergence per token, in nats, that rounding may cost; float32 leaves room for a reordered sum only.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass
class Certificate:
    """How far the saved model's next-token distributions are from those of base and adapter."""

    divergence: float
    largest: float
    same_choice: float
    tokens: int
    dtype: str
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.divergence <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens compared: mean KL divergence {self.divergence:.1e} nats (allowed "
            f"{self.tolerance:.0e}), largest difference of a log-probability {self.largest:.1e}, same likeliest token "
            f"in {self.same_choice:.1%}"
        )


def merge(
    adapter: str,
    out: str,
    *,
    model: str | None = None,
    dtype: str = "auto",
    prompts: list[str] | None = None,
    tolerance: float | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Certificate:
    """Write base plus adapter as one model, with tokenizer and generation config.

    The sum is formed in float32 and rounded once, to ``dtype``. The files are then loaded again and compared with the
    adapted model on ``prompts``; only a model that passes gets the name ``out``.

    Args:
        adapter: the adapter's folder.
        out: the folder to make; it must not exist.
        model: the base; default: the one the adapter names.
        dtype: what is saved; ``auto`` is what the base is stored in.
        prompts: texts to compare on.
        tolerance: mean KL divergence allowed; default by dtype.
        device: where to compute.
        trust_remote_code: as in transformers.

    Raises:
        ValueError: ``out`` exists, the method cannot merge, or the comparison fails.
    """
    folder = Path(out)
    if folder.exists():
        raise ValueError(f"'{out}' exists already; name a folder that does not.")
    options = {"dtype": "float32", "quantize": "none", "device": device, "trust_remote_code": trust_remote_code}
    session = Session(model, adapter, options)
    texts = [
        session.render([{"role": "user", "content": p}]) if session.template == "chat" else p
        for p in prompts or PROMPTS
    ]
    wanted = [_log_probs(session, session.model, text) for text in texts]
    merged = session.model.merge_and_unload()
    saved = _dtype(session, dtype, merged)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        merged.to(saved).save_pretrained(str(partial))
        session.tokenizer.save_pretrained(str(partial))
        del merged
        session.model = None
        gc.collect()
        again: Any = getattr(transformers, session.task.auto).from_pretrained(
            str(partial), dtype=torch.float32, trust_remote_code=trust_remote_code
        )
        got = [_log_probs(session, again.to(device).eval(), text) for text in texts]
        allowed = tolerance if tolerance is not None else TOLERANCES.get(saved, 2e-2)
        certificate = _compare(wanted, got, str(saved).removeprefix("torch."), allowed)
        if not certificate.holds:
            raise ValueError(
                f"The merged model does not answer as the adapted one does, so nothing was saved: {certificate}. "
                + (
                    "Try --dtype float32."
                    if saved != torch.float32
                    else "Please report this with the adapter's config."
                )
            )
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return certificate


def _dtype(session: Session, asked: str, model: nn.Module) -> torch.dtype:
    if asked != "auto":
        found = getattr(torch, asked, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"There is no dtype '{asked}'; use float32, bfloat16 or float16.")
        return found
    from veneer.train.models import load_config

    stored = load_config(session.settings).dtype
    return stored if isinstance(stored, torch.dtype) else getattr(torch, str(stored), torch.float32)


@torch.inference_mode()
def _log_probs(session: Session, model: Any, text: str) -> Tensor:
    ids = session.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [session.bos, *ids] if session.bos is not None and ids[:1] != [session.bos] else ids
    inputs = torch.tensor([ids], device=next(model.parameters()).device)
    options: dict[str, Any] = {"use_cache": False} if session.writes else {}
    if getattr(model.config, "is_encoder_decoder", False):
        options["decoder_input_ids"] = inputs
    output = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), **options)
    numbers = output.logits if "logits" in output else output.last_hidden_state  # classes, tokens, or hidden features
    return F.log_softmax(numbers.flatten(0, -2)[-len(ids) :].float(), -1).cpu()  # (tokens or 1, numbers)


def _compare(wanted: list[Tensor], got: list[Tensor], dtype: str, tolerance: float) -> Certificate:
    p, q = torch.cat(wanted), torch.cat(got)
    divergence = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item()
    likely = p > -10  # differences of what is never said do not matter, and are large
    largest = (p - q).abs()[likely].max().item()
    same = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    return Certificate(max(divergence, 0.0), largest, same, len(p), dtype, tolerance)
