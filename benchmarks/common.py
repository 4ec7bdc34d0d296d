"""What the benchmarks share: models made from a config, interleaved rounds, medians, one table and one JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RESULTS = Path(__file__).parent / "results"


def libraries(names: str) -> dict[str, ModuleType]:
    """Modules that offer ``get_peft_model`` and ``LoraConfig``, by name: ``veneer,peft``."""
    return {name: importlib.import_module(name) for name in names.split(",")}


def arguments(description: str, **defaults: Any) -> argparse.Namespace:
    """``--libraries veneer,peft --rounds N`` and a benchmark's own options."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--libraries", default="veneer,peft")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    return given


def llama(
    hidden: int = 512, layers: int = 8, mlp: int = 1408, vocab: int = 8192, heads: int = 8, **more: Any
) -> nn.Module:
    """A Llama with random weights: the train shape by default; hidden 64 with 32 layers has 225 small linear layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=mlp, vocab_size=vocab,
        num_attention_heads=heads, num_key_value_heads=heads, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class One(nn.Module):
    """A model of one linear layer."""

    def __init__(self, width: int):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Touched(TorchDispatchMode):
    """Counts the bytes of all that torch's kernels read and write: what is written in place counts as both."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.kernels: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        name = func.name()
        if not views and not name.startswith(("aten::empty", "aten::new_empty", "aten::_unsafe_view")):
            made = name.startswith("aten::new_") or "_like" in name  # of another's shape, unread
            seen = tree_leaves(out if made else (args, kwargs, out))
            count = sum(t.numel() * t.element_size() for t in seen if isinstance(t, Tensor))
            self.bytes += count
            self.kernels.append((name, count))
        return out


def kept(model: nn.Module, step: Callable[[], Any]) -> float:
    """MiB of different storages that a training step keeps for backward, the model's own tensors excluded."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        step()
    return sum(found.values()) / 2**20


def interleave(candidates: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, dict[str, float]]:
    """Time callables round by round in turn.

    Returns:
        name -> median CPU and wall seconds, and the least CPU seconds.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for number in range(rounds + warmup):
        for name, run in candidates.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            if number >= warmup:
                times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: {
            "cpu_s": statistics.median(c for c, _ in each),
            "wall_s": statistics.median(w for _, w in each),
            "cpu_min_s": min(c for c, _ in each),
        }
        for name, each in times.items()
    }


def report(title: str, rows: dict[str, dict[str, float]], reference: str | None = None) -> None:
    """Print a table, with ratios to ``reference`` (medians of CPU time), and write ``results/<title>.json``."""
    print(f"\n{title}")
    print(f"{'':34}{'CPU ms':>12}{'wall ms':>12}{'ratio':>9}")
    for name, row in rows.items():
        ratio = row["cpu_s"] / rows[reference]["cpu_s"] if reference else float("nan")
        print(f"{name:34}{1e3 * row['cpu_s']:12.2f}{1e3 * row['wall_s']:12.2f}{ratio:9.3f}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{title.split(':')[0].replace(' ', '_')}.json").write_text(json.dumps(rows, indent=2) + "\n")
