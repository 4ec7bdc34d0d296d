"""Models that transformers reads from a GGUF file: adapters on them train, save and merge as on any other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf.tiny import IDS
from veneer import LoraConfig, OFTConfig, PeftModel, get_peft_model
from veneer.core import quant

gguf = pytest.importorskip("gguf")
HIDDEN, LAYERS, WORDS = 64, 2, 260


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama with 4-bit blocks at its linear layers."""
    folder = tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * HIDDEN)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("gpt2")
    tokens = ["<|endoftext|>", "<pad>", *(chr(0x100 + i) for i in range(WORDS - 3)), "\u0100\u0101"]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 2 + [1] * (WORDS - 2))
    writer.add_token_merges(["\u0100 \u0101"])
    writer.add_eos_token_id(0)
    random, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q4_0
    writer.add_tensor("token_embd.weight", random.normal(size=(WORDS, HIDDEN)).astype(np.float32))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, dtype=np.float32))
    for i in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(HIDDEN, dtype=np.float32))
        square = {f"attn_{n}": (HIDDEN, HIDDEN) for n in ("q", "k", "v", "output")}
        wide = {"ffn_gate": (2 * HIDDEN, HIDDEN), "ffn_up": (2 * HIDDEN, HIDDEN), "ffn_down": (HIDDEN, 2 * HIDDEN)}
        for name, shape in {**square, **wide}.items():
            packed = gguf.quants.quantize(0.1 * random.normal(size=shape).astype(np.float32), kind)
            writer.add_tensor(f"blk.{i}.{name}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        OFTConfig(oft_block_size=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    ],
    ids=["lora", "dora", "oft"],
)
def test_adapters_on_a_model_from_a_gguf_file(config, folder, tmp_path) -> None:
    def base():
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf")

    layer = base().model.layers[0].mlp.up_proj
    # On a CPU transformers unpacks such files while it loads them: sixteen values a block of 32 at most.
    assert quant.backend(layer) is None and len(layer.weight[0, :32].unique()) <= 16
    model = get_peft_model(base(), config).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    y = model.eval()(IDS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path)(IDS).logits, y)
    assert torch.allclose(model.merge_and_unload()(IDS).logits, y, atol=1e-4)
