"""Tables of the commands that only look."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

ENDS = 12


def show_inspection(found: Any, every: bool) -> None:
    """An adapter's folder on one screen."""
    console = Console(highlight=False)
    grid = Table.grid(padding=(0, 2))
    config = found.config
    plain = (str, int, float, bool)
    settings = {k: v for k, v in config.items() if isinstance(v, plain) and v not in (False, "", 0, 0.0)}
    hidden = (
        "peft_type",
        "base_model_name_or_path",
        "task_type",
        "inference_mode",
        "peft_version",
        "init_lora_weights",
    )
    targets = config.get("target_modules")
    rows = [
        ("method", found.method.lower() + (f" for {config['task_type']}" if config.get("task_type") else "")),
        ("base", found.base or "not named"),
        ("size", f"{found.parameters:,} parameters, {found.bytes / 1e6:.1f} MB, {', '.join(found.dtypes)}"),
        ("targets", _targets(targets)),
        ("settings", ", ".join(f"{k} {v}" for k, v in settings.items() if k not in (*hidden, "target_modules"))),
    ]
    for name, value in rows:
        grid.add_row(Text(name, "bold"), Text(value))
    console.print(grid)
    stem = _stem([layer.place for layer in found.layers])
    table = Table(
        f"{stem}...", "shape", "norm", "rank", "effective", box=None, padding=(0, 2), header_style="bright_black"
    )
    for column in table.columns[2:]:
        column.justify = "right"
    whole = every or len(found.layers) <= 2 * ENDS + 4
    shown: Sequence[Any] = found.layers if whole else [*found.layers[:ENDS], None, *found.layers[-ENDS:]]
    largest = max((layer.norm for layer in found.layers), default=1.0) or 1.0
    for layer in shown:
        if layer is None:
            table.add_row(Text(f"... {len(found.layers) - 2 * ENDS} more (--all)", "italic"), "", "", "", "")
            continue
        bar = "▁▂▃▄▅▆▇█"[min(7, int(8 * layer.norm / largest))]
        effective = f"{layer.effective_rank:.1f}" if layer.effective_rank is not None else ""
        table.add_row(
            Text(layer.place[len(stem) :]),
            Text(layer.shape),
            f"{layer.norm:.4f} {bar}",
            str(layer.rank or ""),
            effective,
        )
    console.print(table)
    if found.dead:
        console.print(
            Text(f"{len(found.dead)} of {len(found.layers)} places changed nothing: their weights are zero.", "yellow")
        )


def _targets(targets: Any) -> str:
    """Names that differ only in their layer, once."""
    if not targets or isinstance(targets, str):
        return targets or "not listed"
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in sorted(targets)))


def _stem(places: list[str]) -> str:
    """The parts that all dotted names begin with."""
    columns = zip(*(place.split(".")[:-1] for place in places), strict=False)
    shared = [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]
    return "".join(f"{part}." for part in shared) if len(places) > 1 else ""


def show_methods(rows: Sequence[Any]) -> None:
    """The table of methods."""
    table = Table("method", "what it is", box=None, padding=(0, 2), header_style="bright_black")
    for row in rows:
        table.add_row(Text(row.name, "bold"), Text(row.summary))
    Console(highlight=False).print(table)


def show_configs(rows: Sequence[tuple[str, str, str, str]]) -> None:
    """Config files: name, kind, what it says, what is wrong."""
    table = Table("file", "kind", "settings", "state", box=None, padding=(0, 2), header_style="bright_black")
    for name, kind, settings, state in rows:
        table.add_row(Text(name, "bold"), Text(kind), Text(settings), Text(state, "green" if state == "ok" else "red"))
    Console(highlight=False).print(table)


def show_spectrum(rows: Sequence[dict[str, Any]], ranks: dict[str, int]) -> None:
    """What each layer's delta needs of its rank, and the settings that would give it that."""
    console = Console(highlight=False)
    table = Table("layer", "rank", "effective", "needed", "norm", "largest", box=None, padding=(0, 2))
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        values = [str(row["rank"]), f"{row['effective']:.1f}", str(row["needed"]), f"{row['norm']:.4f}"]
        table.add_row(Text(str(row["layer"])), *values, f"{row['largest']:.4f}")
    console.print(table)
    pattern = ", ".join(f"{layer}: {rank}" for layer, rank in ranks.items())
    console.print(Text(f"\nrank_pattern: {{{pattern}}}"), soft_wrap=True)
