"""Layers of libraries that pack whole models, as those libraries make them: read, adapted, trained through, merged.

gptqmodel and autoawq are in no extra: they want another torch than ours. ``pip install --no-deps`` is enough for this.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf.tiny import IDS, llama
from quant.layers import One
from veneer import IA3Config, LoraConfig, OFTConfig, PeftModel, get_peft_model
from veneer.core import quant
from veneer.engine.tuner import Tuner

GROUP = 32


def rounded(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points (out, groups) of rounding to 4 bits."""
    groups = w.view(w.shape[0], -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = (high - low).clamp(min=1e-8) / 15
    return scales, (-low / scales).round().clamp(0, 15)


def dense(w: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(w.shape[1], w.shape[0])
    layer.weight.data.copy_(w), layer.bias.data.copy_(bias)
    return layer.requires_grad_(False)


def hqq(w: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    core = pytest.importorskip("hqq.core.quantize")
    config = core.BaseQuantizeConfig(nbits=4, group_size=GROUP, axis=1)
    return core.HQQLinear(dense(w, bias), config, compute_dtype=torch.float32, device="cpu")


def gptq(w: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    scales, zeros = rounded(w)
    layer = linear(
        bits=4, group_size=GROUP, sym=False, desc_act=False, in_features=w.shape[1], out_features=w.shape[0],
        bias=True, pack_dtype=torch.int32, register_buffers=True,
    )  # fmt: skip
    layer.pack_original(linear=dense(w, bias), scales=scales, zeros=zeros, g_idx=torch.arange(w.shape[1]) // GROUP)
    layer.post_init()
    return layer


def gptq_awq(w: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    """AWQ as gptqmodel computes it, which is how transformers 5 loads such models."""
    linear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq").AwqTorchLinear
    scales, zeros = rounded(w)
    layer = linear(
        bits=4, group_size=GROUP, sym=False, desc_act=False, in_features=w.shape[1], out_features=w.shape[0],
        bias=True, pack_dtype=torch.int32, register_buffers=True,
    )  # fmt: skip
    layer.pack(linear=dense(w, bias), scales=scales, zeros=zeros)
    layer.post_init()
    return layer


def awq(w: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    gemm = pytest.importorskip("awq.modules.linear.gemm").WQLinear_GEMM
    scales, zeros = (t.t().contiguous().half() for t in rounded(w))
    return gemm.from_linear(dense(w, bias).half(), 4, GROUP, False, scales, zeros)


# maker, row, error of its own product (gptqmodel and autoawq compute in half precision)
FORMS = [(hqq, "hqq", 1e-5), (gptq, "gptqmodel", 4e-3), (gptq_awq, "gptqmodel", 4e-3), (awq, "awq", 4e-3)]
CONFIGS = {
    "lora": lambda: LoraConfig(r=8, target_modules=["layer"]),
    "dora": lambda: LoraConfig(r=8, use_dora=True, target_modules=["layer"]),
    "oft": lambda: OFTConfig(oft_block_size=8, target_modules=["layer"]),
}


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def stir(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize(("make", "name", "own"), FORMS, ids=[make.__name__ for make, _, _ in FORMS])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_layer_as_its_library_makes_it(make, name, own, method):
    torch.manual_seed(0)
    w, bias, x = torch.randn(64, 128) * 0.1, torch.randn(64), torch.randn(4, 128)
    layer = make(w, bias)
    assert quant.backend(layer).name == name
    read = quant.dense(layer, quant.stored(layer)).detach().float()
    assert 0 < off(read, w) < 0.1 and off(layer(x), F.linear(x, read, bias)) < own
    plain = layer(x)
    tuner = Tuner(One(layer))
    tuner.add("a", CONFIGS[method]())
    tuner.set_active("a")
    assert off(tuner(x), plain) < own
    stir(tuner)
    y = tuner(x)
    if make is not awq:  # whose backward pass needs its CUDA kernels
        inputs = x.clone().requires_grad_()
        tuner(inputs).sum().backward()
        assert all(p.grad is not None for p in tuner.parameters() if p.requires_grad)
        slope = float((tuner(x + 0.1) - tuner(x - 0.1)).detach().sum()) / 0.2
        assert abs(float(inputs.grad.sum()) - slope) < 0.02 * float(inputs.grad.abs().sum())
    with pytest.raises(ValueError, match=f"cannot be packed into the {name} form"):
        tuner.merge(quantized="requantize")
    with pytest.warns(UserWarning, match="made dense"):
        tuner.merge()
    assert off(tuner(x), y) < 2 * own
    tuner.unmerge()
    assert tuner.model.layer.base_layer is layer and off(tuner(x), y) < 1e-6


def by_hqq() -> nn.Module:
    base = pytest.importorskip("hqq.models.hf.base")
    core = pytest.importorskip("hqq.core.quantize")
    model = llama(hidden_size=64, intermediate_size=128)
    config = core.BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    base.AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float32, device="cpu")
    return model


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    ],
    ids=["lora", "ia3"],
)
def test_a_model_that_hqq_packed_trains_saves_and_merges(config, tmp_path):
    model = get_peft_model(by_hqq(), config).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    stir(model)
    y = model.eval()(IDS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(by_hqq(), tmp_path)(IDS).logits, y)
    with pytest.warns(UserWarning, match="made dense"):
        merged = model.merge_and_unload()
    assert {type(m) for m in merged.modules() if "Linear" in type(m).__name__} == {nn.Linear}
    assert torch.allclose(merged(IDS).logits, y, atol=1e-5)
