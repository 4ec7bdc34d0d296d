"""A pool of many adapters: right answers, a bound that holds, folders read on demand, threads that take turns."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hf.mixing import folders
from hf.tiny import IDS, llama
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.engine import checkpoint
from veneer.hf.pool import AdapterPool


def library(where: Path, count: int) -> dict[str, str]:
    """``count`` LoRA folders, each with tensors of its own."""
    model = get_peft_model(llama(), LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(where / "pattern")
    shapes = checkpoint.read(where / "pattern")
    generator, out = torch.Generator().manual_seed(0), {}
    for i in range(count):
        folder = where / f"n{i:04d}"
        checkpoint.write(folder, {k: torch.randn(v.shape, generator=generator) for k, v in shapes.items()})
        shutil.copy(where / "pattern" / "adapter_config.json", folder)
        out[folder.name] = str(folder)
    return out


SIZE = 2 * (16 + 16) * 4
"""Bytes of one of them: two layers, A and B of rank 1 in float32."""


@pytest.fixture(scope="module")
def thousand(tmp_path_factory) -> dict[str, str]:
    return library(tmp_path_factory.mktemp("library"), 1000)


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def alone(folder: str):
    return logits(PeftModel.from_pretrained(llama(), folder))


def test_a_thousand_adapters_on_one_model_within_the_bound(thousand) -> None:
    pool = AdapterPool(llama(), thousand, max_bytes=20 * SIZE)
    answers = {}
    for name in pool.names:
        with pool.use(name) as model:
            if int(name[1:]) % 250 == 0:
                answers[name] = logits(model)
        assert pool.bytes <= 20 * SIZE
    assert pool.loads == 1000 and pool.evictions == 980 and pool.resident == pool.names[-20:]
    for name, y in answers.items():
        assert torch.equal(y, alone(thousand[name]))
    held = {n for host in pool.model.base_model.hosts() for n in host.adapters}
    assert held == set(pool.resident) == set(pool.model.peft_config)
    assert torch.equal(logits(pool.model), logits(llama()))


def test_the_least_recently_used_goes_first(thousand) -> None:
    pool = AdapterPool(llama(), thousand, max_bytes=3 * SIZE)
    for name in ("n0000", "n0001", "n0002", "n0000", "n0003"):
        with pool.use(name):
            pass
    assert pool.resident == ["n0002", "n0000", "n0003"]


def test_main_memory_spares_the_folder(thousand, tmp_path) -> None:
    own = {n: str(shutil.copytree(thousand[n], tmp_path / n)) for n in ("n0000", "n0001", "n0002")}
    pool = AdapterPool(llama(), own, max_bytes=SIZE, cpu_bytes=SIZE)
    for name in own:
        with pool.use(name) as model:
            logits(model)
    wanted = alone(own["n0001"])
    for name in own:
        (tmp_path / name / checkpoint.SAFE_NAME).unlink()
    with pool.use("n0001") as model:
        assert torch.equal(logits(model), wanted)
    with pytest.raises(FileNotFoundError), pool.use("n0000"):
        pass


def test_a_mixed_batch_from_the_pool(thousand) -> None:
    pool = AdapterPool(llama(), thousand, max_bytes=2 * SIZE)
    with pool.use("n0005", "n0007", "__base__") as model:
        y = logits(model, torch.cat([IDS, IDS[:1]]), adapter_names=["n0005", "n0007", "__base__"])
    assert torch.allclose(y[:1], alone(thousand["n0005"])[:1], atol=1e-6)
    assert torch.allclose(y[1:2], alone(thousand["n0007"])[1:], atol=1e-6)
    assert torch.allclose(y[2:], logits(llama())[:1], atol=1e-6)


def test_threads_each_get_their_own_adapter(thousand) -> None:
    names = [f"n{i:04d}" for i in range(12)]
    wanted = {name: alone(thousand[name]) for name in names}
    pool = AdapterPool(llama(), thousand, max_bytes=4 * SIZE)
    start = threading.Barrier(6)

    def work(k: int) -> bool:
        start.wait()
        right = True
        for name in names[k:] + names[:k]:
            with pool.use(name) as model:
                right &= torch.equal(logits(model), wanted[name])
        return right

    with ThreadPoolExecutor(6) as workers:
        assert all(workers.map(work, range(6)))
    assert pool.bytes <= 4 * SIZE


def test_the_models_own_adapters_stay_and_train_on(thousand) -> None:
    model = get_peft_model(llama(), LoraConfig(target_modules=["v_proj"], task_type="CAUSAL_LM"), "mine")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    pool = AdapterPool(model, thousand, max_bytes=SIZE)
    for name in ("n0001", "n0002"):
        with pool.use(name):
            assert model.active_adapters == [name]
    pool.evict("n0002")
    assert model.active_adapters == ["mine"] and set(model.peft_config) == {"mine"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_misuse_is_refused_and_changes_nothing(thousand, tmp_path) -> None:
    pool = AdapterPool(llama(), thousand, max_bytes=2 * SIZE)
    with pool.use("n0001"):
        pass
    for refused, words in (
        (lambda: pool.use("nobody"), "no adapter 'nobody'"),
        (lambda: pool.use("n0001", "n0002", "n0003"), "above max_bytes"),
    ):
        with pytest.raises(ValueError, match=words), refused():
            pass
    with pool.use("n0001"):
        with pytest.raises(ValueError, match="at once"), pool.use("n0002"):
            pass
        with pytest.raises(ValueError, match="in use"):
            pool.evict("n0001")
    with pytest.raises(ValueError, match="not an adapter folder"):
        pool.register("x", tmp_path)
    with pytest.raises(ValueError, match="No sub-folder"):
        AdapterPool(llama(), tmp_path)
    wide = folders(tmp_path, ("wide",))["wide"]
    checkpoint.write(wide, {"base_model.model.nowhere.lora_A.weight": torch.ones(2, 2)})
    pool.register("broken", wide)
    with pytest.raises(ValueError, match="do not fit"), pool.use("broken"):
        pass
    assert "broken" not in pool.model.peft_config
    with pool.use("n0001") as model:
        assert torch.equal(logits(model), alone(thousand["n0001"]))
