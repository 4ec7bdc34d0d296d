"""Tasks beyond causal fine-tuning: each learns, measures what it says, and comes back from its folder the same."""

import json
import os

import pytest
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console

from veneer.cli.main import main
from veneer.train import adapters, config, merging, recipes
from veneer.train.classification import agreement, by_class
from veneer.train.embeddings import pair_losses, pool
from veneer.train.evaluate import Session
from veneer.train.plan import make
from veneer.train.prepare import build, prepare
from veneer.train.seq2seq import target_losses
from veneer.train.tagging import span_f1, spans
from veneer.train.trainer import AdapterTrainer

TASKS = {
    "sequence-classification": ("encoder", "reviews", "accuracy"),
    "token-classification": ("encoder", "sentences", "f1"),
    "embeddings": ("encoder", "couples", "accuracy"),
    "seq2seq": ("translator", "translations", "loss"),
}


def settings(task, model, data, out, *words):
    fixed = ["--task", task, "--model", model, "--data", data, "--out", out, "--holdout", "12", "--eval.prompts", "2"]
    return config.load(None, [], [*map(str, fixed), *words], adapters.problems)


def run(prepared, resume=False):
    return recipes.run(prepared, Console(file=open(os.devnull, "w")), resume)


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory):
    """One run of each task, made when first asked for: (prepared, outcome, folder)."""
    made = {}

    def get(task):
        if task not in made:
            model, data, _ = TASKS[task]
            out = tmp_path_factory.mktemp(task) / "out"
            rate = "1e-2" if task == "seq2seq" else "3e-3"
            words = ["--epochs", "8", "--lr", rate, "--train.batch-size", "8"]
            paths = (request.getfixturevalue(model), request.getfixturevalue(data))
            prepared = prepare(settings(task, *paths, out, *words))
            made[task] = prepared, run(prepared), out
        return made[task]

    return get


@pytest.mark.parametrize("task", TASKS)
def test_each_task_learns_and_its_folder_says_what_it_learnt(task, trained):
    prepared, outcome, out = trained(task)
    metric = TASKS[task][2]
    assert outcome.score == metric
    assert outcome.loss_after < 0.5 * outcome.loss_before
    if metric != "loss":
        assert outcome.after[metric] > 0.9 > outcome.before[metric]
    report = json.loads((out / "report.json").read_text())
    assert report["after"] == outcome.after and report["task"] == task
    page = (out / "report.html").read_text()
    assert f"{outcome.before[metric]:.3f} → {outcome.after[metric]:.3f}" in page


@pytest.mark.parametrize("task", TASKS)
def test_the_saved_adapter_measures_what_was_reported(task, trained):
    prepared, outcome, out = trained(task)
    settled = config.load(out / "run.yaml", [], [], adapters.problems)
    again = prepare(settled)
    model = adapters.load(again.task.load(again), out)
    assert again.task.measure(again, model, None) == pytest.approx(outcome.after, rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_a_merged_model_measures_the_same_without_the_library(task, trained, tmp_path):
    prepared, outcome, out = trained(task)
    certificate = merging.merge(str(out), str(tmp_path / "merged"), dtype="float32")
    assert certificate.holds
    merged = getattr(transformers, prepared.task.auto).from_pretrained(tmp_path / "merged").eval()
    if "classification" in task:
        assert list(merged.config.id2label.values()) == prepared.config.classes.names
    assert prepared.task.measure(prepared, merged, None) == pytest.approx(outcome.after, rel=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_the_plan_counts_what_training_then_has(task, trained):
    prepared, outcome, _ = trained(task)
    plan = make(prepared, probe=True)
    assert (plan.trainable, plan.total) == (outcome.trainable, outcome.total)
    assert sum(group.trainable for group in plan.groups) == plan.trainable
    assert any(learnt for _, learnt in plan.sample) and plan.learnt > 0
    assert plan.probe.tokens_per_second > 0 and plan.memory.activations > 0
    json.loads(plan.to_json())


@pytest.mark.parametrize(
    ("task", "row", "right"),
    [
        ("sequence-classification", {"text": "the film was awful"}, "bad"),
        ("token-classification", {"text": "maria went to lima and hugo"}, "maria: PER, lima: LOC, hugo: PER"),
    ],
)
def test_a_folder_answers_by_itself(task, row, right, trained):
    assert Session(adapter=str(trained(task)[2])).respond([row])[0]["answer"] == right


def test_a_translator_says_the_same_from_its_folder(trained):
    _, outcome, out = trained("seq2seq")
    rows = [{"text": one.prompt} for one in outcome.samples]
    assert [one["answer"] for one in Session(adapter=str(out)).respond(rows)] == [one.after for one in outcome.samples]
    assert any(one.after != one.before for one in outcome.samples)


def test_a_folder_embeds_by_itself(trained):
    rows = [{"text": text} for text in ("anna went", "paris good", "oslo good")]
    anna, paris, oslo = (
        torch.tensor(one["answer"]) for one in Session(adapter=str(trained("embeddings")[2])).respond(rows)
    )
    assert anna @ paris > anna @ oslo
    assert float(anna.norm()) == pytest.approx(1)


@pytest.mark.parametrize("task", TASKS)
def test_the_plans_activations_are_those_that_autograd_keeps(task, trained):
    prepared = trained(task)[0]
    model = build(prepared).train()
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    longest = sorted(prepared.train.rows, key=lambda row: -len(row["input_ids"]))[:8]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prepared.task.losses(prepared, model)(model, prepared.collate(longest))
    assert make(prepared).memory.activations == pytest.approx(sum(size for size, _ in kept.values()), rel=0.25)


def test_every_adapted_place_of_an_embedding_model_learns(trained):
    assert not any("pooler" in group.name for group in make(trained("embeddings")[0]).groups)


# ---- methods and bases -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("ia3", ""),
        ("{method: prompt_tuning, num_virtual_tokens: 4}", ""),
        ("{method: prefix_tuning, num_virtual_tokens: 4}", ""),
        ("{method: lora, use_dora: true, r: 4, target_modules: all-linear}", "--model.quantize nf4"),
        ("{method: oft, oft_block_size: 8}", ""),
    ],
)
def test_methods_and_packed_bases_train_by_their_settings(task, block, words, request, tmp_path):
    paths = [request.getfixturevalue(name) for name in TASKS[task][:2]]
    block = block if block.startswith("{") else f"{{method: {block}}}"
    prepared = prepare(settings(task, *paths, tmp_path, "--steps", "2", "--adapter", block, *words.split()))
    plan = make(prepared)
    outcome = run(prepared)
    assert plan.trainable == outcome.trainable > 0
    model = adapters.load(prepared.task.load(prepared), tmp_path)
    assert prepared.task.measure(prepared, model, None) == pytest.approx(outcome.after, rel=1e-4)


def test_a_decoder_classifies_alike_alone_and_in_a_padded_batch(base, reviews, tmp_path):
    """It reads the class off the last token, and has to know which tokens are padding."""
    prepared = prepare(settings("sequence-classification", base, reviews, tmp_path, "--steps", "2"))
    model = build(prepared).eval()
    assert prepared.base.pad_token_id is not None and make(prepared).trainable > 0
    rows = sorted(prepared.train.rows, key=lambda row: len(row["input_ids"]))[:: len(prepared.train) // 3]
    together = model(**{k: v for k, v in prepared.collate(rows).items() if k != "labels"}).logits
    apart = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits for row in rows])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_a_classifier_that_was_killed_goes_on_to_the_bit(encoder, reviews, tmp_path, monkeypatch):
    """Head, dropout and the best score so far included."""
    words = ["--steps", "8", "--eval.every", "2", "--lr", "3e-3", "--adapter.lora_dropout", "0.2"]
    whole = run(prepare(settings("sequence-classification", encoder, reviews, tmp_path / "whole", *words)))
    original = AdapterTrainer.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise InterruptedError
        return original(self, *args, **kwargs)

    prepared = prepare(settings("sequence-classification", encoder, reviews, tmp_path / "cut", *words))
    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", dies)
        with pytest.raises(InterruptedError):
            run(prepared)
    again = run(prepare(prepared.config), resume=True)
    assert (again.before, again.after, again.best_step) == (whole.before, whole.after, whole.best_step)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open() if '"loss"' in line]
        for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_a_resumed_run_of_another_task_is_refused(trained, encoder, sentences):
    out = trained("sequence-classification")[2]
    with pytest.raises(ValueError, match="has the task sequence-classification and cannot be resumed as token"):
        run(prepare(settings("token-classification", encoder, sentences, out)), resume=True)


# ---- losses and figures ----------------------------------------------------------------------------------------------
def test_the_loss_of_a_target_is_the_models_own(trained):
    prepared, _, _ = trained("seq2seq")
    model = prepared.task.load(prepared)
    batch = prepared.collate(prepared.train.rows[:5])
    total, count = target_losses(model, batch)
    torch.testing.assert_close(total / count, model(**batch).loss)


def test_in_batch_negatives_are_the_papers_and_repeated_texts_are_not_among_them():
    torch.manual_seed(0)
    table = torch.randn(9, 8)

    class Bag(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return type("Out", (), {"last_hidden_state": table[input_ids]})

    ids = torch.tensor([[1, 2], [3, 0], [4, 0], [5, 6], [7, 8], [5, 6]])  # anchors, then positives: 1 and 3 are alike
    mask = (ids > 0).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(3)}
    total, count = pair_losses(Bag(), batch, "mean", 0.05)
    vectors = [F.normalize(table[row[row > 0]].mean(0), dim=0) for row in ids]
    wanted = 0.0
    for i, others in enumerate([(3, 4), (3, 4, 5), (4, 5)]):
        scores = torch.stack([vectors[i] @ vectors[j] / 0.05 for j in others])
        wanted += torch.logsumexp(scores, 0) - vectors[i] @ vectors[3 + i] / 0.05
    assert count == 3
    torch.testing.assert_close(total, torch.as_tensor(wanted))
    torch.testing.assert_close(pool(table[ids], mask, "last")[1], F.normalize(table[3], dim=0))


def test_spans_are_counted_whole():
    tags = ["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-PER", "S-ORG", "B-ORG", "E-ORG"]
    assert spans(tags) == [(0, 1, "PER"), (3, 3, "LOC"), (4, 4, "LOC"), (5, 5, "PER"), (6, 6, "ORG"), (7, 8, "ORG")]
    assert span_f1([["B-A", "I-A", "O"]], [["B-A", "O", "O"]]) == 0
    assert span_f1([["B-A", "I-A", "O", "B-B"]], [["B-A", "I-A", "O", "O"]]) == pytest.approx(2 / 3)


def test_what_is_reported_by_class_is_that_of_scikit_learn(trained):
    metrics = pytest.importorskip("sklearn.metrics")
    answered = [("a", "a"), ("a", "b"), ("b", "b"), ("c", "b"), ("c", "c"), ("c", "c")]
    right, guessed = zip(*answered, strict=True)
    found = by_class(answered, ["a", "b", "c", "never"])
    wanted = metrics.classification_report(right, guessed, output_dict=True)
    for name in "abc":
        assert found[name]["precision"] == pytest.approx(wanted[name]["precision"])
        assert found[name]["recall"] == pytest.approx(wanted[name]["recall"])
        assert found[name]["f1"] == pytest.approx(wanted[name]["f1-score"])
    assert "never" not in found
    report = json.loads((trained("sequence-classification")[2] / "report.json").read_text())
    shares = report["tables"]["Share of each class (down) that was taken for a class (across)"]
    assert all(sum(row.values()) == pytest.approx(1) for row in shares.values())
    by_kind = json.loads((trained("token-classification")[2] / "report.json").read_text())["tables"][
        "Held-out rows by kind"
    ]
    assert set(by_kind) == {"LOC", "PER"} and all(row["f1"] > 0.8 for row in by_kind.values())


def test_accuracy_and_f1_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    right, guessed = [0, 0, 1, 2, 2, 2, 4], [0, 1, 1, 2, 0, 2, 3]
    found = agreement(right, guessed)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(right, guessed))
    assert found["f1"] == pytest.approx(metrics.f1_score(right, guessed, average="macro"))


@pytest.mark.parametrize("model", ["encoder", "base"])
def test_a_word_of_several_tokens_learns_its_tag_once(model, sentences, tmp_path, request):
    """Also where tokens are bytes and begin with the blank before the word."""
    folder = request.getfixturevalue(model)
    prepared = prepare(settings("token-classification", folder, sentences, tmp_path))
    for row, source in zip(prepared.train.rows, prepared.train.sources, strict=True):
        names = prepared.config.classes.names
        assert [names[label] for label in row["labels"] if label >= 0] == source.extra["tags"]
    row = next(r for r, s in zip(prepared.train.rows, prepared.train.sources, strict=True) if "maria" in s.text)
    assert len([label for label in row["labels"] if label >= 0]) < len(row["input_ids"]) - 2


# ---- what could not learn --------------------------------------------------------------------------------------------
def rows_of(tmp_path, *labels):
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"text": f"film {i}", "label": label}) + "\n" for i, label in enumerate(labels)))
    return file


@pytest.mark.parametrize(
    ("labels", "words", "message"),
    [
        (["a"] * 30, "", "All 18 training rows have the class 'a'"),
        ([str(i) for i in range(40)], "", "has a class of its own.*columns: {label"),
        (["a", "b"] * 20, "--classes.names [a,c]", r"20 rows have a class that classes.names lacks; .*has 'b'"),
        (["a", "b"] * 20, "--eval.metric bleu", "eval.metric is 'bleu'.*measures accuracy, f1, loss"),
        (
            ["a", "b"] * 20,
            "--adapter.task_type CAUSAL_LM",
            "task sequence-classification needs SEQ_CLS; set .* task: sft",
        ),
        ([None, "b"] * 20, "", "d.jsonl row 1: 'label' must be one class"),
    ],
)
def test_labels_that_cannot_be_learnt_are_refused_in_a_sentence(encoder, tmp_path, labels, words, message):
    with pytest.raises(ValueError, match=message):
        prepare(
            settings("sequence-classification", encoder, rows_of(tmp_path, *labels), tmp_path / "o", *words.split())
        )


def test_a_class_without_training_rows_is_named(encoder, tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"text": "x", "label": "rare"}) + "\n")
    given = settings(
        "sequence-classification", encoder, rows_of(tmp_path, "a", "b"), tmp_path / "o", "--data.eval", str(held)
    )
    prepared = prepare(given)
    assert "No training row has the class rare (1 held out): it cannot be learnt." in prepared.notices
    assert prepared.config.classes.names == ["a", "b", "rare"]


def test_a_model_without_an_encoder_is_refused_for_seq2seq(base, translations, tmp_path):
    with pytest.raises(ValueError, match=r"has no encoder.*task: sft"):
        prepare(settings("seq2seq", base, translations, tmp_path))


@pytest.mark.parametrize(("model", "remedy"), [("encoder", "embeddings"), ("translator", "task: seq2seq")])
def test_models_that_do_not_write_are_refused_for_sft(model, remedy, translations, tmp_path, request):
    with pytest.raises(ValueError, match=f"tiny-.*{remedy}"):
        prepare(settings("sft", request.getfixturevalue(model), translations, tmp_path))


def test_rows_are_cut_to_the_models_positions(encoder, tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text(
        "".join(json.dumps({"text": "film " * (60 if i == 3 else 2), "label": "ab"[i % 2]}) + "\n" for i in range(8))
    )
    prepared = prepare(settings("sequence-classification", encoder, file, tmp_path / "o", "--holdout", "0"))
    assert max(len(row["input_ids"]) for row in prepared.train.rows) == 32
    assert "1 of 8 rows are longer than data.max_length 32 and were cut." in prepared.notices


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--task sft --classes.names [a,b]",
            "'classes' means nothing to task sft; it is for sequence-classification and",
        ),
        ("--task embeddings --packing true", "'data.packing' means nothing to task embeddings; it is for sft."),
        ("--task sequence-clasification", "'task' is 'sequence-clasification'.*did you mean sequence-classification"),
    ],
)
def test_settings_of_other_tasks_are_refused_by_name(words, message):
    with pytest.raises(config.ConfigError, match=message):
        config.load(None, [], ["--model", "m", "--data", "d", "--out", "o", *words.split()])


def test_rows_of_a_file_are_answered_into_a_file(trained, tmp_path, capsys):
    rows = [{"text": "in in was awful", "id": 7}, {"text": "went and was fine", "id": 8}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["generate", "--adapter", str(trained("sequence-classification")[2])]
    main([*words, "--file", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")])
    said = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(one["id"], one["answer"]) for one in said] == [(7, "bad"), (8, "good")]
    assert all(0.5 < one["probability"] <= 1 for one in said)
    with pytest.raises(SystemExit):
        main(["chat", *words[1:]])
    assert "cannot chat; ask it with `veneer generate`" in capsys.readouterr().err
