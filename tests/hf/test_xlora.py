"""X-LoRA: two passes, weights per token and layer, experts that stay as they are, generate without a stale cache."""

from __future__ import annotations

import contextlib
import warnings

import peft
import pytest
import torch

import veneer
from hf.mixing import NAMES, deltas, folders, stir
from hf.tiny import IDS, llama
from veneer import PeftModel, XLoraConfig, get_peft_model
from veneer.engine import checkpoint

PREFIX = "base_model.internal_xlora_classifier.layers."


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> dict[str, str]:
    return folders(tmp_path_factory.mktemp("experts"))


def mixed(experts: dict[str, str], seed: int = 9, **options) -> PeftModel:
    settings = {"layerwise_scalings": True, "task_type": "CAUSAL_LM", "adapters": dict(experts)} | options
    return stir(get_peft_model(llama(), XLoraConfig(**settings)), seed, 0.5).eval()


def logits(model, ids=IDS, **kwargs):
    return model(input_ids=ids, **kwargs).logits


@contextlib.contextmanager
def by_hand(experts: dict[str, str], sigma: torch.Tensor):
    """A bare model whose layers add sum_i sigma_i dW_i x, token by token."""
    model, each = llama(), [deltas(folder) for folder in experts.values()]
    for at, path in enumerate(p for p, _ in model.named_modules() if p in each[0]):
        here = [delta[path] for delta in each]

        def add(module, args, out, at=at, here=here):
            return out + sum(sigma[:, :, at, i, None] * (args[0] @ d.T) for i, d in enumerate(here))

        model.get_submodule(path).register_forward_hook(add)
    yield model


def expected(model: PeftModel, experts: dict[str, str], k: int | None = None) -> torch.Tensor:
    root = model.base_model.roots["default"]
    hidden = llama().model(input_ids=IDS).last_hidden_state
    last = root.internal_xlora_classifier.layers[-1]
    sigma = (hidden @ last.weight.T + last.bias).view(2, 6, -1, 3).softmax(-1).expand(2, 6, 4, 3)
    if k is not None:
        sigma = sigma * torch.zeros_like(sigma).scatter(-1, sigma.topk(k).indices, 1)
    with by_hand(experts, sigma) as plain:
        return logits(plain)


@pytest.mark.parametrize("options", [{}, {"layerwise_scalings": False}, {"top_k_lora": 2}])
def test_it_is_the_papers_formula(experts, options: dict) -> None:
    model = mixed(experts, **options)
    assert torch.allclose(logits(model), expected(model, experts, options.get("top_k_lora")), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"layerwise_scalings": False}, {"xlora_depth": 3, "xlora_size": 8}, {"softmax_temperature": 0.3},
        {"top_k_lora": 2}, {"top_k_lora": 2, "enable_softmax_topk": True}, {"enable_softmax": False},
        {"scaling_pass_value": 0.7}, {"global_scaling_weight": 0.5},
        {"top_k_lora": 1, "enable_softmax_topk": True, "enable_softmax": False},
    ],
)  # fmt: skip
def test_the_peer_reads_our_folder_and_we_read_its_tensors(experts, tmp_path, options: dict) -> None:
    # The peer can run experts only under the names 0, 1, 2, and drops the classifier's first layer when it saves.
    numbered = {str(i): folder for i, folder in enumerate(experts.values())}
    own = mixed(numbered, **options)
    own.save_pretrained(tmp_path / "ours")
    base = llama()
    base.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert torch.allclose(logits(own), logits(theirs), atol=1e-5)
    assert torch.allclose(own.get_latest_scalings(), theirs.get_latest_scalings(), atol=1e-5)

    stir(theirs.base_model.internal_xlora_classifier, 5, 0.5)
    live = theirs.base_model.internal_xlora_classifier.layers
    found = {PREFIX + k: v for k, v in (live.state_dict()).items()}
    checkpoint.write(tmp_path / "theirs", found)
    theirs.peft_config["default"].save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(llama(), tmp_path / "theirs")
    assert torch.allclose(logits(again), logits(theirs), atol=1e-5)


def test_only_the_classifier_trains_and_it_gets_a_gradient(experts) -> None:
    model = mixed(experts).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("internal_xlora_classifier" in n for n in trained)
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    both = mixed(experts, use_trainable_adapters=True)
    assert any("lora_A" in n for n, p in both.named_parameters() if p.requires_grad)


def test_checkpointing_recomputes_under_the_same_scalings(experts) -> None:
    plain, saving = mixed(experts), mixed(experts)
    saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-6))


def test_generate_reads_the_whole_text_at_each_step(experts) -> None:
    model, ids = mixed(experts), IDS[:1]
    wanted = ids
    for _ in range(4):
        wanted = torch.cat([wanted, logits(model, wanted)[:, -1:].argmax(-1)], 1)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(input_ids=ids, **options), wanted)
    with pytest.raises(ValueError, match="use_cache=False"):
        model.base_model.model.generate(input_ids=ids, **options)
    assert model.generate(input_ids=IDS, num_beams=2, **options).shape == (2, 10)


def test_one_expert_is_that_lora(experts) -> None:
    model = mixed({"a": experts["a"]})
    alone = PeftModel.from_pretrained(llama(), experts["a"])
    assert torch.allclose(logits(model), logits(alone), atol=1e-5)


def test_off_is_the_base_and_an_expert_alone_is_itself(experts) -> None:
    model = mixed(experts)
    y = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    model.set_adapter("b")
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(llama(), experts["b"])))
    model.set_adapter("default")
    assert torch.equal(logits(model), y)
    assert torch.allclose(model(input_ids=IDS, logits_to_keep=2).logits, y[:, -2:], atol=1e-6)


def test_its_folder_is_complete_in_itself(experts, tmp_path) -> None:
    model = mixed(experts)
    model.save_pretrained(tmp_path / "mixture")
    moved = (tmp_path / "mixture").rename(tmp_path / "elsewhere")
    config = veneer.PeftConfig.read(moved)
    config.adapters = dict.fromkeys(config.adapters, "/gone")
    config.write(moved)
    again = PeftModel.from_pretrained(llama(), moved)
    assert torch.equal(logits(again), logits(model))
    again.delete_adapter("default")
    assert sorted(again.peft_config) == sorted(NAMES)
    assert torch.equal(logits(again), logits(llama()))
    assert not again.base_model.model._forward_pre_hooks


def test_the_log_of_scalings(experts) -> None:
    model = mixed(experts)
    model.enable_scalings_logging()
    logits(model)
    logits(model, IDS[:, :3])
    logits(model)
    assert [tuple(s.shape) for s in model.get_scalings_log()] == [(2, 6, 4, 3), (2, 3, 4, 3), (2, 6, 4, 3)]
    assert model.get_bucketed_scalings_log()[6][0] == [0, 2]
    model.clear_scalings_log()
    assert model.get_scalings_log() == []
    model.set_topk_lora(1)
    one = logits(model)
    model.set_topk_lora(None)
    assert not torch.equal(one, logits(model))


def test_what_cannot_work_is_refused(experts) -> None:
    with pytest.raises(ValueError, match="between 1 and the number of experts, 3"):
        mixed(experts, top_k_lora=4)
    with pytest.raises(ValueError, match="give adapters="):
        mixed({})
    with pytest.raises(ValueError, match="hidden_size is 99"):
        mixed(experts, hidden_size=99)
    model = mixed(experts)
    for refused, words in (
        (model.merge_and_unload, "by the input"),
        (lambda: model.delete_adapter("a"), "delete 'default' first"),
        (lambda: model(input_ids=IDS, adapter_names=["default", "a"]), "single rows"),
    ):
        with pytest.raises(ValueError, match=words):
            refused()
    mixed_rows = logits(model, adapter_names=["a", "b"])[:1]
    assert torch.allclose(mixed_rows, logits(model, IDS[:1], adapter_names=["a"]), atol=1e-6)
