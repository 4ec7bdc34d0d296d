"""Make train.jsonl and heldout.jsonl out of the rated review sentences in the source package of vaderSentiment.

    pip download --no-deps --no-binary :all: --no-build-isolation vaderSentiment==3.3.2
    python make_data.py vaderSentiment-3.3.2.tar.gz [--rows 160 40] [--to FOLDER]

Same package in, same files out. The sentences of one review all land on the same side, so that the held-out ones come
from reviews the model has not seen.
"""

import argparse
import hashlib
import html
import io
import json
import random
import tarfile
from pathlib import Path

INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
TABLE = "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"
LABELS = ("negative", "positive")


def label(rating: float) -> str | None:
    """What the mean of 20 ratings from -4 to 4 says; None near zero, where the raters themselves disagree."""
    return None if abs(rating) < 1 else "positive" if rating > 0 else "negative"


def sentences(package: Path) -> dict[str, dict[str, list[str]]]:
    """Side -> label -> sentences of 5 to 20 words, without repetitions."""
    with tarfile.open(package) as outer, tarfile.open(fileobj=io.BytesIO(outer.extractfile(INNER).read())) as inner:
        table = inner.extractfile(TABLE).read().decode("utf-8", errors="ignore")
    found = {side: {name: [] for name in LABELS} for side in ("train", "heldout")}
    seen = set()
    for line in table.splitlines():
        number, rating, text = line.split("\t")
        text = html.unescape(" ".join(text.split()))
        name = label(float(rating))
        if name is None or not 5 <= len(text.split()) <= 20 or text in seen:
            continue
        seen.add(text)
        review = number.split("_")[0]
        side = "heldout" if int(hashlib.sha256(review.encode()).hexdigest(), 16) % 4 == 0 else "train"
        found[side][name].append(text)
    return found


def main() -> None:
    """Write both files, beside this script unless told otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("package", type=Path)
    parser.add_argument("--rows", type=int, nargs=2, default=(160, 40), help="of each label, to train on and held out")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    given.to.mkdir(parents=True, exist_ok=True)
    for (side, by_label), count in zip(sentences(given.package).items(), given.rows):
        shuffle = random.Random(0)
        columns = [[(text, name) for text in shuffle.sample(by_label[name], count)] for name in LABELS]
        rows = [row for pair in zip(*columns) for row in pair]  # labels take turns
        with open(given.to / f"{side}.jsonl", "w", encoding="utf-8") as file:
            for text, name in rows:
                file.write(json.dumps({"prompt": text, "completion": name}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
