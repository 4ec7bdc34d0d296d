"""What a run will do, worked out before it does it: parameters, tokens, steps, memory, and time from one probe step.

Memory needs no weights: the model is built on the meta device and one forward pass runs on fake tensors, which have
shapes and no data, while a hook adds up what autograd keeps for the backward pass.
"""

from __future__ import annotations

import copy
import gc
import json
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.train import adapters, models, optimisers
from veneer.train.memory import forward_and_backward
from veneer.train.prepare import Prepared, Schedule, build, counts

HOLES = 0.4
"""What glibc's heap keeps between tensors that come and go, over all that a step without checkpointing makes: measured
at 0.2 to 0.8 by ``benchmarks/plan_memory.py``, more in smaller models."""


@dataclass
class Group:
    """Adapted places whose names differ only in layer numbers."""

    name: str
    places: int
    trainable: int


@dataclass
class Memory:
    """Bytes by what they hold; ``holes`` is what the heap keeps between them, ``runtime`` Python and the libraries."""

    weights: int
    adapters: int
    gradients: int
    optimiser: int
    activations: int
    holes: int
    runtime: int
    available: int

    @property
    def total(self) -> int:
        trained = self.adapters + self.gradients + self.optimiser
        return self.weights + trained + self.activations + self.holes + self.runtime

    @property
    def fits(self) -> bool:
        return self.total <= self.available


@dataclass
class Probe:
    """One real step on the longest batch, after one to warm up."""

    seconds: float
    tokens_per_second: float
    peak_memory: int


@dataclass
class Plan:
    """Everything the plan says; ``sample`` is (token's text, learnt) of the first row."""

    model: str
    dtype: str
    device: str
    threads: int
    trainable: int
    total: int
    groups: list[Group]
    train_rows: int
    held_rows: int
    tokens: int
    learnt: int
    quantiles: dict[str, int]
    counts: dict[str, int]
    facts: list[tuple[str, str]]
    sample: list[tuple[str, bool]]
    score: str
    schedule: Schedule
    memory: Memory
    run_tokens: int
    config: dict[str, Any]
    notices: list[str] = field(default_factory=list)
    advice: str | None = None
    probe: Probe | None = None

    def to_json(self) -> str:
        """The plan for machines."""
        values = asdict(self)
        values["memory"] |= {"total": self.memory.total, "fits": self.memory.fits}
        return json.dumps(values, indent=2, ensure_ascii=False, default=str)


def make(prepared: Prepared, probe: bool = False) -> Plan:
    """The plan of a prepared run.

    Args:
        prepared: what ``prepare`` decided.
        probe: load the model and take two real steps, for time and true memory.

    Raises:
        ValueError: the adapter matches nothing, or nothing would train.
    """
    config, train = prepared.config, prepared.train
    used = models.threads(config.train.threads)
    device = models.device_of(config.model)
    dtype = models.dtype_of(config.model, device)
    model = _skeleton(prepared, dtype)
    trainable, total = counts(model)
    if not trainable:
        raise ValueError("Nothing would train: the adapter has 0 trainable parameters on this model.")
    epochs = prepared.schedule.steps / prepared.schedule.per_epoch
    plan = Plan(
        model=config.model.path,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        threads=used,
        trainable=trainable,
        total=total,
        groups=groups(model),
        train_rows=len(train),
        held_rows=len(prepared.held),
        tokens=train.tokens,
        learnt=train.learnt,
        quantiles=quantiles(train.lengths),
        counts=dict(train.counts),
        facts=prepared.task.facts(prepared),
        sample=prepared.task.sample(prepared),
        score=prepared.score.name,
        schedule=prepared.schedule,
        memory=_memory(prepared, model, dtype, device),
        run_tokens=round(train.tokens * epochs),
        config=config.model_dump(mode="json"),
        notices=prepared.notices,
    )
    del model
    if probe:
        plan.probe = _probe(prepared)
    plan.advice = None if plan.memory.fits else _advice(prepared, plan.memory)
    return plan


def groups(model: nn.Module) -> list[Group]:
    """Trainable parameters gathered by place, layer numbers as ``*``."""
    places: dict[str, set[str]] = {}
    amounts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            place = re.split(r"\.(?:adapters|lora_\w+|default|modules_to_save)\.|\.\w+$", name)[0]
            place = place.removeprefix("base_model.model.")
            pattern = re.sub(r"\.\d+(?=\.|$)", ".*", place)
            places.setdefault(pattern, set()).add(place)
            amounts[pattern] += parameter.numel()
    return [Group(pattern, len(found), amounts[pattern]) for pattern, found in places.items()]


def quantiles(lengths: list[int]) -> dict[str, int]:
    """Token lengths of the rows, before truncation."""
    ordered = sorted(lengths)
    shares = {"least": 0.0, "half": 0.5, "90 %": 0.9, "99 %": 0.99, "most": 1.0}
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in shares.items()}


def _skeleton(prepared: Prepared, dtype: torch.dtype) -> Any:
    """The adapted model on the meta device.

    A LoRA start that needs the weights is left out, its shapes are the same; for other methods that need them the model
    is loaded.
    """
    task = prepared.task
    config = copy.deepcopy(prepared.adapter)
    try:
        return adapters.attach(task.skeleton(prepared, dtype), config)
    except (NotImplementedError, RuntimeError):
        config = copy.deepcopy(prepared.adapter)
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True
            return adapters.attach(task.skeleton(prepared, dtype), config)
    return adapters.attach(task.load(prepared, dtype), config).to("meta")


def _memory(prepared: Prepared, model: Any, dtype: torch.dtype, device: torch.device) -> Memory:
    own = [p for p in model.parameters() if p.requires_grad]
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() * p.element_size() for p in own)
    kept = whole = _activations(prepared, model)
    if prepared.config.train.gradient_checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        kept = _activations(prepared, model)
    holes = 0
    if device.type == "cpu":  # a packed base was dense while it was loaded, and the heap does not give that back
        trainable, total = counts(model)
        holes = round(HOLES * whole) + max(0, (total - trainable) * dtype.itemsize - frozen)
    moments = optimisers.state_bytes(prepared.config.train.optimizer, own)
    return Memory(frozen, trained, trained, moments, kept, holes, _runtime(device), _available(device))


def _activations(prepared: Prepared, model: Any) -> int:
    """Bytes at the highest of a step on the largest batch, beside weights, gradients and the optimiser's state."""
    _, peak = forward_and_backward(model.train(), partial(prepared.task.rehearsal, prepared))
    return max(0, peak - sum(p.nbytes for p in model.parameters() if p.requires_grad))


def _runtime(device: torch.device) -> int:
    return models.memory(device) if device.type != "cuda" else 600 * 2**20  # a CUDA context with its kernels


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                found.append(int(line.split()[1]) * 1024 + models.memory(device))
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit.isdigit():
            found.append(int(limit))
    except OSError:
        pass
    return min(found) if found else 2**63


def _advice(prepared: Prepared, memory: Memory) -> str:
    train = prepared.config.train
    rest = memory.total - memory.activations
    if rest > memory.available:
        return "The weights alone do not fit: take a smaller model, or a half-precision model.dtype."
    if train.batch_size > 1:
        smaller = max(1, int(train.batch_size * (memory.available - rest) / memory.activations))
        batches = -(-train.batch_size * train.accumulate // smaller)
        return f"Set train.batch_size: {smaller} and train.accumulate: {batches}; the steps stay the same."
    if not train.gradient_checkpointing:
        return "Set train.gradient_checkpointing: true (about a third slower)."
    return "Lower data.max_length."


def _probe(prepared: Prepared) -> Probe:
    """Two forward and backward passes with an optimiser step on the longest batch; the second one is timed."""
    model = build(prepared).train()
    device = next(model.parameters()).device
    loss, tokens = prepared.task.step(prepared, model)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        loss().backward()
        optimiser.step()
        optimiser.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    result = Probe(seconds, tokens / seconds, models.peak_memory(device))
    del model, optimiser, loss
    gc.collect()
    return result
