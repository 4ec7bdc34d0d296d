"""LoRA's starts from data: EVA, CorDA, LoRA-GA; the algebra, the data pass, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import veneer
from parity import near, needs_peer
from veneer import LoraConfig, PeftModel, get_peft_model, initialize
from veneer.methods.lora_calibrate import gathered_gradients, input_directions, shared_ranks
from veneer.methods.lora_options import CordaConfig, EvaConfig, LoraGAConfig
from veneer.ops.factor import top_svd
from veneer.ops.running import RunningSvd, inverted


class Net(nn.Module):
    """Two layers share an input; a third has one of its own, with a strong direction in it."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(40, 16)
        self.q, self.k = nn.Linear(16, 48), nn.Linear(16, 48)
        self.out, self.head = nn.Linear(48, 24), nn.Linear(24, 6)
        self.drop = nn.Dropout(0.5)

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.emb(input_ids)
        h = self.out(torch.tanh(self.q(x)) * torch.sigmoid(self.k(x)))
        logits = self.head(torch.tanh(self.drop(h)))
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def batches(n: int = 4, labels: bool = True) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    out = []
    for _ in range(n):
        batch = {"input_ids": torch.randint(0, 40, (8, 5), generator=g)}
        if labels:
            batch["labels"] = torch.randint(0, 6, (8, 5), generator=g)
        out.append(batch)
    return out


def adapted(init: str, targets=("q", "out"), base: nn.Module | None = None, **options) -> PeftModel:
    options = {"r": 4, "lora_alpha": 8} | options
    return get_peft_model(base or net(), LoraConfig(target_modules=list(targets), init_lora_weights=init, **options))


def lora_at(model: PeftModel, path: str):
    return next(a for place, a in model.base_model.adapters("default") if place == path)


def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(batches(1)[0]["input_ids"]).logits


def gradient(path: str, data: list) -> torch.Tensor:
    """The mean gradient of a weight by plain autograd."""
    base = net()
    weight = base.get_parameter(path + ".weight")
    torch.stack([base(**b).loss for b in data]).mean().backward()
    return weight.grad


# ---- LoRA-GA --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rslora", [False, True])
def test_the_first_step_is_the_best_of_rank_2r(rslora):
    data, gamma, r, alpha = batches(3), 16, 4, 8
    model = adapted("lora_ga", r=r, lora_alpha=alpha, use_rslora=rslora)
    initialize(model, data, show_progress_bar=False)
    assert near(logits(model), logits(net()), 3e-6)
    lora = lora_at(model, "q")
    s = alpha / (r**0.5 if rslora else r)
    before = (lora.site.weight + lora.delta_weight()).detach()
    torch.stack([model(**b).loss for b in data]).mean().backward()
    step = 1e-4
    with torch.no_grad():
        for p in (lora.lora_A.weight, lora.lora_B.weight):
            p -= step * p.grad
    moved = (lora.site.weight.double() + lora.delta_weight().detach().double() - before.double()) / step
    g = gradient("q", data).double()
    values = torch.linalg.svdvals(g)
    optimum = float(values[: 2 * r].norm() / values.norm())
    cosine = float((moved * -g).sum() / moved.norm() / g.norm())
    assert cosine == pytest.approx(optimum, abs=2e-3)
    assert float(moved.norm() / g.norm()) == pytest.approx(s**2 * 48**0.5 / gamma * optimum, rel=5e-3)


def test_both_factors_are_scaled_and_complementary():
    data = batches(3)
    model = adapted("lora_ga", lora_ga_config=LoraGAConfig(stable_gamma=64))
    initialize(model, data, show_progress_bar=False)
    lora = lora_at(model, "q")
    c = 48**0.25 / 8
    u = top_svd(gradient("q", data), 4)[0]
    assert torch.allclose(lora.lora_A.weight.norm(dim=1), torch.full((4,), c), rtol=1e-4)
    assert torch.allclose(lora.lora_B.weight.norm(dim=0), torch.full((4,), c), rtol=1e-4)
    assert (u.T @ lora.lora_B.weight).abs().max() < 1e-3 * c


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "random"])
@pytest.mark.parametrize("scale", ["weight_svd", "gd_scale", "unit"])
def test_every_direction_and_scale_is_the_base_at_the_start(direction, scale):
    model = adapted("lora_ga", lora_ga_config=LoraGAConfig(direction=direction, scale=scale))
    initialize(model, batches(2), show_progress_bar=False)
    assert near(logits(model), logits(net()), 1e-5)
    lora = lora_at(model, "q")
    product = lora.lora_A.weight @ top_svd(gradient("q", batches(2)), 8)[2]
    taken = {"ArBr": [1, 3, 5, 7], "A2rBr": [4, 5, 6, 7]}.get(direction)
    if taken:
        rest = [i for i in range(8) if i not in taken]
        assert product[:, rest].abs().max() < 1e-2 * product[:, taken].abs().max()


def test_no_two_gradients_are_held_and_none_is_left():
    base = net()
    held = []
    sites = veneer.hf.preprocess.sites_named(base, LoraConfig(target_modules=["q", "k", "out"]))
    with gathered_gradients(sites) as found:
        watched = [base.q.weight, base.k.weight, base.out.weight]
        for p in base.parameters():
            p.requires_grad_(any(p is w for w in watched))
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: held.append(sum(w.grad is not None for w in watched)))
        for b in batches(2):
            base(**b).loss.backward()
    assert held and max(held) == 0  # ours came first, and took the gradient away
    assert all(p.grad is None for p in base.parameters())
    expected = gradient("k", batches(2))
    assert torch.allclose(found[sites[1]] / 2, expected, atol=1e-7)


def test_the_pass_leaves_the_model_as_it_was():
    model = adapted("lora_ga").train()
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters() if "lora" not in n}
    initialize(model, batches(2), show_progress_bar=False)
    assert model.training and model.base_model.model.drop.training
    with model.disable_adapter():
        for n, p in model.named_parameters():
            if "lora" not in n:
                assert (p.requires_grad, p.grad) == (before[n][0], None) and torch.equal(p, before[n][1])
        assert torch.equal(logits(model), logits(net()))


def test_a_layer_without_gradient_starts_as_plain_lora(tmp_path):
    base = net()
    base.unused = nn.Linear(16, 16)
    model = adapted("lora_ga", ("q", "unused"), base)
    initialize(model, batches(2), show_progress_bar=False)
    lora = lora_at(model, "unused")
    assert lora.lora_B.weight.abs().max() == 0 and lora.lora_A.weight.abs().max() > 0
    model.save_pretrained(tmp_path)
    again = net()
    again.unused = nn.Linear(16, 16)
    assert near(logits(PeftModel.from_pretrained(again, tmp_path)), logits(net()), 1e-5)


@needs_peer
@pytest.mark.parametrize("init", ["lora_ga", "corda"])
def test_saved_it_is_a_plain_adapter_for_the_original_base(init, tmp_path):
    import peft

    model = adapted(init, use_rslora=True, modules_to_save=["head"], rank_pattern={"out": 2})
    initialize(model, batches(3), show_progress_bar=False)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for b in batches(3):
        model(**b).loss.backward()
        optimiser.step()
    model.save_pretrained(tmp_path)
    assert not near(logits(model), logits(net()), 1e-3)
    assert near(logits(PeftModel.from_pretrained(net(), tmp_path)), logits(model), 2e-5)
    assert near(logits(peft.PeftModel.from_pretrained(net(), tmp_path)), logits(model), 2e-5)
    # and training can go on from it, with the start it had
    resumed = adapted(init, use_rslora=True, modules_to_save=["head"], rank_pattern={"out": 2})
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    assert near(logits(resumed), logits(model), 2e-5)
    assert torch.equal(lora_at(resumed, "q").lora_A.weight, lora_at(model, "q").lora_A.weight)


# ---- CorDA ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["ipm", "kpm"])
def test_corda_splits_along_the_directions_the_data_uses(how):
    model = adapted("corda", ("q",), lora_alpha=12, corda_config=CordaConfig(corda_method=how))
    initialize(model, batches(4), show_progress_bar=False)
    assert near(logits(model), logits(net()), 3e-6)
    x = torch.cat([net().emb(b["input_ids"]).flatten(0, 1) for b in batches(4)])
    c = sum((y / y.abs().max()).T @ (y / y.abs().max()) for y in x.chunk(4)) / 4
    damped, inverse = inverted(c)
    u, s, v = torch.linalg.svd(net().q.weight.double() @ damped)
    assert near(u[:, :16] * s @ v @ inverse, net().q.weight, 1e-4)
    chosen = slice(0, 4) if how == "ipm" else slice(12, 16)
    expected = u[:, chosen] * s[chosen] @ v[chosen] @ inverse
    assert near(lora_at(model, "q").delta_weight(), expected, 1e-4 if how == "ipm" else 1e-3)


def test_with_white_inputs_corda_is_pissa():
    base = net()
    for site in veneer.hf.preprocess.sites_named(base, LoraConfig(target_modules=["q"])):
        veneer.methods.lora_calibrate.note(site, torch.eye(16))
    corda, pissa = lora_at(adapted("corda", ("q",), base), "q"), lora_at(adapted("pissa", ("q",)), "q")
    assert near(corda.delta_weight(), pissa.delta_weight(), 1e-5)


# ---- EVA ------------------------------------------------------------------------------------------------------------
def test_the_running_svd_is_the_svd_of_all_rows_in_any_order():
    torch.manual_seed(0)
    x = torch.randn(400, 32) @ torch.diag(torch.logspace(0, -2, 32)) + 3 * torch.randn(32)
    exact = torch.linalg.svd(x - x.mean(0))
    for order in (torch.arange(400), torch.randperm(400)):
        running = RunningSvd(5)
        for part in x[order].split(57):
            running.add(part)
        assert ((running.directions * exact.Vh[:5]).sum(1).abs() > 0.99).all()
        assert torch.allclose(running.ratio, exact.S[:5] ** 2 / exact.S.square().sum(), rtol=2e-2)
        assert torch.allclose(running.directions @ running.directions.T, torch.eye(5), atol=1e-5)


def test_eva_gives_ranks_where_they_explain_most_within_the_budget():
    model = adapted("eva", ("q", "k", "out"), r=4, eva_config=EvaConfig(rho=2.0))
    initialize(model, batches(8), show_progress_bar=False)
    ranks = {place: lora.r for place, lora in model.base_model.adapters("default")}
    assert sum(ranks.values()) == 12 and max(ranks.values()) <= 8 and abs(ranks["q"] - ranks["k"]) <= 1
    assert ranks["out"] < ranks["q"]
    assert near(logits(model), logits(net()), 1e-7)
    for path, rank in ranks.items():
        a = lora_at(model, path).lora_A.weight
        assert torch.allclose(a @ a.T, torch.eye(rank), atol=1e-5)
        assert lora_at(model, path).scaling == pytest.approx(2.0)  # alpha / r stays
    x = torch.cat([net().emb(b["input_ids"]).flatten(0, 1) for b in batches(8)])
    exact = torch.linalg.svd(x - x.mean(0)).Vh[:2]
    assert ((lora_at(model, "q").lora_A.weight[:2] * exact).sum(1).abs() > 0.97).all()


def test_a_layer_that_gets_no_rank_is_let_go_and_the_file_says_so(tmp_path):
    model = adapted("eva", ("q", "out"), r=1)
    state = {"q": torch.eye(16)[:2], "out": torch.zeros(0, 48)}
    veneer.initialize_lora_eva_weights(model, eva_state_dict=state)
    config = model.peft_config["default"]
    assert config.target_modules == {"q"} and config.rank_pattern == {"q": 2}
    assert type(model.base_model.model.out) is nn.Linear
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(lora_at(again, "q").lora_A.weight, lora_at(model, "q").lora_A.weight)


def test_whitened_directions_are_as_long_as_the_data_are_short_along_them():
    found = [
        veneer.get_eva_state_dict(adapted("eva", eva_config=EvaConfig(whiten=w)), batches(4), show_progress_bar=False)
        for w in (False, True)
    ]
    x = torch.cat([net().emb(b["input_ids"]).flatten(0, 1) for b in batches(4)])
    projected = ((x - x.mean(0)) @ found[1]["q"].T).detach()
    assert torch.allclose(projected.var(0), torch.ones(projected.shape[1]), rtol=2e-2)
    assert near(found[1]["q"] / found[1]["q"].norm(dim=1, keepdim=True), found[0]["q"], 1e-5)


def test_padding_and_unlabelled_tokens_do_not_count():
    plain = batches(4)
    padded = []
    for b in plain:
        ids = torch.cat([b["input_ids"], torch.full((8, 3), 39)], 1)
        mask = torch.cat([torch.ones(8, 5), torch.zeros(8, 3)], 1).long()
        labels = torch.cat([b["labels"], torch.full((8, 3), -100)], 1)
        padded.append(({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids, "labels": labels}))
    expected = veneer.get_eva_state_dict(adapted("eva"), plain, show_progress_bar=False)
    for which in (0, 1):
        found = veneer.get_eva_state_dict(adapted("eva"), [p[which] for p in padded], show_progress_bar=False)
        assert all(near(found[k].abs(), expected[k].abs(), 1e-3) for k in expected)


def test_layers_that_share_an_input_share_its_decomposition(monkeypatch):
    calls = []
    add = RunningSvd.add
    monkeypatch.setattr(RunningSvd, "add", lambda self, x: (calls.append(self), add(self, x)))
    base = net()
    sites = veneer.hf.preprocess.sites_named(base, LoraConfig(target_modules=["q", "k", "out"]))
    ids = [b["input_ids"] for b in batches(3)]
    found = input_directions(sites, dict.fromkeys(sites, 4), ids, base, lambda b: None, 1.0)
    assert len(calls) == 6 and found[sites[0]] is found[sites[1]] is not found[sites[2]]
    assert sum(shared_ranks(found, dict.fromkeys(sites, 2)).values()) == 6


@needs_peer
def test_eva_is_the_peers(tmp_path):
    import peft

    data = [{"input_ids": b["input_ids"]} for b in batches(30)]
    fields = {"r": 2, "lora_alpha": 6, "target_modules": ["q", "out"], "init_lora_weights": "eva"}
    theirs = peft.get_peft_model(net(), peft.LoraConfig(eva_config=peft.EvaConfig(rho=2.0, tau=0.9999), **fields))
    peft.initialize_lora_eva_weights(
        theirs, data, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=lambda x, *_: x[0].flatten(0, 1),
        show_progress_bar=False,
    )  # fmt: skip
    mine = get_peft_model(net(), LoraConfig(eva_config=EvaConfig(rho=2.0, tau=1.0), **fields))
    initialize(mine, data, show_progress_bar=False)
    own = {n: p for n, p in theirs.named_parameters() if "lora_A" in n}
    for name, a in own.items():
        b = lora_at(mine, name.split(".")[2]).lora_A.weight
        assert a.shape == b.shape and ((a * b).sum(1).abs() > 0.9).all()
    assert mine.peft_config["default"].rank_pattern == theirs.peft_config["default"].rank_pattern
    mine.save_pretrained(tmp_path)
    assert near(logits(peft.PeftModel.from_pretrained(net(), tmp_path)), logits(mine), 1e-6)


# ---- the peer's names, and refusals ---------------------------------------------------------------------------------
def test_data_passes_before_get_peft_model_make_the_same_starts(tmp_path):
    data = batches(3)
    base, config = net(), LoraConfig(r=4, lora_alpha=8, target_modules=["q", "out"], init_lora_weights="lora_ga")

    def step():
        for b in data:
            base(**b).loss.backward()

    veneer.preprocess_loraga(base, config, step, cache_file=str(tmp_path / "g"))
    early, late = get_peft_model(base, config), adapted("lora_ga")
    initialize(late, data, show_progress_bar=False)
    assert near(lora_at(early, "q").delta_weight(), lora_at(late, "q").delta_weight(), 1e-5)
    again = net()
    veneer.preprocess_loraga(again, config, lambda: None, cache_file=str(tmp_path / "g"))
    assert near(lora_at(get_peft_model(again, config), "q").delta_weight(), lora_at(late, "q").delta_weight(), 1e-5)

    base = net()
    file = str(tmp_path / "c")
    config = LoraConfig(target_modules=["q"], init_lora_weights="corda", corda_config=CordaConfig(covariance_file=file))
    veneer.preprocess_corda(base, config, lambda: [base(**b) for b in data])
    early = lora_at(get_peft_model(base, config), "q").delta_weight()
    again = net()
    veneer.preprocess_corda(again, config)
    assert near(lora_at(get_peft_model(again, config), "q").delta_weight(), early, 1e-6)
    late = get_peft_model(net(), config)
    initialize(late, batches(1), show_progress_bar=False)  # what the file says, not these data
    assert near(lora_at(late, "q").delta_weight(), early, 1e-6)
    wider = get_peft_model(
        net(),
        LoraConfig(target_modules=["q", "k"], init_lora_weights="corda", corda_config=CordaConfig(cache_file=file)),
    )
    with pytest.raises(ValueError, match="holds nothing for 'k'"):
        initialize(wider, batches(1), show_progress_bar=False)


def test_loftq_of_a_base_that_is_quantised_already(tmp_path):
    from veneer.ops import nf4

    base = net()
    save_file({"q.weight": base.q.weight.detach().clone()}, tmp_path / "model.safetensors")
    base.q.weight.data.copy_(nf4.rounded(base.q.weight, 2))
    w, coarse = net().q.weight, base.q.weight.detach().clone()
    model = adapted(True, ("q",), base)
    veneer.replace_lora_weights_loftq(model, tmp_path)
    left = (w - coarse - lora_at(model, "q").delta_weight()).norm()
    assert torch.allclose(left, torch.linalg.svdvals(w - coarse)[4:].norm(), rtol=1e-4)
    before = lora_at(model, "q").lora_B.weight.detach().clone()
    veneer.replace_lora_weights_loftq(model, tmp_path, callback=lambda m, path: path != "q")
    assert torch.equal(lora_at(model, "q").lora_B.weight, before)
    with pytest.raises(ValueError, match=r"hold no 'out.weight'"):
        veneer.replace_lora_weights_loftq(adapted(True, ("out",)), tmp_path)


@pytest.mark.parametrize(
    ("init", "options", "data", "says"),
    [
        ("lora_ga", {}, batches(2, labels=False), "hold no labels .they hold input_ids"),
        ("lora_ga", {}, None, "call initialize.model, dataloader."),
        ("lora_ga", {}, [], "is empty"),
        ("lora_ga", {"r": 9}, batches(2), "asks for 18 directions at 'q'.*only 16"),
        ("eva", {"targets": ("emb",)}, batches(2), "'emb' is of the kind embedding"),
        ("corda", {"r": 20}, batches(2), "asks for 20 directions"),
    ],
)
def test_what_cannot_start_is_refused_and_changes_nothing(init, options, data, says):
    model = adapted(init, **options)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        initialize(model, data, show_progress_bar=False)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_a_packed_weight_has_no_gradient():
    model = adapted("lora_ga", ("q",))
    layer = model.base_model.model.q.get_base_layer()
    layer.weight = nn.Parameter(torch.zeros(48, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="float"):
        initialize(model, batches(2), show_progress_bar=False)


def test_a_start_from_weights_can_be_made_again():
    model = adapted("pissa")
    with torch.no_grad():
        lora_at(model, "q").lora_A.weight.add_(1)
    initialize(model)
    assert near(logits(model), logits(net()), 2e-6)


def test_a_start_from_data_is_never_handed_out_in_a_form_that_nobody_can_read():
    model = adapted("lora_ga")
    initialize(model, batches(2), show_progress_bar=False)
    assert veneer.get_peft_model_state_dict(model)["base_model.model.q.lora_A.weight"].shape[0] == 8
    base = net()
    config = LoraConfig(r=4, target_modules=["q"], init_lora_weights="lora_ga")
    injected = veneer.inject_adapter_in_model(config, base)
    assert veneer.get_peft_model_state_dict(injected)["q.lora_A.weight"].shape[0] == 4
    initialize(injected, batches(2), show_progress_bar=False)
    with pytest.raises(ValueError, match="save it through PeftModel"):
        veneer.get_peft_model_state_dict(injected)


def _one_of_two(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for init in ("lora_ga", "corda", "eva"):
        model = adapted(init, ("q", "k", "out"))
        initialize(model, batches(4)[2 * rank : 2 * rank + 2], show_progress_bar=False)
        torch.save(dict(model.state_dict()), f"{folder}/{init}{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_start_alike_and_from_all_of_the_data(tmp_path):
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    for init in ("lora_ga", "corda", "eva"):
        here, there = (torch.load(tmp_path / f"{init}{rank}") for rank in (0, 1))
        assert here.keys() == there.keys() and all(torch.allclose(here[k], there[k], atol=1e-6) for k in here)
        if init != "eva":
            alone = adapted(init, ("q", "k", "out"))
            initialize(alone, batches(4), show_progress_bar=False)
            assert all(near(here[k], v, 1e-3) for k, v in alone.state_dict().items() if "base_layer.weight" in k)
