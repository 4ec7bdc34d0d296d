"""The report of a run in a real browser, light and dark: skipped where no Chromium is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
CONSOLE = re.compile(r"CONSOLE[:(]\d+\)?\] (.*)")


def shoot(page: Path, out: Path, dark: bool = False) -> tuple[Path, list[str]]:
    """(a picture of the page, what its console said)."""
    scheme = 0 if dark else 1
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,1600",
            "--enable-logging=stderr", f"--user-data-dir={out.parent / f'profile-{out.stem}'}",
            f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={out}", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=240, env={**os.environ, "HOME": str(out.parent)},
    )  # fmt: skip
    assert out.is_file(), done.stderr[-2000:]
    return out, CONSOLE.findall(done.stderr)


def colours(picture: Path):
    """(the background, how many different colours there are, the share of the picture that is not background)."""
    from PIL import Image

    image = Image.open(picture).convert("RGB")
    counts = {colour: n for n, colour in image.getcolors(1 << 24)}
    background = image.getpixel((2, 2))
    return background, len(counts), 1 - counts[background] / (image.width * image.height)


@pytest.fixture(scope="module")
def report(base, tmp_path_factory):
    """The page of a short run."""
    import json

    from veneer.cli.main import main

    folder = tmp_path_factory.mktemp("run")
    data = folder / "rows.jsonl"
    rows = [{"prompt": f"What colour is rose {i}?", "completion": f"The rose {i} is red"} for i in range(32)]
    data.write_text("\n".join(map(json.dumps, rows)))
    words = f"train --model {base} --data {data} --out {folder / 'out'} --steps 6 --eval.every 2 --holdout 6 --lr 1e-2"
    main([*words.split(), "--eval.max_new_tokens", "4", "--log.progress", "off"])
    return folder / "out" / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_is_drawn_without_a_word_in_the_console(report, tmp_path, scheme):
    picture, console = shoot(report, tmp_path / f"{scheme}.png", dark=scheme == "dark")
    background, different, drawn = colours(picture)
    assert console == []
    assert different > 200, "text, curves and heat maps have many shades"
    assert 0.15 < drawn < 0.95
    assert (sum(background) < 200) == (scheme == "dark")


def test_the_report_needs_nothing_but_itself(report):
    text = report.read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=|@import|url\(", text)


def test_a_broken_page_would_be_noticed(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><title>t</title><script>undefinedName()</script>")
    picture, console = shoot(page, tmp_path / "broken.png")
    _, different, drawn = colours(picture)
    assert any("undefinedName" in line for line in console)
    assert different < 5 and drawn < 0.01
