"""8-bit and paged optimisers in a run: they train, resume, are counted by the plan, and are asked for by name."""

from __future__ import annotations

import importlib.util
import io
import shutil

import pytest
import torch
from rich.console import Console

from quant.layers import HAS_BITSANDBYTES
from train.conftest import base, facts, tokenizer  # noqa: F401 - fixtures
from veneer.train import adapters, config, optimisers, plan, recipes
from veneer.train.prepare import prepare

needs_bnb = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
WIDE = ["--adapter.method", "lora", "--adapter.r", "64", "--adapter.target-modules", "[q_proj,down_proj]"]


@pytest.fixture
def prepared(base, facts, tmp_path):  # noqa: F811
    def make(optimizer: str, *words: str):
        fixed = ["--model", str(base), "--data", str(facts), "--out", str(tmp_path / "out"), "--steps", "4"]
        fixed += ["--eval.prompts", "0", "--train.optimizer", optimizer, "--train.save-every", "2", "--train.keep", "9"]
        return prepare(config.load(None, [], [*fixed, "--eval.every", "2", *WIDE, *words], adapters.problems))

    return make


def kept(folder) -> list[tuple[str, torch.Tensor]]:
    """The tensors of an optimiser's state; bitsandbytes puts its own one level deeper, a code's table with it."""
    state = torch.load(folder / "checkpoints/checkpoint-4/optimizer.pt", weights_only=False)["state"]
    flat = [{**one, **one.get("__bnb_optimizer_quant_state__", {})} for one in state.values()]
    pairs = [(key, value) for one in flat for key, value in one.items() if isinstance(value, torch.Tensor)]
    return [(key, value) for key, value in pairs if value.numel() > 1 and not key.startswith("qmap")]


@needs_bnb
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_32bit"])
def test_they_train_on_a_cpu_and_resume_to_the_bit(name: str, prepared, tmp_path) -> None:
    out, console = tmp_path / "out", Console(file=io.StringIO())
    outcome = recipes.run(prepared(name, "--lr", "1e-2"), console)
    assert outcome.loss_after < outcome.loss_before
    first = (out / "adapter_model.safetensors").read_bytes()
    kinds = {tensor.dtype for _, tensor in kept(out)}
    assert (torch.uint8 in kinds) == (name == "adamw_8bit")
    shutil.rmtree(out / "checkpoints/checkpoint-4")
    recipes.run(prepared(name, "--lr", "1e-2"), console, resume=True)
    assert (out / "adapter_model.safetensors").read_bytes() == first


@needs_bnb
@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "lion_8bit", "sgd"])
def test_the_plan_counts_what_they_keep(name: str, prepared, tmp_path) -> None:
    ready = prepared(name)
    planned = plan.make(ready).memory.optimiser
    recipes.run(ready, Console(file=io.StringIO()))
    found = sum(tensor.nbytes for _, tensor in kept(tmp_path / "out"))
    assert planned == pytest.approx(found, rel=0.02)


def test_names_are_looked_at_before_anything_is_loaded(prepared, monkeypatch) -> None:
    with pytest.raises(ValueError, match="'adamw_8bits' is not known; did you mean adamw_8bit"):
        prepared("adamw_8bits")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else found(name, *a)
    )
    with pytest.raises(
        ImportError, match=r"paged_adamw_8bit needs the package bitsandbytes: pip install bitsandbytes\."
    ):
        optimisers.check("paged_adamw_8bit")
    optimisers.check("adamw_torch")
    optimisers.check("loraplus")


def test_large_states_shrink_to_a_quarter() -> None:
    weights = [torch.empty(1024, 1024, device="meta"), torch.empty(16, device="meta")]
    full, packed = (optimisers.state_bytes(name, weights) for name in ("adamw_torch", "paged_adamw_8bit"))
    assert full == 8 * (1024**2 + 16) and packed == pytest.approx(full / 4, rel=0.02)
    assert optimisers.state_bytes("paged_adamw_32bit", [torch.empty(8, dtype=torch.bfloat16)]) == 64
    assert optimisers.state_bytes("sgd", weights) == 0
