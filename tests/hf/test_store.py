"""Many tenants' adapters in one folder, addressed by content."""

from __future__ import annotations

import pytest
import torch

from hf import tiny
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.hf.pool import AdapterPool
from veneer.hf.store import AdapterStore


@pytest.fixture
def adapters(tmp_path):
    folders = []
    for i in range(3):
        base = tiny.llama()
        torch.manual_seed(i)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.save_pretrained(tmp_path / f"adapter{i}")
        folders.append(tmp_path / f"adapter{i}")
    return folders


def test_equal_adapters_are_kept_once_and_served_by_the_tenants_name(tmp_path, adapters):
    store = AdapterStore(tmp_path / "store")
    digests = [store.put(f"tenant-{i}", adapters[i % 3]) for i in range(300)]
    assert len(set(digests)) == 3 and len(list((tmp_path / "store" / "objects").glob("??/*"))) == 3
    assert sorted(store) == sorted(f"tenant-{i}" for i in range(300))
    pool = AdapterPool(tiny.llama(), store.folders())
    with torch.no_grad():
        for tenant in ("tenant-0", "tenant-299"):
            wanted = PeftModel.from_pretrained(tiny.llama(), adapters[int(tenant[7:]) % 3])(tiny.IDS).logits
            with pool.use(tenant) as model:
                torch.testing.assert_close(model(tiny.IDS).logits, wanted)


def test_a_new_version_moves_the_name_and_prune_takes_the_old_one(tmp_path, adapters):
    store = AdapterStore(tmp_path / "store")
    old = store.put("a", adapters[0])
    new = store.put("a", adapters[1])
    assert store.digest("a") == new and store.place(old).is_dir()
    assert store.prune() == [old] and not store.place(old).exists() and store.folder("a").is_dir()


def test_settings_in_another_order_are_the_same_and_other_ones_are_not(tmp_path, adapters):
    store, config = AdapterStore(tmp_path / "store"), adapters[0] / "adapter_config.json"
    first = store.put("a", adapters[0])
    lines = config.read_text()
    config.write_text("\n" + lines + "\n")
    assert store.put("b", adapters[0]) == first
    config.write_text(lines.replace('"lora_alpha": 8', '"lora_alpha": 9'))
    assert store.put("c", adapters[0]) != first


def test_damage_is_found(tmp_path, adapters):
    store = AdapterStore(tmp_path / "store")
    digest, whole = store.put("a", adapters[0]), store.put("b", adapters[1])
    file = store.folder("a") / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0" + b"x")
    assert store.damaged() == [digest] and whole != digest


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden"])
def test_bad_input_is_refused(tmp_path, adapters, name):
    store = AdapterStore(tmp_path / "store")
    with pytest.raises(ValueError, match="usable as a file name"):
        store.put(name, adapters[0])
    with pytest.raises(ValueError, match="no adapter to be stored"):
        store.put("a", tmp_path)
    with pytest.raises(KeyError, match="no adapter of 'nobody'"):
        store.folder("nobody")
    assert not (tmp_path / "store").exists()
