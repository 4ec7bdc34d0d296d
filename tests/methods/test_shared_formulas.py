"""Shared, spectral and sparse methods: each paper's formula, written naively and densely in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import veneer
from laws.kinds import Chain
from parity import ours
from veneer.engine.tuner import Tuner

OUT, IN = 8, 12
Tensors = dict[str, Tensor]


def planted(method: str, **options: Any) -> tuple[Tuner, Tensor]:
    torch.manual_seed(0)
    base = Chain(None, nn.Linear(IN, OUT)).double()
    config = getattr(veneer, f"{method}Config")(target_modules=["layer"], **options)
    return ours(base, config), torch.randn(3, 5, IN, dtype=torch.float64)


def tensors_of(tuner: Tuner) -> Tensors:
    """Every tensor of the adapter and of what it shares, by its last name; leaves of a graph of their own."""
    adapter = next(iter(tuner.adapters("default")))[1]
    modules = [adapter] + ([tuner.shared["default"]] if "default" in tuner.shared else [])
    found: Tensors = {}
    for module in modules:
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            copy = value.detach().clone()
            found[name] = copy.requires_grad_(value.requires_grad)
    return found


def loha(t: Tensors, w: Tensor) -> Tensor:
    return 1.5 * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def lokr(t: Tensors, w: Tensor) -> Tensor:
    return 3.0 * torch.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"])


def vera(t: Tensors, w: Tensor) -> Tensor:
    return torch.diag(t["vera_lambda_b"]) @ t["vera_B"] @ torch.diag(t["vera_lambda_d"]) @ t["vera_A"]


def pvera(t: Tensors, w: Tensor) -> Tensor:
    return torch.diag(t["pvera_lambda_b"]) @ t["pvera_B"] @ torch.diag(t["pvera_lambda_d"][:3]) @ t["pvera_A"][:3]


def vblora(t: Tensors, w: Tensor) -> Tensor:
    bank, z_a, z_b = t["vblora_vector_bank"], t["vblora_logits_A"], t["vblora_logits_B"]

    def mix(z: Tensor) -> Tensor:
        chosen = z.topk(2).indices
        return sum(torch.softmax(z[chosen], 0)[i] * bank[chosen[i]] for i in range(2))

    rows = [torch.cat([mix(z) for z in row]) for row in z_a]  # r rows of A
    columns = [torch.cat([mix(z_b[j, i]) for j in range(len(z_b))]) for i in range(z_b.shape[1])]
    return torch.stack(columns, 1) @ torch.stack(rows)


def randlora(t: Tensors, w: Tensor) -> Tensor:
    a, b, lam, gamma = t["randlora_A"][:, 0], t["randlora_B"], t["randlora_lambda"], t["randlora_gamma"]
    count, r = gamma.shape[0], a.shape[0]
    bases = b.flatten(1).unflatten(1, (r, count))  # the n-th basis takes every count-th column
    total = sum(bases[:, :, n] @ torch.diag(lam[:, n]) @ a @ torch.diag(gamma[n]) for n in range(count))
    return (2.0 * total).T  # the output is the shorter side


def tinylora(t: Tensors, w: Tensor) -> Tensor:
    middle = sum(v * p for v, p in zip(t["tinylora_v.0"], t["tinylora_P"]))
    return t["tinylora_B"] @ middle @ t["tinylora_A"]


def lora_xs(t: Tensors, w: Tensor) -> Tensor:
    return t["lora_xs_B"] @ t["lora_xs_R"] @ t["lora_xs_A"]


def unilora(t: Tensors, w: Tensor) -> Tensor:
    index = torch.cat([t["unilora_indices_A"].flatten(), t["unilora_indices_B"].flatten()]).long()
    p = torch.zeros(len(index), 10, dtype=torch.float64)
    for row, column in enumerate(index):
        p[row, column] = 1 / math.sqrt(int((index == column).sum()))
    assert torch.allclose(p.T @ p, torch.eye(10, dtype=torch.float64), atol=1e-7)
    both = p @ t["unilora_theta_d"]
    return both[2 * IN :].view(OUT, 2) @ both[: 2 * IN].view(2, IN)


def fourierft(t: Tensors, w: Tensor) -> Tensor:
    row, column = t["places"].long()
    u, v = torch.arange(OUT)[:, None].double(), torch.arange(IN)[None].double()
    total = torch.zeros(OUT, IN, dtype=torch.float64)
    for c, p, q in zip(t["fourierft_spectrum"], row, column):
        total = total + c * torch.cos(2 * math.pi * (u * p / OUT + v * q / IN))
    return 20.0 * total / (OUT * IN)


def waveft(t: Tensors, w: Tensor) -> Tensor:
    def haar(n: int) -> Tensor:
        s = torch.zeros(n, n, dtype=torch.float64)  # columns: averages, then details
        for k in range(n // 2):
            s[2 * k, k] = s[2 * k + 1, k] = s[2 * k, n // 2 + k] = 1 / math.sqrt(2)
            s[2 * k + 1, n // 2 + k] = -1 / math.sqrt(2)
        return s

    c = torch.zeros(OUT, IN, dtype=torch.float64).index_put(tuple(t["places"].long()), t["waveft_spectrum"])
    top, bottom = c.chunk(2, 0)  # the peer's quadrants: details along the rows' axis stand top right
    (a, h), (v, d) = top.chunk(2, 1), bottom.chunk(2, 1)
    c = torch.cat([torch.cat([a, v], 1), torch.cat([h, d], 1)])
    return 2.0 * haar(OUT) @ c @ haar(IN).T


def c3a(t: Tensors, w: Tensor) -> Tensor:
    kernel = t["c3a_kernel"]
    rows = [[kernel[i // 4, j // 4, (j % 4 - i % 4) % 4] for j in range(IN)] for i in range(OUT)]
    return torch.stack([torch.stack(row) for row in rows]) / IN


def shira(t: Tensors, w: Tensor) -> Tensor:
    return torch.zeros(OUT, IN, dtype=torch.float64).index_put(tuple(t["shira_indices"].long()), t["shira_weight"])


def supertuning(t: Tensors, w: Tensor) -> Tensor:
    flat = torch.zeros(OUT * IN, dtype=torch.float64)
    flat = flat.index_put((t["supertuning_indices"].long(),), t["supertuning_values"]).view(OUT, IN)
    return flat + 2.0 * t["supertuning_lora_B.weight"] @ t["supertuning_lora_A.weight"]


def peanut(t: Tensors, w: Tensor) -> Tensor:
    h0 = torch.relu(w.T @ t["peanut_A.weight"].T)
    h1 = torch.relu(h0 @ t["peanut_encoders.0.weight"].T)
    h2 = torch.relu(h1 @ t["peanut_decoders.0.weight"].T) + h0
    return 0.5 * (h2 @ t["peanut_B.weight"].T).T


def frod(t: Tensors, w: Tensor) -> Tensor:
    v, places = t["frod_V.layer"], t["frod_s_indices.layer"]
    u = w @ torch.linalg.inv(v).T
    u = u / u.norm(dim=0).clamp_min(1e-12)
    s = torch.zeros(IN, IN, dtype=torch.float64).index_put(tuple(places), t["frod_lambda_s_values"])
    return u @ (torch.diag(t["frod_lambda_l"]) + s) @ v.T - w


def osf(t: Tensors, w: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    low = t["osf_svd_params.U_low"] @ torch.diag(t["osf_svd_params.S_low"]) @ t["osf_svd_params.V_low"]
    return u[:, :3] @ torch.diag(s[:3]) @ vh[:3] + low - w


FORMULAS: dict[str, tuple[str, dict[str, Any], Callable[[Tensors, Tensor], Tensor]]] = {
    "loha": ("LoHa", {"r": 2, "alpha": 3}, loha),
    "lokr": ("LoKr", {"r": 1, "alpha": 3}, lokr),
    "vera": ("Vera", {"r": 3}, vera),
    "pvera": ("Pvera", {"r": 3}, pvera),
    "vblora": ("VBLoRA", {"r": 2, "num_vectors": 5, "vector_length": 4}, vblora),
    "randlora": ("RandLora", {"r": 3, "randlora_alpha": 6}, randlora),
    "tinylora": ("TinyLora", {"r": 2, "u": 3}, tinylora),
    "lora_xs": ("LoraXS", {"r": 2}, lora_xs),
    "unilora": ("UniLora", {"r": 2, "theta_d_length": 10}, unilora),
    "fourierft": ("FourierFT", {"n_frequency": 9, "scaling": 20.0}, fourierft),
    "waveft": ("WaveFT", {"n_frequency": 9, "scaling": 2.0}, waveft),
    "c3a": ("C3A", {"block_size": 4}, c3a),
    "shira": ("Shira", {"r": 1}, shira),
    "supertuning": ("Supertuning", {"sparsity": 0.8, "r": 2}, supertuning),
    "peanut": ("Peanut", {"r": 3, "depth": 1, "scaling": 0.5}, peanut),
    "frod": ("Frod", {"sparse_rate": 0.1}, frod),
    "osf": ("OSF", {"effective_rank": 3}, osf),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_forward_and_gradients_are_the_papers(name: str) -> None:
    method, options, formula = FORMULAS[name]
    tuner, x = planted(method, **options)
    layer, t = tuner.model.layer.base_layer, tensors_of(tuner)
    x.requires_grad_()
    y = tuner(x)
    change = formula(t, layer.weight)
    x_too = x.detach().clone().requires_grad_()
    expected = x_too @ (layer.weight + change).T + layer.bias
    # Frozen draws, and what a start reads off the weight, are made in float32.
    close = {"rtol": 1e-5, "atol": 1e-6} if name in ("frod", "osf", "unilora") else {"rtol": 1e-10, "atol": 1e-10}
    assert torch.allclose(y, expected, **close)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(x.grad, x_too.grad, rtol=1e-4, atol=1e-5)
    adapter = next(iter(tuner.adapters("default")))[1]
    modules = [adapter] + ([tuner.shared["default"]] if "default" in tuner.shared else [])
    compared = 0
    for module in modules:
        for key, parameter in module.named_parameters():
            if name == "osf" and not key.endswith("S_low"):
                continue  # projected on purpose, see below
            assert torch.allclose(parameter.grad, t[key].grad, rtol=1e-4, atol=1e-5), key
            compared += 1
    assert compared


def test_adamss_is_the_papers() -> None:
    tuner, x = planted("Adamss", r=6, num_subspaces=3, subspace_rank=2)
    layer, adapter = tuner.model.layer.base_layer, next(iter(tuner.adapters("default")))[1]
    change = torch.zeros(OUT, IN + 1, dtype=torch.float64)
    for rows, a, b in zip(adapter.rows, adapter.adamss_A, adapter.adamss_B):
        change[rows] = b @ a @ adapter.adamss_newB
    assert sorted(torch.cat(adapter.rows).tolist()) == list(range(OUT))
    expected = x @ (layer.weight + change[:, :IN]).T + layer.bias + change[:, IN]
    y = tuner(x)
    assert torch.allclose(y, expected, atol=1e-10)
    leaves = [*adapter.adamss_A, *adapter.adamss_B]
    for mine, naive in zip(
        torch.autograd.grad(y.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
    ):
        assert torch.allclose(mine, naive, atol=1e-8)


@pytest.mark.parametrize(
    ("method", "options", "count"),
    [
        ("LoHa", {"r": 2}, 4 * 2 * (OUT + IN) // 2),
        ("Vera", {"r": 3}, OUT + 3),
        ("Pvera", {"r": 3}, OUT + 6),
        ("RandLora", {"r": 3}, 3 * (3 + OUT)),
        ("TinyLora", {"r": 2, "u": 5}, 5),
        ("LoraXS", {"r": 3}, 9),
        ("UniLora", {"r": 2, "theta_d_length": 10}, 10),
        ("FourierFT", {"n_frequency": 9}, 9),
        ("WaveFT", {"n_frequency": 9}, 9),
        ("C3A", {"block_size": 4}, OUT * IN // 4),
        ("Shira", {"r": 1}, OUT + IN),
        ("Frod", {"sparse_rate": 0.1}, IN + int(0.1 * IN * IN)),
        ("OSF", {"effective_rank": 3}, 5 * (OUT + IN + 1)),
    ],
)
def test_parameter_count(method: str, options: dict[str, Any], count: int) -> None:
    tuner, _ = planted(method, **options)
    assert sum(p.numel() for p in tuner.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("order", [1, 2, 3, 4, 8, 20])
def test_daubechies_wavelets_are_orthonormal_and_blind_to_polynomials(order: int) -> None:
    from veneer.ops.wavelets import filters

    low, high = map(np.array, filters(f"db{order}"))
    for shift in range(order):
        rest = 2 * order - 2 * shift
        assert abs(low[:rest] @ low[2 * shift :] - (shift == 0)) < 1e-10
        assert abs(high[:rest] @ low[2 * shift :]) < 1e-10
    for power in range(min(order, 5)):
        k = np.arange(2 * order) / (2 * order)
        assert abs(high @ k**power) < 1e-9


def test_wavelets_are_those_of_the_library() -> None:
    pywt = pytest.importorskip("pywt")
    from veneer.ops.wavelets import BUILT_IN, filters

    for order in range(1, BUILT_IN + 1):
        low, high = filters(f"db{order}")
        known = pywt.Wavelet(f"db{order}")
        assert np.allclose(low, known.rec_lo, atol=1e-9) and np.allclose(high, known.rec_hi, atol=1e-9)
    with pytest.raises(ValueError, match="no orthogonal wavelet"):
        filters("bior2.2")


def test_haar_keeps_the_norm() -> None:
    tuner, _ = planted("WaveFT", n_frequency=20, scaling=2.0)
    adapter = next(iter(tuner.adapters("default")))[1]
    assert torch.allclose(adapter.delta_weight().norm(), 2 * adapter.waveft_spectrum.norm())
