"""GRPO and RLOO on a tiny model: the reward rises, the reference is the model itself, kill -9 loses nothing."""

import signal

import pytest
import torch

from veneer.train import adapters, models, recipes
from veneer.train.plan import make
from veneer.train.prepare import build, prepare
from veneer.train.reinforce import ITSELF

from . import preferring
from .preferring import killed_at, lines, losses, prepared, quiet, write

pytest.importorskip("trl")
SHORT = ("--rl.max-new-tokens", "6", "--rl.generations", "4", "--train.batch-size", "8", "--data.holdout", "4")
PLAIN = """
def plain(prompts, completions, **columns):
    return [sum(c.isascii() for c in text) / max(1, len(text)) for text in completions]
"""


def words(folder, *more):
    (folder / "mine.py").write_text(PLAIN)
    return ("--rl.rewards", f"[{{use: '{folder / 'mine.py'}:plain'}}]", *SHORT, *more)


@pytest.fixture(scope="module")
def sharp(base, tmp_path_factory):
    """The tiny model with a head that can make up its mind: with random weights all tokens stay about as likely."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("sharp")
    model = LlamaForCausalLM.from_pretrained(base)
    model.lm_head.weight.data *= 20
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def grpo(sharp, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    run = prepared("grpo", sharp, folder, *words(folder, "--steps", "16", "--lr", "2e-2", "--eval.every", "8"))
    return folder, recipes.run(run, quiet())


def test_the_reward_of_one_s_own_function_rises(grpo):
    folder, outcome = grpo
    rewards = [line["reward"] for line in lines(folder / "out") if "reward" in line]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.2
    assert outcome.after["reward"] > outcome.before["reward"] + 0.2
    assert "mine_py_plain" in next(name for name in outcome.after if name != "reward")
    assert not (folder / "out" / "checkpoints" / "checkpoint-16" / "model.safetensors").exists()


def test_a_killed_run_resumes_with_the_same_rewards(grpo, sharp, tmp_path):
    whole, outcome = grpo
    more = words(tmp_path, "--steps", "16", "--lr", "2e-2", "--eval.every", "8")
    assert killed_at(10, lambda: recipes.run(prepared("grpo", sharp, tmp_path, *more), quiet())) == -signal.SIGKILL
    again = recipes.run(prepared("grpo", sharp, tmp_path, *more), quiet(), resume=True)
    assert losses(tmp_path / "out") == losses(whole / "out")
    assert again.after["reward"] == outcome.after["reward"]


@pytest.mark.parametrize("task", ["grpo", "rloo"])
@pytest.mark.parametrize("which", ["base", "start"])
def test_the_reference_of_a_trained_policy_is_the_base_or_its_start(base, tmp_path, task, which):
    """Random starts that are far from the base, then moved: the log-probabilities asked for are those claimed."""
    more = ("--rl.beta", "0.1", "--rl.reference", which, "--adapter.init_lora_weights", "false", "--steps", "2")
    run = prepared(task, base, tmp_path, *words(tmp_path), *more, "--train.batch-size", "4")
    model = build(run)
    ids = torch.tensor([run.train.rows[0]["input_ids"]])
    model.eval()
    with torch.no_grad():
        start = model(input_ids=ids).logits
        bare = models.load_model(run.config.model)(input_ids=ids).logits
    arguments = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "label_names": []}
    arguments |= {"per_device_train_batch_size": 4, "max_steps": 2, "save_strategy": "no", "logging_steps": 1}
    trainer = run.task.trainer(run, model, {**arguments, "learning_rate": 1e-2}, None)
    seen = []
    forward = trainer._get_per_token_logps_and_entropies

    def watched(policy, *args, **kwargs):
        found = forward(policy, *args, **kwargs)
        if policy is ITSELF:
            with trainer.reference():
                was = model.get_base_model().training
                model.eval()
                with torch.no_grad():
                    seen.append(model(input_ids=ids).logits)
                model.train(was)
        return found

    trainer._get_per_token_logps_and_entropies = watched
    trainer.train()
    assert trainer.ref_model is ITSELF and len(seen) >= 2
    for logits in seen:
        torch.testing.assert_close(logits, bare if which == "base" else start)
    model.eval()
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits, start)  # what was trained is back in its place
    assert any(line.get("kl", 0) != 0 for line in trainer.state.log_history)


def test_rewards_are_weighted_and_see_the_columns(base, tmp_path):
    rewards = "[{use: length, options: {most: 1}, weight: 0.5}, {use: exact, weight: 2}]"
    run = prepared("rloo", base, tmp_path, "--rl.rewards", rewards, *SHORT, "--steps", "1")
    recipes.run(run, quiet())
    line = next(line for line in lines(tmp_path / "out") if "reward" in line)
    expected = 0.5 * line["rewards/length/mean"] + 2 * line["rewards/exact/mean"]
    assert line["reward"] == pytest.approx(expected, abs=1e-5)


def test_columns_reach_a_reward_as_they_stand_in_the_data(base, tmp_path):
    """Of any kind, of a kind that differs from row to row, or missing: nothing on the way makes them alike."""
    answers = [7, "seven", {"deep": [1]}, None]
    found = [{"prompt": f"Q{i}", "answer": answers[i % 4], **({"rare": i} if i < 4 else {})} for i in range(12)]
    (tmp_path / "mine.py").write_text(
        "seen = []\ndef look(prompts, completions, answer, rare=None, **columns):\n"
        "    seen.extend(zip(prompts, answer))\n    return [0.0] * len(completions)\n"
    )
    rewards = f"[{{use: '{tmp_path / 'mine.py'}:look'}}]"
    run = prepared("grpo", base, tmp_path, "--rl.rewards", rewards, *SHORT, "--steps", "2", found=found)
    recipes.run(run, quiet())
    import sys

    seen = sys.modules["veneer_reward_mine"].seen
    assert seen and all(answer == answers[int(prompt[1:]) % 4] for prompt, answer in seen)


def test_a_column_that_a_reward_gets_otherwise_is_refused(base, tmp_path):
    found = [{"prompt": "Q", "completions": ["a"]}] * 3
    with pytest.raises(ValueError, match="a column 'completions', which rewards get from the run"):
        prepared("grpo", base, tmp_path, "--rl.rewards", "[exact]", found=found)


def test_checkpointing_and_several_steps_on_the_same_answers(base, tmp_path):
    more = ("--rl.iterations", "2", "--train.gradient-checkpointing", "--steps", "4")
    run = prepared("grpo", base, tmp_path, *words(tmp_path), *more)
    recipes.run(run, quiet())
    fresh = [line["step"] for line in lines(tmp_path / "out") if "loss" in line and "num_tokens" in line]
    assert fresh == [1, 3]  # new answers at every second step


def test_rows_with_answers_serve_as_prompts(base, facts, tmp_path):
    fixed = ["--task", "grpo", "--model", str(base), "--data", str(facts), "--out", str(tmp_path / "out")]
    run = prepare(preferring.config.load(None, [], [*fixed, "--rl.rewards", "[exact]"], adapters.problems))
    assert run.train.rows[0]["columns"]["answer"].startswith("The ")
    assert run.train.rows[0]["prompt"][-1]["role"] == "user"


def test_a_step_holds_whole_groups_or_is_refused(base, tmp_path):
    run = prepared("grpo", base, tmp_path, "--rl.rewards", "[exact]", "--rl.generations", "6", "--steps", "1")
    assert run.config.train.accumulate == 3  # of batches of 4
    assert any("train.accumulate is 3" in notice for notice in run.notices)
    with pytest.raises(ValueError, match=r"whole groups of rl.generations 6; set train.accumulate: 3"):
        prepared("grpo", base, tmp_path, "--rl.rewards", "[exact]", "--rl.generations", "6", "--accumulate", "2")


def test_a_run_without_a_reward_or_with_a_wrong_one_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match=r"task: grpo needs rl.rewards"):
        prepared("grpo", base, tmp_path)
    with pytest.raises(ValueError, match="no reward 'exac'; did you mean exact"):
        prepared("grpo", base, tmp_path, "--rl.rewards", "[exac]")
    with pytest.raises(ValueError, match=r"rl.loss is 'ppo'; task grpo has dapo, grpo"):
        prepared("grpo", base, tmp_path, "--rl.rewards", "[exact]", "--rl.loss", "ppo")


def test_the_plan_counts_answers(base, tmp_path):
    plan = make(prepared("grpo", base, tmp_path, "--rl.rewards", "[exact]", *SHORT), probe=True)
    facts = dict(plan.facts)
    assert facts["a step"] == "8 answers to 2 prompts" and facts["reference"] == "none (rl.beta is 0)"
    assert plan.schedule.per_epoch == 36 * 4 // 8
    assert "columns for rewards: answer" in facts["format"]


def test_rewards_beside_the_settings_are_found(base, tmp_path):
    (tmp_path / "mine.py").write_text(PLAIN)
    write(tmp_path / "prompts.jsonl", preferring.rows("prompts"))
    file = tmp_path / "run.yaml"
    file.write_text(
        f"task: grpo\nmodel: {base}\ndata: prompts.jsonl\noutput: {tmp_path / 'out'}\n"
        "rl:\n  rewards:\n    - mine.py:plain\n    - {use: exact, weight: 2}\n"
    )
    run = prepare(preferring.config.load(file, [], [], adapters.problems))
    assert [one.use for one in run.config.rl.rewards] == [f"{tmp_path / 'mine.py'}:plain", "exact"]


def test_a_judge_gives_rewards(base, tmp_path):
    rewards = f"[{{use: judge, options: {{model: {base}}}}}]"
    recipes.run(prepared("grpo", base, tmp_path, "--rl.rewards", rewards, *SHORT, "--steps", "1"), quiet())
    line = next(line for line in lines(tmp_path / "out") if "reward" in line)
    assert 0 < line["rewards/judge/mean"] < 1
