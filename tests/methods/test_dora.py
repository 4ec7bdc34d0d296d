"""DoRA: the formula and its constant norm, the memory-light norm, its cache, dropout, bias, and parity both ways."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from laws.kinds import ALL, KINDS, Chain
from methods.test_lora import base_of, inputs_of
from parity import both_ways, call, near, needs_peer, ours, peer, read, read_by_peer, write
from veneer import LoraConfig
from veneer.engine import checkpoint
from veneer.engine.tuner import Tuner
from veneer.ops import lowrank


def one(tuner: Tuner):
    return next(iter(tuner.adapters("default")))[1]


def dora(**settings) -> LoraConfig:
    return LoraConfig(use_dora=True, **({"r": 4, "target_modules": ["layer"]} | settings))


def test_forward_and_gradients_are_the_papers_with_a_constant_norm() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(7, 5).double(), torch.randn(3, 4, 7, dtype=torch.float64)
    tuner = ours(Chain(None, layer), dora(r=3, lora_alpha=6))
    adapter = one(tuner)
    a, b, m = adapter.lora_A.weight, adapter.lora_B.weight, adapter.lora_magnitude_vector
    y = tuner(x)
    v = (layer.weight + 2.0 * b @ a).detach()
    n = v.norm(dim=1)
    assert torch.allclose(y, x @ (m / n)[:, None].mul(v).T + layer.bias, atol=1e-12)
    y.square().sum().backward()
    g = torch.einsum("...o,...i->oi", 2 * y.detach(), x)  # dL/dW'
    dv = (m / n)[:, None] * g
    assert torch.allclose(a.grad, 2.0 * b.T @ dv, atol=1e-9)
    assert torch.allclose(b.grad, 2.0 * dv @ a.T, atol=1e-9)
    assert torch.allclose(m.grad, (g * v).sum(1) / n, atol=1e-9)


def test_the_exact_gradient_is_the_detached_one_projected_off_each_row() -> None:
    torch.manual_seed(0)
    v = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    m, g = torch.rand(5, dtype=torch.float64) + 0.5, torch.randn(5, 7, dtype=torch.float64)
    ((m / v.norm(dim=1))[:, None] * v * g).sum().backward()
    detached = (m / v.norm(dim=1))[:, None] * g
    unit = (v / v.norm(dim=1, keepdim=True)).detach()
    assert torch.allclose(v.grad, detached - (detached * unit).sum(1, keepdim=True) * unit, atol=1e-9)


@pytest.mark.parametrize("kind", sorted(ALL))
def test_the_norm_by_the_identity_is_the_norm_of_the_sum(kind: str, monkeypatch) -> None:
    monkeypatch.setattr("veneer.methods.dora.ROWS_AT_ONCE", 40)  # several pieces
    tuner = ours(base_of(kind)(), LoraConfig(r=4, use_dora=True, **KINDS[kind].targets))
    for _, adapter in tuner.adapters("default"):
        v = adapter.site.weight + (adapter.scaling * _product(adapter)).reshape(adapter.site.shape)
        dense = v.flatten(2 if adapter.site.stack else 1).norm(dim=-1)
        assert torch.allclose(adapter.norm(), dense, rtol=1e-5)


def _product(adapter) -> torch.Tensor:
    a, b = adapter.matrices()
    return b @ a


def test_rows_of_the_merged_weight_have_the_magnitudes() -> None:
    tuner = ours(Chain(None, nn.Linear(7, 5)), dora())
    tuner.merge()
    assert torch.allclose(
        tuner.model.layer.base_layer.weight.norm(dim=1), one(tuner).lora_magnitude_vector.abs(), atol=1e-5
    )


def test_the_remembered_norm_follows_every_change() -> None:
    torch.manual_seed(0)
    tuner = ours(Chain(None, nn.Linear(8, 8)), dora())
    adapter, x = one(tuner), torch.randn(2, 8)
    tuner(x)
    assert adapter.norm() is adapter.norm()

    def set_data() -> None:  # an edit that no version counter sees; the next train() or eval() does
        adapter.lora_B.weight.data.mul_(2)
        adapter.train().eval()

    for change in (
        lambda: _add(adapter.lora_A.weight),
        lambda: _add(adapter.site.module.weight),
        lambda: setattr(adapter.site.module, "weight", nn.Parameter(torch.randn(8, 8))),
        set_data,
    ):
        change()
        v = adapter.site.weight + adapter.scaling * _product(adapter)
        assert torch.allclose(adapter.norm(), v.norm(dim=1), rtol=1e-5)


def _add(parameter: torch.Tensor) -> None:
    with torch.no_grad():
        parameter.add_(1.0)


@pytest.fixture
def torchs_masks(monkeypatch) -> None:
    """Has the fused form drop what ``F.dropout`` drops."""

    def dropped(x: torch.Tensor, p: float) -> lowrank.Dropped:
        left = nn.functional.dropout(x, p)
        return lowrank.Dropped(left * (1 - p), (left != 0).to(torch.uint8), 1 - p)

    monkeypatch.setattr(lowrank, "dropped", dropped)


def test_dropout_falls_on_both_halves_alike(torchs_masks) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 5), torch.randn(3, 16)
    tuner = ours(Chain(None, layer), dora(lora_dropout=0.5)).train()
    adapter = one(tuner)
    torch.manual_seed(7)
    y = tuner(x)
    torch.manual_seed(7)
    dropped = nn.functional.dropout(x, 0.5)
    v = layer.weight + adapter.scaling * _product(adapter)
    g = (adapter.lora_magnitude_vector / v.norm(dim=1))[:, None]
    expected = x @ layer.weight.T + layer.bias + dropped @ (g * v - layer.weight).T
    assert near(y, expected, 1e-5)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv1d_hf"])
def test_a_trained_bias_is_not_scaled(kind: str, bias: str) -> None:
    tuner = ours(base_of(kind)(), dora(bias=bias))
    x = inputs_of(kind)
    y = tuner(x)
    tuner.merge()
    assert near(tuner(x), y, 2e-5)


class _Sizes(TorchDispatchMode):
    """Collects the sizes of tensors that are made, views left out."""

    def __init__(self):
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.made += [t.numel() for t in made if t.untyped_storage().data_ptr() not in given]
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_makes_no_second_matrix(dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr("veneer.methods.dora.ROWS_AT_ONCE", 300 * 20)
    tuner = ours(Chain(None, nn.Linear(300, 200)).to(dtype), dora()).train()
    x = torch.randn(3, 300, dtype=dtype)
    with _Sizes() as sizes:
        tuner(x).float().square().sum().backward()
    assert sizes.made and max(sizes.made) <= 300 * 20  # a piece in float32, where the base is not


def test_the_start_is_exactly_the_base_also_in_half_precision() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = Chain(None, nn.Linear(64, 32)).to(dtype)
        x = torch.randn(4, 64).to(dtype)
        expected = model(x)
        tuner = Tuner(model)
        tuner.add("a", dora())
        tuner.set_active("a")
        assert torch.equal(tuner.eval()(x), expected)


@needs_peer
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in ("linear", "linear_no_bias", "conv1d_hf", "conv1d", "conv2d", "conv2d_1x1")),
        ("embedding", {}),
        ("conv3d", {}),
        ("linear", {"use_rslora": True, "lora_alpha": 16}),
        ("linear", {"lora_dropout": 0.3}),
        ("linear", {"init_lora_weights": False}),
        ("conv2d", {"lora_dropout": 0.3}),
        ("linear", {"rank_pattern": {"layer": 2}}),
    ],
)  # fmt: skip
def test_parity(kind: str, options: dict, tmp_path) -> None:
    import peft

    settings = {"r": 4, "use_dora": True, "target_modules": ["layer"]} | options
    both_ways(base_of(kind), peft.LoraConfig(**settings), LoraConfig(**settings), inputs_of(kind), tmp_path)


@needs_peer
def test_dropout_parity(tmp_path, torchs_masks) -> None:
    import peft

    base, x = base_of("linear"), inputs_of("linear")
    theirs = peer(base(), peft.LoraConfig(r=4, use_dora=True, lora_dropout=0.5, target_modules=["layer"]))
    theirs.save_pretrained(tmp_path)
    mine = read(base(), tmp_path)
    outputs = []
    for model in (theirs.train(), mine.train()):
        torch.manual_seed(3)
        outputs.append(call(model, x))
    assert near(outputs[1], outputs[0], 1e-5)


def test_a_grouped_convolution_wants_a_rank_for_its_groups() -> None:
    tuner = Tuner(base_of("conv2d_grouped")())
    with pytest.raises(ValueError, match="2 groups"):
        tuner.add("a", dora(r=3))


@needs_peer
def test_a_file_across_groups_is_refused(tmp_path) -> None:
    import peft

    peer(base_of("conv2d_grouped")(), peft.LoraConfig(r=4, target_modules=["layer"])).save_pretrained(tmp_path)
    found = checkpoint.read(tmp_path)
    tuner = Tuner(base_of("conv2d_grouped")())
    tuner.add("a", dora())
    with pytest.raises(ValueError, match="2 groups"):
        checkpoint.put(tuner, "a", found | {"base_model.model.layer.lora_magnitude_vector": torch.ones(1, 16, 1, 1)})


@needs_peer
@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_start_that_splits_the_weight_keeps_its_magnitudes_in_the_file(kind: str, start: str, tmp_path) -> None:
    base, x = base_of(kind), inputs_of(kind)
    tuner = Tuner(base())
    tuner.add("default", dora(init_lora_weights=start))
    tuner.set_active("default")
    assert near(tuner.eval()(x), base()(x), 1e-5)
    assert near(one(tuner).lora_magnitude_vector.flatten(), base().layer.weight.flatten(1).norm(dim=1), 1e-5)
    tuner = ours(base(), dora(init_lora_weights=start))
    expected = tuner(x)
    write(tuner, tmp_path)
    assert near(read(base(), tmp_path)(x), expected, 1e-4)
    assert near(call(read_by_peer(base(), tmp_path), x), expected, 1e-4)
