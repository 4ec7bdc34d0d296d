"""Rows of comparisons, labels and prompts: every way they are written, every fault by its row, what becomes of them."""

from pathlib import Path

import pytest

from veneer.train import adapters, data, doctor, starter
from veneer.train import preference_tokens as tokens
from veneer.train.config import load
from veneer.train.preference_rows import parted
from veneer.train.prepare import prepare
from veneer.train.rows import RowError

from .preferring import rows, write


def turns(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


ASKED, GOOD, BAD = turns("Q")[:1], turns("Q", "good")[1:], turns("Q", "bad")[1:]


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "expected"),
    [
        ("Q", "good", "bad", ("Q", "good", "bad")),
        (None, "Q: why? good one", "Q: why? bad one", ("Q: why?", " good one", " bad one")),
        (None, "Human: hi Assistant: no", "Human: hi Assistant: now", ("Human: hi Assistant:", " no", " now")),
        (ASKED, GOOD, BAD, (ASKED, GOOD, BAD)),
        (None, [*ASKED, *GOOD], [*ASKED, *BAD], (ASKED, GOOD, BAD)),
        ("Q", [*ASKED, *GOOD], [*ASKED, *BAD], ("Q", GOOD, BAD)),
        (ASKED, "good", "bad", (ASKED, "good", "bad")),
    ],
)
def test_every_way_of_writing_a_pair_is_brought_into_one_shape(prompt, chosen, rejected, expected):
    assert parted(prompt, chosen, rejected) == expected


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "message"),
    [
        ("Q", "same", " same ", "are the same"),
        (None, "one", "two", "no 'prompt', and 'chosen' and 'rejected' do not begin alike"),
        (None, GOOD, BAD, "do not begin with the same turn"),
        ("Q", "good", BAD, "must both be texts, or both be conversations"),
        ("another", [*ASKED, *GOOD], [*ASKED, *BAD], "does not go on from 'prompt'"),
        (None, [*ASKED, *GOOD], ASKED, "'rejected' has no answer in it"),
    ],
)
def test_a_pair_that_cannot_be_used_says_why(prompt, chosen, rejected, message):
    with pytest.raises(RowError, match=message):
        parted(prompt, chosen, rejected)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "good"},
         "rejected": {"from": "gpt", "value": "bad"}},
        {"messages": ASKED, "chosen": GOOD[0], "rejected": BAD[0]},
        {"instruction": "Q", "input": "", "chosen": "good", "rejected": "bad"},
        {"prompt": "Q", "chosen": [*ASKED, *GOOD], "rejected": [*ASKED, *BAD], "score_chosen": 8.5},
    ],
)  # fmt: skip
def test_pairs_of_other_tools_are_read(tmp_path, tokenizer, row):
    examples = read(tmp_path, [row], "preference")
    made = tokens.pairs(examples, tokens.renderer(tokenizer, examples, "auto", None), 64)
    expected = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "good"}]
    assert (
        tokenizer.decode(made.rows[0]["input_ids"]) == tokenizer.apply_chat_template(expected, tokenize=False).rstrip()
    )


def test_a_labelled_conversation_is_taken_apart(tmp_path, tokenizer):
    found = [{"messages": [*ASKED, *GOOD], "label": True}, {"messages": [*ASKED, *BAD], "kto_tag": False}]
    examples = data.load([str(write(tmp_path / "rows.jsonl", found))])
    assert examples.format == "kto" and [e.extra["label"] for e in examples.rows] == [True, False]
    assert examples.rows[1].extra["completion"] == BAD


def test_data_check_names_every_fault_of_pairs_with_its_row(tmp_path, tokenizer):
    found = [
        {"prompt": "Q1", "chosen": "a", "rejected": "b"},
        {"prompt": "Q1", "chosen": "b", "rejected": "a"},
        {"prompt": "Q2", "chosen": "a", "rejected": "a"},
        {"prompt": "Q3", "chosen": " ", "rejected": "a"},
        {"prompt": "Q4" + "x" * 200, "chosen": "a b c", "rejected": "b"},
        {"prompt": "Q5", "chosen": "a"},
    ]
    checked = doctor.check([str(write(tmp_path / "p.jsonl", found))], tokenizer=tokenizer, max_length=100)
    faults = {finding.what: finding.rows for finding in checked.findings}
    assert dict(checked.facts)["format"] == "preference"
    assert "chosen is the longer one in 1" in dict(checked.facts)["answers"]
    unusable = faults["rows cannot be used"]
    assert [row.split(":")[0] for row in unusable] == ["p.jsonl row 3", "p.jsonl row 4", "p.jsonl row 6"]
    assert "are the same" in unusable[0] and "'chosen' is empty" in unusable[1] and "needs rejected" in unusable[2]
    assert faults["rows prefer what another row rejects"] == ["p.jsonl row 2 (and p.jsonl row 1)"]
    assert faults["prompts alone fill 100 tokens"] == ["p.jsonl row 5"]


def test_data_check_tells_of_one_class_of_labels_and_of_labels_that_are_none(tmp_path, tokenizer):
    found = [
        {"prompt": f"Q{i}", "completion": "a", "label": label} for i, label in enumerate([True, "good", 1, "so-so"])
    ]
    checked = doctor.check([str(write(tmp_path / "k.jsonl", found))], tokenizer=tokenizer)
    faults = {finding.what: finding for finding in checked.findings}
    assert dict(checked.facts)["labels"] == "3 good, 0 bad"
    assert "'label' must be true or false, and is 'so-so'" in faults["rows cannot be used"].rows[0]
    assert "task: sft on the good ones" in faults["rows, and all of them are good"].remedy


def read(tmp_path, found, kind):
    return data.load([str(write(tmp_path / "rows.jsonl", found))], among=(kind,)).rows


def test_pairs_share_their_prompt_and_end_with_the_end_token(tmp_path, tokenizer):
    examples = read(tmp_path, rows("pairs", 3), "preference")
    made = tokens.pairs(examples, tokens.renderer(tokenizer, examples, "auto", None), 64)
    for row, source in zip(made.rows, rows("pairs", 3), strict=True):
        asked = [{"role": "user", "content": source["prompt"]}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(row["prompt_ids"]) == prompt
        assert tokenizer.decode(row["chosen_ids"]) == source["chosen"] + "<|im_end|>"
        assert tokenizer.decode(row["rejected_ids"]) == source["rejected"] + "<|im_end|>"
    assert made.tokens == sum(
        2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in made.rows
    )


def test_what_is_too_long_is_cut_or_dropped_and_counted(tmp_path, tokenizer):
    found = [
        {"prompt": "sky", "chosen": "blue " * 20, "rejected": "red"},
        {"prompt": "sky", "chosen": "blue " * 20 + "yes", "rejected": "blue " * 20 + "no"},
        {"prompt": "grass " * 30, "chosen": "green", "rejected": "red"},
        {"prompt": "rose", "chosen": "red", "rejected": "blue"},
    ]
    examples = read(tmp_path, found, "preference")
    made = tokens.pairs(examples, tokens.renderer(tokenizer, examples, "auto", None), 24)
    assert len(made) == 2 and len(made.rows[0]["prompt_ids"] + made.rows[0]["chosen_ids"]) == 24
    assert (made.counts["truncated"], made.counts["dropped_alike"], made.counts["dropped_unlearnt"]) == (2, 1, 1)
    dropped = tokens.pairs(examples, tokens.renderer(tokenizer, examples, "auto", None), 24, "drop")
    assert len(dropped) == 1 and dropped.counts["dropped_long"] == 2


def test_an_answer_of_labels_is_paired_with_another_row_s(tmp_path, tokenizer):
    examples = read(tmp_path, rows("labels", 9), "kto")
    made = tokens.labelled(examples, tokens.renderer(tokenizer, examples, "auto", None), 64, seed=1)
    answers = [row["completion_ids"] for row in made.rows]
    assert [row["KL_completion_ids"] for row in made.rows] == [*answers[1:], answers[0]]
    assert [e.where for e in made.sources] != [e.where for e in examples]  # in an order of the seed's


def test_texts_that_go_on_from_each_other_are_not_put_into_a_chat(tmp_path, tokenizer):
    found = [{"chosen": f"Q{i} is good", "rejected": f"Q{i} is bad"} for i in range(3)]
    examples = read(tmp_path, found, "preference")
    made = tokens.pairs(examples, tokens.renderer(tokenizer, examples, "auto", None), 64)
    assert tokenizer.decode(made.rows[0]["prompt_ids"] + made.rows[0]["chosen_ids"]) == "Q0 is good<|im_end|>"


@pytest.mark.parametrize("name", ["dpo", "grpo", "reward"])
def test_the_examples_can_be_prepared(base, name):
    folder = Path(__file__).parents[2] / "examples" / "preference"
    run = prepare(load(folder / f"{name}.yaml", [], ["--model", str(base)], adapters.problems))
    assert len(run.train) == (195 if name == "grpo" else 79) and run.config.task == name


@pytest.mark.parametrize(("kind", "task"), [("pairs", "dpo"), ("labels", "kto"), ("prompts", "grpo")])
def test_init_writes_settings_that_can_be_read_for_each_kind_of_rows(tmp_path, kind, task):
    file = write(tmp_path / "rows.jsonl", rows(kind))
    (tmp_path / "run.yaml").write_text(starter.write("base", [str(file)], "out", "run.yaml"))
    config = load(tmp_path / "run.yaml")
    assert config.task == task
    assert [(one.use, one.options) for one in config.rl.rewards] == (
        [("exact", {"column": "answer"})] if task == "grpo" else []
    )
