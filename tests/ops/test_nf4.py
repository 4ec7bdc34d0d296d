"""The NormalFloat quantiser against the paper's numbers."""

from __future__ import annotations

import pytest
import torch

from veneer.ops import nf4

CODEBOOK = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_the_levels_follow_from_gaussian_quantiles():
    assert torch.allclose(nf4.levels(), torch.tensor(CODEBOOK), atol=1e-7)
    assert len(nf4.levels(2)) == 4 and 0.0 in nf4.levels(2)
    dynamic = nf4.dynamic_levels()
    assert len(dynamic.unique()) == 256 and dynamic[-1] == 1 and (dynamic.diff() > 0).all()


def test_the_error_on_gaussian_weights_is_the_published_one():
    torch.manual_seed(0)
    w = torch.randn(2**20) * 0.02

    def error(q: torch.Tensor) -> float:
        return float((q - w).norm() / w.norm())

    assert error(nf4.dequantise(nf4.quantise(w))) == pytest.approx(0.0920, abs=5e-4)
    assert error(nf4.rounded_int(w, 4, 64)) == pytest.approx(0.1077, abs=5e-4)
    doubled = nf4.dequantise(nf4.quantise(w, double=True))
    assert error(doubled) == pytest.approx(0.0920, abs=2e-3)


def test_values_on_the_grid_come_back_exactly_and_a_short_last_block_stands_for_itself():
    torch.manual_seed(0)
    w = torch.randn(7, 33)
    once = nf4.rounded(w, 4)
    assert torch.equal(nf4.rounded(once, 4), once) and once.shape == w.shape
    assert torch.equal(once.flatten()[192:], nf4.rounded(w.flatten()[192:], 4))
    assert nf4.rounded(torch.zeros(5, 3), 4).abs().max() == 0
    assert float((nf4.rounded(w, 8) - w).abs().max()) < 0.02
    with pytest.raises(ValueError, match="2, 4 or 8 bits"):
        nf4.rounded(w, 3)


def test_two_codes_share_a_byte():
    q = nf4.quantise(torch.tensor([1.0, -1.0, 0.0]), block=64)
    assert q.codes.tolist() == [15, 0, 7] and q.packed().tolist() == [0xF0, 0x70]
