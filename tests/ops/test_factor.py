"""Thin factorisations against torch's full ones."""

from __future__ import annotations

import pytest
import torch

from veneer.ops.factor import bottom_svd, gram_svd, thin_qr, top_svd


def matrix(rows: int, columns: int, decay: float, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    n = min(rows, columns)
    u, v = torch.linalg.qr(torch.randn(rows, n))[0], torch.linalg.qr(torch.randn(columns, n))[0]
    return (u * torch.arange(1, n + 1).pow(-decay)) @ v.T


@pytest.mark.parametrize("decay", [0.05, 1.0])
@pytest.mark.parametrize("shape", [(500, 600), (900, 450), (60, 3000)])
@pytest.mark.parametrize("r", [1, 24])
def test_the_leading_triplets_are_the_best_approximation(shape, decay, r):
    w = matrix(*shape, decay)
    u, s, v = top_svd(w, r)
    exact = torch.linalg.svd(w.double(), full_matrices=False)
    best = exact.S[r:].norm()
    assert float((w.double() - (u * s).double() @ v.T.double()).norm()) <= float(best) * (1 + 1e-4)
    assert torch.allclose(s.double(), exact.S[:r], rtol=1e-5)
    for q in (u, v):
        assert torch.allclose(q.T @ q, torch.eye(r), atol=2e-6)
    low_rank = exact.U[:, :r] * exact.S[:r] @ exact.Vh[:r]
    assert float(((u * s) @ v.T - low_rank).norm()) <= 2e-3 * float(low_rank.norm())


def test_the_result_is_deterministic_and_draws_nothing_from_the_global_generator():
    w = matrix(500, 500, 0.5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = top_svd(w, 8)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, top_svd(w, 8), strict=True))
    u = first[0]
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


def test_fewer_steps_leave_a_larger_error_but_never_an_unorthogonal_one():
    w = matrix(700, 700, 0.1)
    errors = []
    for steps in (1, 4, 16):
        u, s, v = top_svd(w, 16, steps=steps)
        errors.append(float((w - (u * s) @ v.T).norm()))
        assert torch.allclose(u.T @ u, torch.eye(16), atol=2e-6)
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]


def test_a_matrix_of_lower_rank_than_asked_still_gives_orthonormal_vectors():
    torch.manual_seed(0)
    w = torch.randn(40, 3) @ torch.randn(3, 30)
    for u, s, v in (gram_svd(w, 6), gram_svd(w.T, 6)):
        assert torch.allclose(u.T @ u, torch.eye(6), atol=1e-5) and torch.allclose(v.T @ v, torch.eye(6), atol=1e-5)
        assert s[3:].max() < 1e-5 * s[0]


def test_the_trailing_triplets():
    w = matrix(40, 30, 0.3)
    u, s, v = bottom_svd(w, 4)
    exact = torch.linalg.svd(w)
    assert torch.allclose(s, exact.S[-4:], atol=1e-6)
    assert torch.allclose((u * s) @ v.T, exact.U[:, 26:30] * exact.S[-4:] @ exact.Vh[-4:], atol=1e-6)


@pytest.mark.parametrize("shape", [(50, 20), (20, 50), (32, 32)])
def test_the_first_columns_of_q_need_only_the_first_columns_of_w(shape):
    torch.manual_seed(0)
    w = torch.randn(*shape)
    q, r = thin_qr(w, 5)
    full_q, full_r = torch.linalg.qr(w)
    assert torch.allclose(q @ r, full_q[:, :5] @ full_r[:5], atol=3e-6)
    assert torch.allclose(q.T @ q, torch.eye(5), atol=1e-6) and (r.diagonal() >= 0).all()
