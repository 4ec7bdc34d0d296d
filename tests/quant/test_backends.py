"""Every quantised form: read, adapted, merged in three ways, and given back as it was."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quant.layers import FORMS, One
from veneer import LoraConfig, OFTConfig
from veneer.core import backends, quant
from veneer.core.sites import sites_for
from veneer.engine.tuner import Tuner

EVERY = pytest.mark.parametrize(("make", "name", "rounding", "own"), FORMS)


def weights() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(64, 128) * 0.1, torch.randn(64), torch.randn(4, 128)


def adapted(layer: nn.Module, config) -> Tuner:
    tuner = Tuner(One(layer))
    tuner.add("a", config)
    tuner.set_active("a")
    with torch.no_grad():
        for parameter in tuner.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return tuner.eval()


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


@EVERY
def test_the_dense_weight_is_what_the_layer_computes_with(make, name, rounding, own):
    w, bias, x = weights()
    layer = make(w, bias).eval()
    assert quant.backend(layer).name == name
    dense = quant.dense(layer, quant.stored(layer))
    assert dense.shape == w.shape and dense.is_floating_point() and type(dense) is torch.Tensor
    assert 0 < off(dense, w) < rounding
    assert off(layer(x), F.linear(x, dense, bias)) < own
    assert off(backends.by_running(layer), dense) < max(own, 1e-5)
    (site,) = sites_for("layer", layer, fan_in_fan_out=True)  # packed forms are never turned
    assert site.shape == tuple(w.shape) and site.dtype == torch.float32


@EVERY
@pytest.mark.parametrize(
    "config",
    [
        lambda: LoraConfig(r=8, target_modules=["layer"]),
        lambda: LoraConfig(r=8, use_dora=True, target_modules=["layer"]),
        lambda: OFTConfig(oft_block_size=8, target_modules=["layer"]),
    ],
    ids=["lora", "dora", "oft"],
)
def test_merged_three_ways_and_restored(make, name, rounding, own, config):
    w, bias, x = weights()
    layer = make(w, bias).eval()
    plain, stored = layer(x), dict(layer.named_parameters())
    tuner = adapted(layer, config())
    y = tuner(x)
    inputs = x.clone().requires_grad_()
    tuner(inputs).sum().backward()
    assert torch.isfinite(inputs.grad).all() and off(y, plain) > 1e-3
    outputs = {}
    for way, bound in (("dequantize", own), ("requantize", rounding + own), ({"layer": w}, rounding + own)):
        with pytest.warns(UserWarning, match="quantised layers"):
            report = tuner.merge(quantized=way)
        assert 0 <= report.layers["layer"].error < rounding
        assert off(tuner(x), y) < 2 * bound
        outputs[str(way)[:4]] = tuner(x)
        assert quant.backend(tuner.model.layer.base_layer) is None or way == "requantize"
        with tuner.disabled():
            assert torch.equal(tuner(x), plain)
        assert torch.equal(tuner(x), outputs[str(way)[:4]])
        tuner.unmerge()
        assert torch.equal(tuner(x), y)
        now = dict(tuner.model.layer.base_layer.named_parameters())
        assert all(now[k] is stored[k] for k in stored) and type(tuner.model.layer.base_layer) is type(layer)
    assert off(outputs["requ"], outputs["dequ"]) > 1e-4  # packing again changes the function


def test_merge_and_unload_leaves_a_plain_layer_or_a_packed_one():
    from veneer.core.nf4_linear import Nf4Linear

    w, bias, x = weights()
    for way, kind in ((None, nn.Linear), ("requantize", Nf4Linear)):
        tuner = adapted(Nf4Linear.of(w, bias), LoraConfig(r=8, target_modules=["layer"]))
        y = tuner(x)
        with pytest.warns(UserWarning, match=r"differ from those of the adapted model by \d"):
            model = tuner.unload(merge=True, quantized=way)
        assert type(model.layer) is kind and "layer.weight" in model.state_dict()
        assert off(model(x), y) < (1e-5 if way is None else 0.15)


def test_a_merge_that_is_refused_leaves_everything_packed():
    from veneer.core.nf4_linear import Nf4Linear

    w, bias, x = weights()
    tuner = adapted(Nf4Linear.of(w, bias), LoraConfig(r=8, target_modules=["layer"]))
    y = tuner(x)
    for way, sentence in (
        ("int5", "quantized must be 'dequantize', 'requantize'"),
        ({}, "hold none for 'layer'"),
        ({"layer": w.T}, r"has shape \(128, 64\), not \(64, 128\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            tuner.merge(quantized=way)
        assert torch.equal(tuner(x), y) and type(tuner.model.layer.base_layer) is Nf4Linear


def test_an_unquantised_base_merges_without_a_word():
    tuner = adapted(nn.Linear(128, 64), LoraConfig(r=8, target_modules=["layer"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuner.merge().layers == {}


class Stranger(nn.Module):
    """A layer of a library that packs whole models only: its tensors have names of its own."""

    def __init__(self, w: torch.Tensor):
        super().__init__()
        self.in_features, self.out_features = w.shape[1], w.shape[0]
        self.register_buffer("qweight", (w * 100).round().to(torch.int8))
        self.bias = None

    def forward(self, x):
        return x @ (self.qweight.to(x.dtype) / 100).T


Stranger.__module__ = "gptqmodel.nn_modules.qlinear"


def test_a_layer_that_only_its_library_packs_is_read_by_running_it():
    w, _, x = weights()
    layer = Stranger(w)
    assert quant.backend(layer).name == "gptqmodel"
    tuner = adapted(layer, LoraConfig(r=8, use_dora=True, target_modules=["layer"]))
    y = tuner(x)
    with pytest.raises(ValueError, match="cannot be packed into the gptqmodel form"):
        tuner.merge(quantized="requantize")
    assert torch.equal(tuner(x), y)
    with pytest.warns(UserWarning, match="made dense"):
        tuner.merge()
    assert off(tuner(x), y) < 1e-5
    tuner.unmerge()
    assert tuner.model.layer.base_layer is layer and torch.equal(tuner(x), y)


def test_a_packed_parameter_is_no_target_by_itself():
    from veneer.core.nf4_linear import Nf4Linear

    w, bias, _ = weights()
    with pytest.raises(ValueError, match=r"is packed.*target_modules"):
        sites_for("layer", Nf4Linear.of(w, bias), "weight")


def test_a_missing_library_is_one_sentence():
    with pytest.raises(ImportError, match=r"needs the package no_such_quantiser: pip install no_such_quantiser\."):
        backends.library("no_such_quantiser.functional")
