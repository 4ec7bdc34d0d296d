"""The example examples/reuters as a user runs it: a sentence encoder learns to sort real news by topic."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from veneer.cli.main import main
from veneer.train.pretrained import default_cache

EXAMPLE = Path(__file__).parents[2] / "examples" / "reuters"


@pytest.fixture(scope="module")
def data():
    spec = importlib.util.spec_from_file_location("get_data", EXAMPLE / "get_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.fetch(default_cache() / "reuters")
    except OSError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_a_hundred_steps_take_minilm_from_guessing_to_nine_in_ten(data, tmp_path, capsys):
    settings = yaml.safe_load((EXAMPLE / "config.yaml").read_text())
    settings["model"] = str(data / "model")
    for part in ("train", "eval"):
        settings["data"][part] = str(data / Path(settings["data"][part]).name)
    settings["output"] = str(tmp_path / "out")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    main(["train", str(file), "--log.progress", "off"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["steps"] == 100
    assert report["before"]["accuracy"] < 0.4
    assert report["after"]["accuracy"] > 0.88 and report["after"]["f1"] > 0.6
    capsys.readouterr()
    main(["generate", "--adapter", str(tmp_path / "out"), "opec ministers meet in geneva to discuss crude oil output"])
    assert capsys.readouterr().out.startswith("crude 0.")
