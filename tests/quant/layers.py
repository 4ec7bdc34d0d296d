"""One linear layer in every quantised form that this machine can make."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from veneer.core.backends import keep_layout
from veneer.core.nf4_linear import Nf4Linear

Make = Callable[[Tensor, Tensor], nn.Module]
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
HAS_TORCHAO = importlib.util.find_spec("torchao") is not None


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def bnb_4bit(kind: str = "nf4", double: bool = True) -> Make:
    def make(w: Tensor, bias: Tensor) -> nn.Module:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(
            w.shape[1], w.shape[0], quant_type=kind, compress_statistics=double, compute_dtype=torch.float32
        )
        layer.weight = bnb.nn.Params4bit(
            w.clone(), requires_grad=False, quant_type=kind, compress_statistics=double
        )  # fmt: skip
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
        layer = layer.to("cpu")
        keep_layout(layer)
        return layer

    return make


def bnb_8bit(w: Tensor, bias: Tensor) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(w.shape[1], w.shape[0], has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(w.clone(), requires_grad=False, has_fp16_weights=False)
    layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer.to("cpu")


def torchao(name: str, **options: object) -> Make:
    def make(w: Tensor, bias: Tensor) -> nn.Module:
        from torchao import quantization

        group = options.get("group")
        settings = {k: v for k, v in options.items() if k != "group"}
        if group:
            settings["granularity"] = quantization.PerGroup(group)
        layer = nn.Linear(w.shape[1], w.shape[0])
        layer.weight, layer.bias = nn.Parameter(w.clone()), nn.Parameter(bias.clone())
        quantization.quantize_(layer, getattr(quantization, name)(**settings))
        return layer.requires_grad_(False)

    return make


def torchao_nf4(w: Tensor, bias: Tensor) -> nn.Module:
    module = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    layer = nn.Linear(w.shape[1], w.shape[0])
    layer.weight = nn.Parameter(module.to_nf4(w.clone(), 64, 16), requires_grad=False)
    layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer


NO_BNB = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
NO_AO = pytest.mark.skipif(not HAS_TORCHAO, reason="torchao is not installed")
# form -> (maker, name of its row, relative error of the weight at most, error of its own product)
FORMS = [
    pytest.param(Nf4Linear.of, "veneer-nf4", 0.1, 1e-6, id="veneer-nf4"),
    pytest.param(bnb_4bit(), "bitsandbytes-4bit", 0.1, 1e-6, id="bnb-nf4", marks=NO_BNB),
    pytest.param(bnb_4bit(double=False), "bitsandbytes-4bit", 0.1, 1e-6, id="bnb-nf4-single", marks=NO_BNB),
    pytest.param(bnb_4bit("fp4"), "bitsandbytes-4bit", 0.13, 1e-6, id="bnb-fp4", marks=NO_BNB),
    pytest.param(bnb_8bit, "bitsandbytes-8bit", 0.01, 3e-2, id="bnb-int8", marks=NO_BNB),
    pytest.param(torchao("Int8WeightOnlyConfig"), "torchao", 0.01, 1e-5, id="torchao-int8", marks=NO_AO),
    pytest.param(
        torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, group=32), "torchao", 0.1, 1e-5, id="torchao-int4",
        marks=NO_AO,
    ),
    pytest.param(torchao_nf4, "torchao", 0.1, 1e-5, id="torchao-nf4", marks=NO_AO),
    pytest.param(torchao("Float8WeightOnlyConfig"), "torchao", 0.04, 1e-5, id="torchao-float8", marks=NO_AO),
]  # fmt: skip
