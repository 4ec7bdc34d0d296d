"""NF4 bytes unpacked by a kernel, and multiplied without being unpacked, equal the eager twin."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gpu.conftest import TYPES, close
from veneer.core.nf4_linear import Nf4Linear
from veneer.ops import nf4_bytes
from veneer.ops.kernels import kernel
from veneer.ops.nf4_bytes import Layout, packed, unpacked_eager

LAYOUTS = [Layout((5, 7)), Layout((40, 96)), Layout((70, 131), 32), Layout((33, 70), 64, False)]


@TYPES
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_weight_equals_the_eager_twins(layout, dtype, device) -> None:
    data = packed(torch.randn(layout.shape, device=device), layout)
    found = kernel("nf4", data, dtype=dtype).unpacked(data, layout, dtype)
    assert found.dtype is dtype
    assert close(found, unpacked_eager(data, layout, dtype), dtype)


@TYPES
@pytest.mark.parametrize("rows", [(2, 3), (16,)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_few_rows_equal_the_product_with_the_weight(layout, rows, dtype, device) -> None:
    out, width = layout.shape
    data = packed(torch.randn(layout.shape, device=device), layout)
    x = torch.randn(*rows, width, device=device).to(dtype)
    bias = torch.randn(out, device=device).to(dtype) if len(rows) == 2 else None
    found = kernel("nf4_rows", x, data).product(x, data, bias, layout)
    assert close(found, F.linear(x, unpacked_eager(data, layout, dtype), bias), dtype)


@pytest.mark.parametrize("rows", [3, 20])
def test_a_layer_gives_the_eager_output_and_gradients(rows, device, monkeypatch) -> None:
    layer = Nf4Linear.of(torch.randn(33, 70, device=device), torch.randn(33, device=device))
    layer.bias.requires_grad_()
    x = torch.randn(rows, 70, device=device, requires_grad=True)
    found = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(nf4_bytes, "kernel", lambda *_, **__: None)
        y = layer(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, layer.bias))])
    assert all(close(mine, twin, torch.float32) for mine, twin in zip(*found, strict=True))


def test_tracers_see_the_eager_twin(device) -> None:
    layer, x = Nf4Linear.of(torch.randn(33, 70, device=device)), torch.randn(4, 3, 70, device=device)
    y = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), y, atol=1e-4)
    assert torch.allclose(torch.vmap(layer)(x), y, atol=1e-4)
