"""Several adapters at equal budget on the user's own data: which one, and how sure is that.

Every method is trained with every seed, each in a folder of its own that is named after its settings; a run that has
finished is not run again, and one that was cut off goes on from its last checkpoint. A seed fixes order, start and the
held-out rows for all methods alike.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from veneer.train import adapters, document
from veneer.train.budgets import Budget, describe, goal_of, settle, with_block
from veneer.train.comparison import Comparison, Contender, picture, recommend
from veneer.train.config import RunConfig
from veneer.train.prepare import score_of

# Names that people use for settings of LoRA.
ALIASES: dict[str, dict[str, Any]] = {
    "dora": {"method": "lora", "use_dora": True},
    "rslora": {"method": "lora", "use_rslora": True},
    **{start: {"method": "lora", "init_lora_weights": start} for start in ("pissa", "olora", "milora", "eva")},
}


def contender(text: str, config: RunConfig) -> Contender:
    """``lora``, ``lora:r=8:lora_alpha=16``, ``dora``, or the path of an adapter config.

    A method of the config's own kind starts from the config's block; others share only its ``target_modules``.

    Raises:
        ValueError: no such method or setting.
    """
    name, *settings = re.split(r":(?=\w+=)", text)
    own = {k: v for k, v in config.adapter.items() if k != "init_lora_weights" or name not in ALIASES}
    if name.endswith(".json"):
        block: dict[str, Any] = {"path": name}
    else:
        block = dict(ALIASES.get(name.lower(), {"method": name}))
        if str(own.get("method", own.get("peft_type", ""))).lower() == block["method"].lower():
            block = {**own, **block}
        elif own.get("target_modules"):
            block["target_modules"] = own["target_modules"]
            if adapters.problems(block):  # a method of another kind, which has no targets to choose
                del block["target_modules"]
    block |= {key: value for key, value, _ in document.overrides(settings, [])}
    wrong = adapters.problems(block)
    if any("num_virtual_tokens" in message for _, message in wrong) and "num_virtual_tokens" not in block:
        block["num_virtual_tokens"] = 20  # has no default; as many as the prompt tuning papers end up with
        wrong = adapters.problems(block)
    if wrong:
        raise ValueError("; ".join(f"--methods {text}: {message}" for _, message in wrong))
    return Contender(" ".join([Path(name).stem if name.endswith(".json") else name, *settings]), block)


# ---- runs ------------------------------------------------------------------------------------------------------------
def compare(
    config: RunConfig,
    methods: Sequence[str],
    budget: Budget,
    seeds: int,
    say: Callable[[str], None] = lambda line: None,
    execute: Callable[[Path], str | None] | None = None,
) -> Comparison:
    """Train every method with every seed, and weigh the results.

    Args:
        config: of a run; its adapter block is the start of methods of its kind, its output folder holds everything.
        methods: see ``contender``.
        budget: what is equal.
        seeds: how many: the config's seed and those after it.
        say: called with a line of text before and after each run.
        execute: trains a settings file and returns None, or what went wrong; default: a process of its own, so that
            memory is measured alone and a failure stays alone.

    Raises:
        ValueError: an unknown method, a doubled one, or no held-out rows to compare on.
    """
    folder = Path(config.output.dir)
    contenders = [contender(text, config) for text in methods]
    names = [one.name for one in contenders]
    if len(set(names)) < len(names) or len(names) < 2:
        raise ValueError(f"--methods needs two or more different ones, not '{','.join(methods)}'.")
    notices: list[str] = []
    if config.train.learning_rate != "auto":
        notices.append(
            f"All methods train with the rate {config.train.learning_rate} of the settings, which suits one of them "
            "better than another; with train.learning_rate: auto each gets its own."
        )
    goal = goal_of(budget, contenders, config)
    result = Comparison(describe(budget, goal), list(range(config.train.seed, config.train.seed + seeds)), 0.0, [], [])
    score = score_of(config)
    result.score, result.higher = score.name, score.higher
    befores: list[float] = []
    for one in contenders:
        plan = _remembered(one, config, budget, goal, folder, notices)
        for seed in result.seeds:
            befores += _one(one, plan, seed, folder, say, execute or _in_a_process, score.name)
    result.contenders = sorted(contenders, key=result.order)
    if not any(one.scores for one in contenders):
        raise ValueError("No run came to its end: " + "; ".join(f"{one.name}: {one.failed}" for one in contenders))
    result.before, result.notices = statistics.fmean(befores), notices
    result.sentence = recommend(result)
    (folder / "compare.json").write_text(json.dumps(asdict(result), indent=2, ensure_ascii=False) + "\n")
    result.files = [str(folder / "compare.json"), *picture(result, folder)]
    return result


def _remembered(
    one: Contender, config: RunConfig, budget: Budget, goal: float | None, folder: Path, notices: list[str]
) -> RunConfig:
    """The contender's run settings. A measured number of steps is kept on disk: measured again it would be another."""
    stored = folder / "budgets.json"
    known = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
    key = _digest({"block": one.block, "budget": [budget.kind, budget.amount, goal], "config": config.dump()})
    if key in known:
        one.block, one.steps, one.trainable = known[key]["block"], known[key]["steps"], known[key]["trainable"]
        notices += known[key]["notices"]
        return with_block(config, one.block, one.steps)
    own: list[str] = []
    prepared = settle(one, config, budget, goal, own)
    if not len(prepared.held):
        raise ValueError("There are no held-out rows to compare on: set data.holdout or data.eval.")
    notices += own
    entry = {"block": one.block, "steps": one.steps, "trainable": one.trainable, "notices": own}
    folder.mkdir(parents=True, exist_ok=True)
    stored.write_text(json.dumps(known | {key: entry}, indent=2, default=str) + "\n", encoding="utf-8")
    return with_block(config, one.block, one.steps)


def _one(
    one: Contender,
    config: RunConfig,
    seed: int,
    folder: Path,
    say: Callable[[str], None],
    execute: Callable[[Path], str | None],
    score: str,
) -> list[float]:
    """One run, unless it has finished before; its figures go to the contender. Returns the base's score, once known."""
    config = config.model_copy(deep=True)
    config.train.seed, config.eval.prompts = seed, 0
    config.output.dir = ""
    name = re.sub(r"\W+", "-", one.name)
    run = folder / "runs" / f"{name}-seed{seed}-{_digest(config.settings())}"
    report = run / "report.json"
    if not report.is_file():
        say(f"{one.name}, seed {seed}: {one.steps} steps, {one.trainable:,} trainable parameters")
        run.mkdir(parents=True, exist_ok=True)
        config.output.dir = str(run)
        settings = run / "settings.yaml"
        settings.write_text(config.dump(), encoding="utf-8")
        one.failed = execute(settings) or one.failed
    if not report.is_file():
        one.failed = one.failed or "the run left no report"
        say(f"{one.name}, seed {seed}: {one.failed}")
        return []
    found = json.loads(report.read_text(encoding="utf-8"))
    before, after = found["before"][score], found["after"][score]
    one.trainable = found["trainable"]
    one.scores.append(after)
    one.seconds.append(found.get("compute_seconds", found["seconds"]))
    one.memory.append(found["peak_memory"])
    say(f"{one.name}, seed {seed}: held-out {score} {after:.4f}, from {before:.4f}")
    return [before]


def _in_a_process(settings: Path) -> str | None:
    """``veneer train SETTINGS --resume``; the last line of what it says if it fails."""
    log = settings.with_name("log.txt")
    with log.open("w", encoding="utf-8") as file:
        words = [sys.executable, "-m", "veneer.cli", "train", str(settings), "--resume", "--log.progress", "plain"]
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it was interrupted too, and writes its checkpoint
            raise
    if code == 130:
        raise KeyboardInterrupt
    lines = log.read_text(encoding="utf-8").strip().splitlines()
    return None if code == 0 else (lines[-1] if lines else f"exit code {code}")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]
