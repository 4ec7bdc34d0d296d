"""What the laws say of every method, of the mixtures that need a model and trained adapters around them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from hf.mixing import folders, stir
from hf.tiny import IDS, llama
from veneer import PeftModel, mix
from veneer.core.config import PeftConfig
from veneer.hf.state_dict import get_peft_model_state_dict

METHODS = pytest.mark.parametrize("method", ["mole", "xlora", "arrow"])


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> dict[str, str]:
    return folders(tmp_path_factory.mktemp("experts"))


def mixed(method: str, experts: dict[str, str], dtype: torch.dtype = torch.float32, **options) -> PeftModel:
    torch.manual_seed(1)
    return stir(mix(llama().to(dtype), experts, method, **options), 3, 0.3).eval()


def logits(model, ids=IDS, **kwargs) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits.detach()


@METHODS
def test_it_changes_the_output_and_off_is_the_base(method: str, experts) -> None:
    model, plain = mixed(method, experts), logits(llama())
    assert not torch.allclose(logits(model), plain, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.base_model.set_active()
    assert torch.equal(logits(model), plain)


@METHODS
def test_unload_leaves_no_trace(method: str, experts) -> None:
    bare = [(n, type(m)) for n, m in llama().named_modules()]
    base = mixed(method, experts).unload()
    assert [(n, type(m)) for n, m in base.named_modules()] == bare
    assert torch.equal(logits(base), logits(llama()))
    assert not base._forward_pre_hooks and not base._forward_hooks


@METHODS
def test_saved_and_loaded_is_the_same_and_so_is_what_goes_on_from_there(method: str, experts, tmp_path) -> None:
    model = mixed(method, experts)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    beside = PeftModel.from_pretrained(llama(), experts["a"], adapter_name="other")
    beside.load_adapter(tmp_path, "mixture")
    beside.set_adapter("mixture")
    assert torch.equal(logits(beside), logits(model))
    assert PeftConfig.read(tmp_path).peft_type == model.peft_config["default"].peft_type
    found = get_peft_model_state_dict(again)
    assert found and all(torch.equal(found[k], v) for k, v in get_peft_model_state_dict(model).items())


@METHODS
def test_the_experts_stay_as_they_were(method: str, experts) -> None:
    model = mixed(method, experts).train()
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    own = [p for p in model.parameters() if p.requires_grad]
    assert bool(own) == (method != "arrow")
    if own:
        optimizer = torch.optim.SGD(own, lr=1.0)
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    else:
        logits(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


@METHODS
def test_deep_copy_and_pickle_are_independent_twins(method: str, experts) -> None:
    model = mixed(method, experts)
    stored = pickle.dumps(model)  # before a call: transformers' hooks for hidden states, which X-LoRA asks for, cannot
    y = logits(model)
    model.train()(input_ids=IDS)  # what a training forward leaves is no part of a copy
    model.eval()
    for twin in (copy.deepcopy(model), pickle.loads(stored)):
        assert torch.equal(logits(twin), y)
        with torch.no_grad():
            for p in twin.parameters():
                p.add_(0.05)
        assert not torch.equal(logits(twin), y) and torch.equal(logits(model), y)


@METHODS
def test_half_precision_bases_keep_their_dtype(method: str, experts) -> None:
    model = mixed(method, experts, torch.bfloat16)
    y = logits(model)
    assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()
    assert torch.allclose(y.float(), logits(mixed(method, experts)), atol=0.15)


@METHODS
def test_rows_of_a_batch_do_not_see_each_other_nor_their_padding(method: str, experts) -> None:
    model = mixed(method, experts)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    ids = IDS.clone()
    ids[1, 3:] = 9
    both = logits(model, ids, attention_mask=mask)
    assert torch.allclose(both[:1], logits(model, IDS[:1]), atol=1e-5)
    assert torch.allclose(both[1:, :3], logits(model, IDS[1:, :3]), atol=1e-5)


@METHODS
def test_checkpointing_changes_no_gradient(method: str, experts) -> None:
    found = []
    for saving in (False, True):
        model = mixed(method, experts).train()
        if saving:
            model.gradient_checkpointing_enable()
        hidden = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=hidden, labels=IDS).loss.backward()
        found.append([hidden.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


@METHODS
def test_a_merge_is_refused_and_changes_nothing(method: str, experts) -> None:
    model = mixed(method, experts)
    y = logits(model)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    assert torch.equal(logits(model), y)


@METHODS
def test_two_mixtures_do_not_see_each_other(method: str, experts) -> None:
    if method != "mole":
        pytest.skip("the experts of these are adapters by name, of which there is one of each")
    model = mixed(method, experts)
    y = logits(model)
    two = dict(list(experts.items())[:2])
    config = type(model.peft_config["default"])(task_type="CAUSAL_LM", adapters=two)
    model.add_adapter("second", config)
    assert torch.equal(logits(model), y)
    model.set_adapter("second")
    assert torch.allclose(logits(model), logits(mix(llama(), two, "mole")), atol=1e-6)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), y)
