"""What a caller sees, fact by fact, on the real peer and on veneer under its name: they agree, or differ on purpose."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("surface_probes.py")
PROBES = [
    node.name
    for node in ast.parse(SCRIPT.read_text()).body
    if isinstance(node, ast.FunctionDef) and "probe" in [ast.unparse(d) for d in node.decorator_list]
]
OWN = "a prompt's tensors are called here as in its file"
DIFFERENT: dict[tuple[str, str], str] = {
    ("trainable_names", "vblora"): "the bank that layers share stands once, beside the model",
    ("frozen_names", "adalora"): "the number of ranks is counted here, and no parameter",
    ("counts", "adalora"): "the number of ranks is counted here, and no parameter",
    ("prompt_names", "prompt.trainable"): OWN,
    ("prompt_names", "prompt.encoder"): "the class is called after the method",
    ("prompt_names", "prefix.trainable"): OWN,
    ("prompt_names", "prefix.encoder"): "the class is called after the method",
    ("prompt_names", "p_tuning.trainable"): OWN,
    ("prompt_names", "p_tuning.encoder"): "the class is called after the method",
    ("prompt_names", "p_tuning.file"): "the encoder is saved beside its rows, so that training can go on",
    ("unloading", "ln_tuning"): "the peer leaves the wrapper of a saved module behind",
}
"""(probe, fact) -> why veneer answers otherwise."""


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """side -> probe -> fact -> value; the two processes run side by side."""
    folder = tmp_path_factory.mktemp("facts")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    running = {
        side: subprocess.Popen(
            [sys.executable, str(SCRIPT), side, str(folder / side)],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for side in ("real", "veneer")
    }  # fmt: skip
    for process in running.values():
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said[-3000:]
    return {side: json.loads((folder / side).read_text()) for side in running}


@pytest.mark.parametrize("probe", PROBES)
def test_facts_agree_or_differ_on_purpose(facts, probe) -> None:
    theirs, ours = facts["real"][probe], facts["veneer"][probe]
    assert "THE PROBE FAILED" not in theirs, theirs
    assert ours.keys() == theirs.keys(), ours
    wrong = []
    for fact, value in theirs.items():
        agrees = as_good(ours[fact], value)
        if agrees == ((probe, fact) in DIFFERENT):
            wrong.append(f"{fact}\n  peer:   {value}\n  veneer: {ours[fact]}\n  they {'agree' if agrees else 'differ'}")
    assert not wrong, "\n".join(wrong)


def as_good(ours: Any, theirs: Any) -> bool:
    """Equal; or for refusals: caught by whatever catches the peer's, and both with the words."""
    if isinstance(theirs, dict) and theirs.keys() == {"raises", "says", "sentence"}:
        return bool(theirs["says"] and ours["says"]) and set(theirs["raises"]) <= set(ours["raises"])
    return ours == theirs


def test_every_difference_is_about_a_fact_that_is_probed(facts) -> None:
    assert [key for key in DIFFERENT if key[1] not in facts["real"].get(key[0], {})] == []
