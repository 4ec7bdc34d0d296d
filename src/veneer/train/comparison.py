"""What a comparison found: means with their confidence intervals, the Pareto fronts, a recommendation.

Methods are compared seed by seed, since a seed fixes order, start and held-out rows for all of them alike:

    mean of the differences +- t(0.975, n - 1) s / sqrt(n),  s their standard deviation over n seeds
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
"""Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom."""


@dataclass
class Contender:
    """One of the things compared, with its runs' results by seed."""

    name: str
    block: dict[str, Any]
    steps: int = 0
    trainable: int = 0
    scores: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    failed: str | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores) if self.scores else math.inf

    @property
    def interval(self) -> float | None:
        """Half of the 95 % confidence interval of the mean."""
        return half_interval(self.scores)


@dataclass
class Comparison:
    """What came of it. Scores are figures on held-out rows, named ``score``; ``higher`` says whether more is better."""

    budget: str
    seeds: list[int]
    before: float
    contenders: list[Contender]
    notices: list[str]
    sentence: str = ""
    files: list[str] = field(default_factory=list)
    score: str = "loss"
    higher: bool = False

    def order(self, one: Contender) -> float:
        """Smaller is better; a contender without scores comes last."""
        return -one.mean if self.higher and one.scores else one.mean


def half_interval(values: Sequence[float]) -> float | None:
    """t(0.975, n - 1) s / sqrt(n), or None of fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    return (T975[n - 2] if n - 2 < len(T975) else 2.0) * statistics.stdev(values) / math.sqrt(n)


def recommend(result: Comparison) -> str:
    """One sentence: the best, whether the others differ from it, and which equal one is smaller."""
    done = [one for one in result.contenders if len(one.scores) == len(result.seeds)]
    if not done:
        return "No method finished with every seed, so there is nothing to recommend."
    best = done[0]
    score = result.score
    most, more = ("highest", "higher") if result.higher else ("lowest", "lower")
    if best.mean == result.before or (best.mean < result.before) == result.higher:
        worse = f"does not improve on the base's {score} {result.before:.4f}"
        return f"None of them learnt: the best, {best.name}, {worse}."
    if len(result.seeds) < 2:
        return f"{best.name} has the {most} held-out {score}, {best.mean:.4f}; one seed cannot say how sure that is."
    alike = [one for one in done[1:] if not differs(best, one)]
    if not alike:
        others = "all others" if len(done) == len(result.contenders) else "all others that finished"
        return f"Take {best.name}: its held-out {score} {best.mean:.4f} is {more} than that of {others}, seed by seed."
    smallest = min([best, *alike], key=lambda one: one.trainable)
    names = ", ".join(one.name for one in alike)
    text = (
        f"{best.name} has the {most} mean held-out {score}, {best.mean:.4f}, but {len(result.seeds)} seeds cannot tell "
    )
    text += f"{names} apart from it"
    if smallest is best:
        return text + f"; take {best.name}, which is also the smallest of them."
    return text + f"; of these, {smallest.name} trains the fewest parameters ({smallest.trainable:,})."


def differs(a: Contender, b: Contender) -> bool:
    """Whether the 95 % interval of the difference, seed by seed, leaves out zero."""
    differences = [y - x for x, y in zip(a.scores, b.scores, strict=True)]
    half = half_interval(differences)
    return half is not None and abs(statistics.fmean(differences)) > half


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one beats in both values, lower being better, by the first value."""
    ordered = sorted(range(len(points)), key=lambda i: points[i])
    kept: list[int] = []
    for i in ordered:
        if not kept or points[i][1] < points[kept[-1]][1]:
            kept.append(i)
    return kept


def picture(result: Comparison, folder: Path) -> list[str]:
    """``compare.png`` and ``.svg``: the score against parameters, memory and time. Nothing without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        result.notices.append("There is no picture without the package matplotlib: pip install 'veneer[train]'.")
        return []
    done = [one for one in result.contenders if one.scores]
    costs: list[tuple[str, list[float]]] = [
        ("trainable parameters", [float(one.trainable) for one in done]),
        ("peak memory, GB", [max(one.memory) / 1e9 for one in done]),
        ("seconds of computing", [statistics.fmean(one.seconds) for one in done]),
    ]
    heights = sorted(one.mean for one in done)
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, values) in zip(figure.subplots(1, 3, sharey=True), costs, strict=True):
        points = list(zip(values, [one.mean for one in done], strict=True))
        best = [points[i] for i in front([(cost, result.order(one)) for cost, one in zip(values, done, strict=True)])]
        axes.plot(*zip(*best, strict=True), color="#9aa5b1", linewidth=1.2, zorder=1, drawstyle="steps-post")
        for (x, y), one in zip(points, done, strict=True):
            axes.errorbar(
                x, y, yerr=one.interval or 0, fmt="o", capsize=3, color="#2457c5" if (x, y) in best else "#9aa5b1"
            )
            right = x > (min(values) + max(values)) / 2  # the name stands on the side that has room
            axes.annotate(
                one.name,
                (x, y),
                xytext=(-7 if right else 7, 6 if heights.index(y) % 2 else -6),
                textcoords="offset points",
                ha="right" if right else "left",
                va="center",
                fontsize=9,
            )
        axes.set_xlabel(name)
        if name == "trainable parameters":
            axes.set_xscale("log")
        if heights[0] > 0 and heights[-1] > 5 * heights[0]:
            axes.set_yscale("log")  # one that has hardly learnt would press the others together
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(f"held-out {result.score} ({'higher' if result.higher else 'lower'} is better)")
    files = [str(folder / "compare.png"), str(folder / "compare.svg")]
    for file in files:
        figure.savefig(file, dpi=130)
    return files
