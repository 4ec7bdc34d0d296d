"""What is missing, too old, in the way or ambiguous is said in a sentence, and nothing is half done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import veneer
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.core import errors


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(x))


def test_names_that_match_nothing_are_refused_here_and_pass_with_a_warning_under_the_peers_name(monkeypatch) -> None:
    config = {"target_modules": ["a", "query"], "modules_to_save": ["head"]}
    model = Net()
    with pytest.raises(ValueError, match="query"):
        get_peft_model(model, LoraConfig(**config))
    assert {type(m) for m in model.modules()} == {Net, nn.Linear}
    monkeypatch.setattr(errors, "lenient", True)
    with pytest.warns(errors.PeftWarning, match="query"):
        adapted = get_peft_model(model, LoraConfig(**config))
    assert adapted.base_model.targeted_module_names == ["a"]
    with pytest.raises(errors.NoMatchingPeftModuleError, match=r"Target modules {'query'} not found"):
        get_peft_model(Net(), LoraConfig(target_modules=["query"]))


def test_a_folder_whose_layout_fits_no_layer_says_which_keys_are_alike(tmp_path) -> None:
    get_peft_model(Net(), LoraConfig(target_modules=["a"])).save_pretrained(tmp_path)
    renamed = nn.Sequential()
    renamed.add_module("first", nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"Target modules {'a'} not found in the base model"):
        PeftModel.from_pretrained(renamed, tmp_path)
    assert isinstance(renamed.first, nn.Linear)


def test_a_tensor_of_another_shape_can_be_caught_as_either_error(tmp_path) -> None:
    get_peft_model(Net(), LoraConfig(target_modules=["a"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 2}))
    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind, match=r"size mismatch.*nothing was loaded.*\(8, 4\) in the file"):
            PeftModel.from_pretrained(Net(), tmp_path)


def test_what_is_not_there_can_be_caught_as_either_error(tmp_path) -> None:
    for kind in (ValueError, FileNotFoundError):
        with pytest.raises(kind, match=r"Can't find 'adapter_config\.json' at"):
            veneer.PeftConfig.from_pretrained(tmp_path)


def test_more_names_than_rows_are_refused() -> None:
    model = get_peft_model(Net(), LoraConfig(target_modules=["a"])).eval()
    with pytest.raises(ValueError, match=r"Length of `adapter_names` should be the same.*2 and 3"):
        model(torch.ones(3, 4), adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match=r"non-existing adapter.*'other'"):
        model(torch.ones(1, 4), adapter_names=["other"])


def test_a_part_of_the_peer_that_is_not_rebuilt_says_so_when_it_is_used() -> None:
    code = (
        "import veneer; veneer.install_as_peft()\n"
        "from peft.tuners.lora.layer import LoraVariant, dispatch_default\n"
        "assert not isinstance(1, LoraVariant)\n"
        "try: dispatch_default()\n"
        "except NotImplementedError as error: print(error)\n"
    )
    source = str(Path(veneer.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": source}, check=False
    )
    assert "peft.tuners.lora.layer.dispatch_default is a part of PEFT's inner workings" in done.stdout, done.stderr
