"""LoRA beside Megatron's parallel layers, played by stand-ins with their arguments and their (output, bias)."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from veneer import IA3Config, LoraConfig, PeftModel, get_peft_model
from veneer.core import parallel


class _Parallel(nn.Module):
    def __init__(self, input_size, output_size, *, config, init_method, bias=True, skip_bias_add=False, **own):
        super().__init__()
        assert config == {"hidden": 8}
        self.input_size, self.output_size, self.config, self.skip_bias_add = (
            input_size,
            output_size,
            config,
            skip_bias_add,
        )
        self.weight = nn.Parameter(torch.empty(output_size, input_size))
        init_method(self.weight)
        self.bias = nn.Parameter(torch.randn(output_size)) if bias else None
        vars(self).update(own)

    def forward(self, input_):
        y = input_ @ self.weight.T
        if self.bias is None or self.skip_bias_add:
            return y, self.bias
        return y + self.bias, None


class ColumnParallelLinear(_Parallel):
    pass


class RowParallelLinear(_Parallel):
    pass


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        own = {"config": {"hidden": 8}, "init_method": nn.init.normal_}
        self.up = ColumnParallelLinear(8, 16, gather_output=False, **own)
        self.down = RowParallelLinear(16, 8, input_is_parallel=True, skip_bias_add=True, **own)
        self.plain = nn.Linear(8, 8)

    def forward(self, x):
        h, _ = self.up(x)
        y, bias = self.down(torch.relu(h))
        return self.plain(y + bias)


def block() -> Block:
    torch.manual_seed(0)
    return Block()


@pytest.fixture
def megatron(monkeypatch):
    layers = types.ModuleType("megatron.core.tensor_parallel")
    layers.ColumnParallelLinear, layers.RowParallelLinear = ColumnParallelLinear, RowParallelLinear
    for name, module in {
        "megatron": types.ModuleType("megatron"),
        "megatron.core": types.ModuleType("megatron.core"),
        "megatron.core.tensor_parallel": layers,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(parallel, "MEGATRON", {})
    monkeypatch.setattr("veneer.hf.megatron.MEGATRON", parallel.MEGATRON)


def config(**more) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["up", "down", "plain"], megatron_config={"hidden": 8}, **more)


def test_lora_beside_parallel_layers_computes_what_it_says_and_is_saved(megatron, tmp_path):
    base, x = block(), torch.randn(3, 8)
    wanted = base(x).detach()
    model = get_peft_model(base, config())
    assert isinstance(base.up.lora_B["default"], ColumnParallelLinear) and type(base.up.lora_A["default"]) is nn.Linear
    assert isinstance(base.down.lora_A["default"], RowParallelLinear)
    assert base.down.lora_A["default"].input_is_parallel and not base.up.lora_B["default"].gather_output
    torch.testing.assert_close(model(x), wanted)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(x).square().mean().backward()
        optimiser.step()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(block(), tmp_path)(x), model(x))

    dense = block()
    with torch.no_grad():
        for name in ("up", "down", "plain"):
            own = base.get_submodule(name)
            a, b = own.lora_A["default"].weight, own.lora_B["default"].weight
            dense.get_submodule(name).weight += own.scaling["default"] * b @ a
    torch.testing.assert_close(dense(x), model(x), rtol=1e-4, atol=1e-5)


def test_nothing_is_imported_on_a_configs_word(megatron):
    with pytest.raises(ValueError, match=r"megatron_core is 'os'; a config may only name megatron\.core"):
        get_peft_model(block(), config(megatron_core="os"))


def test_a_missing_megatron_is_named():
    with pytest.raises(ImportError, match="pip install megatron-core"):
        get_peft_model(block(), config())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: config(lora_dropout=0.1), "lora_dropout does not work at 'up'"),
        (lambda: config(init_lora_weights="pissa"), "init_lora_weights='pissa' does not work"),
        (lambda: LoraConfig(target_modules=["up"], use_dora=True), "Dora is not defined for the megatron 'up'"),
        (lambda: IA3Config(target_modules=["up"], feedforward_modules=[]), "IA3 cannot sit at 'up'"),
    ],
)
def test_what_parallel_layers_cannot_do_is_refused(megatron, other, words):
    get_peft_model(block(), config())  # from here on the layers are known
    with pytest.raises(ValueError, match=words):
        get_peft_model(block(), other())


def test_merging_is_refused(megatron):
    model = get_peft_model(block(), config())
    with pytest.raises(ValueError, match="one of Megatron's parallel layers; merge in one process"):
        model.merge_adapter()
    assert not model.base_model.merged
