"""What the tuner guarantees about several adapters, names, ties, merging and freezing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from veneer import LoraConfig
from veneer.engine import checkpoint
from veneer.engine.tuner import Tuner


class Net(nn.Module):
    def __init__(self, tied: bool = False):
        super().__init__()
        self.embed_tokens = nn.Embedding(12, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 12, bias=False)
        self.subhead = nn.Linear(8, 3)
        if tied:
            self.head.weight = self.embed_tokens.weight

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        h = self.mlp(self.embed_tokens(ids))
        return torch.cat([self.head(h), self.subhead(h)], -1)


IDS = torch.arange(12).reshape(4, 3)


def made(tied: bool = False, **options) -> tuple[Tuner, torch.Tensor]:
    torch.manual_seed(0)
    model = Net(tied).eval()
    y = model(IDS).detach()
    tuner = Tuner(model)
    tuner.add("default", config(**options))
    tuner.set_active("default")
    return tuner.eval(), y


def config(**options) -> LoraConfig:
    return LoraConfig(**({"r": 2, "target_modules": ["mlp.0", "mlp.2"], "init_lora_weights": False} | options))


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "__base__", "keys", "default", 3])
def test_bad_names_are_refused_at_once(name) -> None:
    tuner, _ = made()
    y = tuner(IDS)
    with pytest.raises(ValueError, match=r"name"):
        tuner.add(name, config())
    assert torch.equal(tuner(IDS), y) and list(tuner.configs) == ["default"]


def test_names_that_equal_a_path_component_save_everything() -> None:
    """The peer loses tensors of "default" when another adapter is called like a module ("mlp", "0")."""
    tuner, _ = made()
    keys = checkpoint.tensors(tuner, "default").keys()
    tuner.add("mlp", config())
    tuner.add("0", config())
    assert len(keys) == 4
    for name in ("default", "mlp", "0"):
        assert checkpoint.tensors(tuner, name).keys() == keys


def test_unknown_adapters_are_named_with_what_there_is() -> None:
    tuner, _ = made()
    for act in (tuner.set_active, tuner.delete, tuner.merge, lambda n: tuner.route([n])):
        with pytest.raises(ValueError, match=r"no adapter named 'nope'.*default"):
            act("nope")


def test_an_add_that_fails_leaves_the_model_as_it_was() -> None:
    tuner, y = made()
    before = {n: type(m) for n, m in tuner.named_modules()}
    with pytest.raises(ValueError, match="subhed"):
        tuner.add("b", config(target_modules=["mlp.0", "subhed"]))
    with pytest.raises(ValueError):
        tuner.add("b", config(target_modules=["mlp.0", "mlp.1"]))  # a ReLU
    assert {n: type(m) for n, m in tuner.named_modules()} == before and list(tuner.configs) == ["default"]
    with tuner.disabled():
        assert torch.equal(tuner(IDS), y)


def test_several_active_add_up_and_gains_scale() -> None:
    tuner, base = made()
    tuner.add("b", config())
    single = {}
    tuner.model.mlp[1] = nn.Identity()  # linear in the deltas of one layer at a time
    for name in ("default", "b"):
        tuner.set_active(name)
        single[name] = tuner.model.mlp[0](torch.ones(1, 8))
    with tuner.disabled():
        bare = tuner.model.mlp[0](torch.ones(1, 8))
    tuner.set_active("default", "b")
    both = tuner.model.mlp[0](torch.ones(1, 8))
    assert torch.allclose(both - bare, single["default"] + single["b"] - 2 * bare, atol=1e-6)
    tuner.state.gains = {"default": 0.5, "b": 0.0}
    assert torch.allclose(tuner.model.mlp[0](torch.ones(1, 8)) - bare, 0.5 * (single["default"] - bare), atol=1e-6)
    tuner.merge("default", "b")
    assert torch.allclose(tuner.model.mlp[0](torch.ones(1, 8)) - bare, 0.5 * (single["default"] - bare), atol=1e-6)


def test_merging_one_of_two_active_keeps_the_other() -> None:
    tuner, _ = made()
    tuner.add("b", config())
    tuner.set_active("default", "b")
    y = tuner(IDS)
    tuner.merge("default")
    assert tuner.merged == ("default",) and torch.allclose(tuner(IDS), y, atol=1e-5)
    tuner.merge("b")
    assert set(tuner.merged) == {"default", "b"} and torch.allclose(tuner(IDS), y, atol=1e-5)
    tuner.unmerge()
    assert torch.equal(tuner(IDS), y)


def test_merge_is_all_or_nothing() -> None:
    tuner, _ = made()
    with torch.no_grad():
        tuner.hosts()[1].adapters["default"].lora_A.weight[0, 0] = float("inf")
    weights = [h.site.module.weight for h in tuner.hosts()]
    with pytest.raises(ValueError, match=r"not finite; nothing was merged"):
        tuner.merge()
    assert all(h.site.module.weight is w for h, w in zip(tuner.hosts(), weights, strict=True))
    assert tuner.merged == ()


def test_a_merge_into_tied_weights_touches_one_layer_and_unmerge_ties_again() -> None:
    tuner, base = made(tied=True, target_modules=["embed_tokens"])
    y = tuner(IDS)
    assert tuner.model.head.weight is tuner.model.embed_tokens.base_layer.weight
    tuner.merge(keep="cpu")
    assert torch.allclose(tuner(IDS), y, atol=1e-5)
    tuner.unmerge()
    assert tuner.model.head.weight is tuner.model.embed_tokens.base_layer.weight
    model = tuner.unload()
    assert model.head.weight is model.embed_tokens.weight and torch.equal(model(IDS), base)


def test_switching_while_merged_unmerges_with_a_warning() -> None:
    tuner, _ = made()
    tuner.add("b", config())
    tuner.merge()
    with pytest.warns(UserWarning, match="unmerging"):
        tuner.set_active("b")
    assert tuner.merged == ()


def test_modules_to_save_matches_whole_names_and_trains_a_copy() -> None:
    tuner, base = made(modules_to_save=["head"])
    saved = [h.site.path for h in tuner.hosts("default") if h.adapters["default"].replacement() is not None]
    assert saved == ["head"]
    with torch.no_grad():
        tuner.hosts("default")[0].adapters["default"].copy.weight.add_(1)
    assert not torch.allclose(tuner(IDS)[..., :12], base[..., :12])
    with tuner.disabled():
        assert torch.equal(tuner(IDS), base)
    with pytest.raises(ValueError, match=r"'haed'.*head"):
        tuner.add("b", config(modules_to_save=["haed"]))


def test_a_tied_head_follows_a_trained_copy_where_tying_is_asked_for() -> None:
    tuner, _ = made(tied=True, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    copy_of = tuner.hosts("default")[0].adapters["default"].copy
    with torch.no_grad():
        copy_of.weight.normal_()
    h = tuner.model.mlp(copy_of(IDS))
    assert torch.allclose(tuner(IDS)[..., :12], h @ copy_of.weight.T, atol=1e-5)
    keys = [k for k in checkpoint.tensors(tuner, "default") if "mlp" not in k]
    assert keys == ["base_model.model.embed_tokens.weight"]


@pytest.mark.parametrize("tied", [False, True])
def test_trainable_tokens_move_chosen_rows_only(tied: bool) -> None:
    tuner, base = made(tied=tied, trainable_token_indices=[1, 5])
    with torch.no_grad():
        for host in tuner.hosts("default"):
            if hasattr(host.adapters["default"], "lora_B"):
                host.adapters["default"].lora_B.weight.zero_()
    assert torch.allclose(tuner(IDS), base, atol=1e-6)
    tokens = next(h for h in tuner.hosts("default") if h.site.path == "embed_tokens").adapters["default"]
    optimizer = torch.optim.SGD([p for p in tuner.parameters() if p.requires_grad], lr=1.0)
    tuner(IDS).square().mean().backward()
    optimizer.step()
    rows = tuner.model.embed_tokens(torch.arange(12))
    frozen = tuner.model.embed_tokens.base_layer.weight
    untouched = [i for i in range(12) if i not in (1, 5)]
    assert torch.equal(rows[untouched], frozen[untouched]) and not torch.equal(rows[[1, 5]], frozen[[1, 5]])
    y = tuner(IDS)
    tuner.merge()
    assert torch.allclose(tuner(IDS), y, atol=1e-5)
    keys = [k for k in checkpoint.tensors(tuner, "default") if "token" in k]
    assert keys == ["base_model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    if tied:
        head = tuner.model.head
        assert torch.equal(head.base_layer.weight[[1, 5]], tokens.trainable_tokens_delta)


def test_bias_all_trains_every_bias_and_restores_exactly() -> None:
    tuner, base = made(bias="all")
    trainable = {n for n, p in tuner.named_parameters() if p.requires_grad and "bias" in n}
    assert len(trainable) == 3  # mlp.0, mlp.2, subhead
    with torch.no_grad():
        for name, p in tuner.named_parameters():
            if name in trainable:
                p.add_(1)
    y = tuner(IDS)
    tuner.merge()
    assert torch.allclose(tuner(IDS), y, atol=1e-5)
    assert torch.equal(tuner.unload()(IDS), base)


def test_switching_finds_what_has_been_built_into_an_adapter_since() -> None:
    tuner, _ = made()
    tuner.add("b", config())
    tuner.set_active("b")
    layer = tuner.hosts("default")[0].adapters["default"].lora_A
    torch.nn.utils.parametrizations.weight_norm(layer)
    copy = pickle.loads(pickle.dumps(tuner.hosts("b")[0].adapters["b"].lora_A))
    tuner.hosts("b")[0].adapters["b"].lora_A = copy
    tuner.hosts("b")[0].settle()
    tuner.set_active("default")
    assert all(p.requires_grad for p in layer.parameters()) and len(list(layer.parameters())) == 2
    assert not copy.weight.requires_grad
    tuner.set_active("b")
    assert not any(p.requires_grad for p in layer.parameters()) and copy.weight.requires_grad


def test_frozen_adapters_stay_frozen_and_only_active_ones_train() -> None:
    tuner, _ = made()
    tuner.add("b", config())

    def training() -> set[str]:
        return {n for n in tuner.configs for h in tuner.hosts(n) for p in h.adapters[n].parameters() if p.requires_grad}

    assert training() == {"default"}
    tuner.set_active("b", "default")
    assert training() == {"b", "default"}
    tuner.freeze("b")
    tuner.set_active("b")
    assert training() == set()
    tuner.freeze("b", frozen=False)
    assert training() == {"b"}
    tuner.set_active("default", trainable=False)
    assert training() == set()


def test_rows_of_a_route_must_fit_the_batch() -> None:
    tuner, _ = made()
    tuner.route(["default", "__base__", "default"])
    with pytest.raises(ValueError, match=r"3 entries.*batch of 4"):
        tuner(IDS)
    tuner.route(["default", "__base__"])  # beams: each name stands for two rows
    mixed = tuner(IDS)
    tuner.route(None)
    assert torch.allclose(mixed[:2], tuner(IDS)[:2], atol=1e-6)
    with tuner.disabled():
        assert torch.allclose(mixed[2:], tuner(IDS)[2:], atol=1e-6)


def test_deleting_the_last_adapter_gives_the_layer_back() -> None:
    tuner, base = made()
    tuner.delete("default")
    assert not any(hasattr(m, "is_adapted") for m in tuner.modules())
    assert torch.equal(tuner(IDS), base)


def test_meta_adapters_are_filled_by_a_load() -> None:
    tuner, _ = made()
    y, tensors = tuner(IDS), checkpoint.tensors(tuner, "default")
    model = copy.deepcopy(tuner).unload()
    other = Tuner(model)
    other.add("x", config(), device="meta")
    assert all(p.device.type == "meta" for _, a in other.adapters("x") for p in a.parameters())
    checkpoint.put(other, "x", tensors)
    other.set_active("x")
    assert torch.equal(other.eval()(IDS), y)


def test_adding_to_a_merged_layer_is_refused_before_anything_changes() -> None:
    tuner, _ = made()
    tuner.merge()
    y = tuner(IDS)
    with pytest.raises(ValueError, match=r"mlp\.0' is merged"):
        tuner.add("b", config())
    assert list(tuner.configs) == ["default"] and torch.equal(tuner(IDS), y)
    tuner.add("b", config(target_modules=["subhead"]))
    assert torch.equal(tuner(IDS), y)
