"""A packed base as a folder, and with the adapter that was fitted to it: one call to save, one to load."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf.tiny import IDS, gpt2, llama
from veneer import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    load_quantized,
    quantize_model,
    quantize_with_adapter,
    save_quantized,
)
from veneer.core.nf4_linear import Nf4Linear

WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.mark.parametrize("start", ["qpissa", "loftq"])
@pytest.mark.parametrize("tied", [False, True])
def test_base_and_adapter_survive_as_a_pair_that_trains_on(start: str, tied: bool, tmp_path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(llama(**WIDE, tie_word_embeddings=tied), config)
    quantize_with_adapter(model, start)
    y = model(IDS).logits
    save_quantized(model, tmp_path / "pair")
    assert model.peft_config["default"].base_model_name_or_path is None  # the live settings stay as they were
    again = load_quantized(tmp_path / "pair", is_trainable=True)
    assert torch.equal(again(IDS).logits, y)
    packed = [m for m in again.modules() if isinstance(m, Nf4Linear)]
    assert len(packed) == 14 and all(m.weight.dtype == torch.uint8 for m in packed)
    again.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in again.parameters() if p.requires_grad)
    named = json.loads((tmp_path / "pair/adapter_config.json").read_text())["base_model_name_or_path"]
    by_hand = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named), tmp_path / "pair")
    assert torch.equal(by_hand(IDS).logits, y)


@pytest.mark.parametrize("make", [lambda: llama(**WIDE), gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"double_quant": False, "block": 32, "skip": ["q_proj", "c_fc"]}])
def test_a_packed_model_alone_is_an_ordinary_folder(make, options, tmp_path) -> None:
    model = quantize_model(make(), **options)
    save_quantized(model, tmp_path)
    again = load_quantized(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert [n for n, m in again.named_modules() if isinstance(m, Nf4Linear)] == [
        n for n, m in model.named_modules() if isinstance(m, Nf4Linear)
    ]
    dense, stored = (sum(t.nbytes for t in m.state_dict().values()) for m in (make(), again))
    assert stored < 0.9 * dense
    assert get_peft_model(again, LoraConfig(r=2, target_modules="all-linear"))(IDS).logits.shape == (2, 6, 16)


def test_half_precision_stays_and_what_is_not_packed_is_refused(tmp_path) -> None:
    model = quantize_model(llama(**WIDE).to(torch.bfloat16))
    save_quantized(model, tmp_path / "half")
    again = load_quantized(tmp_path / "half")
    assert again.dtype == torch.bfloat16 and torch.allclose(again(IDS).logits, model(IDS).logits, atol=0.02)
    with pytest.raises(ValueError, match="no layer in veneer's NF4; quantize_model"):
        save_quantized(llama(), tmp_path / "dense")
    with pytest.raises(FileNotFoundError, match="holds no packed model"):
        load_quantized(tmp_path / "dense")
    mixed = quantize_model(llama(**WIDE), skip=["up_proj"])
    quantize_model(mixed, block=32)
    with pytest.raises(ValueError, match="packed in 2 ways"):
        save_quantized(mixed, tmp_path / "mixed")


def test_the_command_line_trains_and_asks_over_a_packed_folder(tmp_path, capsys) -> None:
    import train.conftest as tiny
    from veneer.cli.main import main

    tokenizer = tiny.make_tokenizer()
    base = llama(**WIDE, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    dense = sum(p.nbytes for p in base.parameters())
    save_quantized(quantize_model(base), tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "What colour is the sky", "completion": "blue"}\n' * 8)
    fixed = ["--model", str(tmp_path / "base"), "--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]
    main(["plan", *fixed, "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["memory"]["weights"] < 0.7 * dense
    main(["train", *fixed, "--steps", "2", "--eval.prompts", "0", "--log.progress", "off"])
    main(["generate", "What colour is the sky", "--adapter", str(tmp_path / "out"), "-n", "2"])
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
