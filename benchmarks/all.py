"""Runs every benchmark, and draws the ratios of their last figures: ``make bench``.

python benchmarks/all.py                 # pass --rounds 3 for a quick look
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = (
    "startup",
    "adapters_many_layers",
    "decode",
    "train_step",
    "train_rows",
    "methods_step",
    "starts",
    "combine",
    "experts",
    "optimizer",
)


def draw(results: Path) -> Path:
    """A bar for each figure that has both libraries: our CPU time over the peer's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ratios = {}
    for file in sorted(results.glob("*.json")):
        rows = json.loads(file.read_text())
        if not isinstance(rows, dict):  # of a benchmark that compares with something else
            continue
        for ours in [name for name in rows if name.startswith("veneer")]:
            theirs = ours.replace("veneer", "peft")
            if theirs in rows:
                ratios[f"{file.stem} {ours.removeprefix('veneer')}".strip()] = (
                    rows[ours]["cpu_s"] / rows[theirs]["cpu_s"]
                )
    figure, axes = plt.subplots(figsize=(8, 0.25 * len(ratios) + 1))
    axes.barh(list(ratios), list(ratios.values()), color=["#2a7" if r <= 1 else "#c55" for r in ratios.values()])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("veneer's CPU time over PEFT's")
    axes.set_xscale("log")
    axes.tick_params(labelsize=7)
    figure.tight_layout()
    path = results / "ratios.png"
    figure.savefig(path, dpi=130)
    return path


def main() -> None:
    for script in SCRIPTS:
        subprocess.run([sys.executable, str(HERE / f"{script}.py"), *sys.argv[1:]], check=True)
    print(f"\n{draw(HERE / 'results')}")


if __name__ == "__main__":
    main()
