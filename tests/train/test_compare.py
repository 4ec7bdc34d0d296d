"""Comparing methods: equal budgets, nothing run twice, and conclusions that the figures bear."""

import json

import pytest
from rich.console import Console

from veneer.train import adapters, comparison, config, recipes
from veneer.train.budgets import Budget, settle, size_of
from veneer.train.compare import compare, contender
from veneer.train.comparison import Comparison, Contender, front, half_interval, recommend
from veneer.train.prepare import prepare


def settings(base, facts, out, more=""):
    words = f"--model {base} --data {facts} --out {out} --steps 3 --progress off --eval.prompts 0 --holdout 9 {more}"
    return config.load(None, [], words.split(), adapters.problems)


class Runner:
    """Trains in this process, and counts; the run number ``broken`` fails half way."""

    def __init__(self, broken=None):
        self.runs, self.broken = [], broken

    def __call__(self, file):
        self.runs.append(file.parent.name)
        if len(self.runs) == self.broken:
            raise KeyboardInterrupt
        recipes.run(prepare(config.load(file, [], [], adapters.problems)), Console(quiet=True), resume=True)


def test_a_comparison_that_was_stopped_goes_on_and_runs_nothing_twice(base, facts, tmp_path):
    methods, steps = ["lora:r=4", "ia3"], Budget.parse("steps=2")
    stopped = Runner(broken=3)
    with pytest.raises(KeyboardInterrupt):
        compare(settings(base, facts, tmp_path), methods, steps, 2, execute=stopped)
    again = Runner()
    result = compare(settings(base, facts, tmp_path), methods, steps, 2, execute=again)
    assert again.runs[0] == stopped.runs[2] and len(again.runs) == 2
    assert {one.name: (len(one.scores), one.steps) for one in result.contenders} == {"lora r=4": (2, 2), "ia3": (2, 2)}
    assert result.contenders[0].mean <= result.contenders[1].mean
    assert (tmp_path / "compare.png").stat().st_size > 5000
    stored = json.loads((tmp_path / "compare.json").read_text())
    assert stored["sentence"] == result.sentence and len(stored["contenders"]) == 2
    third = Runner()
    compare(settings(base, facts, tmp_path), [*methods, "lora:r=2"], steps, 2, execute=third)
    assert len(third.runs) == 2 and all(name.startswith("lora-r-2") for name in third.runs)


@pytest.mark.parametrize("text", ["lora", "vera", "prompt_tuning", "adalora"])
def test_a_budget_of_parameters_gives_the_largest_size_within_it(base, facts, tmp_path, text):
    given, goal = settings(base, facts, tmp_path), 3000
    one, notices = contender(text, given), []
    settle(one, given, Budget("params", goal), goal, notices)
    assert not notices
    within = adapters.build(one.block, steps=3)
    knob = next(k for k in ("init_r", "r", "num_virtual_tokens") if getattr(within, k, None))
    prepared = prepare(given)
    prepared.adapter = within
    assert size_of(prepared)[0] == one.trainable <= goal
    prepared.adapter = adapters.build({**one.block, knob: getattr(within, knob) + 1}, steps=3)
    assert size_of(prepared)[0] > goal


def test_blocks_are_sized_too(base, facts, tmp_path):
    given, notices = settings(base, facts, tmp_path), []
    sizes = {}
    for goal in (1500, 6000, 20000):
        one = contender("oft", given)
        settle(one, given, Budget("params", goal), goal, notices)
        assert one.trainable <= goal
        sizes[one.block["oft_block_size"]] = one.trainable
    assert len(sizes) == 3 and not notices


def test_a_method_without_a_size_is_said_to_have_none(base, facts, tmp_path):
    given, notices = settings(base, facts, tmp_path), []
    one = contender("ia3", given)
    settle(one, given, Budget("params", 10), 10, notices)
    assert "ia3 has no size to choose" in notices[0] and f"{one.trainable:,}" in notices[0]


def test_contenders_take_over_what_is_meant_for_their_kind(base, facts, tmp_path):
    given = settings(base, facts, tmp_path, "--adapter.r 6 --adapter.lora_alpha 9 --adapter.target_modules [q_proj]")
    dora = adapters.build(contender("dora", given).block)
    assert (dora.use_dora, dora.r, dora.lora_alpha, set(dora.target_modules)) == (True, 6, 9, {"q_proj"})
    assert adapters.build(contender("lora:r=2:lora_dropout=0.1", given).block).lora_dropout == 0.1
    oft = adapters.build(contender("oft", given).block)
    assert set(oft.target_modules) == {"q_proj"} and oft.r != 6
    with pytest.raises(ValueError, match="did you mean lora"):
        contender("lorra", given)
    with pytest.raises(ValueError, match="two or more different"):
        compare(given, ["lora", "lora"], Budget("steps"), 1)


@pytest.mark.parametrize("text", ["steps=0", "params=lots", "time", "time=5%", "tokens=5"])
def test_a_budget_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="--budget"):
        Budget.parse(text)


def test_budgets_are_read():
    assert Budget.parse("params=1%") == Budget("params", 0.01)
    assert Budget.parse("steps") == Budget("steps", None)


def test_intervals_are_students():
    # 1, 2, 3: mean 2, s 1, t(0.975, 2) = 4.303
    assert half_interval([1, 2, 3]) == pytest.approx(4.303 / 3**0.5)
    assert half_interval([1]) is None


def outcome(**scores):
    found = [Contender(name, {}, 10, size, list(values)) for name, (size, values) in scores.items()]
    seeds = list(range(len(found[0].scores)))
    return Comparison("10 steps", seeds, 3.0, sorted(found, key=lambda one: one.mean), [])


def test_the_recommendation_says_no_more_than_the_seeds_show():
    clear = outcome(a=(100, [1.0, 1.1, 1.2]), b=(10, [1.5, 1.6, 1.7]))
    assert recommend(clear).startswith("Take a")
    # each seed shifts both alike: means overlap widely, and yet b loses with every seed by the same
    paired = outcome(a=(100, [1.0, 1.5, 2.0]), b=(10, [1.1, 1.61, 2.1]))
    assert recommend(paired).startswith("Take a")
    alike = outcome(a=(100, [1.0, 1.3, 1.1]), b=(10, [1.2, 1.1, 1.2]))
    assert "cannot tell b apart" in recommend(alike) and "b trains the fewest parameters (10)" in recommend(alike)
    assert "one seed cannot say" in recommend(outcome(a=(100, [1.0]), b=(10, [1.2])))
    assert "None of them learnt" in recommend(outcome(a=(100, [3.5, 3.4]), b=(10, [3.6, 3.9])))


def test_where_more_is_better_the_highest_score_wins():
    low, high = Contender("low", {}, 10, 5, [0.6, 0.61, 0.62]), Contender("high", {}, 10, 50, [0.9, 0.91, 0.92])
    failed = Contender("failed", {}, 10, 1)
    result = Comparison("10 steps", [0, 1, 2], 0.5, [low, failed, high], [], score="accuracy", higher=True)
    result.contenders.sort(key=result.order)
    assert [one.name for one in result.contenders] == ["high", "low", "failed"]
    assert recommend(result).startswith("Take high: its held-out accuracy 0.9100 is higher")
    assert "all others that finished" in recommend(result)
    result.before = 0.95
    assert "None of them learnt" in recommend(result)


def test_classifiers_are_compared_by_accuracy(encoder, reviews, tmp_path):
    given = settings(encoder, reviews, tmp_path, "--task sequence-classification --lr 3e-3 --train.batch-size 8")
    result = compare(given, ["lora:r=4", "ia3"], Budget.parse("steps=12"), 1, execute=Runner())
    assert (result.score, result.higher) == ("accuracy", True)
    assert result.contenders[0].mean >= result.contenders[1].mean
    stored = json.loads((tmp_path / "compare.json").read_text())
    assert stored["score"] == "accuracy" and "accuracy" in stored["sentence"]
    assert (tmp_path / "compare.svg").stat().st_size > 5000


def test_the_front_holds_what_nothing_beats_in_both():
    assert front([(1, 5), (2, 3), (3, 4), (4, 1), (2, 3.5)]) == [0, 1, 3]
    assert comparison.front([]) == []


def test_a_budget_of_time_is_measured_once(base, facts, tmp_path):
    """Measured again it would give another number of steps, and finished runs would not be found."""
    found = []
    for _ in range(2):
        runner = Runner()
        result = compare(settings(base, facts, tmp_path), ["lora", "ia3"], Budget.parse("time=0.1"), 1, execute=runner)
        found.append(([one.steps for one in result.contenders], len(runner.runs)))
    (first, runs), (second, again) = found
    assert first == second and (runs, again) == (2, 0)
    assert all(1 <= steps <= 100 for steps in first)


def test_a_method_that_fails_is_named_and_the_others_are_compared(base, facts, tmp_path):
    runner = Runner()

    def execute(file):
        return "out of memory" if "ia3" in str(file.parent.name) else runner(file)

    result = compare(
        settings(base, facts, tmp_path), ["lora:r=2", "ia3", "lora:r=4"], Budget("steps"), 1, execute=execute
    )
    assert result.contenders[-1].name == "ia3" and result.contenders[-1].failed == "out of memory"
    assert "ia3" not in result.sentence
