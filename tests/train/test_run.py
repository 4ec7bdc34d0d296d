"""A whole run on a tiny model: it learns, resumes to the bit, stops politely, and refuses what could not learn."""

import json
import os
import signal

import pytest
import torch
from rich.console import Console

from veneer.train import adapters, config, models, recipes
from veneer.train.plan import make
from veneer.train.prepare import build, prepare
from veneer.train.trainer import AdapterTrainer, Collate, checkpoints, held_out_loss, token_losses


def settings(base, facts, out, *words):
    fixed = [
        "--model",
        str(base),
        "--data",
        str(facts),
        "--out",
        str(out),
        "--eval.prompts",
        "1",
        "--eval.max-new-tokens",
        "8",
    ]
    return config.load(None, [], [*fixed, *words], adapters.problems)


def quiet():
    return Console(file=open(os.devnull, "w"))


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def trained(base, facts, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    prepared = prepare(
        settings(base, facts, out, "--steps", "12", "--lr", "1e-2", "--train.keep", "9", "--eval.every", "4")
    )
    return out, recipes.run(prepared, quiet())


def test_a_run_learns_and_leaves_everything_behind(trained):
    out, outcome = trained
    assert outcome.loss_after < 0.97 * outcome.loss_before
    assert outcome.trainable == 16384
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "run.yaml",
    ):
        assert (out / name).is_file()
    assert sorted(losses(out)) == list(range(1, 13))
    assert json.loads((out / "report.json").read_text())["loss_after"] == outcome.loss_after
    assert outcome.samples[0].expected.startswith("The ")


def test_the_report_is_one_page_that_needs_nothing_else(trained):
    out, outcome = trained
    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert "http" not in page.split("</style>")[1].replace("http://www.w3.org", "")
    assert f"{outcome.loss_before:.3f} → {outcome.loss_after:.3f}" in page
    assert page.count("<svg") == 4
    assert "<th>down_proj</th>" in page


def test_the_saved_adapter_gives_the_reported_loss(trained, base):
    out, outcome = trained
    settled = config.load(out / "run.yaml", [], [], adapters.problems)
    prepared = prepare(settled)
    model = adapters.load(models.load_model(settled.model), out)
    assert held_out_loss(model, prepared.held.rows, prepared.collate, 4) == pytest.approx(outcome.loss_after, rel=1e-6)


def test_a_resumed_run_repeats_the_losses_to_the_bit(trained, base, facts, tmp_path):
    whole = losses(trained[0])
    out = tmp_path / "out"
    words = ["--steps", "12", "--lr", "1e-2", "--eval.every", "4"]
    first = prepare(settings(base, facts, out, *words))

    class Killed(Exception):
        pass

    original = AdapterTrainer.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise Killed
        return original(self, *args, **kwargs)

    AdapterTrainer.training_step = dies
    try:
        with pytest.raises(Killed):
            recipes.run(first, quiet())
    finally:
        AdapterTrainer.training_step = original
    partial = out / "checkpoints" / "checkpoint-5"
    partial.mkdir()
    (partial / "adapter_config.json").write_text("{")  # a checkpoint cut off while it was written
    outcome = recipes.run(prepare(settings(base, facts, out, *words)), quiet(), resume=True)
    assert outcome.steps == 12
    assert losses(out) == whole
    assert outcome.loss_after == trained[1].loss_after


def test_resuming_with_other_settings_is_refused(trained, base, facts):
    out, _ = trained
    other = prepare(settings(base, facts, out, "--steps", "12", "--adapter.r", "4"))
    with pytest.raises(ValueError, match=r"cannot be resumed with other settings: .*adapter.r was 16 and is 4"):
        recipes.run(other, quiet(), resume=True)


def test_a_folder_with_a_run_is_not_overwritten_unasked(trained, base, facts):
    with pytest.raises(ValueError, match="holds a run already"):
        recipes.run(prepare(settings(base, facts, trained[0])), quiet())


def test_ctrl_c_keeps_a_whole_checkpoint_and_resume_finishes(base, facts, tmp_path, trained):
    out = tmp_path / "out"
    words = ["--steps", "12", "--lr", "1e-2", "--eval.every", "4"]
    original = AdapterTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **kwargs)

    AdapterTrainer.training_step = interrupted
    try:
        outcome = recipes.run(prepare(settings(base, facts, out, *words)), quiet())
    finally:
        AdapterTrainer.training_step = original
    assert outcome.stopped_at == str(checkpoints(out / "checkpoints")[-1])
    assert outcome.steps == 3
    assert recipes.run(prepare(settings(base, facts, out, *words)), quiet(), resume=True).steps == 12
    assert losses(out) == losses(trained[0])


def test_gradients_do_not_depend_on_accumulation(base, facts, tmp_path):
    """Four batches of one, of unequal length, give the gradient of one batch of four."""
    rows = [json.dumps({"prompt": "What is the sky", "completion": " blue" * n}) for n in (1, 2, 9, 4)]
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join(rows))
    got = []
    for batch, accumulate in ((4, 1), (1, 4)):
        words = [
            "--steps",
            "1",
            "--train.batch-size",
            str(batch),
            "--accumulate",
            str(accumulate),
            "--optimizer",
            "sgd",
        ]
        words += ["--warmup", "0", "--schedule", "constant", "--lr", "1", "--clip", "0"]
        out = tmp_path / f"out{batch}"
        recipes.run(prepare(settings(base, file, out, *words)), quiet())
        got.append((losses(out)[1], adapters.library.load_peft_weights(str(out))))
    assert got[0][0] == pytest.approx(got[1][0], rel=1e-5)
    for name, tensor in got[0][1].items():
        torch.testing.assert_close(tensor, got[1][1][name], rtol=1e-4, atol=1e-6)


def test_the_loss_is_that_of_the_model_itself_and_padding_changes_nothing(base, facts, tmp_path):
    prepared = prepare(settings(base, facts, tmp_path / "out"))
    model = models.load_model(prepared.config.model)
    rows = prepared.train.rows[:3]
    batch = prepared.collate(rows)
    total, count = token_losses(model, batch, keep=True)
    torch.testing.assert_close(total / count, model(**batch).loss)
    torch.testing.assert_close(token_losses(model, batch, keep=False)[0], total)
    padded = Collate(prepared.collate.pad, multiple=64)(rows)
    torch.testing.assert_close(token_losses(model, padded, keep=True)[0], total)


def test_packed_rows_do_not_see_each_other(base, facts, tmp_path):
    prepared = prepare(settings(base, facts, tmp_path / "out", "--packing", "--data.max-length", "80"))
    packed = prepared.feed
    assert max(len(row["input_ids"]) for row in packed) <= 80
    assert len(packed) < len(prepared.train) / 1.9
    assert sorted(t for row in packed for t in row["input_ids"]) == sorted(
        t for r in prepared.train.rows for t in r["input_ids"]
    )
    model = models.load_model(prepared.config.model)
    apart = token_losses(model, prepared.collate(prepared.train.rows), keep=True)
    together = token_losses(model, prepared.collate(packed), keep=True)
    torch.testing.assert_close(together[0], apart[0])
    assert together[1] == apart[1]
    assert recipes.run(prepared, quiet()).steps == prepared.schedule.steps == 3 * -(-len(packed) // 4)


def test_the_plan_counts_what_training_then_has(base, facts, tmp_path):
    prepared = prepare(settings(base, facts, tmp_path / "out", "--epochs", "2"))
    plan = make(prepared, probe=True)
    model = build(prepared)
    trainable, total = model.get_nb_trainable_parameters()
    assert (plan.trainable, plan.total) == (trainable, total)
    assert sum(group.trainable for group in plan.groups) == trainable
    assert {group.name: group.places for group in plan.groups}["model.layers.*.mlp.up_proj"] == 2
    assert plan.schedule.steps == 2 * -(-plan.train_rows // 4)
    assert plan.learnt == sum(label != -100 for row in prepared.train.rows for label in row["labels"])
    assert plan.memory.weights == 4 * (total - trainable)
    assert "".join(text for text, _ in plan.sample) == prepared.tokenizer.decode(prepared.train.rows[0]["input_ids"])
    json.loads(plan.to_json())


@pytest.mark.parametrize("chunked", ["true", "false"])
def test_the_planned_memory_is_what_a_step_allocates(base, facts, tmp_path, chunked):
    from veneer.train.memory import Ledger
    from veneer.train.plan import _activations, _skeleton

    prepared = prepare(settings(base, facts, tmp_path / "out", "--train.chunked_loss", chunked))
    estimate = _activations(prepared, _skeleton(prepared, torch.float32))
    model = build(prepared).train()
    loss, _ = prepared.task.step(prepared, model)
    loss().backward()  # what is made once is there
    model.zero_grad()
    with Ledger(iter([*model.parameters(), *model.buffers()])) as ledger:
        loss().backward()
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert estimate == pytest.approx(ledger.peak - gradients, rel=0.15)


def test_gradient_checkpointing_gives_the_same_losses(base, facts, tmp_path):
    got = []
    for flag in ("true", "false"):
        out = tmp_path / flag
        recipes.run(prepare(settings(base, facts, out, "--steps", "3", "--gradient-checkpointing", flag)), quiet())
        got.append(losses(out))
    assert got[0] == pytest.approx(got[1], rel=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "bnb-nf4", "int8"])
def test_a_quantised_base_trains_also_after_it_was_evaluated(base, facts, tmp_path, kind):
    """bitsandbytes' 4-bit layers repack their weights in evaluation mode on a CPU, and then give wrong gradients."""
    if kind != "nf4":
        pytest.importorskip("bitsandbytes")
    prepared = prepare(settings(base, facts, tmp_path / "out", "--model.quantize", kind, "--lr", "1e-2"))
    if kind != "int8":
        dense = make(prepare(settings(base, facts, tmp_path / "dense"))).memory
        assert make(prepared).memory.weights < dense.weights
    batch = prepared.collate(prepared.train.rows[:4])
    model = build(prepared).train()

    def gradient():
        model.zero_grad()
        total, count = token_losses(model, batch, keep=True)
        (total / count).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    fresh = gradient()
    held_out_loss(model, prepared.held.rows, prepared.collate, 4)
    assert torch.cosine_similarity(fresh, gradient(), 0) > 0.999
    outcome = recipes.run(prepared, quiet())
    assert outcome.loss_after < 0.97 * outcome.loss_before


@pytest.mark.parametrize(
    "block",
    [
        "{method: ia3, target_modules: [k_proj, down_proj], feedforward_modules: [down_proj]}",
        "{method: prompt_tuning, num_virtual_tokens: 4}",
        "{method: prefix_tuning, num_virtual_tokens: 4}",
        "{method: oft}",
        "{method: adalora}",
        "{method: lora, init_lora_weights: pissa}",
        "{method: lora, init_lora_weights: eva, target_modules: [q_proj, v_proj], r: 4}",
        "{method: lora, init_lora_weights: lora_ga, r: 4}",
        "{method: lora, init_lora_weights: corda, r: 4}",
        "{method: deft}",
    ],
)
def test_other_methods_train_by_their_block_alone(base, facts, tmp_path, block):
    """Also those that stand before the text, have a schedule of their own, or start from the base's weights."""
    prepared = prepare(settings(base, facts, tmp_path / "out", "--steps", "3", "--lr", "1e-2", "--adapter", block))
    plan = make(prepared)
    outcome = recipes.run(prepared, quiet())
    assert plan.trainable == outcome.trainable > 0
    again = adapters.load(models.load_model(prepared.config.model), tmp_path / "out")
    assert held_out_loss(again, prepared.held.rows, prepared.collate, 4) == pytest.approx(outcome.loss_after, rel=1e-5)
    bare = held_out_loss(models.load_model(prepared.config.model), prepared.held.rows, prepared.collate, 4)
    assert outcome.loss_before == pytest.approx(bare, rel=1e-6)


@pytest.mark.parametrize("name", ["loraplus", "lorapro"])
def test_optimisers_for_lora_are_chosen_by_name(base, facts, tmp_path, name):
    got = {}
    for chosen in (name, "adamw_torch"):
        out = tmp_path / chosen
        prepared = prepare(settings(base, facts, out, "--steps", "4", "--lr", "3e-3", "--optimizer", chosen))
        outcome = recipes.run(prepared, quiet())
        assert outcome.loss_after < outcome.loss_before
        got[chosen] = losses(out)
    assert got[name][1] == got["adamw_torch"][1]
    assert got[name][4] != got["adamw_torch"][4]


def test_the_flat_optimiser_and_the_chunked_loss_change_no_loss(base, facts, tmp_path):
    got = []
    for number, options in enumerate(([], ["--optimizer", "adamw_flat"], ["--train.chunked_loss", "false"])):
        out = tmp_path / str(number)
        settled = settings(base, facts, out, "--steps", "4", "--lr", "3e-3", "--train.weight_decay", "0.1", *options)
        recipes.run(prepare(settled), quiet())
        got.append(losses(out))
    for other in got[1:]:
        assert other == pytest.approx(got[0], rel=1e-4)


def test_targets_that_match_nothing_are_refused_with_near_names(base, facts, tmp_path):
    prepared = prepare(settings(base, facts, tmp_path / "out", "--adapter.target_modules", "[qproj]"))
    with pytest.raises(ValueError, match="q_proj"):
        make(prepared)


def test_a_tokenizer_of_another_model_is_refused(base, facts, tmp_path, tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.add_tokens([f"<extra_{i}>" for i in range(9)])
    other.chat_template = "<extra_8>" + other.chat_template
    other.save_pretrained(tmp_path / "tok")
    with pytest.raises(ValueError, match="do not belong together"):
        prepare(settings(base, facts, tmp_path / "out", "--model.tokenizer", str(tmp_path / "tok")))


def test_tensorboard_finds_the_figures_beside_the_run(base, facts, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "named"
    words = ["--steps", "4", "--eval.every", "2", "--report-to", "tensorboard"]
    outcome = recipes.run(prepare(settings(base, facts, out, *words)), quiet())
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert {one.step: one.value for one in events.Scalars("train/loss")} == pytest.approx(losses(out), rel=1e-6)
    assert outcome.loss_after == pytest.approx(min(one.value for one in events.Scalars("eval/loss")), rel=1e-6)


def test_a_logger_that_is_not_installed_is_named_before_the_run(base, facts, tmp_path, monkeypatch):
    import importlib.util

    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "trackio" in name else original(name, *a))
    with pytest.raises(ImportError, match=r"log.report_to trackio needs the package trackio: pip install trackio"):
        prepare(settings(base, facts, tmp_path, "--report-to", "trackio"))
    with pytest.raises(config.ConfigError, match="did you mean tensorboard"):
        settings(base, facts, tmp_path, "--report-to", "tensorbord")
