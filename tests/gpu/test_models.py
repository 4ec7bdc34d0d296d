"""Models on the GPU do what they do on the CPU: a slice of the laws, gradients, training, decoding, NF4."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch

from gpu.conftest import INTERPRETED
from hf.tiny import llama
from laws.table import rows
from veneer import LoraConfig, get_peft_model
from veneer.core.nf4_linear import quantize_model
from veneer.ops import kernels
from veneer.testing import laws

METHODS = (
    {"lora_dropout"} if INTERPRETED else {"lora", "lora_dropout", "dora", "oft", "ia3", "loha", "lokr", "vera", "hra"}
)
KINDS = frozenset({"linear"} if INTERPRETED else {"linear", "embedding", "experts"})
SLICE = [dataclasses.replace(row, tested=KINDS & row.kinds) for row in rows() if row.name in METHODS]

PACKED = pytest.mark.parametrize("packed", [True] if INTERPRETED else [False, True])


class TestLaws(laws.Laws):
    """With models and inputs on the device."""

    rows = SLICE

    @pytest.fixture(autouse=True)
    def on_the_device(self, device, monkeypatch) -> None:
        build = laws.base_model
        monkeypatch.setattr(laws, "base_model", lambda *given: tuple(made.to(device) for made in build(*given)))


def adapted(device, dtype=torch.float32, names=("default",), packed=False, **options):
    """A tiny Llama with random adapters, and ids."""
    base = llama(layers=1 if INTERPRETED else 2).to(dtype)
    if packed:
        base = quantize_model(base)
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | options
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    return model.to(device), torch.randint(3, 16, (8, 12)).to(device)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"packed": True}, {"r": 40}], ids=str)
def test_logits_and_gradients_are_the_cpus(options, device) -> None:
    model, ids = adapted("cpu", **options)
    there = copy.deepcopy(model).to(device)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernels, "DEVICES", set())
        wanted = gradients(model, ids)
    found = gradients(there, ids.to(device))
    assert all(kernels.apart(mine.cpu(), other) < 1e-3 for mine, other in zip(found, wanted, strict=True))


def gradients(model, ids) -> list[torch.Tensor]:
    out = model.train()(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    return [out.logits, *[p.grad for p in model.parameters() if p.grad is not None]]


@PACKED
def test_training_with_dropout_learns_and_runs_the_kernels(packed, device) -> None:
    model, ids = adapted(device, torch.bfloat16, packed=packed, lora_dropout=0.1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="veneer's Triton kernel")
        for _ in range(2 if INTERPRETED else 60):
            loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < (1.0 if INTERPRETED else 0.8) * losses[0]
    wanted = "nf4" if packed else "dropout"
    assert kernels.report()[f"{wanted} {device} torch.bfloat16"]


@PACKED
def test_a_mixed_batch_decodes_what_each_row_decodes_alone(packed, device) -> None:
    names = tuple("abcdef")
    model, ids = adapted(device, names=names, packed=packed)
    model.eval()
    route = ["f", "a", "__base__", "c", "b", "e", "d", "a"]
    fixed = {
        "max_new_tokens": 2 if INTERPRETED else 6,
        "do_sample": False,
        "eos_token_id": None,
        "attention_mask": torch.ones_like(ids),
    }
    mixed = model.generate(input_ids=ids, adapter_names=route, **fixed)
    for i, name in enumerate(route if not INTERPRETED else route[:1]):
        model.set_adapter(name if name in names else "a")
        alone = fixed | {"input_ids": ids[i : i + 1], "attention_mask": torch.ones_like(ids[:1])}
        if name in names:
            assert torch.equal(mixed[i : i + 1], model.generate(**alone)), name
        else:
            with model.disable_adapter():
                assert torch.equal(mixed[i : i + 1], model.generate(**alone))
    assert kernels.report()[f"{'nf4_rows' if packed else 'gather'} {device} torch.float32"]
