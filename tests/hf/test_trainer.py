"""transformers' Trainer and TRL train, save, resume and predict with veneer, as ``peft`` and under its own name."""

from __future__ import annotations

import pytest

from .test_as_peft import ROOT, run

PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/hf/with_trainer.py"]


@pytest.mark.parametrize("name", ["as peft", "as veneer alone"])
def test_the_trainer(name) -> None:
    arguments = ["-m", "veneer.as_peft", *PYTEST] if name == "as peft" else PYTEST
    done = run(*arguments, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
