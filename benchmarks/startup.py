"""Times ``import veneer``, ``import peft`` and ``veneer --help``, each in a fresh process.

python benchmarks/startup.py --rounds 5
"""

from __future__ import annotations

import subprocess
import sys

from common import arguments, interleave, report


def main() -> None:
    given = arguments(__doc__ or "")
    commands = {f"import {name}": [sys.executable, "-c", f"import {name}"] for name in given.libraries.split(",")}
    commands["veneer --help"] = [sys.executable, "-m", "veneer.cli.main", "--help"]
    commands["python alone"] = [sys.executable, "-c", "pass"]
    runs = {
        name: (lambda c=command: subprocess.run(c, check=True, capture_output=True))
        for name, command in commands.items()
    }
    rows = interleave(runs, given.rounds)
    for row in rows.values():  # what a child uses is not in this process's CPU time
        row["cpu_s"] = row["wall_s"]
    report("startup: wall time", rows, "python alone")


if __name__ == "__main__":
    main()
