"""What libraries do with adapters where veneer answers to ``peft``: diffusers, sentence-transformers, TRL, accelerate.

Run by ``test_libraries`` in a process of its own:  python -m veneer.as_peft -m pytest tests/hf/with_libraries.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from .tiny import IDS, llama, tokenizer
from .with_trainer import arguments, losses, trained_tensors

# ---- diffusers ------------------------------------------------------------------------------------------------------
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def pipeline():
    """A Stable Diffusion of a few thousand parameters, always the same."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, cross_attention_dim=8, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=[4, 8], down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=4, norm_num_groups=2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, vocab_size=50,
            bos_token_id=0, eos_token_id=2, pad_token_id=1, max_position_embeddings=16,
        )
    )  # fmt: skip
    return StableDiffusionPipeline(
        unet=unet.eval(), vae=vae, text_encoder=text.eval(), tokenizer=None, scheduler=DDIMScheduler(steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@torch.no_grad()
def predicted(pipe) -> torch.Tensor:
    """What the text encoder and the UNet make of one text and one noise."""
    text = pipe.text_encoder(torch.tensor([[0, 5, 6, 2]]))[0]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return pipe.unet(noise, torch.tensor([3]), text)[0]


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> dict[str, tuple[str, torch.Tensor]]:
    """name -> (folder of a LoRA for UNet and text encoder as diffusers writes it, what the pipeline makes with it)."""
    from diffusers import StableDiffusionPipeline

    found = {}
    for seed, name in enumerate("ab"):
        pipe, folder = pipeline(), str(tmp_path_factory.mktemp(name))
        torch.manual_seed(seed)
        config = {"r": 4, "lora_alpha": 4, "init_lora_weights": False}
        pipe.unet.add_adapter(LoraConfig(target_modules=ATTENTION, **config), "x")
        pipe.text_encoder.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], **config), "x")
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=get_peft_model_state_dict(pipe.unet, adapter_name="x"),
            text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder, adapter_name="x"),
        )
        found[name] = folder, predicted(pipe)
    return found


def loaded(loras, *names: str):
    pipe = pipeline()
    for name in names:
        pipe.load_lora_weights(loras[name][0], adapter_name=name)
    return pipe


def test_diffusers_loads_and_chooses(loras) -> None:
    pipe = loaded(loras, "a", "b")
    for name in "ab":
        pipe.set_adapters(name)
        assert torch.allclose(predicted(pipe), loras[name][1], atol=1e-5)
        assert pipe.get_active_adapters() == [name]
    assert pipe.get_list_adapters() == {"unet": ["a", "b"], "text_encoder": ["a", "b"]}


def test_diffusers_weighs_several(loras) -> None:
    pipe = loaded(loras, "a", "b")
    pipe.set_adapters(["a", "b"], [0.5, 0.3])
    both = predicted(pipe)
    pipe.set_adapters(["a"], [0.0])
    assert torch.allclose(predicted(pipe), predicted(pipeline()), atol=1e-6)
    pipe.set_adapters("a", {"unet": {"down": 0.5, "mid": 0.2, "up": 1.0}, "text_encoder": 0.5})
    assert not torch.allclose(predicted(pipe), both, atol=1e-4)
    pipe.set_adapters(["a", "b"], [0.5, 0.3])
    assert torch.allclose(predicted(pipe), both, atol=1e-6)


def test_diffusers_fuses_and_unfuses(loras) -> None:
    pipe = loaded(loras, "a", "b")
    pipe.set_adapters(["a", "b"], [0.5, 0.3])
    both = predicted(pipe)
    pipe.fuse_lora()
    assert torch.allclose(predicted(pipe), both, atol=1e-4)
    pipe.unfuse_lora()
    assert torch.equal(predicted(pipe), both)


def test_diffusers_switches_deletes_and_unloads(loras) -> None:
    pipe, base = loaded(loras, "a", "b"), predicted(pipeline())
    pipe.set_adapters("a")
    pipe.disable_lora()
    assert torch.allclose(predicted(pipe), base, atol=1e-6)
    pipe.enable_lora()
    pipe.set_adapters("a")
    assert torch.allclose(predicted(pipe), loras["a"][1], atol=1e-5)
    pipe.delete_adapters("b")
    assert pipe.get_list_adapters() == {"unet": ["a"], "text_encoder": ["a"]}
    pipe.unload_lora_weights()
    assert torch.equal(predicted(pipe), base)
    assert not any("lora" in name for name, _ in pipe.unet.named_parameters())
    pipe.load_lora_weights(loras["b"][0], adapter_name="a")  # the name is free again
    assert torch.allclose(predicted(pipe), loras["b"][1], atol=1e-5)


def test_diffusers_swaps_in_place(loras, tmp_path) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers  # noqa: F401 - there at all
    from safetensors.torch import load_file

    unet = {
        name: {k.removeprefix("unet."): v for k, v in load_file(Path(loras[name][0]) / _FILE).items() if "unet" in k}
        for name in "ab"
    }
    pipe, other = pipeline(), pipeline()
    pipe.unet.enable_lora_hotswap(target_rank=8)
    pipe.unet.load_lora_adapter(dict(unet["a"]), prefix=None, adapter_name="x")
    one = predicted(pipe)
    pipe.unet.load_lora_adapter(dict(unet["b"]), prefix=None, adapter_name="x", hotswap=True)
    other.unet.load_lora_adapter(dict(unet["b"]), prefix=None, adapter_name="x")
    assert torch.allclose(predicted(pipe), predicted(other), atol=1e-5)
    assert not torch.allclose(predicted(pipe), one, atol=1e-4)


_FILE = "pytorch_lora_weights.safetensors"


# ---- sentence-transformers ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> str:
    """A folder of a tiny encoder that sentence-transformers reads."""
    pytest.importorskip("sentence_transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = str(tmp_path_factory.mktemp("encoder"))
    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(intermediate_size=32, max_position_embeddings=32, **sizes)).save_pretrained(folder)
    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder)
    return folder


def encoder(folder: str):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(folder, device="cpu")


def encoded(model) -> torch.Tensor:
    return model.encode(["a b c", "d"], convert_to_tensor=True)


def encoder_config(**options) -> LoraConfig:
    return LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=["query", "value"], **options)


def test_sentence_transformers_adds_saves_and_loads(sentences, tmp_path) -> None:
    model = encoder(sentences)
    base = encoded(model)
    model.add_adapter(encoder_config(init_lora_weights=False), adapter_name="x")
    y = encoded(model)
    assert not torch.allclose(y, base, atol=1e-3) and model.active_adapters() == ["x"]
    model.disable_adapters()
    assert torch.allclose(encoded(model), base)
    model.enable_adapters()
    model.save_pretrained(str(tmp_path))
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()
    again = encoder(sentences)
    again.load_adapter(str(tmp_path), adapter_name="z")
    assert torch.allclose(encoded(again), y, atol=1e-6)
    assert torch.allclose(encoded(encoder(str(tmp_path))), y, atol=1e-6)


def test_sentence_transformers_trains(sentences, tmp_path) -> None:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = encoder(sentences)
    model.add_adapter(encoder_config())
    before = trained_tensors(model)
    assert before and all("lora_" in name for name in before)
    run = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path), max_steps=2, save_steps=2, use_cpu=True, report_to=[], learning_rate=0.1
        ),
        train_dataset=Dataset.from_dict({"anchor": ["a b", "c d"] * 4, "positive": ["a", "c"] * 4}),
        loss=MultipleNegativesRankingLoss(model),
    )
    run.train()
    assert any(not torch.equal(value, before[name]) for name, value in trained_tensors(model).items())
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()


# ---- TRL ------------------------------------------------------------------------------------------------------------
def causal_config() -> LoraConfig:
    return LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear")


def test_kto_by_trl(tmp_path) -> None:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    rows = [{"prompt": "a b c", "completion": w, "label": l} for w, l in ((" d e f", True), (" l k j", False))] * 8
    run = KTOTrainer(
        model=llama(),
        args=arguments(tmp_path, KTOConfig, bf16=False, max_length=16, max_steps=4),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=causal_config(),
    )
    run.train()
    assert losses(run)[0] == pytest.approx(0.5, abs=0.05)  # policy and reference start equal
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").is_file()


def test_reward_by_trl(tmp_path) -> None:
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    config = llama().config
    config.num_labels = 1
    torch.manual_seed(0)
    run = RewardTrainer(
        model=LlamaForSequenceClassification(config),
        args=arguments(tmp_path, RewardConfig, bf16=False, max_length=16),
        train_dataset=Dataset.from_list([{"chosen": "a b c d e", "rejected": "a b l k j"}] * 16),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, task_type="SEQ_CLS", target_modules="all-linear"),
    )
    run.train()
    assert losses(run)[-1] < losses(run)[0] - 0.05
    saved = tmp_path / "checkpoint-8"
    assert "score" in json.loads((saved / "adapter_config.json").read_text())["modules_to_save"]


# ---- transformers and accelerate ------------------------------------------------------------------------------------
def test_transformers_swaps_in_place(tmp_path) -> None:
    for seed, name in enumerate("ab"):
        model = llama()
        torch.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        model.save_pretrained(tmp_path / name)
    second = model.eval()(IDS).logits
    model = llama()
    model.enable_peft_hotswap(target_rank=4)
    model.load_adapter(str(tmp_path / "a"), adapter_name="x")
    first = model.eval()(IDS).logits
    model.load_adapter(str(tmp_path / "b"), adapter_name="x", hotswap=True)
    assert torch.allclose(model(IDS).logits, second, atol=1e-5) and not torch.allclose(first, second, atol=1e-4)


def test_accelerate_takes_the_adapter_alone_out_of_a_model() -> None:
    """What accelerate saves and loads of a model with adapters under FSDP."""
    from accelerate.utils.fsdp_utils import _get_model_state_dict, _set_model_state_dict

    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    found = _get_model_state_dict(model, adapter_only=True)
    assert found and all("lora_" in key for key in found)
    other = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    _set_model_state_dict(other, found, adapter_only=True)
    assert torch.equal(other.eval()(IDS).logits, model.eval()(IDS).logits)


def test_accelerate_wraps_trainable_leaves_by_themselves() -> None:
    from peft.utils.other import fsdp_auto_wrap_policy

    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    policy = fsdp_auto_wrap_policy(model)
    chosen = [n for n, m in model.named_modules() if policy(module=m, recurse=False, nonwrapped_numel=0)]
    assert chosen and all("lora_" in n or n.endswith(("layers.0", "layers.1")) for n in chosen)


def test_a_model_with_adapters_is_one_for_the_libraries() -> None:
    from accelerate import Accelerator
    from transformers.trainer_utils import PeftModel as known  # noqa: F401 - imported there at the head

    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert isinstance(model, PeftModel) and isinstance(Accelerator(cpu=True).prepare(model), nn.Module)
