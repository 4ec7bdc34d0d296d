"""A run as one page: no script, nothing fetched, light and dark. Made from the files in the run's folder."""

from __future__ import annotations

import itertools
import json
import re
from html import escape
from pathlib import Path
from typing import Any

from veneer.train import inspection, routing_report
from veneer.train.callbacks import duration, size
from veneer.train.charts import Series, heat_table, line_chart, smooth

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --panel: #f6f7f9; --ink: #16191d; --soft: #5c6570; --rule: #e1e5ea;
  --c1: #2563c9; --c2: #c2410c; --c3: #0f766e; --c4: #7c3aed; --good: #15803d; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --panel: #1c2127; --ink: #e7eaee; --soft: #9aa5b1;
  --rule: #2c333b; --c1: #6aa5ff; --c2: #ff9a62; --c3: #4fd1c0; --c4: #b794ff; --good: #5fd38a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 36px 0 12px; }
.sub { color: var(--soft); margin: 0 0 20px; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; }
.tile { background: var(--panel); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; } .good { color: var(--good); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 20px; }
figure { margin: 0; background: var(--panel); border-radius: 8px; padding: 12px 14px; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: 6px; } svg { width: 100%; height: auto; display: block; }
.grid { stroke: var(--rule); } .tick { fill: var(--soft); font-size: 12px; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .faint { opacity: .3; stroke-width: 1; }
.c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); }
.dot { fill: var(--panel); stroke-width: 2; } .legend { margin: 6px 0 0; color: var(--soft); font-size: 13px; }
.legend span { margin-right: 16px; } .key { display: inline-block; width: 12px; height: 3px; margin-right: 6px;
  vertical-align: middle; } .k1 { background: var(--c1); } .k2 { background: var(--c2); } .k3 { background: var(--c3); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; } td, th { text-align: left;
  vertical-align: top; padding: 8px 10px; border-bottom: 1px solid var(--rule); overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 500; font-size: 13px; }
td pre { margin: 0; white-space: pre-wrap; font: inherit; }
.heat { width: auto; } .heat td, .heat th { padding: 3px 8px; border: 0; font-size: 12px; text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.cell { background: color-mix(in srgb, var(--c1) calc(var(--share) * .7), var(--panel)); }
pre.settings { background: var(--panel); border-radius: 8px; padding: 14px; overflow-x: auto; font-size: 13px; }
details summary { cursor: pointer; color: var(--soft); }
"""

LEARNT = [
    ("Reward", "reward"),
    ("Margin of the rewards", "rewards/margins"),
    ("Pairs the right way round", "rewards/accuracies"),
    ("Margin of the rewards", "margin"),
    ("Pairs the right way round", "accuracy"),
]
"""Figures that some tasks have of the training rows as well as of the held-out ones."""


def write(folder: str | Path) -> Path:
    """Make ``report.html`` from what a run has written so far.

    Raises:
        FileNotFoundError: the folder holds no run.
    """
    folder = Path(folder)
    if not (folder / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"'{folder}' holds no run: there is no metrics.jsonl in it.")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    report = _json(folder / "report.json")
    settings = (folder / "run.yaml").read_text(encoding="utf-8") if (folder / "run.yaml").is_file() else ""
    body = [
        _head(folder, report, settings),
        _tiles(report, lines),
        _curves(lines, report),
        _tables(report),
        _samples(report),
    ]
    body += [routing_report.section(lines, report.get("best_step"))]
    body += [_layers(folder), _data(report), _settings(settings)]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(folder.name)} · veneer</title><style>{STYLE}</style></head><body><main>{''.join(body)}</main>"
        "</body></html>\n"
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _head(folder: Path, report: dict[str, Any], settings: str) -> str:
    model = re.search(r"^model:\n(?:  .*\n)*?  path: (.+)$", settings, re.M)
    method = re.search(r"^adapter:\n(?:  .*\n)*?  method: (.+)$", settings, re.M)
    parts = [method[1] if method else "", f"on {model[1]}" if model else "", "" if report else "(not finished)"]
    return f'<h1>{escape(folder.name)}</h1><p class="sub">{escape(" ".join(p for p in parts if p))}</p>'


def _tiles(report: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    tiles: list[tuple[str, str, str]] = []
    before = report.get("before") or {}
    for name, after in (report.get("after") or {}).items():
        higher = report["higher"] if name == report["score"] else name != "loss"
        better = "good" if (after > before[name] if higher else after < before[name]) else ""
        tiles.append((f"{before[name]:.3f} → {after:.3f}", f"held-out {name}, before and after", better))
    if report:
        share = 100 * report["trainable"] / report["total"]
        tiles += [
            (f"{report['trainable']:,}", f"parameters trained, {share:.3g} % of {report['total']:,}", ""),
            (f"{report['steps']:,}", f"steps in {duration(report['seconds'])}", ""),
            (size(report["peak_memory"]), "memory at the peak", ""),
            (size(report["adapter_bytes"]), "the adapter on disk", ""),
        ]
    elif lines:
        tiles.append((f"{lines[-1]['step']:,}", "steps so far", ""))
    cells = "".join(
        f'<div class="tile"><b class="{c}">{escape(v)}</b><span>{escape(n)}</span></div>' for v, n, c in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _curves(lines: list[dict[str, Any]], report: dict[str, Any]) -> str:
    def points(key: str) -> list[tuple[float, float]]:
        return [(one["step"], one[key]) for one in lines if isinstance(one.get(key), int | float)]

    loss = points("loss")
    held = points("eval_loss")
    first = report.get("before") or {}
    if "loss" in first:
        held = [(0, first["loss"]), *held]
    series = [Series("each step", loss, faint=True), Series("training", smooth(loss))] if loss else []
    series += [Series("held out", held, colour=2, dots=True)] if held else []
    speed = [
        (b["step"], (b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"]))
        for a, b in itertools.pairwise(lines)
        if "loss" in a and "loss" in b and b["seconds"] > a["seconds"] and b["tokens"] > a["tokens"]
    ]
    learnt = {"sft": " per learnt token", "seq2seq": " per target token"}.get(report.get("task", "sft"), "")
    figures = [(f"Loss{learnt}", line_chart(series, "step", "loss"))]
    both = [(title, name) for title, name in LEARNT if points(name)]
    for title, name in both:
        held = [(0, first[name])] if name in first else []
        drawn_both = [Series("each step", points(name), faint=True), Series("training", smooth(points(name)))]
        drawn_both += [Series("held out", [*held, *points(f"eval_{name}")], colour=2, dots=True)]
        figures.append((title, line_chart([one for one in drawn_both if one.points], "step", title)))
    left = {"loss", *(name for _, name in both)}
    scored = [name for name in first if name not in left and points(f"eval_{name}")]
    drawn_scores = [
        Series(name, [(0, first[name]), *points(f"eval_{name}")], colour=colour, dots=True)
        for colour, name in enumerate(scored[:4], 1)
    ]
    if drawn_scores:
        figures.append(("On held-out rows", line_chart(drawn_scores, "step", "score")))
    for title, values, colour in (
        ("Learning rate", points("learning_rate"), 3),
        ("Gradient norm", points("grad_norm"), 4),
        ("Tokens a second", smooth(speed), 1),
    ):
        if len(values) > 1:
            figures.append((title, line_chart([Series(title, values, colour=colour)], "step", title)))
    drawn = "".join(f"<figure><figcaption>{escape(t)}</figcaption>{svg}</figure>" for t, svg in figures if svg)
    return f'<h2>Curves</h2><div class="charts">{drawn}</div>' if drawn else ""


def _tables(report: dict[str, Any]) -> str:
    """What the task itself says of the held-out rows, such as which classes are taken for which."""
    drawn = []
    for title, rows in (report.get("tables") or {}).items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        values = {(row, column): value for row, cells in rows.items() for column, value in cells.items()}
        table = heat_table(
            list(rows), sorted(columns, key=lambda c: list(rows).index(c) if c in rows else -1), values, ""
        )
        drawn.append(f'<figure class="wide"><figcaption>{escape(title)}</figcaption>{table}</figure>')
    return f'<h2>By class</h2><div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _samples(report: dict[str, Any]) -> str:
    if not report.get("samples"):
        return ""
    asked = report.get("asked", "prompts")
    kind = f"Held-out {asked}" if report.get("held_out") else f"Training {asked}"
    rows = "".join(
        "<tr>"
        + "".join(f"<td><pre>{escape(one[k])}</pre></td>" for k in ("prompt", "expected", "before", "after"))
        + "</tr>"
        for one in report["samples"]
    )
    head = f"<tr><th>{asked.removesuffix('s')}</th><th>wanted</th><th>before</th><th>after</th></tr>"
    return f'<h2>{kind}, answered before and after</h2><div class="wide"><table>{head}{rows}</table></div>'


def _layers(folder: Path) -> str:
    """Norm and effective rank of each place's change: rows are layers, columns the kinds of place."""
    try:
        found = inspection.inspect(folder)
    except (FileNotFoundError, ValueError):
        return ""
    kinds = {re.sub(r"^.*\.\d+\.", "", layer.place) for layer in found.layers}
    short = {kind: kind.rpartition(".")[2] for kind in kinds}
    if len(set(short.values())) < len(kinds):
        short = {kind: kind for kind in kinds}
    norms: dict[tuple[str, str], float] = {}
    ranks: dict[tuple[str, str], float] = {}
    for layer in found.layers:
        numbers = re.findall(r"\.(\d+)\.", f".{layer.place}.")
        key = (".".join(numbers) or "-", short[re.sub(r"^.*\.\d+\.", "", layer.place)])
        norms[key] = layer.norm
        if layer.effective_rank is not None:
            ranks[key] = layer.effective_rank
    if not norms:
        return ""
    rows, columns = list(dict.fromkeys(r for r, _ in norms)), list(dict.fromkeys(c for _, c in norms))
    tables = [("Norm of the change", heat_table(rows, columns, norms, "norm"))]
    if ranks:
        tables.append(("Effective rank of the change", heat_table(rows, columns, ranks, "effective rank")))
    drawn = "".join(f'<figure class="wide"><figcaption>{t}</figcaption>{table}</figure>' for t, table in tables)
    return f'<h2>What changed where</h2><div class="charts">{drawn}</div>'


def _data(report: dict[str, Any]) -> str:
    rows = report.get("data") or {}
    if not rows:
        return ""
    cells = "".join(f"<tr><th>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>" for k, v in rows.items())
    return f"<h2>Data</h2><table>{cells}</table>"


def _settings(settings: str) -> str:
    if not settings:
        return ""
    return (
        f'<h2>Settings</h2><details><summary>run.yaml</summary><pre class="settings">{escape(settings)}</pre></details>'
    )
