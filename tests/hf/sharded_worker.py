"""What one of two processes does in ``test_sharded``.

    torchrun --standalone --nproc-per-node 2 sharded_worker.py FOLDER CASE ...

Each builds the same model and trains it on its half of each batch; process 0 leaves the results in FOLDER/CASE.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from hf import tiny
from veneer import IA3Config, LoraConfig, PeftModel, get_peft_model
from veneer.hf.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from veneer.methods.mola import MolaConfig

STEPS = 3
CONFIGS = {
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    "dora": lambda: LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True),
    "head": lambda: LoraConfig(r=4, target_modules=["q_proj", "lm_head"], modules_to_save=["norm"]),
    "parallel": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
    "mola": lambda: MolaConfig(r=2, experts=4, top_k=2, balance_weight=0.5, target_modules=["q_proj", "up_proj"]),
}


def build(method: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    base = tiny.llama().to(dtype)
    torch.manual_seed(1)
    return get_peft_model(base, CONFIGS[method]()).train()


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 16, (4, 8), generator=generator) for _ in range(STEPS)]


def loss_of(model, ids: torch.Tensor, tuner) -> torch.Tensor:
    loss = model(input_ids=ids, labels=ids).loss.float()
    penalty = tuner.penalty()
    return loss if penalty is None else loss + penalty


def optimiser(model) -> torch.optim.Optimizer:
    # A large eps: where a gradient is almost zero, Adam would turn its rounding into a step of full length.
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)


def train(model, ids_of_step: list[torch.Tensor], tuner, micro: int = 1) -> list[float]:
    step_of, losses = optimiser(model), []
    for ids in ids_of_step:
        total = 0.0
        for part in ids.chunk(micro):
            loss = loss_of(model, part, tuner) / micro
            loss.backward()
            total += loss.item()
        step_of.step()
        step_of.zero_grad()
        losses.append(total)
    return losses


def alone(method: str, micro: int, dtype: torch.dtype = torch.float32) -> PeftModel:
    """The same training in one process."""
    model = build(method, dtype)
    train(model, batches(), model.base_model, micro)
    return model


def own_half() -> list[torch.Tensor]:
    return [ids.chunk(2)[dist.get_rank()] for ids in batches()]


def shard(model: PeftModel) -> PeftModel:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def case_ddp(folder: Path, method: str) -> None:
    model = build(method)
    train(DistributedDataParallel(model), own_half(), model.base_model)
    everyone = [None, None]
    dist.all_gather_object(everyone, {k: v.clone() for k, v in get_peft_model_state_dict(model).items()})
    assert all(torch.equal(everyone[0][k], everyone[1][k]) for k in everyone[0]), "the processes have drifted apart"
    model.save_pretrained(folder, is_main_process=dist.get_rank() == 0)


def case_fsdp(folder: Path, method: str, dtype: str = "float32", mode: str = "train") -> None:
    from torch.distributed.tensor import DTensor

    model = build(method, getattr(torch, dtype))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    model = shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    train(model.train(mode == "train"), own_half(), model.base_model)
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter.grad is None and torch.equal(parameter.full_tensor(), frozen[name]), name
        else:
            assert parameter.dtype == torch.float32, name
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=tiny.IDS).logits
    model.save_pretrained(folder, is_main_process=dist.get_rank() == 0)
    if dist.get_rank() == 0:
        torch.save(logits, folder / "logits.pt")
    keep_from_main(model, folder / "by_main")
    reload(model, method, getattr(torch, dtype), logits)


def reload(model: PeftModel, method: str, dtype: torch.dtype, logits: torch.Tensor) -> None:
    """Put the tensors out of a sharded model, other ones in, and the first ones back, whose logits are known.

    With the other ones it computes what a whole model with them does: nothing derived from the first ones is kept.
    """
    saved = get_peft_model_state_dict(model)
    generator = torch.Generator().manual_seed(3)
    others = {k: v + 0.3 * torch.rand(v.shape, generator=generator) for k, v in saved.items()}
    single = build(method, dtype).eval()
    set_peft_model_state_dict(single, others, strict=True)
    # Rank 0's file counts, should another rank have been given something else.
    given = others if dist.get_rank() == 0 else {k: torch.zeros_like(v) for k, v in others.items()}
    set_peft_model_state_dict(model, given, strict=True)
    with torch.no_grad():
        there, wanted = model(input_ids=tiny.IDS).logits, single(input_ids=tiny.IDS).logits
        set_peft_model_state_dict(model, saved, strict=True)
        back = model(input_ids=tiny.IDS).logits
    assert not torch.allclose(there, logits, atol=1e-3)
    torch.testing.assert_close(there, wanted)
    assert torch.equal(back, logits)


def keep_from_main(model: PeftModel, folder: Path) -> None:
    """What transformers' Trainer does: all gather the whole model, process 0 alone saves with that state dict."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=gathered)


def planned(folder: Path) -> torch.nn.Module:
    """The base, cut up by the plan that transformers has for it."""
    from transformers import AutoModelForCausalLM

    if dist.get_rank() == 0:
        tiny.llama().save_pretrained(folder / "base")
    dist.barrier()
    return AutoModelForCausalLM.from_pretrained(folder / "base", tp_plan="auto", dtype=torch.float32).eval()


def styled(folder: Path) -> torch.nn.Module:
    """The base, cut up by torch's styles."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    base, mesh = tiny.llama(), init_device_mesh("cpu", (dist.get_world_size(),))
    columns = [f"self_attn.{n}_proj" for n in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
    plan = {name: ColwiseParallel() for name in columns}
    plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    for layer in base.model.layers:
        parallelize_module(layer, mesh, plan)
    return base


def case_tp(folder: Path, how: str) -> None:
    make = {"plan": planned, "styles": styled}[how]
    torch.manual_seed(1 + dist.get_rank())  # process 0's draw counts
    model = get_peft_model(make(folder), CONFIGS["parallel"]()).train()
    assert all(same for _, same in agreeing(model))
    single = build("parallel")
    drawn = torch.Generator().manual_seed(5)
    start = {k: 0.1 * torch.randn(v.shape, generator=drawn) for k, v in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, start, strict=True)
    set_peft_model_state_dict(single, get_peft_model_state_dict(model), strict=True)
    ids = batches()[0]
    for each in (single, model):
        each(input_ids=ids, labels=ids).loss.backward()
    for (name, own), (_, wanted) in zip(trained(model), trained(single), strict=True):
        grad = own.grad.full_tensor() if hasattr(own.grad, "full_tensor") else own.grad
        torch.testing.assert_close(grad, wanted.grad, rtol=1e-4, atol=1e-6, msg=name)
    model.zero_grad(), single.zero_grad()
    train(model, batches(), model.base_model), train(single, batches(), single.base_model)
    for (name, own), (_, wanted) in zip(trained(model), trained(single), strict=True):
        full = own.full_tensor() if hasattr(own, "full_tensor") else own
        torch.testing.assert_close(full, wanted, rtol=1e-4, atol=1e-5, msg=name)
    model.eval(), single.eval()
    with torch.no_grad():
        logits = model(input_ids=tiny.IDS).logits
        torch.testing.assert_close(logits, single(input_ids=tiny.IDS).logits, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=tiny.IDS).logits, tiny.llama()(input_ids=tiny.IDS).logits)
        text = model.generate(input_ids=tiny.IDS, max_new_tokens=3, do_sample=False)
        assert torch.equal(text, single.generate(input_ids=tiny.IDS, max_new_tokens=3, do_sample=False))
    model.save_pretrained(folder, is_main_process=dist.get_rank() == 0)
    dist.barrier()
    for lean in (False, True):
        again = PeftModel.from_pretrained(make(folder), folder, low_cpu_mem_usage=lean).eval()
        with torch.no_grad():
            torch.testing.assert_close(again(input_ids=tiny.IDS).logits, logits)
    if dist.get_rank() == 0:
        torch.save(logits, folder / "logits.pt")
    said = {"merge": refusal(model.merge_adapter)}
    for what, config in {
        "dora": LoraConfig(target_modules=["q_proj"], use_dora=True),
        "dropout": LoraConfig(target_modules=["q_proj"], lora_dropout=0.1),
        "start": LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"),
        "ia3": IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    }.items():
        said[what] = refusal(lambda config=config: model.add_adapter("late", config))
    if dist.get_rank() == 0:
        torch.save(said, folder / "said.pt")


def agreeing(model: PeftModel) -> list[tuple[str, bool]]:
    """Whether a factor has the same values on both processes."""
    both = [None, None]
    dist.all_gather_object(both, {k: v.clone() for k, v in get_peft_model_state_dict(model).items()})
    return [(key, torch.equal(value, both[1][key])) for key, value in both[0].items()]


def trained(model: PeftModel) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def refusal(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing"


def case_refusals(folder: Path) -> None:
    model = shard(build("lora"))
    said: dict = {
        "add": refusal(lambda: model.add_adapter("late", CONFIGS["lora"]())),
        "merge": refusal(model.merge_adapter),
    }
    model.eval()(input_ids=tiny.IDS)  # a refusal leaves a model that still runs
    said["adapters"] = list(model.peft_config)
    if dist.get_rank() == 0:
        torch.save(said, folder / "said.pt")


def main() -> None:
    torch.set_num_threads(1)
    folder, *cases = sys.argv[1:]
    dist.init_process_group("gloo")
    try:
        for each in cases:
            name, *arguments = each.split(":")
            place = Path(folder) / each.replace(":", "-")
            place.mkdir(parents=True, exist_ok=True)
            globals()[f"case_{name}"](place, *arguments)
            dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
