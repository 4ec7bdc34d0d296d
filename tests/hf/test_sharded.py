"""Adapters on several processes: two of them, on gloo, on the CPU, against one process that sees everything."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import veneer
from hf import sharded_worker as worker
from hf import tiny
from veneer.hf.state_dict import get_peft_model_state_dict, set_peft_model_state_dict

WORKER = Path(worker.__file__)
FILE = "adapter_model.safetensors"
FSDP = ["lora", "lora:bfloat16", "head", "dora", "dora:float32:eval", "mola"]
"""method, dtype of the base, and the mode to train in: DoRA remembers norms in eval mode."""

TP = ["styles", "plan"]
"""Who cuts up the base: torch's ``parallelize_module``, or transformers' ``tp_plan``."""


def two_processes(folder: Path, *cases: str) -> Path:
    """Run the worker twice, as ``torchrun --nproc-per-node 2`` would; both must come to a good end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(veneer.__file__).parents[1]), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    command = [sys.executable, str(WORKER), str(folder), *cases]
    processes = [
        subprocess.Popen(
            command, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0, 0], "\n".join(text[-3000:] for text in said)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything the two processes do, in one start of them: importing is what takes long."""
    folder = tmp_path_factory.mktemp("two")
    cases = [
        *(f"ddp:{m}" for m in ("lora", "mola")),
        *(f"fsdp:{m}" for m in FSDP),
        *(f"tp:{how}" for how in TP),
        "refusals",
    ]
    return two_processes(folder, *cases)


def equal_training(folder: Path, method: str, dtype: torch.dtype = torch.float32) -> None:
    # The balance penalty is no mean over tokens: each process has that of its own half, as a micro-batch would.
    single = worker.alone(method, micro=2, dtype=dtype)
    wanted, found = get_peft_model_state_dict(single), load_file(folder / FILE)
    start = get_peft_model_state_dict(worker.build(method, dtype))
    assert found.keys() == wanted.keys()
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 3e-3}
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], **({"rtol": 1e-4, "atol": 1e-5} | tolerance), msg=key)
    assert any(not torch.allclose(value, start[key], atol=1e-3) for key, value in found.items())


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", ["lora", "mola"])
def test_ddp_trains_as_one_process_does(results, method):
    equal_training(results / f"ddp-{method}", method)


def test_two_halves_are_one_batch():
    """Without a penalty the mean over processes is the mean over the whole batch."""
    halves, one = (get_peft_model_state_dict(worker.alone("lora", micro=m)) for m in (2, 1))
    for key, value in halves.items():
        torch.testing.assert_close(value, one[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", FSDP)
def test_fsdp2_trains_as_one_process_does(results, case):
    method, dtype, *_ = [*case.split(":"), ""]
    equal_training(results / f"fsdp-{case.replace(':', '-')}", method, getattr(torch, dtype or "float32"))


@pytest.mark.parametrize("case", FSDP)
def test_what_fsdp2_saved_loads_in_one_process(results, case):
    _, dtype, *_ = [*case.split(":"), ""]
    folder = results / f"fsdp-{case.replace(':', '-')}"
    base = tiny.llama().to(getattr(torch, dtype or "float32"))
    model = veneer.PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tiny.IDS).logits, torch.load(folder / "logits.pt"))
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"]


@pytest.mark.parametrize("case", FSDP)
def test_a_gathered_state_dict_on_process_0_gives_the_same_file(results, case):
    folder = results / f"fsdp-{case.replace(':', '-')}"
    assert (folder / FILE).read_bytes() == (folder / "by_main" / FILE).read_bytes()


def test_what_cannot_be_done_sharded_is_refused_in_a_sentence(results):
    said = torch.load(results / "refusals" / "said.pt")
    assert "Add the adapter first, then shard" in said["add"]
    assert "merge it in one process" in said["merge"]
    assert said["adapters"] == ["default"]


# ---- tensor parallelism: forward, gradients and training are compared inside the processes -------------------------
@pytest.mark.parametrize("how", TP)
def test_what_tensor_parallel_processes_saved_loads_in_one(results, how):
    folder = results / f"tp-{how}"
    model = veneer.PeftModel.from_pretrained(tiny.llama(), folder).eval()
    with torch.no_grad():
        logits = model(input_ids=tiny.IDS).logits
    torch.testing.assert_close(logits, torch.load(folder / "logits.pt"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", TP)
def test_what_tensor_parallel_layers_cannot_do_is_refused_in_a_sentence(results, how):
    said = torch.load(results / f"tp-{how}" / "said.pt")
    assert "merge it in one process" in said["merge"]
    assert "q_proj" in said["dora"] and "choose plain LoRA" in said["dora"]
    assert said["dropout"].startswith("lora_dropout does not work at")
    assert said["start"].startswith("init_lora_weights='pissa' does not work at")
    assert "plain LoRA can, or load the model without" in said["ia3"]


# ---- tensors that are not there -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("part", "word"), [(lambda t: torch.empty(0), "empty"), (lambda t: t.flatten()[:3].clone(), "flattened")]
)
def test_a_part_of_a_tensor_is_never_written(tmp_path, part, word):
    model = worker.build("lora")
    victim = next(p for n, p in model.named_parameters() if "lora_A" in n)
    victim.data = part(victim.data)
    with pytest.raises(ValueError, match=word):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()


def test_zero3_parameters_are_gathered_for_the_file(monkeypatch, tmp_path):
    """DeepSpeed's part is played by a stand-in with its one entry point, which fills and empties tensors in place."""
    model = worker.build("lora")
    wanted = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    full = {}
    for i, parameter in enumerate(p for n, p in model.named_parameters() if "lora_" in n):
        parameter.ds_id, full[i] = i, parameter.data
        parameter.data = torch.empty(0)

    @contextlib.contextmanager
    def gathered(parameters, modifier_rank=None):
        for parameter in parameters:
            parameter.data = full[parameter.ds_id]
        yield
        for parameter in parameters:
            full[parameter.ds_id] = parameter.data.clone()
            parameter.data.fill_(float("nan"))  # the memory is somebody else's now
            parameter.data = torch.empty(0)

    zero = types.SimpleNamespace(GatheredParameters=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero))
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / FILE)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    doubled = {k: 2 * v + 1 for k, v in wanted.items()}
    set_peft_model_state_dict(model, doubled, strict=True)
    again = get_peft_model_state_dict(model)
    assert all(torch.equal(again[key], doubled[key]) for key in wanted)
