"""The written pages hold: their code runs, their links lead somewhere; and those made from code are whole."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from docs.conftest import ROOT
from docs.runner import run_page, world

PAGES = sorted(p for p in (ROOT / "docs").rglob("*.md"))


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs/quickstart.md"], ids=lambda page: page.stem)
def test_page_runs(page, base, tmp_path, monkeypatch):
    world(tmp_path, base, {"examples/quickstart": ROOT / "examples/quickstart"})
    monkeypatch.setenv("COLUMNS", "200")
    assert run_page(page, tmp_path) >= 2


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.stem)
def test_links_lead_to_pages_and_headings(page):
    made = {"methods/index.md", "errors.md", "api.md", "performance.md", "contributing.md"}
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        inside = str(file.relative_to(ROOT / "docs")) if file.is_relative_to(ROOT / "docs") else ""
        if inside in made or re.fullmatch(r"methods/[\w-]+\.md", inside):
            continue  # made at build time; `make docs` checks these
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in headings(file), f"{page.name} links to {target}, a heading that is not there"


def headings(file: Path) -> set[str]:
    found = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") for text in found}


def test_errors_page_has_the_sentences_that_users_meet():
    text = load("make_errors").page()
    for sentence in ("holds a run already", "is not an adapter folder", "must be a positive integer"):
        assert sentence in text
    assert text.count("\n- <small>") > 300


def test_api_page_names_everything_public():
    import veneer

    text = load("make_api").page()
    for names in veneer._HOMES.values():
        for name in names:
            assert re.search(rf"^::: veneer\.[\w.]+\.{name}$", text, re.M), name


def test_site_builds_strictly(tmp_path):
    """What `make docs` does, but for the API page's directives, whose reading of the source takes most of the time."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), plugins=["search"], strict=True))
    assert "Where it sits" in (tmp_path / "site/methods/lora.html").read_text(encoding="utf-8")
    assert (tmp_path / "site/errors.html").is_file()
