"""Adapters that the peer wrote: we read them, answer as it did, and write them back the same.

The folders are made by `make.py`; nothing here needs the peer to be installed. A folder is skipped, with the reason,
while its method is not built.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import veneer
import veneer.methods
from golden.bases import build
from veneer.core.registry import METHODS

FOLDERS = sorted(path for path in (Path(__file__).parent / "folders").iterdir() if (path / "io.safetensors").exists())
TOLERANCE = 1e-5
REWRITTEN = {"peft_version", "auto_mapping", "base_model_name_or_path", "inference_mode"}
"""Fields that describe who wrote the file and for what base, not the adapter."""


def holds(path, beginning):
    """Whether a folder has an output of this kind."""
    with safe_open(path / "io.safetensors", "pt") as file:
        return any(key.startswith(beginning) for key in file.keys())  # noqa: SIM118 - not a dict


def over(folders):
    return pytest.mark.parametrize("folder", folders, ids=lambda path: path.name)


def load(folder):
    """Our model with the adapter on its base, and the inputs and outputs that go with it."""
    kind = json.loads((folder / "adapter_config.json").read_text())["peft_type"]
    if kind not in METHODS:
        pytest.skip(f"{kind} is not built yet")
    with safe_open(folder / "io.safetensors", "pt") as file:
        base = build(file.metadata()["base"])
        io = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    try:
        model = veneer.PeftModel.from_pretrained(base, folder)
    except NotImplementedError as error:
        pytest.skip(str(error))
    return model.eval(), io


def answer(model, io):
    given = {k: v for k, v in io.items() if k.split(".")[0] not in ("output", "merged")}
    with torch.no_grad():
        y = model(given.pop("x"), **given) if "x" in given else model(**given)
    return y.logits if hasattr(y, "logits") else y


def assert_equal(ours, theirs, io):
    """Equal wherever the text is: what stands at padding is nobody's answer."""
    assert ours.shape == theirs.shape
    mask = io.get("attention_mask")
    if mask is not None and theirs.dim() == 3 and "decoder_input_ids" not in io:
        prompt = torch.ones(len(mask), theirs.shape[1] - mask.shape[1])
        keep = torch.cat([prompt, mask], dim=1).bool()
        ours, theirs = ours[keep], theirs[keep]
    gap = (ours - theirs).abs().max().item()
    assert gap <= TOLERANCE * max(1.0, theirs.abs().max().item()), f"outputs differ by {gap:.2e}"


@over(FOLDERS)
def test_we_answer_as_the_peer_did(folder):
    model, io = load(folder)
    assert_equal(answer(model, io), io["output"], io)


@over([path for path in FOLDERS if holds(path, "merged")])
def test_merged_we_answer_as_the_peer_did(folder):
    model, io = load(folder)
    assert_equal(answer(model.merge_and_unload(), io), io["merged"], io)


@over([path for path in FOLDERS if holds(path, "output.")])
def test_adapters_in_sub_folders(folder):
    model, io = load(folder)
    for name in [key.split(".")[1] for key in io if key.startswith("output.")]:
        model.load_adapter(folder / name, name)
        model.set_adapter(name)
        assert_equal(answer(model, io), io[f"output.{name}"], io)
    model.set_adapter("default")
    assert_equal(answer(model, io), io["output"], io)


@over(FOLDERS)
def test_written_again_it_is_the_same_adapter(folder, tmp_path):
    model, _ = load(folder)
    embeddings = {"save_embedding_layers": True} if folder.name == "lora_resized" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path, **embeddings)
    theirs, ours = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path))
    assert sorted(ours) == sorted(theirs)
    for key, tensor in theirs.items():
        assert ours[key].shape == tensor.shape, key
        assert torch.equal(ours[key].to(tensor.dtype), tensor), key
    assert_same_settings(*(json.loads((path / "adapter_config.json").read_text()) for path in (folder, tmp_path)))


def assert_same_settings(theirs, ours):
    """What we write means what the peer wrote; a field we leave out is one that stands at its default there too."""
    for key in set(theirs) & set(ours) - REWRITTEN:
        a, b = theirs[key], ours[key]
        if isinstance(a, list) and a and isinstance(a[0], str):  # the peer writes its sets in any order
            a, b = sorted(a), sorted(b)
        assert a == b, key
    left_out = {key: theirs[key] for key in set(theirs) - set(ours) - REWRITTEN}
    unset = (None, False, [], {}, "none")
    config = METHODS[theirs["peft_type"]].config
    defaults = {name: field.default for name, field in config.__dataclass_fields__.items()}
    wrong = {k: v for k, v in left_out.items() if v not in unset and v != defaults.get(k)}
    assert not wrong, f"settings lost: {wrong}"
