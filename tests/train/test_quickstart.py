"""The quickstart's data are what their README says, and its score is what generation would do."""

import json
from pathlib import Path

import pytest

from veneer.train import config, quickstart
from veneer.train.prepare import prepare

FOLDER = Path(__file__).parents[2] / "examples" / "quickstart"


def read(name):
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def test_the_data_are_balanced_and_no_held_out_sentence_is_trained_on():
    train, held = read("train.jsonl"), read("heldout.jsonl")
    assert (len(train), len(held)) == (320, 80)
    for rows in (train, held):
        answers = [row["completion"] for row in rows]
        assert answers.count("positive") == answers.count("negative") == len(rows) / 2
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}


@pytest.fixture
def run(base, tmp_path):
    """The quickstart's own settings on the tiny model, with short sentences."""
    words = ["--model", str(base), "--out", str(tmp_path / "out"), "--data.eval", str(FOLDER / "heldout.jsonl#6")]
    return prepare(config.load(FOLDER / "config.yaml", [], [*words, "--eval.batch_size", "4"]))


def trained(run, steps, rate):
    """The tiny model, taught the first held-out rows by heart."""
    import torch

    from veneer.train.models import load_model

    torch.manual_seed(0)
    model = load_model(run.config.model).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        model(**run.collate(run.held.rows)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


@pytest.mark.parametrize("steps", [0, 8, 60])
def test_the_exact_score_is_what_greedy_generation_gives(run, steps):
    import torch

    model = trained(run, steps, 1e-2)
    expected = 0
    for row in run.held.rows:
        wanted = quickstart._learnt(row)
        prompt = torch.tensor([row["input_ids"][: row["labels"].index(wanted[0])]])
        written = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(wanted), do_sample=False
        )
        expected += written[0, prompt.shape[1] :].tolist() == wanted
    found = quickstart.score(model, run)
    assert (found.rows, found.exact) == (6, expected)
    assert found.exact <= found.chosen
    if steps == 60:
        assert found.exact == 6, "a model that knows the rows by heart scores them all"


def test_outside_a_clone_one_sentence_says_where_to_run_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="from the root of a clone"):
        quickstart.main([])


def test_it_runs_from_its_settings_to_the_scores(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(FOLDER.parents[1])
    words = ["--model", str(base), "--out", str(tmp_path / "out"), "--train.steps", "2", "--eval.every", "2"]
    assert quickstart.main([*words, "--max-new-tokens", "2"]) == 0
    shown = capsys.readouterr().out
    for line in ("trainable of", "step 1/2", "held-out loss", "before", "after", "at the peak", "right answer"):
        assert line in shown
    assert str(tmp_path / "out") in shown.replace("\n", "")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
