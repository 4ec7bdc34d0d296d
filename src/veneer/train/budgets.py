"""Equal budgets: how large a method and how long its run may be, so that it can be compared with others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from veneer.train import adapters, models
from veneer.train import plan as planning
from veneer.train.comparison import Contender
from veneer.train.config import RunConfig
from veneer.train.prepare import Prepared, build, counts, prepare

SIZES = ("init_r", "r", "num_virtual_tokens", "n_frequency", "num_vectors", "adapter_len", "rank")
"""Settings that a method grows with, in the order they are looked for."""
BLOCKS: dict[str, dict[str, Any]] = {
    "oft_block_size": {"r": 0},
    "boft_block_size": {"boft_block_num": 0},
    "block_size": {},
}
"""Sizes of blocks, which must divide a weight's sides, so powers of two are tried; and what must be unset with them."""
LONG = 1_000_000  # steps, for methods that want to know: their sizes do not depend on it


@dataclass(frozen=True)
class Budget:
    """What is equal: optimiser steps, trainable parameters, or seconds; ``amount`` None takes the config's own."""

    kind: str
    amount: float | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """``steps``, ``steps=200``, ``params=500000``, ``params=1%`` (of the base) or ``time=300``.

        Raises:
            ValueError: anything else.
        """
        kind, _, amount = text.partition("=")
        try:
            value = None if not amount else float(amount.rstrip("%")) * (0.01 if amount.endswith("%") else 1)
        except ValueError:
            value = -1.0
        bad_share = amount.endswith("%") and kind != "params"
        if kind not in ("steps", "params", "time") or bad_share or (value is not None and value <= 0):
            raise ValueError(f"--budget is '{text}'; use steps, steps=200, params=500000, params=1% or time=300.")
        if kind == "time" and value is None:
            raise ValueError("--budget time needs the seconds of a run, as in time=300.")
        return cls(kind, value)


def settle(one: Contender, config: RunConfig, budget: Budget, goal: float | None, notices: list[str]) -> Prepared:
    """Give a contender its size and its steps under the budget.

    Args:
        one: gets ``block``, ``steps`` and ``trainable``.
        config: the user's.
        budget: what is equal.
        goal: with a budget of parameters, how many.
        notices: what could not be made equal is said here.
    """
    if goal is not None:
        _resize(one, config, goal, notices)
    if budget.kind == "steps" and budget.amount:
        config = config.model_copy(deep=True)
        config.train.steps = int(budget.amount)
    prepared = prepare(with_block(config, one.block))
    if budget.kind == "time" and budget.amount:
        probe = planning.make(prepared, probe=True).probe
        assert probe is not None
        steps = max(1, int(budget.amount / (probe.seconds * config.train.accumulate)))
        prepared = prepare(with_block(config, one.block, steps))
    one.steps = prepared.schedule.steps
    one.trainable = one.trainable or size_of(prepared)[0]
    return prepared


def size_of(prepared: Prepared) -> tuple[int, int]:
    """(trainable, all) parameters, without loading weights where that can be."""
    model, config = prepared.config.model, copy.deepcopy(prepared.adapter)
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True  # of the same size, and needs no weights
    shape = prepared.task.skeleton(prepared, models.dtype_of(model, models.device_of(model)))
    try:
        return counts(adapters.attach(shape, config))
    except (NotImplementedError, RuntimeError):
        return counts(build(prepared))


def _resize(one: Contender, config: RunConfig, goal: float, notices: list[str]) -> None:
    """The largest size within ``goal`` parameters; the smallest one where none is."""
    built = adapters.build(one.block)
    block = next((key for key in BLOCKS if hasattr(built, key)), None)
    ranks = (key for key in SIZES if isinstance(getattr(built, key, None), int) and getattr(built, key) > 0)
    knob = block or next(ranks, None)
    prepared = prepare(with_block(config, one.block))
    task_type = prepared.task.adapter_type
    known: dict[int, int | None] = {}

    def trainable(size: int) -> int | None:
        """None where this method cannot have the size here."""
        if size not in known:
            try:
                prepared.adapter = adapters.build(
                    _sized(one.block, str(knob), size, built), steps=LONG, task_type=task_type
                )
                known[size] = size_of(prepared)[0]
            except ValueError:
                known[size] = None
        return known[size]

    if block:
        for power in range(1, 13):
            trainable(2**power)
    elif knob and trainable(1) != trainable(2):
        _bisect(trainable, goal)
    found = {size: count for size, count in known.items() if count is not None}
    if knob is None or len(set(found.values())) < 2:
        prepared.adapter = adapters.build(one.block, steps=LONG, task_type=task_type)
        one.trainable = size_of(prepared)[0]
        notices.append(f"{one.name} has no size to choose: it trains {one.trainable:,} parameters whatever the budget.")
        return
    within = [size for size, count in found.items() if count <= goal] or [min(found, key=lambda size: found[size])]
    best = max(within, key=lambda size: (found[size], -size))
    one.block, one.trainable = _sized(one.block, knob, best, built), found[best]
    if one.trainable > goal:
        notices.append(f"{one.name} has at least {one.trainable:,} parameters, which is above the budget.")


def _bisect(trainable: Callable[[int], int | None], goal: float) -> None:
    """Ask for sizes until the largest one within ``goal`` is among them; sizes that cannot be count as too large."""

    def fits(size: int) -> bool:
        count = trainable(size)
        return count is not None and count <= goal

    low, high = 1, 2
    while fits(high) and high < 1 << 14:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)


def _sized(block: dict[str, Any], knob: str, size: int, built: Any) -> dict[str, Any]:
    """The block with another size; alpha follows a rank, so that the scale stays."""
    changed: dict[str, Any] = {**block, knob: size}
    alpha, before = getattr(built, "lora_alpha", None), getattr(built, knob)
    if knob == "r" and isinstance(alpha, int | float):
        changed["lora_alpha"] = max(1, round(alpha * size / before))
    if knob == "init_r":
        changed["target_r"] = max(1, round(getattr(built, "target_r", size) * size / before))
    return changed | BLOCKS.get(knob, {})


def goal_of(budget: Budget, contenders: list[Contender], config: RunConfig) -> float | None:
    """How many parameters a budget of them allows; without an amount, as many as the first contender has."""
    if budget.kind != "params":
        return None
    if budget.amount is not None and budget.amount >= 1:
        return budget.amount
    trainable, total = size_of(prepare(with_block(config, contenders[0].block)))
    return trainable if budget.amount is None else budget.amount * (total - trainable)


def with_block(config: RunConfig, block: dict[str, Any], steps: int | None = None) -> RunConfig:
    """The settings with another adapter, and of another length."""
    changed = config.model_copy(deep=True)
    changed.adapter = copy.deepcopy(block)
    changed.train.steps = steps or changed.train.steps
    return changed


def describe(budget: Budget, goal: float | None) -> str:
    """What is equal, in words."""
    if budget.kind == "params":
        return f"at most {goal:,.0f} trainable parameters"
    if budget.kind == "time":
        return f"about {budget.amount:g} seconds of steps"
    return f"{budget.amount:g} steps" if budget.amount else "the steps of the settings"
