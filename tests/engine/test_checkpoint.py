"""Adapter files: strict loading, whole or not there, the same bytes for the same tensors."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import veneer.core.files as files
from engine.test_tuner import IDS, config, made
from veneer import LoraConfig, PeftConfig
from veneer.engine import checkpoint


def test_two_saves_have_the_same_bytes(tmp_path) -> None:
    for name in ("one", "two"):
        tuner, _ = made(target_modules=["mlp.2", "mlp.0", "embed_tokens"])
        checkpoint.write(tmp_path / name, checkpoint.tensors(tuner, "default"))
        tuner.configs["default"].write(tmp_path / name)
    for file in (checkpoint.SAFE_NAME, "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("safe", [True, False])
def test_both_file_kinds_round_trip(tmp_path, safe: bool) -> None:
    tuner, _ = made()
    tensors = checkpoint.tensors(tuner, "default")
    checkpoint.write(tmp_path, tensors, safe=safe)
    back = checkpoint.read(tmp_path)
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) for k in back)


def test_every_kind_of_tensor_is_read_as_safetensors_reads_it(tmp_path) -> None:
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int8, torch.bool)
    held = {str(kind): torch.arange(6).view(2, 3).to(kind) for kind in kinds}
    held |= {"none": torch.empty(0, 4), "scalar": torch.tensor(2.0), "odd": torch.ones(3, dtype=torch.int8)}
    save_file(held, tmp_path / checkpoint.SAFE_NAME, metadata={"format": "pt"})
    found = checkpoint.read(tmp_path)
    assert found.keys() == held.keys()
    for key, value in held.items():
        assert found[key].dtype is value.dtype and found[key].shape == value.shape
        assert found[key].is_contiguous() and torch.equal(found[key].double(), value.double())


def test_what_is_written_into_a_read_tensor_stays_out_of_the_file(tmp_path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / checkpoint.SAFE_NAME)
    checkpoint.read(tmp_path)["a"].zero_()
    assert torch.equal(checkpoint.read(tmp_path)["a"], torch.ones(3))


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_a_file_that_does_not_fit_changes_nothing_and_says_how(fault: str) -> None:
    tuner, _ = made()
    y = tuner(IDS)
    tensors = {k: torch.zeros_like(v) for k, v in checkpoint.tensors(tuner, "default").items()}
    key = "base_model.model.mlp.0.lora_A.weight"
    if fault == "missing":
        del tensors[key]
    elif fault == "unexpected":
        tensors["base_model.model.v_proj.lora_A.weight"] = torch.zeros(2, 8)
        key = "v_proj.lora_A"
    else:
        tensors[key] = torch.zeros(3, 8)
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        checkpoint.put(tuner, "default", tensors)
    assert key in str(error.value) and torch.equal(tuner(IDS), y)
    if fault == "shape":
        with pytest.raises(ValueError):
            checkpoint.put(tuner, "default", tensors, strict=False)
        report = checkpoint.put(tuner, "default", tensors, strict=False, ignore_mismatched_sizes=True)
        assert report.mismatched_keys[0][1:] == ((3, 8), (2, 8))
    else:
        report = checkpoint.put(tuner, "default", tensors, strict=False)
        assert report.missing_keys if fault == "missing" else report.unexpected_keys
    assert report.loaded and not torch.equal(tuner(IDS), y)


def test_other_module_names_are_explained() -> None:
    tuner, _ = made()
    tensors = {k.replace("mlp.", "ffn."): v for k, v in checkpoint.tensors(tuner, "default").items()}
    with pytest.raises(ValueError, match="key_mapping"):
        checkpoint.put(tuner, "default", tensors)


def test_truncated_and_absent_files_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors"):
        checkpoint.read(tmp_path)
    tuner, _ = made()
    path = checkpoint.write(tmp_path, checkpoint.tensors(tuner, "default"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="truncated"):
        checkpoint.read(tmp_path)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_disk_that_fills_or_ctrl_c_leaves_the_old_file(tmp_path, monkeypatch, failure) -> None:
    tuner, _ = made()
    path = checkpoint.write(tmp_path, checkpoint.tensors(tuner, "default"))
    tuner.configs["default"].write(tmp_path)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(handle) -> None:
        raise failure

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(type(failure)):
        checkpoint.write(tmp_path, {k: v + 1 for k, v in checkpoint.tensors(tuner, "default").items()})
    with pytest.raises(type(failure)):
        LoraConfig(r=64, target_modules=["x"]).write(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old and path.exists()


def test_a_config_that_cannot_be_written_leaves_the_old_one(tmp_path) -> None:
    one = config()
    one.write(tmp_path)
    old = (tmp_path / "adapter_config.json").read_bytes()
    one.rank_pattern = {"a": object()}
    with pytest.raises(TypeError, match="rank_pattern"):
        one.write(tmp_path)
    assert (tmp_path / "adapter_config.json").read_bytes() == old


def test_unknown_fields_of_a_file_are_kept_and_written_again(tmp_path) -> None:
    values = config().file_dict() | {"from_the_future": {"x": 1}, "peft_version": "9.9"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match=r"from_the_future.*9\.9"):
        read = PeftConfig.read(tmp_path)
    read.write(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["from_the_future"] == {"x": 1}


def test_malformed_configs_say_what_is_wrong(tmp_path) -> None:
    path: Path = tmp_path / "adapter_config.json"
    with pytest.raises(FileNotFoundError, match="not an adapter folder"):
        PeftConfig.read(tmp_path)
    for text, words in (("{", "not valid JSON"), ("[]", "JSON object"), ('{"peft_type": "LOAR"}', "LOAR")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            PeftConfig.read(tmp_path)
    with pytest.raises(TypeError, match="lora_alpha"):
        LoraConfig(lora_alpah=3)
    with pytest.raises(ValueError, match="task_type"):
        LoraConfig(task_type="CAUSAL")
    with pytest.raises(TypeError, match="eva_config"):
        LoraConfig(eva_config="yes")


NAMES = st.text(st.characters(categories=("Ll", "Lu", "Nd"), max_codepoint=127), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(NAMES, NAMES)
def test_keys_do_not_depend_on_names(first: str, second: str) -> None:
    tuner, _ = made()
    keys = checkpoint.tensors(tuner, "default").keys()
    for name in {first, second}:
        try:
            tuner.add(name, config())
        except ValueError as error:
            assert "name" in str(error)
            continue
        assert checkpoint.tensors(tuner, name).keys() == keys
    assert checkpoint.tensors(tuner, "default").keys() == keys
