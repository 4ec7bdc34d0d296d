"""Commands as a user types them: what they print, and errors in a sentence with an exit code."""

import json

import pytest

from veneer.cli.main import main


def run(capsys, line):
    code = 0
    try:
        main(line if isinstance(line, list) else line.split())
    except SystemExit as end:
        code = end.code or 0
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize(
    ("line", "code", "sentence"),
    [
        ("train nowhere.yaml", 1, "There is no settings file 'nowhere.yaml'."),
        ("train", 1, "Name a settings file"),
        ("train --model m", 2, "'data' is missing"),
        ("inspect /nowhere/at-all", 1, "there is no such folder"),
        ("generate", 1, "There is nothing to answer"),
        ("generate hello", 1, "Say which model"),
        ("configs ls nowhere", 1, "There is no folder 'nowhere'"),
    ],
)
def test_errors_are_one_sentence_and_an_exit_code(capsys, line, code, sentence):
    got, _, err = run(capsys, line)
    assert got == code
    assert sentence in err
    assert "Traceback" not in err


def test_debug_shows_where_an_error_came_from():
    with pytest.raises(FileNotFoundError):
        main(["train", "nowhere.yaml", "--debug"])


def test_from_settings_to_a_merged_model(capsys, base, facts, tmp_path):
    settings = tmp_path / "run.yaml"
    settings.write_text(
        f"model: {base}\ndata: {{train: '{facts}', holdout: 4}}\nadapter: {{method: lora, r: 4}}\n"
        f"output: {tmp_path / 'out'}\nlog: {{progress: plain}}\neval: {{prompts: 2, max_new_tokens: 6}}\n"
    )
    code, out, _ = run(capsys, f"plan {settings} --steps 4 --json")
    plan = json.loads(out)
    assert (code, plan["schedule"]["steps"], plan["held_rows"]) == (0, 4, 4)
    code, out, _ = run(capsys, f"train {settings} --dry-run --steps 4")
    assert code == 0
    assert "⟦The sky is blue<|im_end|>⟧" in out
    assert not (tmp_path / "out").exists()
    code, out, _ = run(capsys, f"train {settings} --steps 4 --set train.learning_rate=1e-2")
    assert code == 0
    assert "step 4/4" in out
    assert "held-out loss" in out
    code, out, _ = run(capsys, f"inspect {tmp_path / 'out'} --json")
    assert json.loads(out)["config"]["r"] == 4
    code, out, _ = run(capsys, f"inspect {tmp_path / 'out'} --spectrum")
    assert code == 0 and "rank_pattern: {" in out and (tmp_path / "out" / "spectrum.png").is_file()
    code, out, _ = run(capsys, f"inspect {tmp_path / 'out'}")
    assert "self_attn.q_proj" in out
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        json.dumps({"instruction": "What colour", "input": "sky"}) + "\n" + json.dumps({"prompt": "Hi"}) + "\n"
    )
    answers = tmp_path / "answers.jsonl"
    code, _, _ = run(capsys, f"generate --adapter {tmp_path / 'out'} --file {prompts} --out {answers} -n 4")
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert code == 0
    assert [set(row) for row in rows] == [{"instruction", "input", "answer"}, {"prompt", "answer"}]
    code, out, _ = run(capsys, f"merge {tmp_path / 'out'} --out {tmp_path / 'merged'}")
    assert code == 0
    assert "Merged into" in out
    code, out, _ = run(
        capsys, ["generate", "--model", str(tmp_path / "merged"), "-n", "4", "--no-stream", "What colour is the sky 1"]
    )
    assert code == 0


def test_configs_are_listed_checked_and_shown(capsys, tmp_path):
    good = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "inference_mode": True}
    (tmp_path / "good.json").write_text(json.dumps(good))
    (tmp_path / "bad.json").write_text(json.dumps({**good, "lora_alfa": 3}, indent=0))
    code, out, _ = run(capsys, f"configs check {tmp_path / 'good.json'}")
    assert (code, out) == (0, f"{tmp_path / 'good.json'}: ok\n")
    code, out, _ = run(capsys, f"configs check {tmp_path / 'bad.json'}")
    assert code == 1
    assert "bad.json:9: LoraConfig has no setting 'lora_alfa'; did you mean lora_alpha?" in out
    code, out, _ = run(capsys, f"configs ls {tmp_path}")
    assert "good.json" in out and "1 error" not in out.split("good.json")[1].splitlines()[0]
    code, out, _ = run(capsys, f"configs show {tmp_path / 'good.json'}")
    assert json.loads(out)["lora_dropout"] == 0.0


def test_methods_are_those_of_the_registry(capsys):
    import veneer.methods  # noqa: F401
    from veneer.core import registry

    code, out, _ = run(capsys, "methods --json")
    assert {row["name"] for row in json.loads(out)} == {name.lower() for name in registry.METHODS}
