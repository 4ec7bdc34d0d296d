"""Routing in a run's log: figures of every step, tables of the held-out rows, a heat map on the page."""

import io
import json
import math

import pytest
from rich.console import Console

from veneer.train import adapters, config, recipes, routing_report
from veneer.train.prepare import prepare


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def train(base, facts, tmp_path_factory):
    def run(*words, console=None):
        folder = tmp_path_factory.mktemp("routed") / "out"
        fixed = [
            "--model",
            str(base),
            "--data",
            str(facts),
            "--out",
            str(folder),
            "--eval.prompts",
            "0",
            "--steps",
            "4",
        ]
        prepared = prepare(config.load(None, [], [*fixed, *words], adapters.problems))
        recipes.run(prepared, console or Console(file=io.StringIO()))
        return folder

    return run


MOLA = ["--adapter.method", "mola", "--adapter.experts", "[2,3]", "--adapter.target_modules", "[q_proj,v_proj]"]
MIXLORA = ["--adapter.method", "mixlora", "--adapter.experts", "3", "--adapter.target_modules", "[mlp]"]


@pytest.mark.parametrize("words", [MOLA, MIXLORA], ids=["mola", "mixlora"])
def test_steps_and_evaluations_say_how_the_mixture_routes(train, words, capsys):
    said = io.StringIO()
    folder = train(*words, "--eval.every", "2", "--log.progress", "plain", console=Console(file=said, width=200))
    found = lines_of(folder)
    steps = [one for one in found if "loss" in one]
    assert len(steps) == 4
    for one in steps:
        assert 0 <= one["routing_entropy"] <= math.log(3) + 1e-5 and 1 / 3 <= one["routing_busiest"] <= 1
        assert one["penalty"] > 0
    tables = [one for one in found if "routing" in one]
    assert [one["step"] for one in tables] == [2, 4]
    for use in tables[-1]["routing"]["layers"].values():
        assert math.isclose(sum(use["load"]), 1, abs_tol=1e-3) and use["entropy"] <= math.log(len(use["load"])) + 1e-4
    held = [one for one in found if "eval_loss" in one]
    assert all("eval_routing_entropy" in one for one in held)
    assert "busiest expert" in said.getvalue()
    page = (folder / "report.html").read_text()
    assert "Who goes where (step 4)" in page and "<script" not in page


def test_the_share_on_the_page_is_the_share_that_was_counted(train):
    folder = train(*MOLA)
    table = [one for one in lines_of(folder) if "routing" in one][-1]["routing"]["layers"]
    part = (folder / "report.html").read_text().split("Who goes where")[1]
    for path, use in table.items():
        layer, kind = path.split(".")[2], path.split(".")[-1]
        assert f"Share of each expert, {kind}" in part
        for expert, share in enumerate(use["load"]):
            assert f'title="{layer} {expert}: share {share:.4g}"' in part


def test_with_nothing_held_out_the_training_rows_are_counted(train):
    found = lines_of(train(*MOLA, "--data.holdout", "0", "--eval.every", "2"))
    assert [one["step"] for one in found if "routing" in one] == [2, 4]


def test_what_routes_nothing_logs_nothing_and_has_no_heat_map(train):
    folder = train("--adapter.method", "lora", "--adapter.target_modules", "[q_proj]")
    assert not any("routing" in key for one in lines_of(folder) for key in one)
    assert "Who goes where" not in (folder / "report.html").read_text()


def test_layers_of_one_last_name_in_different_places_are_kept_apart():
    use = {"load": [0.5, 0.5], "entropy": 0.7}
    layers = {"m.layers.0.self.q": use, "m.layers.0.cross.q": use}
    page = routing_report.section([{"step": 1, "routing": {"experts": ["a", "b"], "layers": layers}}])
    assert "self.q" in page and "cross.q" in page and ">a</th>" in page
