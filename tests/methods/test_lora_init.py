"""LoRA's starts from the weight alone: the algebra of each, and what is saved of them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import veneer
from parity import both_ways, near, needs_peer, peer
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.core.config import PeftConfig
from veneer.engine import checkpoint
from veneer.engine.tuner import Tuner
from veneer.methods.lora_options import LoftQConfig
from veneer.ops import nf4

SPLITTING = ["pissa", "pissa_niter_3", "olora", "milora"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(12, 20), nn.Linear(20, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.first(x)))))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def data(n: int = 7) -> torch.Tensor:
    return torch.randn(n, 12, generator=torch.Generator().manual_seed(5))


def one(init, r: int = 4, base: nn.Module | None = None, **options):
    """The adapter of a tuner's only layer, its original weight, and the tuner."""
    base = base or net()
    weight = base.layer.weight.detach().clone()
    tuner = Tuner(base)
    tuner.add("default", LoraConfig(r=r, target_modules=["layer"], init_lora_weights=init, **options))
    tuner.set_active("default")
    return next(a for _, a in tuner.adapters("default")), weight, tuner.eval()


def train(model: nn.Module, x: torch.Tensor, steps: int = 3, lr: float = 0.05) -> None:
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimiser.step()


# ---- the algebra ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", SPLITTING)
def test_the_parts_add_up_to_the_weight(init, rslora):
    lora, w, tuner = one(init, lora_alpha=24, use_rslora=rslora)
    assert near(lora.site.weight + lora.delta_weight(), w, 5e-7)
    with tuner.disabled():
        assert torch.equal(lora.site.weight, w)


def test_pissa_takes_the_leading_and_milora_the_trailing_singular_values():
    s = torch.linalg.svdvals(net().layer.weight)
    lora, _, _ = one("pissa", lora_alpha=24)
    assert torch.allclose(torch.linalg.svdvals(lora.delta_weight())[:4], s[:4], rtol=1e-5)
    assert torch.linalg.svdvals(lora.site.weight)[0] <= s[4] * (1 + 1e-5)
    lora, _, _ = one("milora", lora_alpha=24)
    assert torch.allclose(torch.linalg.svdvals(lora.delta_weight())[:4], s[-4:], rtol=1e-4)
    assert torch.allclose(torch.linalg.svdvals(lora.site.weight)[:12], s[:12], rtol=1e-5)


def test_olora_has_orthonormal_columns():
    b = one("olora")[0].lora_B.weight
    assert torch.allclose(b.T @ b, torch.eye(4), atol=1e-6)


def test_mica_trains_a_alone_over_the_minor_directions():
    lora, w, tuner = one("mica")
    assert lora.lora_A.weight.abs().max() == 0 and not lora.lora_B.weight.requires_grad
    minor = torch.linalg.svd(w)[0][:, 12:16]
    b = lora.lora_B.weight
    assert torch.allclose(b @ b.T, minor @ minor.T, atol=1e-5)
    before = b.detach().clone()
    train(tuner, data())
    assert torch.equal(b, before) and lora.lora_A.weight.abs().max() > 0


def test_orthogonal_factors_cancel_while_both_have_gradients():
    lora, _, tuner = one("orthogonal")
    assert lora.delta_weight().abs().max() < 1e-7
    tuner(data()).square().sum().backward()
    assert lora.lora_A.weight.grad.abs().max() > 0 and lora.lora_B.weight.grad.abs().max() > 0


def test_loftq_alternates_towards_the_weight_whatever_the_scale():
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(256, 256))[0] for _ in range(2))
    w = (u * torch.logspace(0, -1.5, 256)) @ v.T
    plain = torch.linalg.svdvals(w - nf4.rounded(w, 4)).sum()
    for r, expected in ((8, [0.929, 0.888, 0.868]), (32, [0.743, 0.676, 0.654])):
        found = []
        for rounds in (1, 2, 3):
            base = nn.Module()
            base.layer = nn.Linear(256, 256, bias=False)
            base.layer.weight.data.copy_(w)
            how = LoftQConfig(loftq_iter=rounds)
            lora, _, _ = one("loftq", r=r, base=base, lora_alpha=3 * r, loftq_config=how)
            left = w - lora.site.weight - lora.delta_weight()
            found.append(float((torch.linalg.svdvals(left).sum() / plain).detach()))
            assert torch.equal(nf4.rounded(lora.site.weight, 4), lora.site.weight)
        assert found == pytest.approx(expected, abs=0.012) and found == sorted(found, reverse=True)


# ---- what is saved --------------------------------------------------------------------------------------------------
EXTRAS = {
    "plain": {},
    "rslora_patterns": {"use_rslora": True, "rank_pattern": {"first": 2}, "alpha_pattern": {"layer": 5}},
    "head_and_biases": {"modules_to_save": ["head"], "bias": "lora_only"},
    "dora": {"use_dora": True},
}


@needs_peer
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("init", SPLITTING)
def test_saved_is_a_plain_adapter_of_the_original_base_that_the_peer_reads(init, extra, tmp_path):
    import peft

    config = LoraConfig(r=3, lora_alpha=9, target_modules=["first", "layer"], init_lora_weights=init, **EXTRAS[extra])
    model = get_peft_model(net(), config)
    assert near(model(data()), net()(data()), 2e-6)
    train(model, data())
    expected = model.eval()(data())
    assert not near(expected, net()(data()), 1e-3)
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path / "never_read"))
    written = PeftConfig.read(tmp_path)
    assert (written.r, written.init_lora_weights) == (6, True) and config.r == 3 and config.init_lora_weights == init
    assert near(PeftModel.from_pretrained(net(), tmp_path)(data()), expected, 2e-5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(net(), tmp_path).eval()
    assert not [w for w in caught if "missing" in str(w.message)]
    assert near(theirs(data()), expected, 2e-5)
    with model.disable_adapter():
        off = model(data())
    if extra != "head_and_biases":
        assert torch.equal(off, net()(data()))


@needs_peer
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_raw_form_is_the_peers_both_ways(init, rslora, tmp_path):
    import peft

    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "layer"], "use_rslora": rslora}
    theirs = peer(net(), peft.LoraConfig(init_lora_weights=init, **fields))
    theirs.save_pretrained(tmp_path / "theirs")
    for low in (False, True):
        mine = PeftModel.from_pretrained(net(), tmp_path / "theirs", low_cpu_mem_usage=low)
        assert near(mine(data()), theirs(data()), 2e-5)
    own = get_peft_model(net(), LoraConfig(init_lora_weights=init, **fields))
    train(own, data())
    own.save_pretrained(tmp_path / "ours", convert=False)
    assert PeftConfig.read(tmp_path / "ours").init_lora_weights == init
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    assert near(again(data()), own.eval()(data()), 2e-5)


@needs_peer
@pytest.mark.parametrize("init", ["mica", "orthogonal"])
def test_other_starts_are_plain_files(init, tmp_path):
    import peft

    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "layer"], "init_lora_weights": init}
    size = 0.3
    both_ways(net, peft.LoraConfig(**fields), LoraConfig(**fields), data(), tmp_path, grad_tolerance=None, size=size)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_training_goes_on_from_a_converted_checkpoint_with_its_own_start(init, tmp_path):
    config = LoraConfig(r=3, target_modules=["first", "layer"], init_lora_weights=init)
    model = get_peft_model(net(), copy.deepcopy(config))
    train(model, data())
    model.save_pretrained(tmp_path)
    # the resumed model was started from another (less exact) split: the file's own is taken over
    config.init_lora_weights = "pissa_niter_1"
    again = get_peft_model(net(), config)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    assert near(again(data()), model(data()), 2e-6)
    own, theirs = (next(a for _, a in m.base_model.adapters("default")) for m in (again, model))
    assert torch.equal(own.lora_A.weight, theirs.lora_A.weight) and torch.equal(own.start_B, theirs.start_B)
    train(again, data())
    train(model, data())
    assert near(again(data()), model(data()), 2e-5)
    with again.disable_adapter():
        assert torch.equal(again(data()), net()(data()))


def test_a_file_that_does_not_fit_leaves_the_start_alone(tmp_path):
    model = get_peft_model(net(), LoraConfig(r=3, target_modules=["first", "layer"], init_lora_weights="pissa"))
    train(model, data())
    model.save_pretrained(tmp_path)
    tensors = checkpoint.read(tmp_path)
    tensors.pop("base_model.model.first.lora_A.weight")
    checkpoint.write(tmp_path, tensors)
    other = get_peft_model(net(), LoraConfig(r=3, target_modules=["first", "layer"], init_lora_weights="olora"))
    train(other, data())
    expected = other(data())
    with pytest.raises(ValueError, match="nothing was loaded"):
        other.load_adapter(tmp_path, "default")
    assert torch.equal(other(data()), expected)


# ---- living with others ---------------------------------------------------------------------------------------------
def test_a_second_start_splits_the_original_weight_although_the_first_is_active():
    model = get_peft_model(net(), LoraConfig(target_modules=["layer"], r=4, init_lora_weights="pissa"))
    model.add_adapter("b", LoraConfig(target_modules=["layer"], r=2, init_lora_weights="olora"))
    model.set_adapter("b")
    assert near(model(data()), net()(data()), 2e-6)
    with pytest.raises(ValueError, match="cannot be active together"):
        model.set_adapter(["default", "b"])
    model.delete_adapter("default")
    assert near(model(data()), net()(data()), 2e-6)


def test_all_of_a_start_moves_with_the_model():
    model = get_peft_model(net(), LoraConfig(target_modules=["layer"], r=4, init_lora_weights="pissa"))
    model.add_adapter("b", LoraConfig(target_modules=["layer"], r=2, init_lora_weights="olora"))
    model.double()
    x = data().double()
    expected = net().double()(x)
    for name in ("default", "b"):
        model.set_adapter(name)
        assert model(x).dtype == torch.float64 and near(model(x), expected, 2e-6)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_over_a_bfloat16_base_the_rest_is_taken_from_the_factors_as_stored(init, autocast):
    base = net().bfloat16()
    w = base.layer.weight.detach().float()
    config = LoraConfig(r=4, target_modules=["layer"], init_lora_weights=init)
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast)
    lora = next(a for _, a in model.base_model.adapters("default"))
    assert lora.lora_A.weight.dtype == (torch.float32 if autocast else torch.bfloat16)
    exact = w - lora.scaling * lora.lora_B.weight.float() @ lora.lora_A.weight.float()
    assert torch.equal(lora.site.weight, exact.bfloat16())


# ---- refusals -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"init_lora_weights": "pissa", "r": 17}, "'first'.*20 x 12 has only 12"),
        ({"init_lora_weights": "olora", "rank_pattern": {"layer": 40}}, "asks for 40 directions"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "even rank"),
        ({"init_lora_weights": "pissa_niter_x"}, "positive number of steps"),
        ({"init_lora_weights": "pissa", "lora_alpha": 0}, "positive lora_alpha"),
        ({"init_lora_weights": "loftq", "loftq_config": LoftQConfig(loftq_bits=5)}, "2, 4 or 8 bits"),
        (
            {"init_lora_weights": "mica", "use_qalora": True, "qalora_group_size": 4},
            "'mica' does not go with use_qalora",
        ),
        ({"init_lora_weights": "pissa", "alora_invocation_tokens": [1]}, "acts on some tokens only"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(options, says):
    tuner = Tuner(net())
    with pytest.raises(ValueError, match=says):
        tuner.add("default", LoraConfig(target_modules=["first", "layer"], **options))
    assert not tuner.configs and type(tuner.model.layer) is nn.Linear


def test_a_packed_base_cannot_be_split():
    base = net()
    base.layer.weight = nn.Parameter(torch.zeros(16, 20, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="load the base unquantised"):
        Tuner(base).add("default", LoraConfig(r=2, target_modules=["layer"], init_lora_weights="pissa"))


def test_tensors_taken_by_hand_have_the_shapes_of_the_config_and_go_back(tmp_path):
    from veneer import get_peft_model_state_dict, set_peft_model_state_dict

    model = get_peft_model(net(), LoraConfig(r=3, target_modules=["first", "layer"], init_lora_weights="pissa"))
    train(model, data())
    twin = get_peft_model(net(), LoraConfig(r=3, target_modules=["first", "layer"], init_lora_weights="pissa"))
    for convert, rank in ((None, 3), (True, 6)):
        tensors = get_peft_model_state_dict(model, convert=convert)
        assert tensors["base_model.model.layer.lora_A.weight"].shape[0] == rank
        assert set_peft_model_state_dict(twin, tensors, strict=True).clean
        assert near(twin(data()), model(data()), 2e-6)
    # values from elsewhere (gathered shards) are the ones that are converted
    whole = {k: v + 1 for k, v in model.state_dict().items()}
    moved = get_peft_model_state_dict(model, whole, convert=True)
    assert torch.equal(moved["base_model.model.layer.lora_A.weight"][:3], tensors_of(model)[:3] + 1)
    assert torch.equal(moved["base_model.model.layer.lora_A.weight"][3:], tensors_of(model)[3:])


def tensors_of(model):
    return veneer.get_peft_model_state_dict(model, convert=True)["base_model.model.layer.lora_A.weight"]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 16])
def test_few_steps_come_as_near_to_the_leading_triplets_as_so_many_power_iterations(steps, power):
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(512, 512)).Q for _ in range(2))
    layer = nn.Linear(512, 512, bias=False)
    with torch.no_grad():
        layer.weight.copy_(u * (1 + torch.rand(512)) / torch.arange(1, 513) ** power @ v)
    weight = layer.weight.detach().clone()
    config = LoraConfig(r=16, lora_alpha=16, target_modules=["0"], init_lora_weights=f"pissa_niter_{steps}")
    tuner = Tuner(nn.Sequential(layer))
    tuner.add("a", config)
    (_, lora), *_ = tuner.adapters("a")
    u, s, v = torch.svd_lowrank(weight, 16, niter=steps)
    taken, wanted = (weight.norm() ** 2 - (weight - w).norm() ** 2 for w in (lora.delta_weight(), u * s @ v.T))
    assert taken >= 0.999 * wanted
