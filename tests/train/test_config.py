"""Settings: every error at once, each with its place and the nearest valid name."""

import json

import pytest
import yaml

from veneer.train import config

GOOD = {"model": "m", "data": {"train": "d.jsonl"}, "output": "o"}


def problems(path, *words):
    with pytest.raises(config.ConfigError) as caught:
        config.load(path, [], words)
    return str(caught.value)


def test_all_errors_come_at_once_with_file_line_and_suggestion(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\ndata:\n  train: d.jsonl\n  max_lenght: 5\ntrain:\n  epochs: many\n  lr: 1e-4\n  schedule: cosin\n"
        "learning_rate: 3\nadapter: {r: 8}\n"
    )
    text = problems(file)
    assert text.startswith("7 settings are wrong")
    assert f"{file}:4: there is no setting 'data.max_lenght'; did you mean data.max_length?" in text
    assert f"{file}:6: 'train.epochs' is 'many'" in text
    assert f"{file}:7: there is no setting 'train.lr'; here it is called train.learning_rate." in text
    assert f"{file}:8: 'train.schedule' is 'cosin'" in text and "'cosine'" in text
    assert f"{file}:9: there is no setting 'learning_rate'; learning_rate stands under train." in text
    assert f"{file}:10: 'adapter'" in text and "method: lora" in text
    assert "'output' is missing" in text


@pytest.mark.parametrize("ending", [".yaml", ".json", ".toml"])
def test_the_three_formats_say_the_same_and_know_their_lines(tmp_path, ending):
    bodies = {
        ".yaml": "model: m\noutput: o\ndata:\n  train: d.jsonl\ntrain:\n  epochs: 2\n  epoch: 3\n",
        ".json": '{"model": "m",\n"output": "o",\n"data": {\n\t"train": "d.jsonl"},\n'
        '"train": {\n\t"epochs": 2,\n\t"epoch": 3}}\n',
        ".toml": 'model = "m"\noutput = "o"\n[data]\ntrain = "d.jsonl"\n[train]\nepochs = 2\nepoch = 3\n',
    }
    file = tmp_path / f"run{ending}"
    file.write_text(bodies[ending])
    assert f"{file}:7: there is no setting 'train.epoch'; did you mean train.epochs?" in problems(file)
    file.write_text(
        "\n".join(bodies[ending].replace(',\n\t"epoch": 3', "").splitlines()[: None if ending == ".json" else -1])
    )
    assert config.load(file).train.epochs == 2


def test_overrides_from_the_command_line_win_and_are_named_when_wrong(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    words = ["--epochs", "1", "--train.learning-rate", "2e-4", "--model.dtype=float32", "--out", "p", "--overwrite"]
    settings = config.load(file, ["adapter.r=4"], words)
    assert (settings.train.epochs, settings.train.learning_rate) == (1, 2e-4)
    assert (settings.model.path, settings.model.dtype) == ("m", "float32")
    assert (settings.output.dir, settings.output.overwrite) == ("p", True)
    assert settings.adapter == {"method": "lora", "r": 4}
    assert "--batch-size: 'train.batch_size' is 0" in problems(file, "--train.batch-size", "0").replace(
        "train.batch-size", "batch-size"
    )
    assert "several sections have 'batch_size'" in problems(file, "--batch-size", "2")


def test_settings_come_from_the_command_line_alone():
    settings = config.load(None, [], ["--model", "m", "--data", "d.jsonl", "--out", "o", "--adapter", "a.json"])
    assert settings.data.train == ["d.jsonl"]
    assert settings.adapter == {"path": "a.json"}


def test_what_is_dumped_reads_back_the_same(tmp_path):
    settings = config.load(None, [], ["--model", "m", "--data", "d.jsonl", "--out", "o", "--lr", "3e-5"])
    file = tmp_path / "run.yaml"
    file.write_text(settings.dump())
    assert config.load(file) == settings


def test_a_repeated_key_is_refused(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: a\ndata: d\nmodel: b\n")
    with pytest.raises(ValueError, match=r"run.yaml:3: the key 'model' stands already on line 1"):
        config.load(file)


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("a.yaml", "model: [\n", "a.yaml:2: this is not valid YAML"),
        ("a.json", '{"model": }', "a.json:1: this is not valid JSON"),
        ("a.toml", "model = \n", "a.toml:1: this is not valid TOML"),
        ("a.ini", "x", "settings are read from"),
        ("a.yaml", "- 1\n", "must be a mapping"),
    ],
)
def test_broken_files_are_refused_in_a_sentence(tmp_path, name, body, message):
    (tmp_path / name).write_text(body)
    with pytest.raises(ValueError, match=message):
        config.load(tmp_path / name)


def test_paths_are_also_looked_for_beside_the_settings_file(tmp_path):
    (tmp_path / "d.jsonl").write_text("")
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**GOOD, "data": "d.jsonl#10"}))
    assert config.load(file).data.train == [str(tmp_path / "d.jsonl#10")]


def test_the_adapter_block_is_checked_against_its_method():
    from veneer.train import adapters

    found = dict(adapters.problems({"method": "lora", "rank": 3, "lora_alfa": 4}))
    assert "did you mean r?" in found[("rank",)]
    assert "did you mean lora_alpha?" in found[("lora_alfa",)]
    assert "did you mean lora" in adapters.problems({"method": "lorra"})[0][1]
    assert adapters.problems({"method": "lora", "r": 0})
    assert not adapters.problems({"method": "lora", "r": 3})


def test_a_config_saved_for_inference_trains_with_a_notice(tmp_path):
    from veneer.train import adapters

    file = tmp_path / "lora.json"
    file.write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "inference_mode": True, "target_modules": ["q_proj"]})
    )
    notices = []
    built = adapters.build({"path": str(file)}, notices)
    assert built.inference_mode is False
    assert "inference_mode" in notices[0]
    assert adapters.build(adapters.resolved(built)).to_dict() == built.to_dict()


def test_a_bare_key_is_looked_for_in_the_sections_that_the_task_reads():
    words = ["--model", "m", "--data", "d.jsonl", "--out", "o", "--max-new-tokens", "9"]
    assert config.load(None, [], words).eval.max_new_tokens == 9
    with pytest.raises(
        config.ConfigError, match=r"several sections have .*--eval.max_new_tokens or --rl.max_new_tokens"
    ):
        config.load(None, [], [*words, "--task", "grpo"])
    assert config.load(None, [], ["--pooling", "last", *words[:6], "--task", "embeddings"]).embeddings.pooling == "last"
