"""Every registered method has a page: its paper, its equation, the meaning of each setting, an example that runs."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import re

import pytest

import veneer.methods  # noqa: F401 - enters the methods into the registry
from docs.conftest import ROOT
from docs.runner import blocks, world
from veneer.core import registry

METHODS = sorted(registry.METHODS)


def load():
    spec = importlib.util.spec_from_file_location("make_method_pages", ROOT / "docs/make_method_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


maker = load()


@pytest.mark.parametrize("name", METHODS)
def test_page_says_source_equation_and_every_setting(name):
    text = maker.page(name)
    row = registry.METHODS[name]
    head = text.split("\n\n")[1]
    assert re.search(r"\b(19|20)\d\d\b", head), "the page opens with a year"
    assert re.search(r"arxiv|doi|openreview|ICLR|no paper", head, re.I), "the page opens with a source"
    assert "```text\n" in text.split("## Example")[0].split("## Settings")[0], "there is an equation"
    said = maker.meanings(row.config)
    silent = [f.name for f in dataclasses.fields(row.config) if not said.get(f.name)]
    assert not silent, f"{row.config.__name__}'s docstring does not say under Attributes: what {silent} mean"
    strange = [
        field
        for one in row.config.__mro__
        if dataclasses.is_dataclass(one)
        for field in maker.meanings_of(one)
        if field not in {f.name for f in dataclasses.fields(one)}
    ]
    assert not strange, f"{row.config.__name__}'s docstring explains {strange}, which it does not have"


@pytest.mark.parametrize("stem", [*maker.VARIANTS, *maker.STARTS])
def test_variant_pages_have_equations(stem):
    assert "```text\n" in maker.variant_page(stem).split("## Code")[0]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "SHADOW"])
def test_example_runs(name, base, tmp_path, monkeypatch):
    """On a tiny model in SmolLM2's place; something trains, and not everything."""
    world(tmp_path, base, {})
    monkeypatch.chdir(tmp_path)
    (example,) = (block for block in blocks(maker.page(name)) if block.language == "python" and "base =" in block.code)
    out, names = io.StringIO(), {}
    with contextlib.redirect_stdout(out):
        exec(example.code, names)
    trainable, total = names["model"].get_nb_trainable_parameters()
    assert 0 < trainable < total
    assert "trainable params" in out.getvalue()
