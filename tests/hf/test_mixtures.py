"""Mixtures of trained LoRAs from their folders: MoLE's gates, Arrow's routes, and what cannot be mixed."""

from __future__ import annotations

import math
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from hf.mixing import NAMES, deltas, folders, stir
from hf.tiny import IDS, llama
from veneer import ArrowConfig, PeftModel, create_arrow_model, keep_experts, mix
from veneer.core.sites import sites_for
from veneer.methods.arrow import prototype
from veneer.methods.mole import Mole, MoleConfig, _Units

MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> dict[str, str]:
    return folders(tmp_path_factory.mktemp("experts"))


def logits(model, ids=IDS, **kwargs):
    return model(input_ids=ids, **kwargs).logits


def mole(experts: dict[str, str], size: float = 0.0, **options) -> PeftModel:
    return stir(mix(llama(), experts, "mole", **options), 3, size).eval()


def layers(model) -> list[Mole]:
    return [a for _, a in model.base_model.adapters("default")]


# ---- MoLE -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gate", ["token", "sequence"])
def test_mole_is_the_papers_formula_forward_and_gradient(gate: str) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 5).double()
    adapter = Mole(sites_for("l", linear)[0], MoleConfig(experts=list("xyz"), r=2, gate=gate), _Units()).double()
    for t in (adapter.mole_A, adapter.mole_B, adapter.mole_gate.data, adapter.mole_log_tau.data):
        t.copy_(torch.randn(t.shape, dtype=torch.float64))
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    e = torch.stack([(x @ a.T) @ b.T for a, b in zip(adapter.mole_A, adapter.mole_B, strict=True)], -2)
    seen = (e if gate == "token" else e.mean(1, keepdim=True)).flatten(-2)
    seen = (seen - seen.mean(-1, keepdim=True)) / (seen.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    g = (seen @ adapter.mole_gate / adapter.mole_log_tau.exp()).softmax(-1)
    naive = linear(x) + (g[..., None] * e).sum(-2)
    ours = adapter(x, linear)
    assert torch.allclose(ours, naive, atol=1e-5)
    wanted = [x, adapter.mole_gate, adapter.mole_log_tau]
    up = torch.randn_like(naive)
    pairs = zip(torch.autograd.grad(ours, wanted, up), torch.autograd.grad(naive, wanted, up), strict=True)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in pairs)


def test_one_expert_is_that_lora(experts) -> None:
    alone = PeftModel.from_pretrained(llama(), experts["b"])
    assert torch.allclose(logits(mole({"b": experts["b"]}, 0.5)), logits(alone), atol=1e-5)


def test_untrained_gates_give_the_mean(experts) -> None:
    plain = llama()
    for path, parts in {p: [deltas(f)[p] for f in experts.values()] for p in deltas(experts["a"])}.items():
        plain.get_submodule(path).weight.data += torch.stack(parts).mean(0)
    assert torch.allclose(logits(mole(experts)), logits(plain), atol=1e-5)


def test_experts_of_other_ranks_and_layers_mix(tmp_path, experts) -> None:
    wide = folders(tmp_path, ("w",), r=4, use_rslora=True, target_modules=["q_proj", "o_proj"])
    model = mole({"a": experts["a"]} | wide)
    keep_experts(model, ["w"])
    assert torch.allclose(logits(model), logits(PeftModel.from_pretrained(llama(), wide["w"])), atol=1e-5)


@pytest.mark.parametrize("gate", ["token", "sequence"])
def test_left_out_experts_leave_the_others_renormalised(experts, gate: str) -> None:
    model = mole(experts, 0.5, gate=gate)
    for unit in layers(model):
        h = torch.randn(2, 5, 3, 2)
        g = unit.weigh(h)
        unit.keep(["a", "c"])
        kept = unit.weigh(h)
        assert torch.allclose(kept[..., [0, 2]], g[..., [0, 2]] / g[..., [0, 2]].sum(-1, keepdim=True), atol=1e-6)
        assert (kept[..., 1] == 0).all()
    keep_experts(model, ["c"])
    alone = PeftModel.from_pretrained(llama(), experts["c"])
    assert torch.allclose(logits(model), logits(alone), atol=1e-5)
    with pytest.raises(ValueError, match="a, b, c"):
        keep_experts(model, ["d"])


def test_the_balance_is_least_where_gates_are_even_and_reaches_the_gates(experts) -> None:
    even, odd = mole(experts, balance_weight=1.0).train(), mole(experts, 0.5, balance_weight=1.0).train()
    for model in (even, odd):
        model(input_ids=IDS, attention_mask=MASK)
    assert math.isclose(even.base_model.penalty().item(), 3 * math.log(3), rel_tol=1e-5)
    term = odd.base_model.penalty()
    assert term.item() > 3 * math.log(3)
    term.backward()
    trained = {n: p for n, p in odd.named_parameters() if p.requires_grad}
    assert trained and all("mole_gate" in n or "mole_log_tau" in n for n in trained)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert odd.eval()(input_ids=IDS) is not None and odd.base_model.penalty() is None


@pytest.mark.parametrize("gate", ["token", "sequence"])
def test_padding_changes_neither_text_nor_balance(experts, gate: str) -> None:
    model = mole(experts, 0.5, gate=gate).train()
    padded = IDS.clone()
    padded[1, 3:] = 5
    y = model(input_ids=IDS, attention_mask=MASK).logits
    term = model.base_model.penalty()
    z = model(input_ids=padded, attention_mask=MASK).logits
    assert torch.allclose(y[1, :3], z[1, :3], atol=1e-5)
    assert torch.allclose(model.base_model.penalty(), term, atol=1e-5)
    assert torch.allclose(model(input_ids=IDS[1:, :3]).logits, y[1:, :3], atol=1e-5)


def test_checkpointing_gives_the_same_gradients(experts) -> None:
    found = []
    for checkpointed in (False, True):
        model = mole(experts, 0.3).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        (model(input_ids=IDS, labels=IDS).loss + model.base_model.penalty()).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))


def test_mole_saves_itself_whole_and_generates(experts, tmp_path) -> None:
    model = mole(experts, 0.5)
    model.save_pretrained(tmp_path / "mixture")
    again = PeftModel.from_pretrained(llama(), tmp_path / "mixture")
    assert torch.equal(logits(again), logits(model))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached = again.generate(input_ids=IDS, **options)
    assert torch.equal(cached, again.generate(input_ids=IDS, use_cache=False, **options))
    with pytest.raises(ValueError, match="cannot be merged"):
        again.merge_and_unload()


def test_training_the_gates_finds_the_expert_of_the_task(experts) -> None:
    with torch.no_grad():
        target = logits(PeftModel.from_pretrained(llama(), experts["b"]))
    model = mole(experts, balance_weight=0.0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(40):
        loss = (logits(model) - target).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.2 * losses[0]


# ---- Arrow ----------------------------------------------------------------------------------------------------------
def test_the_prototype_is_the_top_right_singular_vector() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 30, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    p, wanted = prototype(a, b), torch.linalg.svd(b @ a)[2][0]
    assert torch.allclose(p * torch.sign(p @ wanted), wanted, atol=1e-10)


@pytest.mark.parametrize("general", [False, True])
def test_arrow_answers_as_the_peer(experts, tmp_path, general: bool) -> None:
    extra = list(folders(tmp_path, ("g", "h"), lora_alpha=2).values()) if general else None
    options = {"top_k": 2, "router_temperature": 0.7, "use_gks": general}
    ours = create_arrow_model(llama(), list(experts.values()), ArrowConfig(**options), extra).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = llama()
        torch.manual_seed(0)  # from an unlucky start its steps end far off
        theirs = peft.create_arrow_model(base, list(experts.values()), peft.ArrowConfig(**options), extra).eval()
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-2)  # the peer's prototypes come from a few random steps
    assert not torch.allclose(logits(ours), logits(llama()), atol=5e-2)
    assert ours.active_adapter == "arrow_router" and sorted(ours.peft_config) == sorted(theirs.peft_config)

    ours.save_pretrained(tmp_path / "ours")
    tasks = [str(tmp_path / "ours" / f"task_{i}") for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = llama()
        torch.manual_seed(0)
        again = peft.create_arrow_model(base, tasks, peft.ArrowConfig(**options), extra).eval()
    assert torch.allclose(logits(again), logits(ours), atol=1e-2)
    read = _read(tmp_path / "ours")
    assert torch.allclose(logits(read), logits(ours), atol=1e-6)
    if not general:  # there the peer saves task adapters that are not the ones it was given
        theirs.save_pretrained(tmp_path / "theirs")
        assert torch.allclose(logits(_read(tmp_path / "theirs")), logits(theirs), atol=1e-2)


def _read(folder) -> PeftModel:
    """Every adapter of a folder; the peer itself cannot read the router's, be it its own or ours."""
    first, *others = sorted((p.name for p in folder.iterdir() if p.is_dir()), reverse=True)
    model = PeftModel.from_pretrained(llama(), folder / first, adapter_name=first)
    for name in others:
        model.load_adapter(folder / name, name)
    model.set_adapter("arrow_router")
    return model.eval()


def test_arrow_is_the_formula_at_every_layer(experts) -> None:
    model = mix(llama(), experts, "arrow", top_k=2, router_temperature=0.5).eval()
    each = [deltas(folder) for folder in experts.values()]
    for place, adapter in model.base_model.adapters("default"):
        x = torch.randn(2, 5, 16)
        here = [d[place] for d in each]
        sim = torch.stack([(x @ torch.linalg.svd(d)[2][0]).abs() for d in here], -1)
        values, chosen = sim.topk(2, -1)
        g = torch.zeros_like(sim).scatter(-1, chosen, (values / 0.5).softmax(-1))
        naive = sum(g[..., i : i + 1] * (x @ d.T) for i, d in enumerate(here))
        zero = torch.zeros(2, 5, here[0].shape[0])
        assert torch.allclose(adapter(x, lambda h, zero=zero: zero), naive, atol=1e-5)
        flipped = adapter.gates(-x, adapter.library()[2])
        assert torch.allclose(flipped, adapter.gates(x, adapter.library()[2]))


def test_arrow_of_all_experts_and_a_high_temperature_is_the_mean(experts) -> None:
    model = mix(llama(), experts, "arrow", top_k=3, router_temperature=1e6).eval()
    assert torch.allclose(logits(model), logits(mole(experts)), atol=1e-4)


def test_arrow_follows_its_experts_and_trains_nothing(experts) -> None:
    model = mix(llama(), experts, "arrow").eval()
    assert not [n for n, p in model.named_parameters() if p.requires_grad]
    y = logits(model)
    model.load_adapter(experts["a"], "b")
    assert not torch.allclose(logits(model), y, atol=1e-4)
    model.set_adapter("c")
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(llama(), experts["c"])))
    with pytest.raises(ValueError, match="cannot be merged"):
        model.set_adapter("default")
        model.merge_and_unload()


def test_general_knowledge_is_taken_off_once_and_leaves_the_adapters(experts, tmp_path) -> None:
    general = folders(tmp_path, ("g",))  # the same weights as expert a
    model = mix(llama(), {"a": experts["a"]}, "arrow", general=general).eval()
    for _ in range(2):
        assert torch.allclose(logits(model), logits(llama()), atol=1e-6)
    model.set_adapter("a")
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(llama(), experts["a"])))


# ---- what cannot be mixed -------------------------------------------------------------------------------------------
def test_what_cannot_be_mixed_is_refused(experts, tmp_path) -> None:
    other = folders(tmp_path / "dora", ("d",), use_dora=True)
    saved = folders(tmp_path / "saved", ("s",), modules_to_save=["lm_head"])
    strange = folders(tmp_path / "base", ("x", "y"))
    for name, base in zip(strange, ("one/model", "two/other"), strict=True):
        config = veneer.PeftConfig.read(strange[name])
        config.base_model_name_or_path = base
        config.write(strange[name])
    for adapters, method, options, words in (
        ({}, "mole", {}, "Nothing to mix"),
        (experts, "moles", {}, "mole, xlora, arrow, lorahub"),
        (experts | other, "mole", {}, "use_dora"),
        (experts | saved, "xlora", {}, "modules_to_save"),
        (strange, "arrow", {}, "different base models: model, other"),
        (experts, "mole", {"gate": "block"}, "'token' or 'sequence'"),
        (experts, "xlora", {"top_k_lora": 4}, "between 1 and the number of experts, 3"),
        (experts, "arrow", {"top_k": 0}, "must be positive"),
        (experts, "arrow", {"use_gks": True}, "needs general adapters"),
        (experts, "arrow", {"general": {"a": experts["b"]}}, "names both"),
    ):
        with pytest.raises(ValueError, match=words):
            mix(llama(), adapters, method, **options)
    narrow = llama(hidden_size=8, num_key_value_heads=1)
    with pytest.raises(ValueError, match="another base"):
        mix(narrow, experts, "mole")
    assert not any("adapters" in n for n, _ in narrow.named_modules())
    assert sorted(NAMES) == sorted(experts)


@pytest.mark.parametrize(("method", "gate"), [("mole", "mole_gate"), ("xlora", "internal_xlora_classifier")])
def test_a_missing_gate_is_one_sentence_and_leaves_the_base_alone(method: str, gate: str, experts, tmp_path) -> None:
    mix(llama(), experts, method).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    kept = load_file(file)
    for name in [name for name in kept if gate in name][:1]:
        del kept[name]
    save_file(kept, file)
    base = llama()
    with pytest.raises(ValueError, match=f"1 tensors are missing from the file .*{gate}"):
        PeftModel.from_pretrained(base, tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="no tensors"):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(base), logits(llama()))
