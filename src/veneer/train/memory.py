"""What a training step needs in memory, by calculation: the step is run on tensors without values, and counted.

    peak = weights + moments + max over the step of (gradients + what autograd keeps + what is in use)

Every storage that an operation makes is entered when it appears and struck out when it is freed, so temporaries count:
logits and their gradients, a packed weight unpacked for one product, a checkpointed block that is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step.

    Attributes:
        weights: parameters and buffers, those that train included.
        trained: the part of them that trains.
        gradients: of what trains.
        moments: the optimiser's state.
        activations: what autograd keeps between the forward and the backward pass, the loss' own part included.
        peak: the most at any moment of the step.
    """

    weights: int
    trained: int
    gradients: int
    moments: int
    activations: int
    peak: int


class Ledger(TorchDispatchMode):
    """Within: the bytes of all storages made by operations, now (``live``) and at most (``peak``)."""

    def __init__(self, known: Iterator[Tensor]):
        super().__init__()
        self._known = {t.untyped_storage()._cdata for t in known}
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self._sum = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._enter(leaf)
        return out

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or (key in self._held and not self._held[key][0].expired()):
            return
        if key in self._held:  # the place of one that was freed
            self._sum -= self._held.pop(key)[1]
        self._held[key] = StorageWeakRef(storage), storage.nbytes()
        self._sum += storage.nbytes()
        if self._sum > self.peak:  # only now does it matter what has been freed meanwhile
            self.peak = max(self.peak, self.live)

    @property
    def live(self) -> int:
        """Bytes in use now."""
        for key in [key for key, (ref, _) in self._held.items() if ref.expired()]:
            self._sum -= self._held.pop(key)[1]
        return self._sum


class _Step(nn.Module):
    """A loss and its backward pass as one call, so that a recomputation sees the weights of ``functional_call``."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], Tensor], ledger: Ledger):
        super().__init__()
        self.model, self.loss, self.__dict__["ledger"] = model, loss, ledger

    def forward(self) -> int:
        loss = self.loss(self.model)
        kept = int(self.ledger.live)  # type: ignore[arg-type]
        loss.backward()
        return kept


def forward_and_backward(model: nn.Module, loss: Callable[[Any], Tensor]) -> tuple[int, int]:
    """(bytes between the passes, bytes at the highest) of ``loss(model).backward()``, weights not counted.

    Args:
        model: on any device; only its shapes are read.
        loss: makes its own inputs, on the CPU; nothing of what it computes has values.
    """
    shapes = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {n: torch.empty(t.shape, dtype=t.dtype, requires_grad=t.requires_grad) for n, t in shapes.items()}
        ledger = Ledger(iter(state.values()))
        step = _Step(model, loss, ledger)
        with ledger:
            kept = torch.func.functional_call(step, {f"model.{n}": t for n, t in state.items()}, ())
    return kept, ledger.peak


def step_memory(model: nn.Module, rows: int, length: int, moment_bytes: float | None = None) -> StepMemory:
    """The memory of one step of a causal language model, AdamW's state in place, without allocating any of it.

    Args:
        model: with or without adapters, on the meta device or any other (only shapes are read); in training mode, and
            with gradient checkpointing on, if the step is to have it.
        rows: sequences in a batch.
        length: their tokens.
        moment_bytes: optimiser state for each trained number; default: two numbers of the parameter's own dtype.

    Returns:
        Bytes, of what torch allocates; a CUDA context, fragmentation and the program itself come on top.
    """

    def loss(model: Any) -> Tensor:
        inputs = {key: torch.ones(rows, length, dtype=torch.long) for key in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
        return F.cross_entropy(logits.float(), inputs["input_ids"].flatten())

    kept, peak = forward_and_backward(model, loss)
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    own = [t for t in model.parameters() if t.requires_grad]
    trained = sum(t.nbytes for t in own)
    moments = 2 * trained if moment_bytes is None else round(moment_bytes * sum(t.numel() for t in own))
    # The optimiser works tensor by tensor: its temporaries are those of the largest one.
    update = trained + 2 * max((t.nbytes for t in own), default=0)
    return StepMemory(weights, trained, trained, moments, kept, weights + moments + max(peak, update))


def made_of(
    config: Any,
    *,
    how: str = "lora",
    rank: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = True,
    wide_adapters: bool = True,
) -> Any:
    """A causal language model without values, set up for one way of training, for ``step_memory``.

    Args:
        config: a transformers config.
        how: "full", "lora" (all linear layers), or "qlora" (the same over NF4).
        rank: LoRA's.
        dtype: of the base.
        checkpointing: keep only each block's input.
        wide_adapters: adapters in float32, as ``get_peft_model`` makes them; False: in the base's dtype.

    Raises:
        ValueError: another ``how``.
    """
    from transformers import AutoModelForCausalLM

    from veneer import LoraConfig, get_peft_model, quantize_model

    if how not in ("full", "lora", "qlora"):
        raise ValueError(f"how must be 'full', 'lora' or 'qlora', not '{how}'.")
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if how == "qlora":
        model = quantize_model(model)
    if checkpointing:
        if how != "full":
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if how != "full":
        settings = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, settings, autocast_adapter_dtype=wide_adapters)
    return model.train()
