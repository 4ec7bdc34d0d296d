"""The tutorials, run as they stand: every block, in order, on a tiny model that answers to SmolLM2's name."""

from __future__ import annotations

import sys

import pytest

import veneer.methods  # noqa: F401 - the methods that are there before any page adds its own
from docs.conftest import ROOT
from docs.runner import blocks, run_page, world
from veneer.core import registry

PAGES = sorted((ROOT / "docs/tutorials").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tutorial_runs(page, base, tmp_path, monkeypatch):
    world(tmp_path, base, {})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("COLUMNS", "200")
    known = set(registry.METHODS)
    try:
        assert run_page(page, tmp_path) >= 3
    finally:  # what the reader's own method leaves in the tables would meet other tests without its module
        for name in set(registry.METHODS) - known:
            sys.modules.pop(registry.METHODS.pop(name).build.__module__, None)
            registry.PeftType._members.pop(name)


def test_what_is_marked_to_run_is_what_the_reader_sees(tmp_path):
    page = tmp_path / "page.md"
    page.write_text('```python\nprint("one 12")\n```\n\n```text\none 3\n```\n\n```py\nraise Exit\n```\n')
    assert [block.language for block in blocks(page.read_text())] == ["python", "text", "py"]
    assert run_page(page, tmp_path) == 1
    page.write_text('```python\nprint("one")\n```\n\n```text\ntwo\n```\n')
    with pytest.raises(AssertionError, match=r"page\.md:6"):
        run_page(page, tmp_path)
