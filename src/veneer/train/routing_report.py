"""Who goes where, for a run's page: a heat map of layers and experts, and how it came to that."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from veneer.train.charts import Series, heat_table, line_chart, smooth


def section(lines: list[dict[str, Any]], best: int | None = None) -> str:
    """The report's part on routing; empty where the run routes nothing.

    Args:
        lines: of metrics.jsonl.
        best: the step whose adapter was kept; its table is shown, or else the last one.
    """
    tables = [one for one in lines if isinstance(one.get("routing"), dict) and one["routing"].get("layers")]
    if not tables:
        return ""
    shown = next((one for one in reversed(tables) if one["step"] == best), tables[-1])
    figures = _courses(lines)
    for kind, layers in _kinds(shown["routing"]["layers"]).items():
        heading = f"Share of each expert, {kind}" if kind else "Share of each expert"
        figures.append((heading, _map(layers, shown["routing"].get("experts") or [])))
    drawn = "".join(
        f'<figure class="wide"><figcaption>{escape(title)}</figcaption>{inside}</figure>' for title, inside in figures
    )
    return f'<h2>Who goes where (step {shown["step"]:,})</h2><div class="charts">{drawn}</div>'


def _courses(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    found = []
    for title, key in (("Entropy of the gates (nats)", "routing_entropy"), ("Busiest expert", "routing_busiest")):
        steps, held = (
            [(one["step"], one[name]) for one in lines if isinstance(one.get(name), int | float)]
            for name in (key, f"eval_{key}")
        )
        series = [Series("training", smooth(steps))] if steps else []
        series += [Series("held out", held, colour=2, dots=True)] if held else []
        if len(steps) + len(held) > 1:
            found.append((title, line_chart(series, "step", title)))
    return found


def _kinds(layers: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Layers by their path's last part (``q_proj``), by the whole rest of the path where those would clash."""
    rest = {path: re.sub(r"^.*?\.\d+\.", "", path) for path in layers}
    short = {kind: kind.rpartition(".")[2] for kind in rest.values()}
    clash = len(set(short.values())) < len(short)
    found: dict[str, dict[str, Any]] = {}
    for path, use in layers.items():
        found.setdefault(rest[path] if clash else short[rest[path]], {})[path] = use
    return found


def _map(layers: dict[str, Any], names: list[str]) -> str:
    shares: dict[tuple[str, str], float] = {}
    for path, use in layers.items():
        number = re.search(r"\.(\d+)\.", f".{path}.")
        for i, share in enumerate(use["load"]):
            shares[number[1] if number else path, names[i] if i < len(names) else str(i)] = share
    rows, columns = list(dict.fromkeys(r for r, _ in shares)), list(dict.fromkeys(c for _, c in shares))
    entropy = sum(use["entropy"] for use in layers.values()) / len(layers)
    legend = f'<p class="legend">a row for each layer, from the input up; mean entropy {entropy:.2f} nats</p>'
    return heat_table(rows, columns, shares, "share") + legend
