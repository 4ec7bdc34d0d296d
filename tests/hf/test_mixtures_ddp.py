"""Mixtures on two processes: no parameter is left without a gradient, and the gradient is that of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from hf.mixing import folders, stir
from hf.tiny import IDS, llama
from veneer import LilyConfig, LoraMoeConfig, MixLoraConfig, MolaConfig, PolyConfig, get_peft_model, mix

LAYERS = {"target_modules": ["q_proj", "up_proj"]}
CONFIGS = {
    "mola": lambda: MolaConfig(r=2, experts=4, top_k=1, balance_weight=0.5, **LAYERS),
    "mixlora": lambda: MixLoraConfig(
        r=2, experts=4, top_k=1, balance_weight=0.5, lora_dropout=0.0, target_modules=["mlp", "q_proj"]
    ),
    "loramoe": lambda: LoraMoeConfig(r=2, experts=4, knowledge_experts=2, balance_weight=0.5, **LAYERS),
    "poly": lambda: PolyConfig(r=2, n_skills=3, **LAYERS),
    "lily": lambda: LilyConfig(r=2, **LAYERS),
}
FROM_FOLDERS = {"mole": {}, "mole-sequence": {"gate": "sequence"}, "xlora": {"layerwise_scalings": True}}
CASES = [(method, saving) for method in (*CONFIGS, *FROM_FOLDERS) for saving in (False, True)]
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
ROWS = torch.cat([IDS, IDS.flip(0) + 1])


def build(method: str, saving: bool, where: str):
    torch.manual_seed(1)
    if method in CONFIGS:
        model = get_peft_model(llama(), CONFIGS[method]())
    else:
        named = {name: f"{where}/{name}" for name in "abc"}
        model = mix(llama(), named, method.partition("-")[0], **FROM_FOLDERS[method])
    if saving:
        model.gradient_checkpointing_enable()
    return stir(model, 3, 0.3).train()


def loss_of(model, tuner, rows: slice, padding: int) -> torch.Tensor:
    torch.manual_seed(0)  # Poly draws
    ids, mask = ROWS[rows].clone(), MASK[rows]
    ids[mask == 0] = padding
    loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    penalty = tuner.penalty()
    return loss if penalty is None else loss + penalty


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    for method, saving in CASES:
        model = build(method, saving, folder)
        spread = DistributedDataParallel(model, find_unused_parameters=False)
        for padding in (0, 7, 0):  # the third time round, DDP would refuse what had no gradient in the second
            loss_of(spread, model.base_model, slice(2 * rank, 2 * rank + 2), padding).backward()
            results[method, saving, padding] = gradients(model)
    torch.save(results, f"{folder}/rank{rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("two")
    folders(folder)
    torch.multiprocessing.spawn(one_of_two, (str(folder),), nprocs=2)
    return folder, [torch.load(folder / f"rank{rank}") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "saving"), CASES)
def test_two_processes_have_the_gradient_of_one(method: str, saving: bool, results) -> None:
    folder, (first, second) = results
    alone = build(method, False, str(folder))
    trained = {n for n, p in alone.named_parameters() if p.requires_grad}
    for rows in (slice(0, 2), slice(2, 4)):
        (loss_of(alone, alone.base_model, rows, 0) / 2).backward()
    wanted = gradients(alone)
    assert wanted.keys() == trained
    for found in (first, second):
        for padding in (0, 7):
            assert found[method, saving, padding].keys() == trained
            for name, gradient in found[method, saving, padding].items():
                torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)
