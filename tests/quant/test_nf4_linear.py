"""Our own NF4 layer: its numbers, what it stores, and what it keeps for the backward pass."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf.tiny import IDS, gpt2, llama
from veneer import quantize_model
from veneer.core.nf4_linear import Nf4Linear
from veneer.ops import nf4

SHAPES = [(64, 128), (5, 33), (7, 64), (300, 65)]


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_layer_is_the_linear_layer_of_the_reference_quantiser(shape, double):
    torch.manual_seed(0)
    w, bias, x = torch.randn(shape), torch.randn(shape[0]), torch.randn(3, 2, shape[1], requires_grad=True)
    layer = Nf4Linear.of(w, bias, double_quant=double)
    q = nf4.dequantise(nf4.quantise(w, double=double))
    assert torch.equal(layer.dequantize(), q)
    y, expected = layer(x), F.linear(x, q, bias)
    assert torch.equal(y, expected)
    direction = torch.randn_like(y)
    assert torch.allclose(
        torch.autograd.grad(y, x, direction)[0], torch.autograd.grad(expected, x, direction)[0], atol=1e-6
    )


def test_a_weight_takes_4_127_bits_or_4_5():
    for double, bits in ((True, 4 + 8 / 64 + 32 / (64 * 256)), (False, 4.5)):
        layer = Nf4Linear(1024, 1024, bias=False, double_quant=double)
        assert layer.weight.nbytes * 8 / 1024**2 == pytest.approx(bits, abs=1e-4)


def test_nothing_dense_is_kept_for_the_backward_pass():
    layer, x = Nf4Linear.of(torch.randn(256, 512)), torch.randn(4, 512, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert [t.data_ptr() for t in kept] == [layer.weight.data_ptr()]
    y.sum().backward()
    assert x.grad.abs().sum() > 0 and layer.weight.grad is None


def test_casting_moves_the_computation_and_not_the_stored_numbers():
    layer = Nf4Linear.of(torch.randn(8, 64), torch.randn(8))
    before = layer.weight.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.weight, before) and layer.compute_dtype == torch.bfloat16
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype == torch.bfloat16
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.dequantize(), layer.dequantize())


def test_rows_of_a_vmap_and_second_derivatives_agree_with_the_dense_layer():
    layer, x = Nf4Linear.of(torch.randn(8, 64)), torch.randn(5, 64)
    assert torch.allclose(torch.func.vmap(layer)(x), layer(x), atol=1e-6)
    assert torch.autograd.gradcheck(layer, (torch.randn(2, 64, dtype=torch.float64, requires_grad=True),))
    assert torch.autograd.gradgradcheck(layer, (torch.randn(2, 64, dtype=torch.float64, requires_grad=True),))


def test_a_model_keeps_its_head_tied_weights_and_what_is_skipped():
    model = quantize_model(llama(), skip=["down_proj", "model.layers.0.mlp.up_proj"])
    kinds = {n: type(m).__name__ for n, m in model.named_modules() if type(m) in (nn.Linear, Nf4Linear)}
    assert kinds["lm_head"] == "Linear" and kinds["model.layers.1.mlp.up_proj"] == "Nf4Linear"
    assert kinds["model.layers.0.mlp.up_proj"] == kinds["model.layers.1.mlp.down_proj"] == "Linear"
    assert model.is_quantized and torch.isfinite(model(IDS).logits).all()
    turned, dense = quantize_model(gpt2()), gpt2()
    assert type(turned.transformer.h[0].attn.c_attn) is Nf4Linear
    assert (turned(IDS).logits - dense(IDS).logits).abs().max() < 0.2


def test_the_packed_state_loads_into_a_model_made_without_weights():
    model = quantize_model(llama())
    with torch.device("meta"):
        empty = llama()
    again = quantize_model(empty)
    again.load_state_dict(model.state_dict(), assign=True)
    again.model.rotary_emb = model.model.rotary_emb  # its table is no part of a state
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_refusals_say_what_to_do():
    with pytest.raises(ValueError, match="knows 'nf4', not 'int3'"):
        quantize_model(llama(), "int3")
    with pytest.raises(ValueError, match="no linear layer"):
        quantize_model(nn.Sequential(nn.ReLU()))


def test_it_compiles_in_one_piece():
    layer, x = Nf4Linear.of(torch.randn(8, 64)), torch.randn(5, 64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)
    g, expected = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, layer))
    assert torch.allclose(g, expected, atol=1e-5)
