"""When a kernel runs: on its devices, unless it is switched off, fails its check, or triton is missing."""

from __future__ import annotations

import importlib
import runpy
import sys
import warnings

import pytest
import torch

from veneer.ops import kernels
from veneer.ops.kernels import KERNELS, kernel, switch


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_passes_its_own_check(name, device) -> None:
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            assert kernel(name, torch.ones(2, 2, device=device)).__name__ == f"veneer.ops.triton.{name}"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", KERNELS)
def test_a_wrong_kernel_is_found_told_once_and_left_alone(name, device, monkeypatch) -> None:
    module, x = importlib.import_module(f"veneer.ops.triton.{name}"), torch.ones(2, 2, device=device)
    work = {"dropout": "spread", "pair": "pair", "gather": "expand", "nf4": "unpacked", "nf4_rows": "product"}[name]
    right = getattr(module, work)

    def wrong(*given):
        found = right(*given)
        return (found[0], found[1] * 1.2) if isinstance(found, tuple) else found.mul_(1.2)

    with monkeypatch.context() as patched:
        patched.setattr(module, work, wrong)
        with pytest.warns(RuntimeWarning, match=rf"kernel '{name}'.* is not used on .*VENEER_KERNELS_OFF={name}"):
            assert kernel(name, x) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel(name, x) is None
    if name == "nf4":
        assert kernel(name, x.bfloat16()) is module  # each dtype is checked for itself
    switch(name)
    assert kernel(name, x) is module


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_result_that_is_no_number_is_wrong(value, device, monkeypatch) -> None:
    module = importlib.import_module("veneer.ops.triton.nf4")
    monkeypatch.setattr(module, "check", lambda *_: {"weight": value, "other": 0.0})
    with pytest.warns(RuntimeWarning, match="its weight is"):
        assert kernel("nf4", torch.ones(1, device=device)) is None


def test_a_kernel_that_does_not_compile_is_left_alone(device, monkeypatch) -> None:
    def check(*_):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(importlib.import_module("veneer.ops.triton.pair"), "check", check)
    with pytest.warns(RuntimeWarning, match="failed with RuntimeError: out of resource"):
        assert kernel("pair", torch.ones(1, device=device)) is None


def test_switches(device, monkeypatch) -> None:
    x = torch.ones(1, 1, device=device)
    switch("nf4", False)
    assert kernel("nf4", x) is None
    assert kernel("pair", x) is not None
    switch("all", False)
    assert all(kernel(name, x) is None for name in KERNELS)
    switch("pair")
    assert kernel("pair", x) is not None
    assert kernels.report() == {f"pair {device} torch.float32": True}
    with pytest.raises(ValueError, match="no kernel 'nf5'; there are: dropout"):
        switch("nf5")
    path = kernels.__file__
    monkeypatch.setenv("VENEER_KERNELS_OFF", "nf4, gather")
    assert runpy.run_path(path)["_off"] == {"nf4", "gather"}
    monkeypatch.setenv("VENEER_KERNELS_OFF", "all")
    assert runpy.run_path(path)["_off"] == set(KERNELS)


def test_without_triton_one_sentence_says_so(device, monkeypatch) -> None:
    for name in list(sys.modules):
        if name.startswith("veneer.ops.triton"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    kernels._tell_absent.cache_clear()
    with pytest.warns(RuntimeWarning, match="pip install triton"):
        assert kernel("pair", torch.ones(1, device=device)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel("nf4", torch.ones(1, device=device)) is None


def test_other_tensors_have_no_kernels(device) -> None:
    assert kernel("pair", torch.ones(1, device=device, dtype=torch.float64)) is None
    assert kernel("pair", torch.ones(1, device="meta")) is None
    assert kernel("pair", torch.ones(1, device=device).as_subclass(type("Sub", (torch.Tensor,), {}))) is None
