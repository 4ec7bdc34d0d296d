"""Trainable tokens: which rows change, tied heads, a linear layer's rows, files of the peer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from golden.bases import build
from laws.kinds import Chain
from parity import both_ways, near, needs_peer, ours
from veneer import TrainableTokensConfig
from veneer.engine import checkpoint
from veneer.engine.tuner import Tuner

IDS = torch.arange(12).view(3, 4)


class Tied(nn.Module):
    """A language model in small: the head has the embedding's own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embed(x)))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def tied() -> nn.Module:
    torch.manual_seed(0)
    return Tied()


def tokens(*indices: int, **settings) -> TrainableTokensConfig:
    return TrainableTokensConfig(token_indices=list(indices), **({"target_modules": ["layer"]} | settings))


def test_only_the_named_rows_change_and_the_others_to_the_last_bit() -> None:
    layer = nn.Embedding(12, 8)
    before = layer.weight.clone()
    tuner = ours(Chain(None, layer), tokens(3, 7))
    optimizer = torch.optim.SGD([p for p in tuner.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    tuner(IDS).square().sum().backward()
    optimizer.step()
    rows = tuner.unload(merge=True).layer.weight
    changed = (rows != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [3, 7]
    assert torch.equal(rows[~changed], before[~changed])


def test_a_linear_layer_keeps_its_bias_merged_or_not() -> None:
    """The peer loses it in its forward (0.25 off)."""
    layer, x = nn.Linear(8, 12), torch.randn(5, 8)
    tuner = ours(Chain(None, layer), tokens(1, 4))
    theta = next(tuner.adapters("default"))[1].trainable_tokens_delta
    expected = nn.functional.linear(x, layer.weight.index_copy(0, torch.tensor([1, 4]), theta), layer.bias)
    assert near(tuner(x), expected, 1e-6)
    tuner.merge()
    assert near(tuner(x), expected, 1e-6)


def test_a_tied_head_sees_the_same_rows_and_both_train_them() -> None:
    tuner = ours(tied(), tokens(2, 5, target_modules=["embed"]))
    theta = next(p for p in tuner.parameters() if p.requires_grad)
    w = tied().embed.weight.detach().index_copy(0, torch.tensor([2, 5]), theta)
    expected = torch.tanh(w[IDS]) @ w.T
    y = tuner(IDS)
    assert near(y, expected, 1e-6)
    y.square().sum().backward()
    (through_both,) = torch.autograd.grad(expected.square().sum(), theta)
    assert near(theta.grad, through_both, 1e-5)
    twin = copy.deepcopy(tuner)
    with torch.no_grad():
        theta.zero_()
    assert near(twin(IDS), y, 1e-6) and not near(tuner(IDS), y, 1e-3)
    twin.merge()
    assert near(twin(IDS), y, 1e-6)


@needs_peer
def test_files_of_a_tied_model_both_ways(tmp_path: Path) -> None:
    import peft

    def base() -> nn.Module:
        return build("llama_tied")

    settings = {"token_indices": [2, 5], "task_type": "CAUSAL_LM", "target_modules": ["embed_tokens"]}
    both_ways(
        base, peft.TrainableTokensConfig(**settings), TrainableTokensConfig(**settings), {"input_ids": IDS}, tmp_path
    )


def test_an_adapter_made_empty_and_filled_from_a_file_knows_its_rows() -> None:
    tuner = ours(tied(), tokens(2, 5, target_modules=["embed"]))
    empty = Tuner(tied())
    empty.add("default", tokens(2, 5, target_modules=["embed"]), device="meta")
    assert checkpoint.put(empty, "default", checkpoint.tensors(tuner, "default")).clean
    empty.set_active("default")
    assert torch.equal(empty(IDS), tuner(IDS))


@pytest.mark.parametrize("bad", [[1, 1], [12], [-1]])
def test_indices_that_make_no_sense_are_refused(bad: list[int]) -> None:
    with pytest.raises(ValueError, match="distinct and in"):
        ours(Chain(None, nn.Embedding(12, 8)), tokens(*bad))
