"""Cartridges: started from a text's own cache, frozen where said, put together; parity with the peer."""

from __future__ import annotations

import pytest
import torch

import veneer
from hf.tiny import gpt2, llama, tokenizer
from parity import needs_peer
from prompt_parity import both_ways
from veneer import CartridgeConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

TEXT = "a b c d e f"
IDS = torch.tensor([[1, 4, 5, 6, 7]])


def made(base=llama, length=4, **kwargs):
    torch.manual_seed(1)
    return get_peft_model(base(), CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=length, **kwargs)).eval()


@needs_peer
@pytest.mark.parametrize("base", ["gqa", "gpt2"])
def test_parity(base, tmp_path):
    both_ways(base, "CartridgeConfig", tmp_path, num_virtual_tokens=3, num_frozen_tokens=2)


@pytest.mark.parametrize("base", [llama, gpt2])
def test_untrained_it_is_the_text_itself(base):
    model = made(base, length=6)
    veneer.initialize_kv_prefix_from_text(model, tokenizer(), text=TEXT, use_chat_template=False)
    read = torch.tensor([tokenizer()(TEXT)["input_ids"]])
    expected = model.get_base_model()(torch.cat([read, IDS], 1)).logits[:, -5:]
    assert torch.allclose(model(IDS).logits, expected, atol=1e-5)
    projected = get_peft_model(
        base(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6, prefix_projection=True)
    ).eval()
    table = veneer.initialize_kv_prefix_from_text(projected, tokenizer(), text=TEXT)
    assert table.shape[0] == 6 and torch.allclose(projected(IDS).logits, expected, atol=1e-5)


@needs_peer
def test_the_start_is_the_peers():
    import peft

    theirs = peft.get_peft_model(llama(), peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    table = peft.initialize_kv_prefix_from_text(theirs, tokenizer(), text=TEXT, use_chat_template=False)
    ours = veneer.initialize_kv_prefix_from_text(made(), tokenizer(), text=TEXT, use_chat_template=False)
    assert torch.allclose(ours, table, atol=1e-6)


def test_frozen_tokens_stay_and_the_others_learn():
    model = made(num_frozen_tokens=2)
    own = model.base_model.prompts["default"]
    before = own.table().detach().clone()
    model.train()
    model.set_adapter("default")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    changed = (own.table() != before).any(1)
    assert changed.tolist() == [False, False, True, True]


def test_cartridges_read_together_are_one_after_the_other(tmp_path):
    model = made(length=3)
    torch.manual_seed(2)
    model.add_adapter("second", CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    model.save_pretrained(tmp_path)
    model.set_adapter(["default", "second"])
    expected = model.eval()(IDS).logits
    veneer.compose_cartridge_adapters([tmp_path, tmp_path / "second"], output_path=tmp_path / "both")
    both = veneer.PeftModel.from_pretrained(llama(), tmp_path / "both")
    assert both.peft_config["default"].num_virtual_tokens == 5
    assert torch.allclose(both(IDS).logits, expected, atol=1e-6)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(both.generate(IDS, **greedy), model.generate(IDS, **greedy))


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="must lie between 0 and"):
        made(num_frozen_tokens=5)
    with pytest.raises(ValueError, match="not 1 rows of 2 tokens"):
        veneer.initialize_kv_prefix_from_text(made(), tokenizer(), text="a b")
    other = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="no prefix of a decoder"):
        veneer.initialize_kv_prefix_from_text(other, tokenizer(), text=TEXT)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a CARTRIDGE"):
        veneer.compose_cartridge_adapters([tmp_path], output_path=tmp_path / "x")
