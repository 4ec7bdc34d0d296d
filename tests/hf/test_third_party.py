"""A method of another package: really installed, found by its entry point, and held to the laws of the house."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "third_party_method"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of site-packages with the example package in it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--target", str(folder), str(EXAMPLE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def run(site: Path, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT / "src"), str(ROOT / "tests")])}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=cwd, timeout=300, check=False
    )


PROGRAM = """
import sys, torch, warnings
from torch import nn
import veneer
from veneer import PeftConfig, PeftModel, PeftType, get_peft_model

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))

torch.manual_seed(0)
x, base = torch.randn(3, 4), Net()
config = veneer.RowGainConfig(target_modules=["a"], start=0.5)
assert str(config.peft_type) == "ROW_GAIN" and PeftType.ROW_GAIN == "ROW_GAIN"
model = get_peft_model(base, config)
assert [n for n, p in model.named_parameters() if p.requires_grad] == ["base_model.model.a.row_gain_g.default"]
y = model.eval()(x)
model.save_pretrained(sys.argv[1])
assert type(PeftConfig.from_pretrained(sys.argv[1])) is veneer.RowGainConfig
plain = model.unload()
again = PeftModel.from_pretrained(plain, sys.argv[1])
assert torch.equal(again(x), y)
assert torch.allclose(again.merge_and_unload()(x), y, atol=1e-6)
"""


REGISTERING = """
from dataclasses import dataclass
import torch, pytest, peft
from torch import nn
from veneer.core.adapter import Reweight
from veneer.core.config import LayerConfig
from peft.utils import register_peft_method

@dataclass
class DoubleConfig(LayerConfig):
    pass

class Double(Reweight):
    def __init__(self, site, config):
        super().__init__(site, config)
        self.twice = nn.Parameter(torch.tensor(2.0))
    def merged(self, weight, bias):
        return weight * self.twice, bias

register_peft_method(name="double", config_cls=DoubleConfig, model_cls=Double, prefix="twice")
config = DoubleConfig(target_modules=["0"])
model = peft.get_peft_model(nn.Sequential(nn.Linear(2, 2, bias=False)), config)
x = torch.ones(1, 2)
with model.disable_adapter():
    base = model(x)
assert torch.equal(model(x), 2 * base) and config.peft_type == "DOUBLE" and model.base_model.prefix == "twice"
with pytest.raises(ValueError, match="exists already"):
    register_peft_method(name="double", config_cls=DoubleConfig, model_cls=Double)
with pytest.raises(ValueError, match="lower case"):
    register_peft_method(name="Triple", config_cls=DoubleConfig, model_cls=Double)
with pytest.raises(NotImplementedError, match="here a method is one Adapter class"):
    register_peft_method(name="tuner", config_cls=DoubleConfig, model_cls=peft.LoraModel)
"""


def test_it_is_made_saved_loaded_and_merged_and_another_registered(site, tmp_path) -> None:
    done = run(site, "-c", "import veneer; veneer.install_as_peft()\n" + PROGRAM + REGISTERING, str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_command_lists_it(site) -> None:
    done = run(site, "-m", "veneer.cli.main", "methods")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "row_gain" in done.stdout and "RowGain" in done.stdout


def test_its_own_tests_are_the_laws(site) -> None:
    done = run(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE / "tests"))
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_laws_that_do_not_hold_are_found(site, tmp_path) -> None:
    """The laws can fail: a method whose merge forgets the bias is caught."""
    (tmp_path / "test_wrong.py").write_text(
        "from functools import partial\n"
        "from veneer_row_gain import RowGain, RowGainConfig\n"
        "from veneer.testing import Laws, Row\n"
        "RowGain.delta = lambda self, x: x\n"
        "RowGain.merged = lambda self, w, b: (w * self.row_gain_g.exp()[:, None] + 1, b)\n"
        "class TestWrong(Laws):\n"
        "    rows = [Row('wrong', partial(RowGainConfig), kinds=frozenset({'linear'}), tested=frozenset({'linear'}))]\n"
    )
    done = run(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_wrong.py"))
    assert done.returncode == 1 and "FAILED" in done.stdout and "test_start_is_the_base" in done.stdout


def test_a_broken_package_is_named_and_keeps_nothing_else_from_working(tmp_path) -> None:
    record = tmp_path / "broken_method-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-method\nVersion: 1.0\n")
    (record / "entry_points.txt").write_text("[veneer.methods]\nbroken = broken_method\n")
    (tmp_path / "broken_method.py").write_text("raise ImportError('no module named something')\n")
    done = run(tmp_path, "-c", "import veneer; print(veneer.LoraConfig(r=2).r)")
    assert done.returncode == 0 and done.stdout.strip() == "2"
    assert "package broken-method could not be loaded" in done.stderr and "no module named something" in done.stderr


def test_an_adapter_of_a_method_that_is_not_installed_is_said(tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "ROW_GAIN"}')
    done = run(tmp_path, "-c", f"import veneer; veneer.PeftConfig.from_pretrained({str(tmp_path)!r})")
    assert "No method is registered for peft_type 'ROW_GAIN'" in done.stderr and "once the package" in done.stderr
