"""Plans and outcomes for a reader's eye."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from veneer.train.callbacks import duration, size

SHOWN_TOKENS = 400


def show_notices(console: Console, notices: list[str]) -> None:
    """One line each."""
    for notice in notices:
        console.print(Text.assemble(("note  ", "yellow"), notice))


def facts(console: Console, rows: list[tuple[str, str]]) -> None:
    """Two columns: what, and how much."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, "bold"), Text(value))
    console.print(table)


def show_plan(console: Console, plan: Any) -> None:
    """The plan on one screen, with one row's tokens, the learnt ones in green."""
    config, schedule, memory = plan.config, plan.schedule, plan.memory
    share = 100 * plan.trainable / plan.total
    batch = config["train"]["batch_size"] * config["train"]["accumulate"]
    facts(
        console,
        [
            ("model", f"{plan.model}  {plan.total - plan.trainable:,} parameters, {plan.dtype} on {plan.device}"),
            (
                "adapter",
                f"{config['adapter']['method']}  {plan.trainable:,} trainable of {plan.total:,} ({share:.3f} %)",
            ),
        ],
    )
    table = Table("place", "modules", "trainable", box=None, padding=(0, 2), header_style="bright_black")
    for column in table.columns[1:]:
        column.justify = "right"
    for group in plan.groups:
        table.add_row(Text(group.name), f"{group.places:,}", f"{group.trainable:,}")
    console.print(table)
    data = config["data"]
    lengths = ", ".join(f"{name} {value}" for name, value in plan.quantiles.items())
    facts(
        console,
        [
            ("data", f"{plan.train_rows:,} rows to train on, {plan.held_rows:,} held out"),
            *[(name, value) for name, value in plan.facts],
            ("row length", f"{lengths} (data.max_length {data['max_length']}, {plan.counts.get('truncated', 0)} cut)"),
            (
                "steps",
                f"{schedule.steps:,} of {batch} rows, {schedule.per_epoch:,} an epoch, {schedule.warmup} to warm up",
            ),
            ("", f"learning rate {config['train']['learning_rate']:g}, {config['train']['schedule']}"),
            (
                "rhythm",
                f"held-out {plan.score} every {schedule.eval_every} steps, checkpoint every {schedule.save_every}",
            ),
            ("memory", f"about {size(memory.total)} of {size(memory.available)}: {_parts(memory)}"),
            ("writes", f"{config['output']['dir']}/ adapter, tokenizer, run.yaml, metrics.jsonl, report.json"),
        ],
    )
    if plan.probe:
        seconds = plan.run_tokens / plan.probe.tokens_per_second
        facts(
            console,
            [
                ("time", f"about {duration(seconds)} of training at {plan.probe.tokens_per_second:,.0f} tokens/s"),
                (
                    "probe",
                    f"{plan.probe.seconds:.2f} s for the longest batch, {size(plan.probe.peak_memory)} at the peak",
                ),
            ],
        )
    if not memory.fits:
        console.print(Text(f"This does not fit into memory. {plan.advice}", "bold red"))
    console.print()
    console.print(Text.assemble("The first row; ", ("green", "bold green"), " is what the model learns:"))
    console.print(sample_text(plan.sample, colour=console.is_terminal))
    console.print()
    show_notices(console, plan.notices)


def _parts(memory: Any) -> str:
    names = ("weights", "adapters", "gradients", "optimiser", "activations", "holes", "runtime")
    return ", ".join(f"{name} {size(getattr(memory, name))}" for name in names)


def sample_text(pieces: list[tuple[str, bool]], colour: bool = True) -> Text:
    """Tokens with their loss mask: learnt ones in green, or between ⟦ and ⟧ where there is no colour."""
    text, inside = Text(), False
    for piece, learnt in pieces[:SHOWN_TOKENS]:
        if not colour and learnt != inside:
            text.append("⟦" if learnt else "⟧")
        inside = learnt
        text.append(piece, "bold green" if learnt else "bright_black")
    if inside and not colour:
        text.append("⟧")
    if len(pieces) > SHOWN_TOKENS:
        text.append(f" ... {len(pieces) - SHOWN_TOKENS} more tokens", "italic")
    return text


def show_samples(console: Console, samples: list[Any], held_out: bool, asked: str = "prompts") -> None:
    """Prompts (or whatever is ``asked``) answered before and after, side by side."""
    if not samples:
        return
    title = f"Held-out {asked}" if held_out else f"{asked.capitalize()} of the training rows (nothing was held out)"
    table = Table(
        asked.removesuffix("s"), "wanted", "before", "after", title=title, title_justify="left", show_lines=True
    )
    for one in samples:
        cells = [_short(text) for text in (one.prompt, one.expected, one.before, one.after)]
        table.add_row(Text(cells[0]), Text(cells[1], "bright_black"), Text(cells[2]), Text(cells[3], "green"))
    console.print(table)


def show_shares(console: Console, title: str, by_row: dict[str, dict[str, float]]) -> None:
    """Row -> column -> share, the columns being the same in all rows."""
    columns = list(next(iter(by_row.values()), {}))
    table = Table(
        "", *columns, title=title, title_justify="left", box=None, padding=(0, 2), header_style="bright_black"
    )
    for name, cells in by_row.items():
        table.add_row(Text(name, "bold"), *(f"{cells[column]:.2f}" for column in columns))
    console.print(table)


def _short(text: str, limit: int = 300) -> str:
    text = "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
    return text if len(text) <= limit else text[:limit].rstrip() + " ..."


def show_outcome(console: Console, outcome: Any) -> None:
    """What came of a run, and what to do next."""
    if outcome.stopped_at:
        console.print(f"Stopped at step {outcome.steps}; the checkpoint is {outcome.stopped_at}.")
        console.print(f"Go on with:  veneer train {outcome.folder}/run.yaml --resume", highlight=False, soft_wrap=True)
        return
    show_samples(console, outcome.samples, outcome.held_out, outcome.asked)
    for title, by_row in list(outcome.tables.items())[:1]:
        if len(by_row) <= 20:
            show_shares(console, title, by_row)
    rows = [
        (
            "trained",
            f"{outcome.trainable:,} of {outcome.total:,} parameters ({100 * outcome.trainable / outcome.total:.3f} %)",
        )
    ]
    rows += [("", f"{outcome.steps:,} steps in {duration(outcome.seconds)}, {size(outcome.peak_memory)} at the peak")]
    best = f" (best step: {outcome.best_step})" if outcome.best_step else ""
    for name in outcome.after:
        figures = f"{outcome.before.get(name, float('nan')):.4f} before, {outcome.after[name]:.4f} after"
        rows.append((f"held-out {name}", figures + (best if name == outcome.score else "")))
    rows.append(("adapter", f"{outcome.folder}  {size(outcome.adapter_bytes)}"))
    facts(console, rows)
    console.print(f"Report:      {outcome.folder}/report.html", highlight=False, soft_wrap=True)
    talk = f"Talk to it:  veneer chat --adapter {outcome.folder}"
    ask = f"Ask it:      veneer generate --adapter {outcome.folder} TEXT"
    console.print(talk if outcome.writes else ask, highlight=False, soft_wrap=True)
