"""Runs on two processes (gloo, CPU) against the same run on one: training, resuming on another number, dying."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import veneer
from veneer.train import adapters, config, distributed, launch, recipes
from veneer.train.prepare import prepare

WORKER = Path(__file__).with_name("distributed_worker.py")
FILE = "adapter_model.safetensors"
pytestmark = pytest.mark.slow


def words(base, facts, out, *more: str) -> list[str]:
    fixed = [
        *("--model", str(base), "--data", str(facts), "--out", str(out), "--adapter.r", "4", "--steps", "6"),
        *("--train.save-every", "2", "--train.keep", "9", "--eval.best", "false", "--eval.every", "3"),
        *("--lr", "1e-2", "--eval.prompts", "1", "--eval.max-new-tokens", "2", "--train.threads", "1"),
    ]
    return [*fixed, *more]


TWO = ("--train.batch-size", "2")
ONE = ("--train.batch-size", "2", "--train.accumulate", "2")
"""As many rows a step in one process as two processes have with ``TWO``."""


def alone(base, facts, out, *more: str, resume: bool = False) -> Path:
    prepared = prepare(config.load(None, [], words(base, facts, out, *ONE, *more), adapters.problems))
    recipes.run(prepared, Console(quiet=True), resume)
    return out


def environment() -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(Path(veneer.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip


def together(folder: Path, jobs: list[dict], restarts: int = 0) -> subprocess.CompletedProcess:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("--max-restarts", str(restarts), str(WORKER), str(folder / "jobs.json")),
    ]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400)


def cut_off(run: Path, to: Path, step: int) -> Path:
    """A copy of a run as it was when it had just saved ``step``."""
    shutil.copytree(run, to)
    for folder in (to / "checkpoints").glob("checkpoint-*"):
        if int(folder.name.rsplit("-", 1)[1]) > step:
            shutil.rmtree(folder)
    for name in (FILE, "report.json", "report.html"):
        (to / name).unlink()
    return to


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def same(one: Path, other: Path, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    mine, theirs = load_file(one / FILE), load_file(other / FILE)
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        torch.testing.assert_close(theirs[key], value, rtol=rtol, atol=atol, msg=key)
    assert losses(other) == pytest.approx(losses(one), rel=max(rtol, 1e-3))


CASES: dict[str, tuple[list[str], list[str]]] = {
    "ddp": ([], []),
    "fsdp2": (["--distributed.strategy", "fsdp2"], []),
    "fsdp2-bfloat16": (["--distributed.strategy", "fsdp2"], ["--dtype", "bfloat16"]),
    "fsdp2-nf4": (["--distributed.strategy", "fsdp2"], ["--model.quantize", "nf4"]),
    "fsdp2-bnb-nf4": (["--distributed.strategy", "fsdp2"], ["--model.quantize", "bnb-nf4"]),
    "tensor-parallel": (["--distributed.strategy", "tensor-parallel", "--train.batch-size", "4"], []),
}
"""What only the two processes are told, and what the single one is told too."""


@pytest.fixture(scope="module")
def runs(base, facts, tmp_path_factory) -> Path:
    """Every run of two processes in one start of them: importing is what takes long."""
    folder = tmp_path_factory.mktemp("two")
    alone(base, facts, folder / "one")
    jobs = [{"words": words(base, facts, folder / case, *TWO, *own, *both)} for case, (own, both) in CASES.items()]
    for strategy in ("ddp", "fsdp2"):
        cut_off(folder / "one", folder / f"one-then-{strategy}", 2)
        more = [*TWO, "--distributed.strategy", strategy]
        jobs.append({"words": words(base, facts, folder / f"one-then-{strategy}", *more), "resume": True})
    other = words(base, facts, folder / "prompt", *TWO, "--distributed.strategy", "fsdp2")
    at = other.index("--adapter.r")
    jobs.append(
        {
            "words": [
                *other[:at],
                *other[at + 2 :],
                "--adapter.method",
                "prompt_tuning",
                "--adapter.num-virtual-tokens",
                "4",
            ]
        }
    )
    done = together(folder, jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(runs, base, facts, case):
    both = CASES[case][1]
    one = alone(base, facts, runs / f"{case}-alone", *both) if both else runs / "one"
    loose = {"rtol": 0.05, "atol": 5e-3} if "bfloat16" in case else {}
    same(one, runs / case, **loose)
    assert all(value.dtype == torch.float32 for value in load_file(runs / case / FILE).values())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_run_of_one_process_goes_on_with_two(runs, strategy):
    same(runs / "one", runs / f"one-then-{strategy}")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_run_of_two_processes_goes_on_with_one(runs, base, facts, strategy):
    cut_off(runs / strategy, runs / f"{strategy}-then-one", 4)
    same(runs / "one", alone(base, facts, runs / f"{strategy}-then-one", resume=True))


def test_a_step_of_other_rows_is_refused(runs, base, facts):
    out = cut_off(runs / "ddp", runs / "other-rows", 4)
    with pytest.raises(ValueError, match=r"a step had 4 rows \(.*2 processes\) and would have 2 \(.*1 processes\)"):
        alone(base, facts, out, "--train.accumulate", "1", resume=True)


def test_a_run_leaves_one_report_and_no_doubled_lines(runs):
    for case in CASES:
        steps = [line["step"] for line in map(json.loads, (runs / case / "metrics.jsonl").open()) if "loss" in line]
        assert steps == [1, 2, 3, 4, 5, 6]
        assert (runs / case / "report.json").is_file() and (runs / case / "report.html").is_file()


def test_what_lies_outside_of_the_blocks_is_refused_for_fsdp2(runs):
    said = (runs / "prompt" / "refused.txt").read_text()
    assert "trains outside of them; use ddp" in said
    assert not (runs / "prompt" / FILE).exists()


# ---- starting processes, and losing them ----------------------------------------------------------------------------
@pytest.fixture
def started(monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK", raising=False)


def settings(base, facts, out, *more: str) -> config.RunConfig:
    return config.load(None, [], words(base, facts, out, *TWO, "--processes", "2", *more), adapters.problems)


def test_a_run_whose_process_is_killed_starts_again_and_ends_as_if_nothing_had_been(
    runs, base, facts, started, monkeypatch
):
    out = runs / "killed"
    jobs = [{"words": words(base, facts, out, *TWO), "dies": {"rank": 1, "step": 3}}]
    (runs / "killed.json").write_text(json.dumps(jobs))
    monkeypatch.setattr(launch, "WORKER", (str(WORKER),))
    launch.run(settings(base, facts, out, "--distributed.restarts", "1"), [str(runs / "killed.json")])
    same(runs / "one", out)


@pytest.mark.parametrize(
    ("checkpoint", "then"),
    [
        (True, "nothing up to step 4 is lost: go on with `veneer train .*run.yaml --resume`"),
        (False, "there was no whole checkpoint yet, so start again with --overwrite"),
    ],
)
def test_a_dead_process_is_one_sentence(tmp_path, base, facts, started, monkeypatch, checkpoint, then):
    out = tmp_path / "out"
    if checkpoint:
        (out / "checkpoints" / "checkpoint-4").mkdir(parents=True)
        (out / "checkpoints" / "checkpoint-4" / "complete.json").write_text("{}")
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, signal, time\nos.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    )
    monkeypatch.setattr(launch, "WORKER", (str(worker),))
    with pytest.raises(ChildProcessError, match=rf"Process 1 of 2 was killed \(SIGKILL\); {then}"):
        launch.run(settings(base, facts, out), [])


def test_who_starts_the_processes(base, facts, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert launch.wanted(settings(base, facts, tmp_path))
    assert not launch.wanted(config.load(None, [], words(base, facts, tmp_path), adapters.problems))
    with pytest.raises(ValueError, match=r"torchrun --standalone --nproc-per-node 2 -m veneer\.cli train"):
        launch.wanted(settings(base, facts, tmp_path, "--launch", "torchrun"))
    monkeypatch.setenv("RANK", "0")
    assert not launch.wanted(settings(base, facts, tmp_path, "--launch", "torchrun"))


@pytest.mark.parametrize(
    ("key", "value", "package"), [("launch", "ray", "ray"), ("strategy", "deepspeed-zero3", "deepspeed")]
)
def test_a_missing_package_is_named(base, facts, tmp_path, monkeypatch, key, value, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = settings(base, facts, tmp_path, f"--distributed.{key}", value)
    with pytest.raises(ImportError, match=f"needs the package {package}: pip install"):
        launch.run(given, []) if key == "launch" else distributed.join(given, torch.device("cpu"))


def test_the_plan_says_how_the_processes_are_started(base, facts, tmp_path):
    given = settings(base, facts, tmp_path, "--distributed.strategy", "fsdp2", "--launch", "torchrun")
    line = "2 processes, fsdp2: torchrun --standalone --nproc-per-node 2 -m veneer.cli train c.yaml"
    assert distributed.plan_lines(given, ["c.yaml"]) == [line]
    assert distributed.plan_lines(config.load(None, [], words(base, facts, tmp_path), adapters.problems), []) == []


def test_deepspeeds_checkpoints_are_for_their_number_of_processes():
    now = {"train": {"batch_size": 4}, "distributed": {"strategy": "deepspeed-zero2", "processes": 1}}
    then = {"train": {"batch_size": 2}, "distributed": {"strategy": "deepspeed-zero2", "processes": 2}}
    assert "those of 2 processes, and there are 1 now" in distributed.changed_batch(then, now)[0]


@pytest.mark.parametrize("more", [["--task", "dpo"], ["--model.quantize", "nf4"]])
def test_what_tensor_parallelism_cannot_do_is_refused(base, facts, tmp_path, monkeypatch, more):
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = settings(base, facts, tmp_path, "--distributed.strategy", "tensor-parallel", *more)
    with pytest.raises(ValueError, match=r"distributed\.strategy tensor-parallel"):
        distributed.join(given, torch.device("cpu"))


def test_ray_starts_the_workers(runs, base, facts, started, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.chdir(runs)
    out = runs / "ray"
    given = words(base, facts, out, *TWO, "--processes", "2", "--launch", "ray", "--device", "cpu")
    try:
        launch.run(config.load(None, [], given, adapters.problems), ["train", *given])
    finally:
        ray.shutdown()
    same(runs / "one", out)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_as_one_process_does(runs, base, facts, stage):
    pytest.importorskip("deepspeed")
    out = runs / f"zero{stage}"
    job = {"words": words(base, facts, out, *TWO, "--distributed.strategy", f"deepspeed-zero{stage}")}
    done = together(runs, [job])
    assert done.returncode == 0, done.stderr[-3000:]
    same(runs / "one", out, rtol=1e-3, atol=1e-5)
