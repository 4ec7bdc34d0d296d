"""Data files: every format and container read alike, and bad rows named."""

import csv
import json

import pytest

from veneer.train import data

ROWS = {
    "alpaca": {"instruction": "Add", "input": "1 2", "output": "3"},
    "prompt": {"prompt": "Q", "completion": "A"},
    "messages": {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "text": {"text": "Once"},
}


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        pq.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("name", ROWS)
def test_formats_are_told_by_their_columns(tmp_path, name):
    found = data.load([write(tmp_path / "d.jsonl", [ROWS[name]] * 3)])
    assert found.format == name
    assert len(found) == 3
    if name in ("messages", "sharegpt"):
        assert found.rows[0].messages == ROWS["messages"]["messages"]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_containers_give_the_same_rows(tmp_path, ending):
    rows = [{"prompt": f"Q, {i}", "completion": f'A "{i}"\nend'} for i in range(4)]
    found = data.load([write(tmp_path / f"d{ending}", rows)])
    assert [(e.prompt, e.completion) for e in found.rows] == [(r["prompt"], r["completion"]) for r in rows]


def test_text_files_are_cut_at_blank_lines(tmp_path):
    (tmp_path / "d.txt").write_text("one\ntwo\n\n\nthree\n")
    assert [e.text for e in data.load([str(tmp_path / "d.txt")]).rows] == ["one\ntwo", "three"]


def test_json_with_one_object_a_line_or_wrapped_in_a_key_is_understood(tmp_path):
    (tmp_path / "lines.json").write_text("\n".join(json.dumps(ROWS["prompt"]) for _ in range(2)))
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": [ROWS["prompt"]] * 3}))
    assert len(data.load([str(tmp_path / "*.json")])) == 5


def test_globs_limits_and_folders(tmp_path):
    write(tmp_path / "a.jsonl", [ROWS["prompt"]] * 5)
    write(tmp_path / "b.jsonl", [ROWS["prompt"]] * 5)
    assert len(data.load([str(tmp_path / "*.jsonl")])) == 10
    assert len(data.load([str(tmp_path / "a.jsonl#2")])) == 2
    assert len(data.load([str(tmp_path)])) == 10


def test_columns_are_mapped_and_unknown_ones_suggest_the_mapping(tmp_path):
    file = write(tmp_path / "d.jsonl", [{"question": "Q", "answer": "A", "id": 1}])
    with pytest.raises(
        ValueError, match=r"columns question, answer, id.*columns: \{prompt: question, completion: answer\}"
    ):
        data.load([file])
    found = data.load([file], columns={"prompt": "question", "completion": "answer"})
    assert (found.rows[0].prompt, found.rows[0].completion) == ("Q", "A")


def test_bad_rows_are_named_together_or_skipped_with_a_count(tmp_path):
    file = tmp_path / "d.jsonl"
    good = json.dumps(ROWS["messages"])
    bad = json.dumps({"messages": [{"role": "wizard", "content": "x"}]})
    silent = json.dumps({"messages": [{"role": "user", "content": "x"}]})
    file.write_text(f"{good}\n{bad}\n{{oops\n{silent}\n{good}\n")
    with pytest.raises(ValueError) as caught:
        data.load([str(file)])
    text = str(caught.value)
    assert "3 rows cannot be used" in text
    assert "d.jsonl row 2: turn 1 has the role 'wizard'" in text
    assert "d.jsonl row 3: not valid JSON" in text
    assert "d.jsonl row 4: the conversation has no assistant turn" in text
    found = data.load([str(file)], bad="skip")
    assert len(found) == 2
    assert len(found.skipped) == 3


def test_missing_files_name_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"did you mean train.jsonl"):
        data.load([str(tmp_path / "trian.jsonl")])


def test_rows_with_the_same_prompt_are_never_on_both_sides():
    rows = [data.Example(f"row {i}", prompt=f"Q{i % 30}", completion=str(i)) for i in range(90)]
    train, held = data.split(rows, 0.2, seed=1)
    assert len(train) + len(held) == 90
    assert 18 <= len(held) <= 20
    assert not {e.prompt for e in train} & {e.prompt for e in held}
    assert data.split(rows, 0.2, seed=1)[1] == held
    assert data.split(rows[:10], "auto", seed=1) == (rows[:10], [])
    with pytest.raises(ValueError, match="leave none to train on"):
        data.split(rows, 90, seed=1)


@pytest.mark.parametrize(
    ("row", "kind", "columns"),
    [
        ({"review": "r", "sentiment": "s"}, "labels", "text: review, label: sentiment"),
        ({"words": ["a"], "ner_tags": ["O"]}, "tags", "tokens: words, tags: ner_tags"),
        ({"query": "q", "passage": "p"}, "pairs", "anchor: query, positive: passage"),
        ({"x": "q", "y": "p"}, "labels", "text: x, label: y"),
    ],
)
def test_a_task_suggests_the_mapping_to_its_own_columns(tmp_path, row, kind, columns):
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"columns: \{{{columns}\}}"):
        data.load([str(file)], among=(kind,))


def test_each_task_reads_its_rows_from_tables_too(tmp_path):
    """A csv file has no lists: words stand with blanks between, or as JSON."""
    rows = {
        "labels": ('text,label\n"one, two",3\n', {"label": "3"}),
        "tags": (
            'tokens,tags\nA b,O B-X\n"[""A"", ""b""]","[""O"", ""B-X""]"\n',
            {"tokens": ["A", "b"], "tags": ["O", "B-X"]},
        ),
        "pairs": ("anchor,positive\nq,p\n", {"positive": "p"}),
    }
    for kind, (text, extra) in rows.items():
        file = tmp_path / f"{kind}.csv"
        file.write_text(text)
        found = data.load([str(file)])
        assert found.format == kind
        assert all(one.extra == extra for one in found.rows)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "t", "label": 0.5}, "'label' must be one class"),
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens and 1 tags"),
        ({"anchor": "a", "positive": " "}, "'positive' is empty"),
    ],
)
def test_rows_that_a_task_cannot_use_are_named(tmp_path, row, message):
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=f"d.jsonl row 1: .*{message}"):
        data.load([str(file)])


def test_a_prompt_that_many_rows_share_does_not_swallow_the_training_rows():
    many = [data.Example("", prompt="same", completion=str(i)) for i in range(60)]
    few = [data.Example("", prompt=str(i), completion="x") for i in range(40)]
    for seed in range(5):
        train, held = data.split(many + few, "auto", seed)
        assert len(held) == 5 and not any(row.prompt == "same" for row in held)
    assert data.split(many, "auto", 0) == (many, [])
