"""Third-party calls where veneer answers to ``peft``, in one process; and the published table of them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .ecosystem import CALLS, table

ROOT = Path(__file__).parents[2]


def test_libraries_find_what_they_call() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])}
    command = [sys.executable, "-m", "veneer.as_peft", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/hf/with_libraries.py"],
        capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize("test", sorted({call.test for call in CALLS}))
def test_each_row_of_the_table_names_a_test_that_is_there(test) -> None:
    path, name = test.split("::")
    functions = {n.name for n in ast.parse((ROOT / path).read_text()).body if isinstance(n, ast.FunctionDef)}
    assert name in functions


def test_the_published_table_is_the_one_that_is_tested() -> None:
    page = (ROOT / "docs" / "ecosystem.md").read_text()
    assert table() in page, "docs/ecosystem.md is not of today's calls and versions: run python tests/hf/ecosystem.py"
