"""The package itself: light to import, every public name there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import veneer


def test_importing_veneer_imports_nothing_heavy() -> None:
    code = "import sys, veneer; print([m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"
    )


def test_a_config_needs_no_transformers() -> None:
    code = "import sys; from veneer import LoraConfig; LoraConfig(r=4); print('transformers' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
        == "False"
    )


@pytest.mark.parametrize("name", sorted(veneer._WHERE))
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(veneer, name) is not None


@pytest.mark.parametrize("name", ["LoraModel", "IA3Model", "HRAConfig", "OFTConfig", "PeftConfig", "AdaLoraModel"])
def test_names_of_methods_are_found_in_the_registry(name: str) -> None:
    assert getattr(veneer, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = veneer.nonsense
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = veneer.Nonsense
