"""After training: merging with its certificate, inspection without the base, chats and answers."""

import json

import pytest
import torch
from rich.console import Console

import veneer
from veneer.train import adapters, config, inspection, merging, recipes
from veneer.train.conversation import Conversation
from veneer.train.evaluate import Session
from veneer.train.prepare import prepare


@pytest.fixture(scope="module")
def adapter(base, facts, tmp_path_factory):
    out = tmp_path_factory.mktemp("after") / "out"
    words = f"--model {base} --data {facts} --out {out} --steps 6 --lr 2e-2 --progress off --eval.prompts 0"
    recipes.run(prepare(config.load(None, [], words.split(), adapters.problems)), Console(quiet=True))
    return out


def test_merged_model_answers_the_same_and_brings_tokenizer_and_template(adapter, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "merged"
    certificate = merging.merge(str(adapter), str(out))
    assert certificate.holds
    assert certificate.same_choice == 1
    session = Session(None, str(adapter))
    ids = session.tokenizer("What colour is the sky", return_tensors="pt")["input_ids"]
    merged = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(merged(ids).logits, session.model(input_ids=ids).logits, rtol=1e-3, atol=1e-4)
    assert AutoTokenizer.from_pretrained(out).chat_template == session.tokenizer.chat_template
    assert (out / "generation_config.json").is_file()


def test_a_merge_past_its_tolerance_saves_nothing(adapter, tmp_path):
    out = tmp_path / "merged"
    with pytest.raises(ValueError, match=r"does not answer as the adapted one.*--dtype float32"):
        merging.merge(str(adapter), str(out), dtype="bfloat16", tolerance=1e-12)
    assert list(tmp_path.iterdir()) == []


def test_inspection_gives_norm_and_rank_of_the_weight_change(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    A, B = torch.randn(3, 20), torch.randn(30, 3)
    A[2] = 0  # of rank 2, then
    stem = "base_model.model.layers.{}.q.lora_{}.weight"
    tensors = {stem.format(10, "A"): A, stem.format(10, "B"): B, stem.format(2, "A"): A, stem.format(2, "B"): 0 * B}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6}))
    found = inspection.inspect(tmp_path)
    assert [layer.place for layer in found.layers] == ["layers.2.q", "layers.10.q"]
    assert found.layers[1].norm == pytest.approx((2 * B @ A).norm().item(), rel=1e-5)
    assert 1 < found.layers[1].effective_rank <= 2
    assert [layer.place for layer in found.dead] == ["layers.2.q"]
    assert found.parameters == 2 * (A.numel() + B.numel())


def test_inspecting_a_wrong_or_damaged_folder_says_so(adapter, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"did you mean '.*out'"):
        inspection.inspect(adapter.parent / "outt")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 not json at all")
    with pytest.raises(ValueError, match="is damaged"):
        inspection.inspect(tmp_path)


def test_a_session_finds_base_tokenizer_and_template_from_the_adapter_alone(adapter):
    session = Session(None, str(adapter))
    assert session.template == "chat"
    text = session.render([{"role": "user", "content": "Hi"}])
    assert text.endswith("<|im_start|>assistant\n")
    streamed = "".join(session.stream([{"role": "user", "content": "What colour is the sky 1"}], max_new_tokens=6))
    assert streamed == session.answer([{"role": "user", "content": "What colour is the sky 1"}], max_new_tokens=6)


def test_base_in_a_chat_answers_without_the_adapter_and_comes_back(adapter):
    session = Session(None, str(adapter))
    talk = Conversation(session, [str(adapter)], None, {"max_new_tokens": 6})
    question = "What colour is the grass 3"

    def ask():
        "".join(talk.say("/reset"))
        return "".join(talk.say(question))

    adapted = ask()
    "".join(talk.say("/base"))
    bare = ask()
    with session.model.disable_adapter():
        assert bare == session.answer([{"role": "user", "content": question}], max_new_tokens=6)
    assert bare != adapted
    "".join(talk.say("/base"))
    assert ask() == adapted
    "".join(talk.say("/quit"))
    assert talk.over


def test_two_adapters_are_switched_by_name(adapter, tmp_path):
    session = Session(None, str(adapter))
    other = tmp_path / "other"
    session.model.save_pretrained(str(other))
    tensors = veneer.load_peft_weights(str(other))
    from safetensors.torch import save_file

    save_file({k: torch.zeros_like(v) for k, v in tensors.items()}, other / "adapter_model.safetensors")
    talk = Conversation(session, [str(adapter), str(other)], None, {"max_new_tokens": 6})
    first = "".join(talk.say("What colour is the rose 1"))
    assert "other" in "".join(talk.say("/adapter other"))
    "".join(talk.say("/reset"))
    second = "".join(talk.say("What colour is the rose 1"))
    with session.model.disable_adapter():
        bare = session.answer([{"role": "user", "content": "What colour is the rose 1"}], max_new_tokens=6)
    assert second == bare != first
