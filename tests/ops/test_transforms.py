"""Changes that few entries decide, circulant blocks and turned pairs: as their plain forms, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer import FourierFTConfig, ShiraConfig, WaveFTConfig, get_peft_model
from veneer.ops import circulant, entries
from veneer.ops.circulant import correlated
from veneer.ops.rotation import turn, turn_pairs

FEW_ENTRIES = {
    "fourierft": FourierFTConfig(n_frequency=21, target_modules=["0"]),
    "fourierft at one place of each pair": FourierFTConfig(n_frequency=100, random_loc_seed=3, target_modules=["0"]),
    "shira": ShiraConfig(r=1, target_modules=["0"], init_weights=False),
    "waveft": WaveFTConfig(n_frequency=21, target_modules=["0"], init_weights=False),
    "waveft db4": WaveFTConfig(n_frequency=21, wavelet_family="db4", target_modules=["0"], init_weights=False),
    "waveft plain": WaveFTConfig(n_frequency=21, use_idwt=False, target_modules=["0"], init_weights=False),
}


@pytest.mark.parametrize("sides", [(64, 48), (63, 50), (70, 49)], ids=str)
@pytest.mark.parametrize("row", FEW_ENTRIES)
def test_the_entries_own_gradient_is_that_of_the_whole_weight(
    row: str, sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    at = entries._LinearByEntries.backward
    monkeypatch.setattr(entries._LinearByEntries, "backward", staticmethod(lambda *a: taken.append(1) or at(*a)))
    torch.manual_seed(0)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(*sides)), FEW_ENTRIES[row]).double()
    layer = model.base_model.model[0]
    adapter = layer.adapters["default"]
    (values,) = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(3, 5, sides[0], dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, sides[1], dtype=torch.float64)
    y = model(x)
    found = torch.autograd.grad(y, (x, values), grad)
    plain = F.linear(x, layer.base_layer.weight + adapter.delta_weight(), layer.base_layer.bias)
    torch.testing.assert_close(y, plain)
    assert taken
    torch.testing.assert_close(found, torch.autograd.grad(plain, (x, values), grad))


@pytest.mark.parametrize("b", [1, 4, 5])
def test_correlated_blocks(b: int) -> None:
    x = torch.randn(3, 5, 2 * b, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 2, b, dtype=torch.float64, requires_grad=True)
    i = torch.arange(b)
    matrix = w[:, :, (i[None] - i[:, None]) % b].transpose(1, 2).reshape(3 * b, 2 * b)
    torch.testing.assert_close(correlated(x, w), x @ matrix.T)
    assert torch.autograd.gradcheck(correlated, (x, w))


def test_layers_that_read_the_same_share_its_spectra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circulant, "AT_HAND", 1)  # pieces of 32 rows
    transformed = []
    spectra = circulant._spectra
    monkeypatch.setattr(circulant, "_spectra", lambda x: transformed.append(len(x)) or spectra(x))
    x = torch.randn(40, 8, dtype=torch.float64)
    wide, narrow = (torch.randn(rows, 2, 4, dtype=torch.float64, requires_grad=True) for rows in (3, 1))
    one, two = correlated(x, wide), correlated(x, narrow)
    assert transformed == [32, 8]
    before = x.clone()
    apart = [correlated(before, wide), correlated(before.clone(), narrow)]
    assert all(map(torch.equal, (one, two), apart))
    (one.sum() * two.sum()).backward()
    grads = wide.grad.clone(), narrow.grad.clone()
    wide.grad = narrow.grad = None
    (apart[0].sum() * apart[1].sum()).backward()
    torch.testing.assert_close(grads, (wide.grad, narrow.grad))
    other, count = torch.randn_like(wide), len(transformed)
    once = correlated(x, wide)  # a new pass, in which x may hold other numbers, written past all counts
    assert transformed[count:] == [32, 8]
    x.mul_(2)
    torch.testing.assert_close(correlated(x, narrow), 2 * two)
    del one, two, once, apart
    assert circulant._shared(x, other) is None  # nobody waits for them, so they are gone


def test_turned_pairs() -> None:
    v = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    cos, sin = (torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    first, second = v.view(3, 2, 2, 3).unbind(2)
    want = torch.stack([cos[:, 0] * first + sin[:, 0] * second, cos[:, 1] * second + sin[:, 1] * first], 2)
    with torch.no_grad():
        torch.testing.assert_close(turn_pairs(v, cos, sin), want.view(3, 12))
    torch.testing.assert_close(turn_pairs(v, cos, sin), want.view(3, 12))
    assert torch.autograd.gradcheck(turn_pairs, (v, cos, sin))


@pytest.mark.parametrize("blocks", [(12, 4), (16, 2), (3, 8)])
def test_small_blocks_that_are_joined_turn_the_same(blocks: tuple[int, int]) -> None:
    n, b = blocks

    def turned(v: Tensor, r: Tensor) -> Tensor:
        return v @ torch.block_diag(*r)

    v = torch.randn(40, n * b, dtype=torch.float64, requires_grad=True)
    r = torch.randn(n, b, b, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(turn(v, r), turned(v, r))
    grad = torch.randn_like(v)
    torch.testing.assert_close(
        torch.autograd.grad(turn(v, r), (v, r), grad), torch.autograd.grad(turned(v, r), (v, r), grad)
    )
