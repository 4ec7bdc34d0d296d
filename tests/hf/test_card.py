"""The model card: what the hub and people read, and what an existing card keeps."""

from __future__ import annotations

import pytest
import yaml

import veneer
from veneer import LoraConfig, get_peft_model
from veneer.hf import card

from .tiny import llama


def adapted(**options):
    settings = {"r": 3, "task_type": "CAUSAL_LM", "target_modules": ["v_proj", "q_proj"]} | options
    model = llama()
    model.config._name_or_path = "someone/base"
    return get_peft_model(model, LoraConfig(**settings))


def front(folder) -> dict:
    return card.split((folder / "README.md").read_text())[0]


def test_the_front_matter_is_what_the_hub_reads(tmp_path) -> None:
    adapted().save_pretrained(tmp_path)
    assert front(tmp_path) == {
        "base_model": "someone/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:someone/base", "lora", "transformers"],
    }


def test_the_text_says_what_was_trained_and_how_to_load_it(tmp_path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "LoRA: Low-Rank Adaptation (Hu et al., 2021" in text
    assert "| Rank | 3 |" in text
    assert "`q_proj`, `v_proj`" in text
    assert f"{trained:,}" in text
    assert 'AutoModelForCausalLM.from_pretrained("someone/base")' in text
    assert "from veneer import PeftModel" in text and "from peft import PeftModel" in text


def test_a_second_save_writes_nothing_new(tmp_path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    first = (path.read_text(), path.stat().st_ino)
    model.save_pretrained(tmp_path)
    assert (path.read_text(), path.stat().st_ino) == first  # an atomic write would have made a new file


def test_an_existing_card_keeps_its_license_and_its_text(tmp_path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: [de]\ntags: [legal]\npipeline_tag: summarization\n---\n\n"
        "# Mein Adapter\n\nGut.\n"
    )
    adapted().save_pretrained(tmp_path)
    kept = front(tmp_path)
    assert kept["license"] == "apache-2.0" and kept["language"] == ["de"]
    assert kept["pipeline_tag"] == "summarization"
    assert set(kept["tags"]) == {"legal", "lora", "transformers", "base_model:adapter:someone/base"}
    text = (tmp_path / "README.md").read_text()
    assert "# Mein Adapter\n\nGut.\n" in text
    text = text.replace("Gut.", "Sehr gut.")
    (tmp_path / "README.md").write_text(text)
    adapted(r=5).save_pretrained(tmp_path)
    new = (tmp_path / "README.md").read_text()
    assert "Sehr gut." in new and "| Rank | 5 |" in new and "| Rank | 3 |" not in new


def test_the_tag_of_a_former_base_goes(tmp_path) -> None:
    adapted().save_pretrained(tmp_path)
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = "someone/else"
    model.save_pretrained(tmp_path)
    assert [t for t in front(tmp_path)["tags"] if t.startswith("base_model")] == ["base_model:adapter:someone/else"]


def test_a_card_with_broken_front_matter_is_left_alone(tmp_path) -> None:
    broken = "---\nlicense: [apache\n---\n# Mine\n"
    (tmp_path / "README.md").write_text(broken)
    with pytest.raises(ValueError, match=r"README\.md is not valid YAML"):
        adapted().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == broken
    assert (tmp_path / "adapter_model.safetensors").is_file()  # what matters was saved before


def test_a_rule_in_the_text_is_no_front_matter() -> None:
    text = "# Title\n\n---\nnot: yaml\n---\n"
    assert card.split(text) == ({}, text)


def test_several_adapters_are_listed_and_the_card_is_at_the_top(tmp_path) -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=7, target_modules=["o_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| Name | default |" in text and "| Name | other |" in text and "| Rank | 7 |" in text
    assert not (tmp_path / "other" / "README.md").exists()


def test_a_base_without_a_name_is_not_given_one(tmp_path) -> None:
    from torch import nn

    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    model.save_pretrained(tmp_path)
    assert front(tmp_path) == {"library_name": "peft", "tags": ["lora"]}


def test_a_hub_id_is_told_from_a_path(tmp_path) -> None:
    assert card.is_hub_id("someone/base") and card.is_hub_id("gpt2")
    assert not card.is_hub_id(str(tmp_path)) and not card.is_hub_id("../base")


def test_odd_names_survive_yaml(tmp_path) -> None:
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = "a: #b/ü"
    model.save_pretrained(tmp_path)
    assert front(tmp_path)["base_model"] == "a: #b/ü"
    assert yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])["library_name"] == "peft"
    assert veneer.__version__
