"""What is made and listed without torch's own ways is what torch would have made and listed."""

from __future__ import annotations

import torch
from torch import nn

from veneer.core import lean


class Saving(nn.Linear):
    """A layer with a way of its own to be saved."""

    def get_extra_state(self):
        return torch.ones(1)


def everything() -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ModuleDict({"own": Saving(3, 3), "none": nn.ReLU()}))
    module.register_buffer("kept", torch.ones(2))
    module.register_buffer("lost", torch.ones(2), persistent=False)
    module.register_buffer("empty", None)
    module.register_parameter("nothing", None)
    return module


def test_a_module_begins_as_torch_begins_one() -> None:
    theirs = vars(nn.Module())
    for _ in range(2):
        mine = nn.Module.__new__(nn.Module)
        lean.begin(mine)
        assert vars(mine) == theirs and [type(v) for v in vars(mine).values()] == [type(v) for v in theirs.values()]
        mine.weight = nn.Parameter(torch.ones(1))
        mine.register_forward_hook(lambda *given: None)
        mine.register_buffer("other", torch.ones(1), persistent=False)  # no two modules share a table


def test_saved_tensors_are_the_live_ones_of_the_state_dict() -> None:
    module = everything()
    theirs, mine = module.state_dict(keep_vars=True), lean.saved(module)
    assert mine.keys() == theirs.keys()
    assert all(mine[key] is theirs[key] for key in mine if not key.endswith("_extra_state"))


def test_emptied_parameters_keep_all_but_their_values() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).requires_grad_(False)
    module[0].weight.requires_grad_(True)
    lean.empty(module, torch.bfloat16)
    assert all(p.is_meta and p.dtype is torch.bfloat16 and type(p) is nn.Parameter for p in module.parameters())
    assert [p.requires_grad for p in module.parameters()] == [True, False, False, False]
    assert module[0].weight.shape == (3, 2)
