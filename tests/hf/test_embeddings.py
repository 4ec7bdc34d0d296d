"""Which embedding tables are saved beside an adapter, and how they come back."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from .tiny import IDS, gpt2, llama, t5

IN, OUT = "base_model.model.model.embed_tokens.", "base_model.model.lm_head."


def adapted(base, **options):
    settings = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "init_lora_weights": False} | options
    return get_peft_model(base, LoraConfig(**settings)).eval()


def tables(model, save_embedding_layers="auto") -> set[str]:
    found = get_peft_model_state_dict(model, save_embedding_layers=save_embedding_layers)
    return {key for key, value in found.items() if "lora" not in key and value.shape[0] >= 16}


@pytest.fixture
def base(tmp_path):
    """A folder with a base model."""
    folder = tmp_path / "base"
    llama().save_pretrained(folder)
    return folder


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_nothing_is_saved_for_a_base_as_it_was(base) -> None:
    model = adapted(loaded(base))
    assert tables(model) == set()
    assert tables(model, False) == set()
    assert tables(model, True) == {IN + "weight", OUT + "weight"}


def test_resized_embeddings_are_saved_and_come_back(base, tmp_path) -> None:
    grown = loaded(base)
    grown.resize_token_embeddings(19)
    model = adapted(grown)
    assert tables(model) == {IN + "weight", OUT + "weight"}
    assert tables(model, False) == set()
    y = model(IDS + 3).logits
    model.save_pretrained(tmp_path / "adapter")

    fresh = loaded(base)
    with pytest.raises(ValueError, match=r"\(19, 16\).*resize_token_embeddings\(19\)"):
        PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    fresh = loaded(base)
    fresh.resize_token_embeddings(19)
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(again(IDS + 3).logits, y)


def test_no_base_on_this_machine_means_no_guess_and_no_request(monkeypatch) -> None:
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("asked the network"))
    model = llama()
    model.config._name_or_path = "someone/not-downloaded"
    model.resize_token_embeddings(19)
    assert tables(adapted(model)) == set()


def test_an_adapter_that_sits_at_a_table_brings_it_along(base) -> None:
    assert tables(adapted(loaded(base), target_modules=["q_proj", "embed_tokens"])) == {IN + "base_layer.weight"}
    assert tables(adapted(loaded(base), target_modules=["q_proj", "lm_head"])) == {OUT + "base_layer.weight"}
    assert tables(adapted(loaded(base), target_modules=["embed_tokens"]), False) == set()


def test_the_names_of_the_tables_do_not_matter() -> None:
    assert tables(adapted(gpt2(tie_word_embeddings=False), target_modules=["wte"])) == {
        "base_model.model.transformer.wte.base_layer.weight"
    }
    model = adapted(t5(), target_modules=["q"], task_type="SEQ_2_SEQ_LM")
    assert tables(model, True) == {"base_model.model.shared.weight"}


def test_of_tied_tables_one_is_saved(tmp_path) -> None:
    model = adapted(gpt2(), target_modules=["c_attn"])
    assert tables(model, True) == {"base_model.model.transformer.wte.weight"}
    with torch.no_grad():
        model.get_base_model().transformer.wte.weight.mul_(2)
    y = model(IDS).logits
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    again = PeftModel.from_pretrained(gpt2(), tmp_path)
    assert torch.equal(again(IDS).logits, y)
    inner = again.get_base_model()
    assert inner.lm_head.weight is inner.transformer.wte.weight


def test_what_is_trained_as_a_whole_is_saved_once(base, tmp_path) -> None:
    grown = loaded(base)
    grown.resize_token_embeddings(19)
    model = adapted(grown, modules_to_save=["lm_head", "embed_tokens"])
    keys = {k for k in get_peft_model_state_dict(model) if "lora" not in k}
    assert keys == {IN + "weight", OUT + "weight"}  # the trained copies, under their own keys
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(1)
    y = model(IDS).logits
    model.save_pretrained(tmp_path)
    fresh = loaded(base)
    fresh.resize_token_embeddings(19)
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path)(IDS).logits, y)


def test_copies_that_the_peer_saves_twice_are_read(base, tmp_path) -> None:
    """With resized embeddings in modules_to_save, PEFT 0.21.2 also writes its wrapper's own live names."""
    model = adapted(loaded(base), modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    found = load_file(path)
    found[OUT + "modules_to_save.weight"] = found[OUT + "weight"].clone()
    found[OUT + "original_module.weight"] = model.get_base_model().lm_head.original_module.weight.detach().clone()
    save_file(found, path)
    assert torch.equal(PeftModel.from_pretrained(loaded(base), tmp_path)(IDS).logits, model(IDS).logits)


def test_trained_rows_need_no_table(base) -> None:
    model = adapted(loaded(base), trainable_token_indices=[3, 4])
    assert tables(model) == set()


def test_resized_and_trained_rows_use_the_key_that_the_peer_reads(base, tmp_path) -> None:
    grown = loaded(base)
    grown.resize_token_embeddings(18)
    model = adapted(grown, trainable_token_indices=[16, 17])
    assert tables(model) == {IN + "token_adapter.base_layer.weight", OUT + "weight"}
    model.save_pretrained(tmp_path)
    fresh = loaded(base)
    fresh.resize_token_embeddings(18)
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path)(IDS + 3).logits, model(IDS + 3).logits)


def test_a_merge_does_not_change_what_is_saved(base) -> None:
    model = adapted(loaded(base), target_modules=["q_proj", "embed_tokens"])
    before = get_peft_model_state_dict(model)[IN + "base_layer.weight"].clone()
    model.merge_adapter()
    assert torch.equal(get_peft_model_state_dict(model)[IN + "base_layer.weight"], before)


def test_another_adapter_at_the_table_changes_nothing(base) -> None:
    model = adapted(loaded(base))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["embed_tokens"]))
    assert tables(model) == set()
    assert tables(model, True) == {IN + "weight", OUT + "weight"}


def test_another_word_than_auto_is_refused(base) -> None:
    with pytest.raises(ValueError, match="must be 'auto', True or False, not 'yes'"):
        get_peft_model_state_dict(adapted(loaded(base)), save_embedding_layers="yes")
