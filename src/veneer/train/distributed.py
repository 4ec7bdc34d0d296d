"""One run on several processes: which of them this is, how the model is spread over them, what only one of them does.

``distributed.strategy`` says how:

    ddp               every process holds the base, the adapter's gradients are averaged (default)
    fsdp2             every block of the base is cut up, and put together while it runs (torch's ``fully_shard``)
    tensor-parallel   every layer is cut up, by the plan that transformers has for the model; all see the same rows
    deepspeed-zero2   gradients and optimiser cut up
    deepspeed-zero3   parameters too

How the processes are started is the matter of ``veneer.train.launch``; here the environment tells (``RANK``,
``WORLD_SIZE``), whoever has set it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from veneer.core.parts import is_cut, parts_of, whole
from veneer.train.config import RunConfig

OPTIMISER = "optimizer.pt"
"""The Trainer's name for the optimiser's state in a checkpoint."""


def processes() -> int:
    """How many processes share this run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launched() -> bool:
    """Whether something has started this process as one of several, perhaps the only one."""
    return "RANK" in os.environ


def is_main() -> bool:
    """Whether this process writes and speaks for all."""
    return int(os.environ.get("RANK", 0)) == 0


def restarted() -> bool:
    """Whether the processes were started again after one of them had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def strategy(config: RunConfig) -> str:
    """What is done; ``alone`` where there is one process and nothing that a single one could do."""
    wanted = config.distributed.strategy
    if wanted.startswith("deepspeed"):
        return wanted
    return "alone" if processes() == 1 else "ddp" if wanted == "auto" else wanted


def replicas(config: RunConfig) -> int:
    """How many processes see rows of their own."""
    return 1 if strategy(config) == "tensor-parallel" else processes()


def join(config: RunConfig, device: torch.device) -> None:
    """Meet the other processes, before the model is loaded.

    Raises:
        ImportError: DeepSpeed is asked for and not installed.
        ValueError: a strategy that does not go with other settings.
    """
    chosen = strategy(config)
    if chosen == "alone":
        return
    _check(config, chosen)
    if chosen.startswith("deepspeed"):
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "localhost")):
            os.environ.setdefault(name, str(value))
        os.environ.setdefault("MASTER_PORT", "29511")
        return
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        dist.init_process_group("gloo" if device.type == "cpu" else None, **_meeting())


def _meeting() -> dict[str, Any]:
    """Where processes meet that were started again: under another name than those before, who have left addresses."""
    if not restarted():
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    place = dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return {"store": place, "rank": int(os.environ["RANK"]), "world_size": processes()}


def _check(config: RunConfig, chosen: str) -> None:
    if chosen.startswith("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise ImportError(f"distributed.strategy {chosen} needs the package deepspeed: pip install deepspeed.")
    if chosen in ("fsdp2", "tensor-parallel") and config.task in ("dpo", "kto", "orpo", "reward", "grpo", "rloo"):
        raise ValueError(
            f"distributed.strategy {chosen} has not been built for task {config.task}, whose trainer holds the model "
            "otherwise; use ddp."
        )
    if chosen == "tensor-parallel" and config.model.quantize != "none":
        raise ValueError(
            f"distributed.strategy tensor-parallel cannot cut the packed weights of model.quantize "
            f"{config.model.quantize}; use fsdp2 or ddp, which take them."
        )


def leave() -> None:
    """Part from the other processes at the end of a run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def loading(config: RunConfig) -> dict[str, Any]:
    """What ``from_pretrained`` is told besides."""
    return {"tp_plan": "auto"} if strategy(config) == "tensor-parallel" else {}


def spread(model: Any, config: RunConfig) -> Any:
    """The adapted model, cut up where the strategy does that before training.

    Raises:
        ValueError: trainable tensors that no block of the base holds, which would not be kept alike.
    """
    if strategy(config) == "fsdp2":
        shard(model)
    elif strategy(config) == "tensor-parallel":
        # The Trainer refuses checkpoints of what it takes for whole models in parts; ours hold the adapter alone.
        model.get_base_model()._is_distributed_loading_by_transformers = False
    return model


def shard(model: Any) -> None:
    """Cut up the base with its adapters by FSDP2: each of its repeated blocks, and the rest.

    Raises:
        ValueError: see ``spread``.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    base = model.get_base_model()
    inside = {id(p) for p in base.parameters()}
    outside = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    if outside:
        raise ValueError(
            f"distributed.strategy fsdp2 cuts up the base's layers, but '{outside[0]}' trains outside of them; use ddp."
        )
    device = next(base.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in blocks(base):
        fully_shard(block, mesh=mesh)
    fully_shard(base, mesh=mesh)


def blocks(base: nn.Module) -> list[nn.Module]:
    """The modules that a model repeats: the members of its outermost lists of modules of one class."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in base.modules():
        if id(module) in inside or not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        if len({type(member) for member in module}) == 1:
            found += module
            inside |= {id(each) for each in module.modules()}
    return found


def changed_batch(stored: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is wrong if a step of a resumed run would see another number of rows; the processes may be others."""

    def rows(settings: dict[str, Any]) -> tuple[int, str]:
        train, spread_over = settings.get("train", {}), settings.get("distributed", {})
        count = 1 if spread_over.get("strategy") == "tensor-parallel" else spread_over.get("processes", 1)
        numbers = train.get("batch_size", 0), train.get("accumulate", 1), count
        return math.prod(numbers), "train.batch_size {} x train.accumulate {} x {} processes".format(*numbers)

    if now["distributed"]["strategy"].startswith("deepspeed"):
        were, are = (settings.get("distributed", {}).get("processes", 1) for settings in (stored, now))
        if were != are:
            return [f"DeepSpeed's checkpoints are those of {were} processes, and there are {are} now"]
    (before, how), (after, now_how) = rows(stored), rows(now)
    return [] if before == after else [f"a step had {before} rows ({how}) and would have {after} ({now_how})"]


def arguments(config: RunConfig) -> dict[str, Any]:
    """Keywords of ``TrainingArguments`` for the strategy."""
    chosen = strategy(config)
    if chosen == "ddp":
        return {"ddp_find_unused_parameters": config.distributed.unused_parameters}
    if chosen.startswith("deepspeed"):
        return {"deepspeed": deepspeed_settings(int(chosen[-1]))}
    return {}


def deepspeed_settings(stage: int) -> dict[str, Any]:
    """DeepSpeed's own settings; "auto" is filled in by the Trainer. Every parameter keeps its dtype."""
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


class _External(TrainerCallback):
    """Tells ZeRO-3 that adapters read tensors of the layers inside them without calling these."""

    def __init__(self, model: Any):
        self.model = model

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After DeepSpeed has taken the parameters apart, before the first forward."""
        zero = importlib.import_module("deepspeed").zero
        for host in self.model.base_model.hosts():
            for adapter in host.adapters.values():
                for module in adapter.modules():
                    for parameter in adapter.parameters():
                        zero.register_external_parameter(module, parameter)


def callbacks(config: RunConfig, model: Any) -> list[TrainerCallback]:
    """What the strategy has to do as the training begins."""
    return [_External(model)] if strategy(config) == "deepspeed-zero3" else []


# ---- the Trainer ----------------------------------------------------------------------------------------------------
def settle(accelerator: Any, model: nn.Module) -> int:
    """Have accelerate leave a model alone that is cut up already, and give tensor-parallel processes the same rows.

    Returns:
        How many processes see rows of their own.
    """
    if not is_spread(model):
        return accelerator.num_processes
    accelerator.prepare_model = lambda model, *args, **kwargs: model
    if not parallel(model):
        return accelerator.num_processes
    from accelerate.data_loader import prepare_data_loader

    whole_batches = {"num_processes": 1, "process_index": 0, "put_on_device": True, "use_seedable_sampler": True}
    accelerator.prepare_data_loader = lambda loader, *args, **kwargs: prepare_data_loader(
        loader, accelerator.device, **whole_batches
    )
    return 1


def is_spread(model: nn.Module) -> bool:
    """Whether parameters of the model lie in parts on several processes, as DTensors."""
    return any(is_cut(p) for p in model.parameters())


def parallel(model: nn.Module) -> bool:
    """Whether it is tensor parallel: cut up, but by no ``fully_shard``."""
    from torch.distributed.fsdp import FSDPModule

    return is_spread(model) and not any(isinstance(m, FSDPModule) for m in model.modules())


def save_optimiser(optimiser: Any, folder: str | Path, main: bool) -> None:
    """Write an optimiser's state as a single process would have it: all gather, one writes."""
    state = optimiser.state_dict()
    state["state"] = {i: {k: _whole(v) for k, v in own.items()} for i, own in state["state"].items()}
    if main:
        torch.save(state, Path(folder) / OPTIMISER)


def _whole(value: Any) -> Any:
    return whole(value).cpu() if isinstance(value, Tensor) else value


def load_optimiser(optimiser: Any, folder: str | Path) -> None:
    """Read what ``save_optimiser`` or a single process has written, cut up as the parameters are.

    Raises:
        ValueError: the state is that of other parameters.
    """
    state = torch.load(Path(folder) / OPTIMISER, map_location="cpu", weights_only=True)
    own = [p for group in optimiser.param_groups for p in group["params"]]
    if len(own) != sum(len(group["params"]) for group in state["param_groups"]):
        raise ValueError(f"{Path(folder) / OPTIMISER} is the state of other parameters; start anew in another folder.")
    optimiser.load_state_dict(state)
    for parameter in own:
        held = optimiser.state[parameter]
        for key, value in held.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                held[key] = parts_of(parameter, value)


# ---- what is said ---------------------------------------------------------------------------------------------------
def plan_lines(config: RunConfig, words: Iterable[str]) -> list[str]:
    """How the run with these words of the command line is started on several processes, for the plan."""
    wanted, said = config.distributed, shlex.join(words)
    count = wanted.processes
    if count == 1 and wanted.strategy == "auto":
        return []
    how = {
        "local": f"veneer train {said}",
        "torchrun": f"torchrun --standalone --nproc-per-node {count} -m veneer.cli train {said}",
        "ray": f"veneer train {said}   (on {count} workers of a Ray cluster)",
    }[wanted.launch]
    name = "ddp" if wanted.strategy == "auto" else wanted.strategy
    return [f"{count} processes, {name}: {how}"]
