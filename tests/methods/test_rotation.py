"""What the rotating methods promise: orthogonality, one orientation, the papers' formulas, starts, and the cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laws.kinds import Chain
from parity import near, ours
from veneer import BOFTConfig, HRAConfig, OFTConfig, PsoftConfig, RoadConfig
from veneer.core.config import LayerConfig
from veneer.engine import checkpoint
from veneer.engine.tuner import Tuner
from veneer.ops.rotation import cayley, nearest_divisor, neumann, reflections, skew


def double(i: int = 12, o: int = 8) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(i, o).double(), torch.randn(3, 4, i, dtype=torch.float64)


def at(build: type[LayerConfig], **settings: Any) -> LayerConfig:
    return build(target_modules=["layer"], **settings)


def one(tuner: Tuner) -> Any:
    return next(tuner.adapters("default"))[1]


def same_gradients(tuner: Tuner, x: Tensor, y: Tensor, expected: Tensor) -> None:
    """The adapter's output and the gradient of each of its tensors are those of ``expected``."""
    assert torch.allclose(y, expected, atol=1e-11)
    parameters = [p for p in tuner.parameters() if p.requires_grad]
    mine = torch.autograd.grad(y.sin().sum(), parameters, retain_graph=True)
    naive = torch.autograd.grad(expected.sin().sum(), parameters)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(mine, naive, strict=True))


# ---- matrices -------------------------------------------------------------------------------------------------------
def test_cayley_is_orthogonal_and_the_series_is_its_beginning() -> None:
    torch.manual_seed(0)
    q = skew(0.05 * torch.randn(3, 28), 8)
    exact, eye = cayley(q), torch.eye(8)
    assert torch.equal(q, -q.mT)
    assert near(exact @ exact.mT, eye.expand(3, 8, 8), 1e-6)
    off = [float((neumann(q, n) - exact).abs().max()) for n in (2, 4, 6, 9)]
    assert off == sorted(off, reverse=True) and off[-1] < 1e-4
    assert not near(neumann(q, 5), exact.mT, 0.1), "the series must approach R, not its transpose"


def test_the_compact_product_is_the_product_of_the_reflections() -> None:
    torch.manual_seed(0)
    u = torch.randn(7, 5, dtype=torch.float64)
    product = torch.eye(7, dtype=torch.float64)
    for column in u.T:
        product = product @ (torch.eye(7) - 2 * torch.outer(column, column) / column.dot(column))
    unit, s = reflections(u)
    assert torch.allclose(torch.eye(7) - unit @ s @ unit.T, product, atol=1e-12)


@pytest.mark.parametrize(("n", "wanted", "found"), [(12, 5, 4), (8, 32, 8), (8, 3, 2), (10, 4, 5), (7, 1, 1)])
def test_nearest_divisor(n: int, wanted: int, found: int) -> None:
    assert nearest_divisor(n, wanted) == found


# ---- OFT ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("neumann_terms", [0, 5])
def test_oft_is_its_formula(neumann_terms: int) -> None:
    layer, x = double()
    terms = {"num_cayley_neumann_terms": neumann_terms} if neumann_terms else {"use_cayley_neumann": False}
    tuner = ours(Chain(None, layer), at(OFTConfig, oft_block_size=4, **terms))
    q, eye = skew(one(tuner).oft_R["weight"], 4), torch.eye(4, dtype=torch.float64)
    if neumann_terms:
        r = eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    else:
        r = (eye + q) @ torch.linalg.inv(eye - q)
    w = layer.weight @ torch.block_diag(*r).T
    same_gradients(tuner, x, tuner(x), x @ w.T + layer.bias)


def test_oft_means_the_same_with_either_way_to_the_rotation() -> None:
    """The peer's two branches are transposes of each other: 0.35 apart at these angles."""
    layer, x = double()
    exact = ours(Chain(None, layer), at(OFTConfig, oft_block_size=4, use_cayley_neumann=False), size=0.05)
    series = ours(Chain(None, layer), at(OFTConfig, oft_block_size=4, num_cayley_neumann_terms=9), size=0.05)
    assert near(series(x), exact(x), 1e-6)
    assert not near(exact(x), nn.functional.linear(x, layer.weight, layer.bias), 1e-2)


@pytest.mark.parametrize("config", [
    at(OFTConfig, oft_block_size=4, use_cayley_neumann=False),
    at(BOFTConfig, boft_n_butterfly_factor=2, boft_block_size=2),
    at(HRAConfig, r=4),
], ids=["oft", "boft", "hra"])  # fmt: skip
def test_rotating_keeps_the_norms_and_angles_of_neurons(config: LayerConfig) -> None:
    layer, _ = double()
    w = layer.weight.detach().clone()
    tuner = ours(Chain(None, layer), config, size=0.3)
    if hasattr(one(tuner), "boft_s"):
        nn.init.ones_(one(tuner).boft_s)
    tuner.merge()
    assert not near(layer.weight, w, 0.1)
    assert torch.allclose(layer.weight @ layer.weight.T, w @ w.T, atol=1e-9)


@pytest.mark.parametrize(
    "build", [nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, dilation=2, padding=(2, 1), groups=2)]
)
def test_oft_on_a_convolution_answers_alike_merged_or_not(build: nn.Module) -> None:
    """The peer's forward and merge are 6.1 apart."""
    x = torch.randn(2, 4, 7, 7)
    tuner = ours(Chain(None, build), at(OFTConfig, oft_block_size=6))
    y = tuner(x)
    tuner.merge()
    assert near(tuner(x), y, 1e-5)


def test_constrained_oft_steps_back_into_its_ball() -> None:
    config = at(OFTConfig, oft_block_size=4, coft=True, eps=0.01)
    tuner = ours(Chain(None, nn.Linear(12, 8)), config, size=1.0)
    x, entries = torch.randn(5, 12), one(tuner).entries
    y = tuner(x)
    before = entries.detach().clone()
    tuner.after_step(1)
    assert skew(entries, 4).flatten(1).norm(dim=1).max() <= 0.01 / math.sqrt(3) * 1.001
    assert not torch.equal(entries, before)
    assert near(tuner(x), y, 1e-6), "the forward sees the projected point already"


def test_module_dropout_acts_in_training_only_and_leaves_whole_blocks_alone() -> None:
    """In the peer's linear layer it has no effect."""
    layer, x = double()
    tuner = ours(Chain(None, layer), at(OFTConfig, oft_block_size=4, module_dropout=0.5))
    assert torch.equal(tuner(x), tuner(x))
    tuner.train()
    kept = set()
    for _ in range(40):
        turned = one(tuner).turn(x)
        kept.add(tuple(torch.equal(a, b) for a, b in zip(turned.split(4, -1), x.split(4, -1), strict=True)))
    assert len(kept) == 8


# ---- BOFT -----------------------------------------------------------------------------------------------------------
def test_boft_is_its_formula() -> None:
    layer, x = double(8, 6)
    tuner = ours(Chain(None, layer), at(BOFTConfig, boft_block_size=4, boft_n_butterfly_factor=2))
    adapter, eye = one(tuner), torch.eye(4, dtype=torch.float64)
    q = (adapter.boft_R - adapter.boft_R.mT) / 2
    b = [torch.block_diag(*((eye + k) @ torch.linalg.inv(eye - k))) for k in q]
    order = [0, 1, 4, 5, 2, 3, 6, 7]  # half-blocks (0, 2), (1, 3) side by side
    p = torch.eye(8, dtype=torch.float64)[order]
    w = adapter.boft_s * (layer.weight @ (p.T @ b[1] @ p) @ b[0])
    same_gradients(tuner, x, tuner(x), x @ w.T + layer.bias)


def test_as_many_factors_of_two_as_the_width_has_bits_make_a_dense_rotation() -> None:
    tuner = ours(Chain(None, nn.Linear(16, 4)), at(BOFTConfig, boft_block_size=2, boft_n_butterfly_factor=4), size=1.0)
    r = one(tuner).turn(torch.eye(16))
    assert near(r @ r.T, torch.eye(16), 1e-5)
    assert r.abs().min() > 0
    assert not any(b.numel() for b in one(tuner).buffers())


def test_butterfly_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="butterfly"):
        ours(Chain(None, nn.Linear(12, 4)), at(BOFTConfig, boft_block_size=4, boft_n_butterfly_factor=3))


# ---- HRA ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gram_schmidt", [False, True])
def test_hra_is_its_formula(gram_schmidt: bool) -> None:
    layer, x = double(7, 5)
    tuner = ours(Chain(None, layer), at(HRAConfig, r=3, apply_GS=gram_schmidt), size=0.5)
    u, eye = one(tuner).hra_u, torch.eye(7, dtype=torch.float64)
    w, done = layer.weight, []
    for column in u.T:
        for previous in done if gram_schmidt else ():
            column = column - previous * previous.dot(column)
        column = column / column.norm()
        done.append(column)
        w = w @ (eye - 2 * torch.outer(column, column))
    same_gradients(tuner, x, tuner(x), x @ w.T + layer.bias)


@pytest.mark.parametrize("layer", [nn.Linear(64, 48), nn.Conv2d(8, 16, 3)])
def test_gram_schmidt_starts_at_the_base_where_the_weight_has_null_directions(layer: nn.Module) -> None:
    """The peer's start is off by the order of the output (1.8 on a 64 x 64 layer), and so is its gradient's point."""
    x = torch.randn(2, 64) if isinstance(layer, nn.Linear) else torch.randn(2, 8, 6, 6)
    expected = layer(x)
    tuner = Tuner(Chain(None, layer))
    tuner.add("default", at(HRAConfig, r=8, apply_GS=True))
    tuner.set_active("default")
    y = tuner(x)
    assert near(y, expected, 1e-5)
    y.sin().sum().backward()
    assert one(tuner).hra_u.grad.abs().max() > 1e-3


def test_gram_schmidt_starts_as_near_as_it_can_elsewhere() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    w = layer.weight.detach().clone()
    tuner = Tuner(Chain(None, layer))
    tuner.add("default", at(HRAConfig, r=4, apply_GS=True))
    tuner.merge("default")
    smallest = torch.linalg.svdvals(w)[-4:]
    assert near((layer.weight - w).norm(), 2 * smallest.norm(), 1e-4)


# ---- RoAd, PSOFT ----------------------------------------------------------------------------------------------------
def test_road_is_its_formula() -> None:
    layer, x = double(5, 8)
    tuner = ours(Chain(None, layer), at(RoadConfig, group_size=4))
    t, a = one(tuner).road_theta, one(tuner).road_alpha
    r = torch.zeros(8, 8, dtype=torch.float64)
    for n in range(4):  # pair n of group n // 2
        i = n // 2 * 4 + n % 2
        j = i + 2
        for (row, column), value in {
            (i, i): t[n].cos(),
            (i, j): -t[n].sin(),
            (j, i): t[n].sin(),
            (j, j): t[n].cos(),
        }.items():
            e = torch.zeros_like(r)
            e[row, column] = 1
            r = r + e * a[n] * value
    same_gradients(tuner, x, tuner(x), (x @ layer.weight.T + layer.bias) @ r.T)


def test_psoft_is_its_formula_and_keeps_the_singular_values() -> None:
    layer, x = double(9, 6)
    w = layer.weight.detach().clone()
    tuner = ours(Chain(None, layer), at(PsoftConfig, r=3, psoft_alpha=3))
    adapter, eye = one(tuner), torch.eye(3, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(w.float(), full_matrices=False)
    q = skew(adapter.psoft_R["weight"], 3)
    r = (eye + q) @ torch.linalg.inv(eye - q)
    turned = adapter.psoft_R["vector_b"][:, None] * r * adapter.psoft_R["vector_a"]
    b, a = (u[:, :3] * s[:3]).double(), vh[:3].double()
    same_gradients(tuner, x, tuner(x), x @ (w + b @ (turned - eye) @ a).T + layer.bias)
    nn.init.ones_(adapter.psoft_R["vector_a"])
    nn.init.ones_(adapter.psoft_R["vector_b"])
    tuner.merge()
    assert not torch.allclose(layer.weight, w, atol=1e-3)
    assert torch.allclose(torch.linalg.svdvals(layer.weight), s.double(), atol=1e-5)


def test_psoft_made_empty_and_filled_from_a_file_knows_its_frame() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(9, 6), torch.randn(4, 9)
    tuner, empty = ours(Chain(None, layer), at(PsoftConfig, r=3)), Tuner(Chain(None, layer))
    empty.add("default", at(PsoftConfig, r=3), device="meta")
    assert checkpoint.put(empty, "default", checkpoint.tensors(tuner, "default")).clean
    empty.set_active("default")
    assert near(empty(x), tuner(x), 1e-6)


# ---- the cache ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("config", [
    at(OFTConfig, oft_block_size=4), at(BOFTConfig, boft_block_size=4), at(HRAConfig, r=4),
    at(RoadConfig, group_size=4), at(PsoftConfig, r=4),
], ids=["oft", "boft", "hra", "road", "psoft"])  # fmt: skip
def test_what_is_kept_in_eval_mode_never_goes_stale(config: LayerConfig) -> None:
    x, tuner = torch.randn(3, 12), ours(Chain(None, nn.Linear(12, 8)), config)
    with torch.no_grad():
        first = tuner(x)
        assert torch.equal(tuner(x), first)
        parameter = next(p for p in tuner.parameters() if p.requires_grad)
        factors = torch.linspace(1, 3, parameter.numel()).view_as(parameter)
        parameter.mul_(factors)
        second = tuner(x)
        assert not near(second, first, 1e-4)
        parameter.data = parameter.data / factors
        assert near(tuner(x), first, 1e-5)
    assert near(tuner(x), first, 1e-5) and tuner(x).requires_grad
    with torch.inference_mode():
        assert near(tuner(x), first, 1e-5)
    with torch.no_grad():
        assert near(tuner(x), first, 1e-5)
