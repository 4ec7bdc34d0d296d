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


def test_classes_are_counted_and_those_that_cannot_be_learnt_are_named(tmp_path):
    rows = [{"text": f"t {i}", "label": "Good" if i == 3 else "good" if i % 2 else "bad"} for i in range(20)]
    train = write(tmp_path / "train.jsonl", [*rows, {"text": "t 2", "label": "good"}, {"text": "", "label": "bad"}])
    held = write(tmp_path / "held.jsonl", [{"text": "x", "label": "odd"}])
    found = doctor.check([train], [held])
    assert dict(found.facts)["classes"].startswith("3: bad 10 (48 %), good 10 (48 %), Good 1")
    rows_of = {one.what: one.rows for one in found.findings}
    assert rows_of["labels are written otherwise than elsewhere"] == ["train.jsonl row 4 ('Good' for 'good')"]
    assert rows_of["held-out labels are in no training row"] == ["held.jsonl row 1 ('odd')"]
    assert rows_of["rows answer a prompt otherwise than another row"] == ["train.jsonl row 21 (and train.jsonl row 3)"]
    assert rows_of["rows cannot be used"] == ["train.jsonl row 22: 'text' is empty"]


def test_tags_of_words_are_looked_over(tmp_path, word_tokenizer):
    rows = [{"tokens": ["anna", "went"], "tags": ["B-PER", "O"]}] * 3 + [
        {"tokens": ["otto", "in", "rome"], "tags": ["I-PER", "O", "B-LOC"]}
    ]
    found = doctor.check([write(tmp_path / "d.jsonl", rows)], tokenizer=word_tokenizer, max_length=4)
    assert dict(found.facts)["classes"].startswith("4: O 4 (44 %), B-PER 3")
    rows_of = {one.what: one.rows for one in found.findings}
    assert rows_of["rows have an I- tag without a B- before"] == ["d.jsonl row 4"]
    assert rows_of["rows are longer than 4 tokens"] == ["d.jsonl row 4"]


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"review": "r", "sentiment": "good"}, "sequence-classification"),
        ({"tokens": ["a"], "tags": ["O"]}, "token-classification"),
        ({"query": "q", "passage": "p"}, "embeddings"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "dpo"),
        ({"prompt": "p", "completion": "a", "label": True}, "kto"),
        ({"prompt": "p"}, "grpo"),
    ],
)
def test_the_first_settings_file_chooses_the_task_by_the_data(tmp_path, row, task):
    from veneer.train import adapters, data, tasks

    file = write(tmp_path / "d.jsonl", [row] * 3)
    (tmp_path / "run.yaml").write_text(starter.write("m", [file], "o", "run.yaml"))
    settings = config.load(tmp_path / "run.yaml", check_adapter=adapters.problems)
    assert settings.task == task
    among = tasks.find(task).formats
    assert len(data.load(settings.data.train, settings.data.format, settings.data.columns, among=among)) == 3


def test_an_encoder_decoder_gets_the_task_that_it_can_learn(tmp_path, translator, translations):
    (tmp_path / "run.yaml").write_text(starter.write(str(translator), [str(translations)], "o", "run.yaml"))
    assert config.load(tmp_path / "run.yaml").task == "seq2seq"


def test_an_encoder_gets_questions_and_answers_as_texts_that_belong_together(tmp_path, encoder):
    from veneer.train import adapters
    from veneer.train.prepare import prepare

    file = write(tmp_path / "d.jsonl", [{"question": f"who {i}", "answer": f"anna {i}"} for i in range(30)])
    (tmp_path / "run.yaml").write_text(starter.write(str(encoder), [file], str(tmp_path / "o"), "run.yaml"))
    settings = config.load(tmp_path / "run.yaml", check_adapter=adapters.problems)
    assert (settings.task, settings.data.columns) == ("embeddings", {"anchor": "question", "positive": "answer"})
    assert len(prepare(settings).train) == 28
