"""What every method guarantees over a linear layer whose weight is in NF4."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from laws.kinds import Chain
from laws.table import rows
from veneer.core.config import PeftConfig
from veneer.core.nf4_linear import Nf4Linear
from veneer.engine import checkpoint
from veneer.engine.tuner import Tuner
from veneer.testing.laws import config_for, near, randomise
from veneer.testing.row import Row

CASES = [row for row in rows() if "linear" in row.kinds]
SPLITTING = ("pissa", "olora", "milora", "loftq")
"""Starts of LoRA that move or round a float weight, which a packed one does not have."""


def refused(row: Row) -> bool:
    config = config_for(row, "linear")
    start = str(getattr(config, "init_lora_weights", ""))
    return start.startswith(SPLITTING) or config.peft_type == "LN_TUNING"


def base_model() -> tuple[Chain, torch.Tensor]:
    torch.manual_seed(0)
    first, layer = nn.Linear(8, 8), nn.Linear(8, 16)
    model = Chain(first, Nf4Linear.of(layer.weight, layer.bias)).eval().requires_grad_(False)
    return model, torch.randn(4, 3, 8)


def planted(row: Row) -> tuple[Tuner, torch.Tensor]:
    model, x = base_model()
    tuner = Tuner(model)
    torch.manual_seed(1)
    tuner.add("a", config_for(row, "linear"))
    randomise(tuner, "a")
    tuner.set_active("a")
    return tuner.eval(), x


@pytest.mark.parametrize("row", [r for r in CASES if refused(r)], ids=lambda row: row.name)
def test_what_needs_a_float_weight_says_so(row: Row) -> None:
    tuner = Tuner(base_model()[0])
    with pytest.raises(ValueError, match=r"float|packed"):
        tuner.add("a", config_for(row, "linear"))
    assert type(tuner.model.layer) is Nf4Linear


@pytest.mark.parametrize("row", [r for r in CASES if not refused(r)], ids=lambda row: row.name)
def test_every_method_over_a_packed_layer(row: Row, tmp_path) -> None:
    expected = base_model()[0](base_model()[1])
    tuner, x = planted(row)
    layer = tuner.hosts()[0].get_base_layer()
    before = dict(layer.named_parameters())
    y = tuner(x)
    assert torch.isfinite(y).all() and not near(y, expected, 1e-6)
    with tuner.disabled():
        assert torch.equal(tuner(x), expected)

    tuner.train()
    tuner(x).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in tuner.parameters())
    tuner.eval()

    if row.merges_at("linear"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuner.merge()
            assert near(tuner(x), y, max(row.tolerance, 2e-5))
            with tuner.disabled():
                assert torch.equal(tuner(x), expected)
            tuner.unmerge()
            report = tuner.merge(quantized="requantize")
            assert all(0 <= loss.error < 0.3 for loss in report.layers.values())
            tuner.unmerge()
        assert torch.equal(tuner(x), y)
        now = dict(tuner.hosts()[0].get_base_layer().named_parameters())
        assert all(now[k] is before[k] for k in before)

    checkpoint.write(tmp_path, checkpoint.tensors(tuner, "a"))
    checkpoint.config(tuner, "a").write(tmp_path)
    again = Tuner(base_model()[0])
    torch.manual_seed(77)
    again.add("other", PeftConfig.read(tmp_path))
    assert checkpoint.put(again, "other", checkpoint.read(tmp_path)).clean
    again.set_active("other")
    assert near(again.eval()(x), y, max(1e-6, row.start_tolerance))
