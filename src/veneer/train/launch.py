"""``veneer train`` on several processes of this machine, or on the workers of a Ray cluster.

    veneer train config.yaml --processes 2

starts the same command twice, with the environment that ``torchrun`` would give it, and waits. A process that dies
takes the others with it; ``distributed.restarts`` starts them all again, from the last whole checkpoint.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from veneer.train.config import RunConfig

WORKER = ("-m", "veneer.cli")


def wanted(config: RunConfig) -> bool:
    """Whether this process has to start others, rather than to train.

    Raises:
        ValueError: the processes should have been started from outside, and have not been.
    """
    asked = config.distributed
    if "RANK" in os.environ:
        return False
    if asked.launch == "torchrun" and asked.processes > 1:
        raise ValueError(
            f"distributed.launch is torchrun, so start the {asked.processes} processes by `torchrun --standalone "
            f"--nproc-per-node {asked.processes} -m veneer.cli train ...`, or set distributed.launch: local."
        )
    return asked.processes > 1 or asked.launch == "ray"


def run(config: RunConfig, words: Sequence[str]) -> None:
    """Start ``veneer`` with ``words`` on every process, and wait for all.

    Raises:
        ImportError: Ray is asked for and not installed.
        ChildProcessError: a process has died; the sentence says which, and how to go on.
    """
    {"local": _local, "ray": _ray}[config.distributed.launch](config, words)


def _local(config: RunConfig, words: Sequence[str]) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // config.distributed.processes)))
    count, restarts = str(config.distributed.processes), str(config.distributed.restarts)
    try:
        main(["--standalone", "--nproc-per-node", count, "--max-restarts", restarts, *WORKER, *words])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise ChildProcessError(_sentence(config, rank, _end(failure.exitcode))) from None


def _end(code: int) -> str:
    if code < 0:
        return f"was killed ({signal.Signals(-code).name})"
    return f"ended with code {code}"


def _sentence(config: RunConfig, rank: Any, what: str) -> str:
    from veneer.train.trainer import checkpoints

    folder = Path(config.output.dir)
    found = checkpoints(folder / "checkpoints")
    if not found:
        then = "there was no whole checkpoint yet, so start again with --overwrite."
    else:
        step = found[-1].name.rsplit("-", 1)[1]
        then = f"nothing up to step {step} is lost: go on with `veneer train {folder / 'run.yaml'} --resume`."
    again = f" after {config.distributed.restarts} restarts" if config.distributed.restarts else ""
    return f"Process {rank} of {config.distributed.processes} {what}{again}; {then}"


def _ray(config: RunConfig, words: Sequence[str]) -> None:
    if importlib.util.find_spec("ray") is None:
        raise ImportError("distributed.launch ray needs the package ray: pip install 'ray[train]'.")
    import ray
    import ray.train as rt
    from ray.train.torch import TorchConfig, TorchTrainer

    if not ray.is_initialized():
        ray.init(log_to_driver=True, include_dashboard=False)
    on_gpu = config.model.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= config.distributed.processes
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"words": list(words), "folder": os.getcwd()},
        scaling_config=rt.ScalingConfig(num_workers=config.distributed.processes, use_gpu=on_gpu),
        run_config=rt.RunConfig(failure_config=rt.FailureConfig(max_failures=config.distributed.restarts)),
        torch_config=TorchConfig(backend=None if on_gpu else "gloo"),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise ChildProcessError(_sentence(config, "?", f"failed under Ray ({str(error).splitlines()[0]})")) from error


def _worker(settings: dict[str, Any]) -> None:
    """One worker of Ray's, which has joined the process group and set ``RANK`` and its kin."""
    os.chdir(settings["folder"])
    sys.argv = ["veneer", *settings["words"]]
    try:
        runpy.run_module("veneer.cli", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"the worker ended with code {end.code}") from None
