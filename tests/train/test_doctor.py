"""A first settings file that works, and data looked over before training."""

import json

import pytest

from veneer.train import config, doctor, starter


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*texts):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def test_every_fault_is_named_with_its_rows(tmp_path, tokenizer):
    double = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c"},
        ]
    }
    rows = [
        chat("Q", "A"),
        chat("Q", "A"),
        chat("Q", "B"),
        chat("E", " "),
        double,
        {"messages": 3},
        chat("L" * 99, "A"),
        chat("T", "A", "B"),
    ]
    train = write(tmp_path / "train.jsonl", rows)
    held = write(tmp_path / "held.jsonl", [chat("E", "x"), chat("new", "x")])
    found = {one.what: one.rows for one in doctor.check([train], [held], tokenizer=tokenizer, max_length=60).findings}
    assert found["rows cannot be used"][0].startswith("train.jsonl row 6")
    assert found["rows are there twice"] == ["train.jsonl row 2 (as train.jsonl row 1)"]
    assert found["rows answer a prompt otherwise than another row"] == ["train.jsonl row 3 (and train.jsonl row 1)"]
    assert found["rows have an empty answer"] == ["train.jsonl row 4"]
    assert found["rows have two turns of one role in a row"] == ["train.jsonl row 5"]
    assert found["rows end with the user"] == ["train.jsonl row 8"]
    assert found["rows are longer than 60 tokens"] == ["train.jsonl row 7"]
    assert found["held-out prompts are in the training rows"] == ["held.jsonl row 1 (as train.jsonl row 4)"]


def test_clean_data_have_no_findings(facts, tokenizer):
    found = doctor.check([str(facts)], tokenizer=tokenizer)
    assert found.findings == []
    assert dict(found.facts)["turns"].startswith("U A (60)")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (chat("Q", "A"), "messages"),
        ({"instruction": "I", "output": "O"}, "alpaca"),
        ({"question": "Q", "answer": "A"}, "prompt"),
    ],
)
def test_the_first_settings_file_is_valid_for_its_data(tmp_path, row, kind):
    from veneer.train import adapters, data

    file = write(tmp_path / "d.jsonl", [row] * 3)
    (tmp_path / "run.yaml").write_text(starter.write("m", [file], "o", "run.yaml"))
    settings = config.load(tmp_path / "run.yaml", check_adapter=adapters.problems)
    assert settings.data.format == kind
    assert len(data.load(settings.data.train, settings.data.format, settings.data.columns)) == 3
