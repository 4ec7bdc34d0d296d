"""A compiled PeftModel stays one graph through what users do with its adapters."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from veneer import LoraConfig, get_peft_model


@torch.no_grad()
def test_adapters_rows_and_the_bare_model_share_two_graphs() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, num_hidden_layers=1, intermediate_size=24, vocab_size=20, num_attention_heads=2,
            num_key_value_heads=2,
        )
    )  # fmt: skip
    configs = {
        name: LoraConfig(r=r, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        for name, r in (("default", 4), ("b", 4), ("c", 2))
    }
    model = get_peft_model(base, configs["default"]).eval()
    for name in ("b", "c"):
        model.add_adapter(name, configs[name])
    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(model, backend=lambda g, inputs: graphs.append(g) or g.forward, fullgraph=True)
    ids = torch.arange(12).reshape(3, 4)
    seen = []

    def check(**rows: list[str]) -> None:
        given = {"input_ids": ids, "use_cache": False, **rows}
        seen.append(compiled(**given).logits)
        assert torch.allclose(seen[-1], model(**given).logits, atol=1e-5)

    check()
    model.set_adapter("b")
    check()
    model.base_model.set_adapter(["default", "c"])
    check()
    with model.disable_adapter():
        check()
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("c", 0.5)
    check()
    assert len(graphs) == 1
    for rows in (["default", "b", "c"], ["b", "__base__", "b"]):
        check(adapter_names=rows)
    check()
    assert len(graphs) == 2
    assert not any(torch.allclose(a, b) for i, a in enumerate(seen[:-1]) for b in seen[:i])
    assert torch.equal(seen[-1], seen[4])
