"""DPO, KTO, ORPO and reward models on a tiny model: they learn, the reference is the base, kill -9 loses nothing."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from veneer.train import adapters, models, recipes
from veneer.train.config import ConfigError
from veneer.train.orpo import orpo
from veneer.train.plan import make
from veneer.train.preference import weights
from veneer.train.prepare import build, prepare
from veneer.train.trainer import checkpoints

from . import preferring
from .preferring import killed_at, lines, logprobs, losses, on_two_processes, prepared, quiet, rows

pytest.importorskip("trl")
LEARN = ("--steps", "16", "--lr", "1e-2", "--eval.every", "8", "--data.holdout", "8")


@pytest.fixture(scope="module")
def dpo(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo")
    return folder / "out", recipes.run(prepared("dpo", base, folder, *LEARN, "--train.keep", "9"), quiet())


def test_dpo_learns_and_leaves_everything_behind(dpo):
    out, outcome = dpo
    assert outcome.before["loss"] == pytest.approx(0.6931, abs=1e-4)  # log 2: the policy is its own reference
    assert outcome.before["rewards/margins"] == 0
    assert outcome.after["loss"] < 0.6
    assert outcome.after["rewards/accuracies"] > 0.9 and outcome.after["rewards/margins"] > 0.2
    logged = {key for line in lines(out) for key in line}
    assert {"rewards/margins", "rewards/accuracies", "eval_rewards/margins", "loss", "tokens"} <= logged
    assert json.loads((out / "report.json").read_text())["after"]["loss"] == outcome.after["loss"]
    assert (out / "run.yaml").is_file() and (out / "report.html").is_file()


def test_checkpoints_hold_the_adapter_alone_and_the_saved_one_gives_the_reported_loss(dpo, base, tmp_path):
    out, outcome = dpo
    for folder in checkpoints(out / "checkpoints"):
        assert not (folder / "model.safetensors").exists()
        assert all("lora_" in key for key in load_file(folder / "adapter_model.safetensors"))
    run = prepared("dpo", base, tmp_path, *LEARN)
    policy, bare = adapters.load(models.load_model(run.config.model), out), models.load_model(run.config.model)
    total = 0.0
    for row in run.held.rows:
        gain = [
            logprobs(policy, row["prompt_ids"], row[side]) - logprobs(bare, row["prompt_ids"], row[side])
            for side in ("chosen_ids", "rejected_ids")
        ]
        total -= float(F.logsigmoid(torch.tensor(0.1 * (gain[0] - gain[1]))))
    assert outcome.after["loss"] == pytest.approx(total / len(run.held.rows), rel=1e-4)


def test_a_killed_run_resumes_with_the_same_losses(dpo, base, tmp_path):
    whole, outcome = dpo
    assert killed_at(10, lambda: recipes.run(prepared("dpo", base, tmp_path, *LEARN), quiet())) == -signal.SIGKILL
    out = tmp_path / "out"
    assert [path.name for path in checkpoints(out / "checkpoints")] == ["checkpoint-8"]
    again = recipes.run(prepared("dpo", base, tmp_path, *LEARN), quiet(), resume=True)
    assert losses(out) == losses(whole)
    assert again.after == outcome.after


def test_gradient_checkpointing_changes_nothing_but_memory(dpo, base, tmp_path):
    checkpointing = (*LEARN, "--train.gradient-checkpointing")
    recipes.run(prepared("dpo", base, tmp_path, *checkpointing), quiet())
    assert losses(tmp_path / "out") == pytest.approx(losses(dpo[0]), rel=1e-4)


def test_two_processes_share_the_pairs_and_the_reference_s_answers(dpo, base, tmp_path):
    """Each works out half of them: given to other rows, the first loss would not be log 2."""
    halved = [*LEARN[2:], "--steps", "2", "--train.batch-size", "2", "--eval.every", "2"]
    assert on_two_processes(lambda: recipes.run(prepared("dpo", base, tmp_path, *halved), quiet())) == [0, 0]
    first = [line for line in lines(tmp_path / "out") if "loss" in line]
    assert first[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and first[1]["loss"] < 0.6931
    assert json.loads((tmp_path / "out" / "report.json").read_text())["after"]["rewards/margins"] > 0


def test_ctrl_c_keeps_a_whole_checkpoint_and_resume_finishes(dpo, base, tmp_path, monkeypatch):
    from transformers import Trainer

    original = Trainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted)
        outcome = recipes.run(prepared("dpo", base, tmp_path, *LEARN), quiet())
    assert outcome.steps == 3 and outcome.stopped_at.endswith("checkpoint-3")
    recipes.run(prepared("dpo", base, tmp_path, *LEARN), quiet(), resume=True)
    assert losses(tmp_path / "out") == losses(dpo[0])


INIT = "--adapter.init_lora_weights"


@pytest.mark.parametrize(
    ("words", "quantised"),
    [((), "none"), ((INIT, "pissa"), "none"), ((INIT, "lora_ga"), "none"), (("--adapter.method", "oft"), "none"),
     ((), "nf4")],
)  # fmt: skip
def test_the_reference_is_the_untouched_base_and_no_second_model_is_loaded(
    base, tmp_path, monkeypatch, words, quantised
):
    """Also where the adapter's start is split off from the base, and over packed weights."""
    run = prepared("dpo", base, tmp_path, "--steps", "4", "--model.quantize", quantised, *words)
    bare = models.load_model(run.config.model)
    loaded, original = [], type(bare).from_pretrained
    monkeypatch.setattr(type(bare), "from_pretrained", lambda *a, **k: loaded.append(a) or original(*a, **k))
    model = build(run)
    arguments = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none"}
    trainer = run.task.trainer(run, model, {**arguments, "max_steps": 4, "label_names": []}, None)
    assert len(loaded) <= 1 and trainer.ref_model is None
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    for row in trainer.train_dataset.select(range(3)):
        for side in ("chosen", "rejected"):
            assert row[f"ref_{side}_logps"] == pytest.approx(
                logprobs(bare, row["prompt_ids"], row[f"{side}_ids"]), rel=1e-4
            )


def test_dpo_goes_on_from_a_trained_adapter_which_is_then_the_reference(base, facts, tmp_path):
    first = tmp_path / "sft"
    words = ["--model", str(base), "--data", str(facts), "--out", str(first), "--steps", "6", "--lr", "1e-2"]
    recipes.run(prepare(preferring.config.load(None, [], [*words, "--eval.prompts", "0"])), quiet())
    ask = ("--steps", "2", "--adapter.start", str(first))
    for which, reference in (("auto", "start"), ("base", "base")):
        run = prepared("dpo", base, tmp_path, *ask, "--preference.reference", which)
        assert run.config.preference.reference == reference
        assert run.config.adapter == {"start": str(first)}
        expected = models.load_model(run.config.model)
        if reference == "start":
            expected = adapters.load(expected, first)
        model = build(run)
        arguments = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "label_names": []}
        trainer = run.task.trainer(run, model, {**arguments, "max_steps": 2}, None)
        row = trainer.train_dataset[0]
        wanted = logprobs(expected, row["prompt_ids"], row["chosen_ids"])
        assert row["ref_chosen_logps"] == pytest.approx(wanted, rel=1e-4)
    outcome = recipes.run(prepared("dpo", base, tmp_path, *ask, "--data.holdout", "4", "--lr", "1e-2"), quiet())
    assert outcome.before["loss"] == pytest.approx(0.6931, abs=1e-4) != outcome.after["loss"]


def test_nothing_else_is_set_beside_a_start(base, tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    with pytest.raises(ConfigError, match="'r' cannot be set beside 'start'"):
        preferring.settings("dpo", base, tmp_path, "--adapter.start", str(tmp_path / "sft"), "--adapter.r", "4")
    with pytest.raises(ConfigError, match="no trained adapter in"):
        preferring.settings("dpo", base, tmp_path, "--adapter.start", str(tmp_path / "none"))


def test_kto_raises_good_answers_above_bad_ones(base, tmp_path):
    words = (*LEARN[:-2], "--data.holdout", "12", "--preference.beta", "0.5")
    outcome = recipes.run(prepared("kto", base, tmp_path, *words), quiet())
    assert outcome.before["rewards/margins"] == 0 < outcome.after["rewards/margins"]


def test_kto_weighs_the_rarer_kind_more():
    three = [{"label": True}] * 3 + [{"label": False}]
    assert weights("auto", three) == (1.0, 3.0)
    assert weights("auto", [{"label": not row["label"]} for row in three]) == (3.0, 1.0)
    assert weights((1.0, 0.5), three) == (1.0, 0.5)


def test_kto_refuses_rows_of_one_kind(base, tmp_path):
    good = [row for row in rows("labels") if row["label"]]
    with pytest.raises(ValueError, match=r"All 18 rows are good\. KTO learns from good answers and bad ones"):
        prepared("kto", base, tmp_path, found=good)


def test_a_reward_model_learns_to_tell_the_better_answer_and_comes_back(base, tmp_path):
    from veneer.train.reward_model import RewardModel

    words = ("--steps", "20", "--lr", "1e-2", "--eval.every", "20", "--data.holdout", "8")
    run = prepared("reward", base, tmp_path, *words)
    outcome = recipes.run(run, quiet())
    assert outcome.after["accuracy"] > 0.8 and outcome.after["margin"] > 1
    judge = RewardModel(str(tmp_path / "out"))
    for source, row in zip(
        run.held.sources[:2], run.held.rows, strict=False
    ):  # scored as it was trained, end token too
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        expected = judge.session.model(input_ids=ids).logits[0].tolist()
        assert judge([source.prompt], [source.completion]) == pytest.approx(expected, rel=1e-4)
    for row in rows("pairs")[:3]:
        good, bad = judge([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        assert good > bad
    asked = {"prompt": row["prompt"], "answer": row["chosen"]}
    assert judge.session.respond([asked])[0]["reward"] == pytest.approx(good, rel=1e-4)


def test_orpo_is_the_paper_s_formula():
    logprobs = torch.tensor([-0.5, -1.0, -2.0, -0.7], dtype=torch.float64)
    p = logprobs.exp()
    odds = p / (1 - p)
    ratio = (odds[:2] / odds[2:]).log()
    expected = (-logprobs[:2] - 0.3 * torch.sigmoid(ratio).log()).sum()
    torch.testing.assert_close(orpo(logprobs, 0.3)[0], expected)


def test_orpo_learns_without_a_reference_and_does_not_depend_on_accumulation(base, tmp_path):
    outcome = recipes.run(prepared("orpo", base, tmp_path, *LEARN, "--output.overwrite"), quiet())
    assert outcome.after["loss"] < 0.95 * outcome.before["loss"]
    assert {"rewards/margins", "rewards/accuracies"} <= {key for line in lines(tmp_path / "out") for key in line}
    first = []
    for batch, accumulate in ((4, 1), (1, 4)):
        folder = tmp_path / str(batch)
        folder.mkdir()
        words = ("--steps", "1", "--train.batch-size", str(batch), "--accumulate", str(accumulate))
        recipes.run(prepared("orpo", base, folder, *words, "--data.holdout", "0"), quiet())
        first.append(losses(folder / "out")[1])
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_a_prompt_method_is_refused_where_trl_trains_the_model_inside(base, tmp_path):
    words = ("--steps", "1", "--adapter.method", "prompt_tuning", "--adapter.num_virtual_tokens", "2")
    with pytest.raises(ValueError, match="PROMPT_TUNING puts a prompt before the text; use another method"):
        recipes.run(prepared("dpo", base, tmp_path, *words), quiet())


def test_the_plan_says_what_is_compared(base, tmp_path):
    plan = make(prepared("dpo", base, tmp_path), probe=True)
    facts = dict(plan.facts)
    assert facts["reference"].startswith("the bare base") and facts["pairs"].startswith("38;")
    assert [text for text, learnt in plan.sample if learnt][0].startswith("The")
    assert plan.sample[-1] == ("\n  rather than\nno red<|im_end|>", False)
    single = make(prepared("reward", base, tmp_path)).memory
    assert plan.probe.tokens_per_second > 0 and plan.memory.activations > single.activations  # it has logits
    labels = dict(make(prepared("kto", base, tmp_path)).facts)["labels"]
    assert labels == "20 good, 18 bad, weighted 1 to 1.11"


def test_an_unknown_loss_is_refused_with_those_there_are(base, tmp_path):
    with pytest.raises(ValueError, match=r"preference.loss is 'simpo'; task dpo has sigmoid, hinge, ipo"):
        prepared("dpo", base, tmp_path, "--preference.loss", "simpo")


def test_trl_that_is_missing_is_asked_for_in_a_sentence(monkeypatch):
    import sys

    from veneer.train.policy import trl

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "trl", None)
        with pytest.raises(ImportError, match=r"task: dpo needs the package trl .*pip install 'veneer\[train\]'"):
            trl("DPOTrainer", "dpo")
    with pytest.raises(ImportError, match=r"task: kto needs NoTrainer, which TRL \d+\.\d+"):
        trl("NoTrainer", "kto")
