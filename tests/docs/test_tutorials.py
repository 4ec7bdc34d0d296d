"""The tutorials, run as they stand: every block, in order, on a tiny model that answers to SmolLM2's name."""

from __future__ import annotations

import sys

import pytest

from docs.conftest import ROOT
from docs.runner import blocks, run_page, world

PAGES = sorted((ROOT / "docs/tutorials").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tutorial_runs(page, base, tmp_path, monkeypatch):
    world(tmp_path, base, {})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("COLUMNS", "200")
    assert run_page(page, tmp_path) >= 3
    sys.modules.pop("scale_and_shift", None)


def test_what_is_marked_to_run_is_what_the_reader_sees(tmp_path):
    page = tmp_path / "page.md"
    page.write_text('```python\nprint("one 12")\n```\n\n```text\none 3\n```\n\n```py\nraise Exit\n```\n')
    assert [block.language for block in blocks(page.read_text())] == ["python", "text", "py"]
    assert run_page(page, tmp_path) == 1
    page.write_text('```python\nprint("one")\n```\n\n```text\ntwo\n```\n')
    with pytest.raises(AssertionError, match=r"page\.md:6"):
        run_page(page, tmp_path)
