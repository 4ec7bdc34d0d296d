"""Draw what compare.py measured: ``python figure.py results.json starts.png``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

COLOURS = ["#8a8a8a", "#4c72b0", "#55a868", "#c44e52", "#8172b3", "#dd8452", "#64b5cd"]


def main(source: Path, target: Path) -> None:
    """Three panels: alignment of the first step, held-out loss, held-out accuracy."""
    results = json.loads(source.read_text())
    names = list(results)
    colour = dict(zip(names, COLOURS, strict=False))
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    bars, loss, right = figure.subplots(1, 3)
    bars.barh(names[::-1], [results[n]["alignment"] for n in names[::-1]], color=[colour[n] for n in names[::-1]])
    for i, n in enumerate(names[::-1]):
        bars.text(results[n]["alignment"], i, f" {results[n]['alignment']:.2f}", va="center", fontsize=8)
    bars.set_title("first step: cosine with −∇W", fontsize=10)
    bars.margins(x=0.15)
    for name in names:
        steps, losses, shares = zip(*results[name]["heldout"], strict=True)
        loss.plot(steps, losses, color=colour[name], marker=".", label=name)
        right.plot(steps, [100 * s for s in shares], color=colour[name], marker=".")
    loss.set_yscale("log")
    loss.set_title("held-out loss", fontsize=10)
    right.set_title("held-out sentences right, %", fontsize=10)
    for axes in (loss, right):
        axes.set_xlabel("optimiser step")
    loss.legend(fontsize=7, frameon=False)
    for axes in (bars, loss, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
