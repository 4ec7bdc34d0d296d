"""Conversion to LoRA, intruder dimensions, and the key formats of other tools."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.test_combine import IDENTITY, IDS, output, refusal, small, tuner_of
from laws.kinds import KINDS, Chain
from methods.test_lora import base_of, inputs_of
from parity import call, near, needs_peer, peer, randomise, read, read_by_peer
from veneer import LoraConfig
from veneer.core.config import PeftConfig
from veneer.engine import checkpoint
from veneer.engine.tuner import Tuner
from veneer.hf import foreign
from veneer.hf.convert import convert_to_lora, reduce_intruder_dimension, save_as_lora

SOME = [case for case in IDENTITY if case.values[1] in ("linear", "conv2d", "experts")]


@pytest.mark.parametrize(("row", "kind"), SOME)
def test_every_additive_method_becomes_lora(row, kind: str, tmp_path) -> None:
    tuner, x = tuner_of(kind, row.make)
    if (why := refusal(tuner)) is not None:
        with pytest.raises(ValueError, match=why):
            convert_to_lora(tuner, 8, "a")
        return
    expected = output(tuner, "a", x)
    save_as_lora(tmp_path, tuner, 64, "a")
    torch.manual_seed(0)
    again = read(KINDS[kind].build().eval(), tmp_path)
    assert near(again(x), expected, 1e-4)
    assert list(tuner.configs) == ["a"] and tuner.state.active == ("a",)


def test_a_fixed_rank_is_the_best_and_a_share_holds_its_energy() -> None:
    tuner, _ = tuner_of("linear", lambda **t: LoraConfig(r=8, **t))
    delta = tuner.hosts()[0].adapters["a"].delta_weight().detach()
    s = torch.linalg.svdvals(delta)
    for rank in (1, 3, 0.5, 0.9, 0.99):
        config, tensors = convert_to_lora(tuner, rank, "a")
        a, b = (tensors[f"base_model.model.layer.lora_{p}.weight"] for p in "AB")
        r = a.shape[0]
        assert config.at("layer").r == r and config.at("layer").lora_alpha == r
        assert torch.allclose((b @ a - delta).norm(), s[r:].norm(), atol=1e-5)
        if isinstance(rank, float):
            energy = s.square().cumsum(0) / s.square().sum()
            assert energy[r - 1] >= rank - 1e-6 and (r == 1 or energy[r - 2] < rank)
        else:
            assert r == rank


def test_everything_else_of_an_adapter_comes_along(tmp_path) -> None:
    tuner = small()
    tuner.add("a", LoraConfig(
        r=4, target_modules=["q"], modules_to_save=["head"], bias="lora_only", trainable_token_indices={"embed": [1, 2]}
    ))  # fmt: skip
    randomise([p for h in tuner.hosts("a") for p in h.adapters["a"].parameters()], 1, 0.1)
    expected = output(tuner.eval(), "a", IDS)
    save_as_lora(tmp_path, tuner, 4, "a")
    assert near(read(small().model, tmp_path)(IDS), expected, 1e-5)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, 0.0])
def test_a_rank_that_is_none_is_refused(rank) -> None:
    tuner, _ = tuner_of("linear", lambda **t: LoraConfig(r=2, **t))
    with pytest.raises(ValueError, match="rank must be"):
        convert_to_lora(tuner, rank, "a")


def test_refusals_name_the_adapter() -> None:
    tuner, _ = tuner_of("linear", lambda **t: LoraConfig(r=2, **t))
    with pytest.raises(ValueError, match="no adapter named 'z'"):
        convert_to_lora(tuner, 2, "z")
    tuner.merge()
    with pytest.raises(ValueError, match="unmerge"):
        convert_to_lora(tuner, 2, "a")


@needs_peer
@pytest.mark.parametrize("kind", ["linear", "conv1d_hf", "conv2d", "embedding"])
def test_what_we_convert_the_peer_loads(kind: str, tmp_path) -> None:
    base, x = base_of(kind), inputs_of(kind)
    tuner = Tuner(base())
    tuner.add("default", LoraConfig(r=4, use_dora=True, target_modules=["layer"]))
    randomise([p for h in tuner.hosts() for p in h.adapters["default"].parameters()], 1, 0.1)
    tuner.set_active("default")
    save_as_lora(tmp_path, tuner, 16, "default")
    assert near(call(read_by_peer(base(), tmp_path), x), tuner.eval()(x), 1e-4)


@needs_peer
def test_conversion_parity(tmp_path) -> None:
    import peft

    theirs = peer(base_of("linear")(), peft.LoHaConfig(r=2, target_modules=["layer"]), size=0.5)
    tuner = Tuner(base_of("linear")())
    tuner.add("default", LoraConfig(r=8, target_modules=["layer"]))
    delta = theirs.base_model.model.layer.get_delta_weight("default").detach()
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    adapter = tuner.hosts()[0].adapters["default"]
    with torch.no_grad():
        adapter.lora_A.weight.copy_(vh[:8])
        adapter.lora_B.weight.copy_(u[:, :8] * s[:8])
    for rank in (2, 0.9):
        config, tensors = convert_to_lora(tuner, rank)
        peer_config, peer_tensors = peft.convert_to_lora(theirs, rank)
        assert config.at("layer").r == peer_config.rank_pattern.get("layer", peer_config.r)
        assert near(product(tensors), product(peer_tensors), 1e-4)


def product(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    a, b = (tensors[f"base_model.model.layer.lora_{part}.weight"] for part in "AB")
    return b @ a


# ---- intruders ------------------------------------------------------------------------------------------------------
@needs_peer
def test_intruders_like_the_peer(tmp_path) -> None:
    import peft
    from peft.tuners.lora.intruders import reduce_intruder_dimension as theirs_reduce

    base = base_of("linear")
    theirs = peer(base(), peft.LoraConfig(r=2, target_modules=["layer"]), size=0.7)
    theirs.save_pretrained(tmp_path)
    mine = read(base(), tmp_path)
    options = {"top_k": 6, "threshold_epsilon": 0.8, "mitigation_lambda": 0.6}
    theirs_reduce(theirs, "default", "less", logging_sink=None, **options)
    counts = reduce_intruder_dimension(mine, "default", "less", **options)
    assert counts["layer"] > 0 and mine.state.active == ("less",)
    theirs_delta = theirs.base_model.model.layer.get_delta_weight("less")
    assert near(mine.hosts("less")[0].adapters["less"].delta_weight(), theirs_delta, 1e-4)


def test_a_strange_direction_is_weakened_and_nothing_else() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 12, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([6.0] * 6 + [0.0] * 6)) + 1e-3 * torch.diag(torch.arange(12.0)))
        strange = (torch.eye(12)[6] + torch.eye(12)[7] + torch.eye(12)[8] + torch.eye(12)[9]) / 2
    tuner = Tuner(Chain(None, layer))
    tuner.add("a", LoraConfig(r=2, lora_alpha=2, target_modules=["layer"]))
    adapter = tuner.hosts()[0].adapters["a"]
    with torch.no_grad():
        adapter.lora_A.weight.copy_(torch.stack([strange, torch.eye(12)[0]]))
        adapter.lora_B.weight.copy_(torch.stack([10 * strange, 0.5 * torch.eye(12)[0]], 1))
    counts = reduce_intruder_dimension(tuner, "a", "b", top_k=4, threshold_epsilon=0.7, mitigation_lambda=0.0, rank=3)
    assert counts == {"layer": 1}
    left = tuner.hosts()[0].adapters["b"].delta_weight()
    assert abs(left @ strange @ strange) < 0.05 and abs(left[0, 0] - 0.5) < 0.01


# ---- other tools' keys ----------------------------------------------------------------------------------------------
class Unet(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_out": nn.ModuleList([nn.Linear(8, 8)])})
        self.conv_in = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x).flatten(2).mT
        return self.attn["to_out"][0](torch.tanh(self.attn["to_q"](x)))


def unet() -> nn.Module:
    torch.manual_seed(0)
    return Unet().eval()


X = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))


def trained(**settings) -> tuple[Tuner, torch.Tensor]:
    tuner = Tuner(unet())
    tuner.add("default", LoraConfig(**({"r": 4, "target_modules": ["to_q", "to_out.0", "conv_in"]} | settings)))
    randomise([p for h in tuner.hosts() for p in h.adapters["default"].parameters()], 2, 0.2)
    tuner.set_active("default")
    return tuner.eval(), tuner(X)


def loaded(config: PeftConfig, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    tuner = Tuner(unet())
    tuner.add("default", config)
    assert checkpoint.put(tuner, "default", tensors).clean
    tuner.set_active("default")
    return tuner.eval()(X)


@pytest.mark.parametrize(
    "settings",
    [{"lora_alpha": 6}, {"use_rslora": True}, {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"conv_in": 3}}],
)
def test_other_tools_files_there_and_back(settings: dict) -> None:
    tuner, expected = trained(**settings)
    tensors, config = checkpoint.tensors(tuner, "default"), tuner.configs["default"]
    kohya = foreign.to_kohya(config, tensors)
    assert "lora_unet_attn_to_out_0.lora_down.weight" in kohya and kohya["lora_unet_attn_to_q.alpha"].dim() == 0
    assert near(loaded(*foreign.from_kohya(kohya | {"lora_te_x.alpha": torch.ones(())}, unet())), expected, 1e-5)
    diffusers = foreign.to_diffusers(config, tensors)
    assert "unet.attn.to_q.lora_A.weight" in diffusers
    assert near(loaded(*foreign.from_diffusers(diffusers)), expected, 1e-5)


def test_older_diffusers_names() -> None:
    tuner, expected = trained(lora_alpha=4, target_modules=["to_q", "to_out.0"])
    tensors = {k.removeprefix("base_model.model."): v for k, v in checkpoint.tensors(tuner, "default").items()}
    old = {"unet." + k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for k, v in tensors.items()}
    assert near(loaded(*foreign.from_diffusers(old)), expected, 1e-5)
    oldest = {
        k.replace(".to_q.lora.", ".processor.to_q_lora.").replace(".to_out.0.lora.", ".processor.to_out_lora."): v
        for k, v in old.items()
    }
    assert near(loaded(*foreign.from_diffusers(oldest)), expected, 1e-5)


def test_names_that_fit_nothing_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="nearest: attn_to_q"):
        foreign.from_kohya({"lora_unet_atn_to_q.lora_down.weight": torch.ones(1, 8)}, unet())
    with pytest.raises(ValueError, match="prefix 'lora_te'"):
        foreign.from_kohya({"lora_unet_attn_to_q.alpha": torch.ones(())}, unet(), "lora_te")
    with pytest.raises(ValueError, match="no plain LoRA tensor"):
        foreign.from_diffusers({"unet.attn.to_q.hada_w1_a": torch.ones(1, 8)})
    with pytest.raises(ValueError, match="no place in this format"):
        foreign.to_kohya(LoraConfig(), {"base_model.model.x.lora_magnitude_vector": torch.ones(3)})
