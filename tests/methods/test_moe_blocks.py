"""LoRAMoE and MixLoRA: the papers' formulas, what is shared, and the balance terms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from veneer import LoraMoeConfig, MixLoraConfig, PeftModel, get_peft_model
from veneer.methods.lora import Lora
from veneer.methods.loramoe import localised_balance
from veneer.methods.mixlora import MixLora

IDS = torch.tensor([[1, 4, 5, 6, 7, 8], [1, 9, 10, 11, 12, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2,
        )
    ).eval()  # fmt: skip


def tuned(config, size: float = 0.3) -> PeftModel:
    model, generator = get_peft_model(llama(), config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator))
    return model.eval()


def mixlora(**options) -> PeftModel:
    return tuned(MixLoraConfig(**({"r": 2, "experts": 4, "lora_dropout": 0.0, "target_modules": ["mlp"]} | options)))


def blocks(model: PeftModel) -> list:
    return [a for _, a in model.base_model.adapters("default")]


def naive(a: MixLora, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Each expert as a feed-forward block of its own, with its own whole weights."""
    m, out = a.site.module, 0
    for e in range(gates.shape[-1]):
        gate, up, down = (
            getattr(m, f"{n}_proj").weight
            + a.scaling * getattr(a, f"mixlora_{n}_B")[e] @ getattr(a, f"mixlora_{n}_A")[e]
            for n in ("gate", "up", "down")
        )
        out = out + gates[..., e : e + 1] * ((F.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    return out


@pytest.mark.parametrize("k", [1, 2, 4])
def test_sharing_equals_whole_experts_forward_and_gradient(k: int) -> None:
    model = mixlora(top_k=k, lora_alpha=4).double()
    for a in blocks(model):
        x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
        p = (x @ a.mixlora_router.T).softmax(-1)
        kept = torch.zeros_like(p).scatter(-1, p.topk(k).indices, 1.0) * p
        gates = kept / kept.sum(-1, keepdim=True)
        ours, wanted = a(x, a.site.module), naive(a, x, gates)
        assert torch.allclose(ours, wanted, atol=1e-6)
        own, up = [x, *(p for p in a.parameters() if p.requires_grad)], torch.randn_like(wanted)
        pairs = zip(
            torch.autograd.grad(ours, own, up, allow_unused=True),
            torch.autograd.grad(wanted, own, up, allow_unused=True),
            strict=True,
        )
        for found, other in pairs:
            found, other = (torch.zeros(1) if g is None else g for g in (found, other))
            assert torch.allclose(found, other, atol=1e-5 * max(1.0, float(other.abs().max())))  # float32 gates


def test_equal_experts_are_one_lora_block() -> None:
    model = mixlora()
    for a in blocks(model):
        for name, p in a.named_parameters():
            if name != "mixlora_router":
                p.data[1:] = p.data[:1]
        x = torch.randn(2, 5, 16)
        one = torch.zeros(2, 5, 4)
        one[..., 0] = 1
        assert torch.allclose(a(x, a.site.module), naive(a, x, one), atol=1e-5)


def test_it_starts_at_the_base_and_gives_attention_a_lora(tmp_path) -> None:
    config = MixLoraConfig(r=2, experts=3, target_modules=["mlp", "q_proj"], lora_dropout=0.0)
    fresh = get_peft_model(llama(), config).eval()
    assert torch.allclose(fresh(input_ids=IDS).logits, llama()(input_ids=IDS).logits, atol=1e-6)
    model = tuned(config)
    kinds = [type(a) for a in blocks(model)]
    assert kinds.count(MixLora) == 2 and kinds.count(Lora) == 2
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    y = model(input_ids=IDS).logits
    assert torch.equal(again(input_ids=IDS).logits, y)
    cached = again.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(
        cached, again.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=False)
    )
    with pytest.raises(ValueError, match="cannot be merged"):
        again.merge_and_unload()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    "config", [MixLoraConfig, LoraMoeConfig], ids=lambda config: config.__name__.removesuffix("Config")
)
def test_every_tensor_gets_a_gradient_and_padding_none(config, checkpointed: bool) -> None:
    extra = {"balance_weight": 0.1, "lora_dropout": 0.0, "r": 2, "experts": 4}
    extra |= {"target_modules": ["mlp"]} if config is MixLoraConfig else {"target_modules": ["up_proj", "down_proj"]}
    extra |= {"knowledge_experts": 2} if config is LoraMoeConfig else {}
    model = tuned(config(**extra)).train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    loss = model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
    term = model.base_model.penalty()
    (loss + term).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n.endswith("router"))
    other = IDS.clone()
    other[1, 3:] = 3
    model(input_ids=other, attention_mask=MASK)
    assert torch.allclose(model.base_model.penalty(), term, atol=1e-6)


def test_mixloras_balance_is_k_where_even() -> None:
    model = mixlora(top_k=2, balance_weight=1.0).train()
    a = blocks(model)[0]
    gates = torch.eye(4).repeat(6, 1) * 0.5 + torch.eye(4).roll(1, 0).repeat(6, 1) * 0.5
    a._routing = gates[None].requires_grad_(), torch.full((1, 24, 4), 0.25, requires_grad=True)
    assert torch.allclose(a.penalty(), torch.tensor(2.0))


def test_the_localised_balance() -> None:
    even = torch.full((2, 3, 4), 0.25)
    assert localised_balance(even, 2, 0.1) == 0
    types = torch.tensor([0, 1])
    own = torch.tensor([[0.9, 0.9, 1.1, 1.1], [1.1, 1.1, 0.9, 0.9]]) / 4
    z = own * torch.tensor([[1.1, 1.1, 0.9, 0.9], [0.9, 0.9, 1.1, 1.1]])
    assert torch.allclose(localised_balance(own, 2, 0.1, types), z.var(unbiased=False) / z.mean())
    assert localised_balance(own, 2, 0.1, types) < localised_balance(own, 2, 0.1, 1 - types)
    padded = torch.cat([even, torch.eye(4)[:3].expand(2, 3, 4)], 1)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0]] * 2)
    assert localised_balance(padded, 2, 0.1, mask=mask) == 0 < localised_balance(padded, 2, 0.1)


def test_loramoe_is_the_formula_and_hears_the_kinds_of_samples() -> None:
    model = tuned(LoraMoeConfig(r=2, experts=4, knowledge_experts=2, balance_weight=1.0, target_modules=["up_proj"]))
    a = blocks(model)[0]
    x = torch.randn(2, 5, 16)
    g = (x @ a.loramoe_router.T).softmax(-1)
    wanted = sum(16 * g[..., e : e + 1] * (x @ a.loramoe_A[e].T) @ a.loramoe_B[e].T for e in range(4))
    assert torch.allclose(a(x, lambda h: torch.zeros(2, 5, 24)), wanted, atol=1e-5)
    model.train()
    terms = []
    for types in (None, torch.tensor([0, 1]), torch.tensor([1, 0])):
        model(input_ids=IDS, sample_types=types)
        terms.append(model.base_model.penalty().item())
    assert len(set(terms)) == 3


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MixLoraConfig(top_k=9, target_modules=["mlp"]), "top_k=9"),
        (MixLoraConfig(target_modules=["self_attn"]), "gated feed-forward"),
        (MixLoraConfig(target_modules=["mlp", "up_proj"]), "the block alone"),
        (LoraMoeConfig(knowledge_experts=7, target_modules=["up_proj"]), "knowledge_experts=7"),
        (LoraMoeConfig(target_modules=["embed_tokens"]), "linear layer"),
    ],
)
def test_bad_settings_are_refused(config, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        get_peft_model(llama(), config)
