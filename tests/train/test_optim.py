"""The optimisers that know A from B: their groups, their projections, and what they are invariant to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from parity import needs_peer
from veneer import LoraConfig, get_peft_model
from veneer.train import optim


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.layer, self.head = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 3)
        self.conv = nn.Conv1d(12, 12, 3, padding=1, groups=2)

    def forward(self, ids):
        h = torch.tanh(self.layer(self.emb(ids)))
        return self.head(h + self.conv(h.transpose(1, 2)).transpose(1, 2))


def model(targets=("layer",), r: int = 2, trained: bool = True, **options):
    torch.manual_seed(0)
    config = LoraConfig(r=r, lora_alpha=6, target_modules=list(targets), **options)
    built = get_peft_model(Net(), config)
    if trained:
        with torch.no_grad():
            for _, lora in built.base_model.adapters("default"):
                if hasattr(lora, "factors"):
                    for p in lora.factors():
                        p.add_(0.3 * torch.randn_like(p))
    return built


def ids() -> torch.Tensor:
    return torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(2))


def backward(built) -> None:
    built.zero_grad()
    (built(ids()) - 1).square().mean().backward()


def lora(built, path: str = "layer"):
    return next(a for place, a in built.base_model.adapters("default") if place == path)


def full_gradient(built) -> torch.Tensor:
    """The gradient of the merged weight of ``layer``."""
    merged = copy.deepcopy(built).merge_and_unload()
    merged.requires_grad_(True)
    (merged(ids()) - 1).square().mean().backward()
    return merged.layer.weight.grad


# ---- LoRA+ ----------------------------------------------------------------------------------------------------------
def test_b_learns_faster_by_the_ratio_and_every_tensor_is_in_one_group():
    built = model(("emb", "layer", "conv"), modules_to_save=["head"])
    opt = optim.create_loraplus_optimizer(
        built, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, betas=(0.8, 0.9)
    )
    rate = {id(p): g["lr"] for g in opt.param_groups for p in g["params"]}
    grouped = [id(p) for g in opt.param_groups for p in g["params"]]
    trainable = {id(p): n for n, p in built.named_parameters() if p.requires_grad}
    assert sorted(grouped) == sorted(trainable)
    for path in ("layer", "conv"):
        a, b = lora(built, path).factors()
        assert rate[id(b)] == pytest.approx(16 * rate[id(a)]) == 16e-3
    assert all(rate[id(p)] == 1e-6 for p in lora(built, "emb").factors())
    decay = {id(p): g["weight_decay"] for g in opt.param_groups for p in g["params"]}
    copied = next(a for _, a in built.base_model.adapters("default") if a.replacement() is not None).copy
    assert decay[id(copied.bias)] == 0 and decay[id(copied.weight)] == 0.1 and opt.defaults["betas"] == (0.8, 0.9)


def test_a_bias_of_b_goes_with_b_and_does_not_decay():
    built = model(lora_bias=True)
    opt = optim.create_loraplus_optimizer(
        built, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=4, loraplus_weight_decay=0.2
    )
    group = next(g for g in opt.param_groups if any(p is lora(built).lora_B.bias for p in g["params"]))
    assert (group["lr"], group["weight_decay"]) == (0.4, 0.0)


# ---- LoRA-FA, Riemannian --------------------------------------------------------------------------------------------
def test_lorafa_keeps_a_and_moves_b_as_near_to_full_training_as_b_can():
    built = model()
    opt = optim.create_lorafa_optimizer(built, lr=1e-3)
    part = lora(built)
    a_before = part.lora_A.weight.detach().clone()
    g = full_gradient(built)
    backward(built)
    assert part.lora_A.weight.grad is None
    opt.step()
    a = a_before.double()
    projected = part.scaling * part.lora_B.weight.grad.double() @ a  # what B's changed gradient makes of the weight
    onto_rows_of_a = a.T @ torch.linalg.solve(a @ a.T, a)
    assert torch.allclose(projected, g.double() @ onto_rows_of_a, atol=1e-6)
    assert torch.equal(part.lora_A.weight, a_before)
    built.set_adapter("default")
    assert not part.lora_A.weight.requires_grad


def test_riemannian_moves_the_product_alike_whatever_the_balance_of_its_factors():
    moves = []
    for mix in (torch.eye(2), torch.tensor([[3.0, 1.0], [0.5, 0.2]])):
        built, mix = model().double(), mix.double()
        part = lora(built)
        with torch.no_grad():
            part.lora_B.weight.copy_(part.lora_B.weight @ mix)
            part.lora_A.weight.copy_(torch.linalg.solve(mix, part.lora_A.weight))
        before = part.delta_weight().detach()
        opt = optim.create_riemannian_optimizer(built, torch.optim.SGD, lr=1e-6, reg=1e-12)
        backward(built)
        opt.step()
        moves.append((part.delta_weight().detach() - before) / 1e-6)
    assert torch.allclose(moves[0], moves[1], rtol=0, atol=1e-3 * float(moves[0].abs().max()))
    plain = []
    for mix in (torch.eye(2), torch.tensor([[3.0, 1.0], [0.5, 0.2]])):
        part = lora(model())
        a, b = (p.detach() for p in part.factors())
        a, b = torch.linalg.solve(mix, a), b @ mix
        g = full_gradient(model()).detach()
        plain.append(b @ b.T @ g + g @ a.T @ a)
    assert not torch.allclose(plain[0], plain[1], rtol=0, atol=0.1 * float(plain[0].abs().max()))


# ---- LoRA-Pro -------------------------------------------------------------------------------------------------------
def test_lorapro_projects_the_full_gradient():
    built = model(r=3)
    part, g = lora(built), full_gradient(built).double()
    backward(built)
    a, b = (t.detach().double() for t in part.factors())
    g_a, g_b = (t.grad.double() for t in part.factors())
    s = part.scaling
    assert torch.allclose(g_a, s * b.T @ g, atol=1e-6) and torch.allclose(g_b, s * g @ a.T, atol=1e-6)
    new_a, new_b = optim.adjusted(a, b, g_a, g_b, s)
    p_b, p_a = b @ torch.linalg.pinv(b), torch.linalg.pinv(a) @ a
    expected = p_b @ g + g @ p_a - p_b @ g @ p_a
    assert torch.allclose(s * (new_b @ a + b @ new_a), expected, atol=1e-6)
    # X only shares out what the two factors do; its choice keeps them nearest to autograd's
    shift = torch.randn(3, 3, dtype=torch.float64)
    assert torch.allclose(s * ((new_b - b @ shift) @ a + b @ (new_a + shift @ a)), expected, atol=1e-5)


def test_the_sylvester_equation_is_solved():
    torch.manual_seed(0)
    p, q, c = (torch.randn(5, 5, dtype=torch.float64) for _ in range(3))
    p, q = p @ p.T, q @ q.T
    x = optim.sylvester(p, q, c)
    assert (p @ x + x @ q - c).abs().max() < 1e-6


def test_lorapro_from_zero_and_with_others_learns_and_resumes():
    built = model(("emb", "layer", "conv"), trained=False, modules_to_save=["head"])
    opt = optim.create_lorapro_optimizer(built, lr=1e-2)
    losses = []
    for _ in range(12):
        built.zero_grad()
        loss = (built(ids()) - 1).square().mean()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0] and losses[2] < losses[1] < losses[0]
    assert opt.state[lora(built).lora_A.weight]["exp_avg"].shape == (12, 8)
    twin = copy.deepcopy(built)
    again = optim.create_lorapro_optimizer(twin, lr=1e-2)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for m, o in ((built, opt), (twin, again)):
        backward(m)
        o.step()
    assert torch.equal(lora(built).lora_B.weight, lora(twin).lora_B.weight)


# ---- all ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(optim.OPTIMISERS))
def test_each_lowers_the_loss_on_every_layer_kind(name):
    built = model(("emb", "layer", "conv"), trained=False)
    opt = optim.OPTIMISERS[name](built, lr=2e-2 if name != "loraplus" else 2e-3)
    before = float((built(ids()) - 1).square().mean().detach())
    for _ in range(15):
        backward(built)
        opt.step()
    assert float((built(ids()) - 1).square().mean().detach()) < 0.8 * before


def test_a_model_without_lora_is_refused():
    with pytest.raises(ValueError, match="no adapters"):
        optim.create_lorapro_optimizer(Net())
    with pytest.raises(ValueError, match=r"at least 1, not 0\.5"):
        optim.create_loraplus_optimizer(model(), torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=0.5)


@needs_peer
@pytest.mark.parametrize("which", ["loraplus", "lorafa", "riemannian"])
def test_a_step_is_the_peers(which):
    import peft
    from peft import optimizers as theirs

    import veneer

    def step(built, library):
        if which == "loraplus":
            opt = library.create_loraplus_optimizer(
                built, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4, loraplus_weight_decay=0.0
            )
        elif which == "lorafa":
            opt = library.create_lorafa_optimizer(built, r=2, lora_alpha=6, lr=1e-2)
        else:
            opt = library.create_riemannian_optimizer(built, torch.optim.AdamW, lr=1e-2, reg=1e-2, weight_decay=0.0)
        for _ in range(3):
            backward(built)
            opt.step()
        return built(ids())

    mine = model()
    torch.manual_seed(0)
    other = peft.get_peft_model(Net(), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["layer"]))
    with torch.no_grad():
        for name, p in zip(("lora_A", "lora_B"), lora(mine).factors(), strict=True):
            getattr(other.base_model.model.layer, name)["default"].weight.copy_(p)
    # the peer's own AdamW for LoRA-FA adds eps before the bias correction, torch's after it
    tolerance = 3e-3 if which == "lorafa" else 2e-5
    assert torch.allclose(step(mine, veneer), step(other, theirs), atol=tolerance)
