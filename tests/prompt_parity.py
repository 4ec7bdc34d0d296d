"""Parity of prompts with the peer, both ways: either side's folder, read by the other, gives equal outputs."""

from __future__ import annotations

import json
import warnings

import torch
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification, BertForTokenClassification

import veneer
from hf.tiny import gpt2, llama, t5
from parity import near, randomise
from veneer.engine import checkpoint

IDS = torch.tensor([[1, 4, 5, 6, 7], [0, 0, 1, 9, 10]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def bert(cls):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return cls(BertConfig(vocab_size=16, max_position_embeddings=32, pad_token_id=0, **sizes)).eval()


BASES = {
    "llama": (llama, "CAUSAL_LM"),
    "gqa": (lambda: llama(num_attention_heads=4, num_key_value_heads=2), "CAUSAL_LM"),
    "gpt2": (gpt2, "CAUSAL_LM"),
    "t5": (t5, "SEQ_2_SEQ_LM"),
    "t5_deep": (lambda: t5(num_layers=3), "SEQ_2_SEQ_LM"),
    "classifier": (lambda: bert(BertForSequenceClassification), "SEQ_CLS"),
    "tagger": (lambda: bert(BertForTokenClassification), "TOKEN_CLS"),
    "answerer": (lambda: bert(BertForQuestionAnswering), "QUESTION_ANS"),
}


def output(model, base, **more):
    decoder = {}
    if base.startswith("t5") and "labels" not in more:
        decoder = {"decoder_input_ids": torch.tensor([[0, 4, 5], [0, 6, 7]])}
    with torch.no_grad():
        y = model(input_ids=IDS, attention_mask=MASK, **decoder, **more)
    return y.start_logits if base == "answerer" else y.logits


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def both_ways(base, kind, folder, extra_keys=(), generates=True, inputs=None, **fields):
    """Assert equal outputs (and equal greedy answers) of each side's folder on the other side, and equal keys."""
    import peft

    build, task = BASES[base]
    inputs = inputs or {}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(build(), getattr(peft, kind)(task_type=task, **fields))
        randomise(trained(theirs), seed=3)
        theirs.eval().save_pretrained(folder / "theirs")
        expected = output(theirs, base, **inputs)
        mine = veneer.PeftModel.from_pretrained(build(), folder / "theirs")
        assert near(output(mine, base, **inputs), expected, 2e-5)
        assert not near(expected[:, -1], output(build(), base)[:, -1], 1e-3)
        if generates and task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
            greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0} | inputs
            ours, answer = (m.generate(input_ids=IDS, attention_mask=MASK, **greedy) for m in (mine, theirs))
            assert torch.equal(ours, answer)

        own = veneer.get_peft_model(build(), getattr(veneer, kind)(task_type=task, **fields))
        randomise(trained(own), seed=4)
        expected = output(own.eval(), base, **inputs)
        own.save_pretrained(folder / "ours")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read = peft.PeftModel.from_pretrained(build(), folder / "ours").eval()
        assert not [w for w in caught if "missing" in str(w.message).lower()]
        assert near(output(read, base, **inputs), expected, 2e-5)
    here, there = (checkpoint.read(folder / which) for which in ("ours", "theirs"))
    extra = {k for k in here if k.startswith(tuple(extra_keys))} if extra_keys else set()
    assert {k: v.shape for k, v in here.items() if k not in extra} == {k: v.shape for k, v in there.items()}
    ours, theirs = (json.loads((folder / w / "adapter_config.json").read_text()) for w in ("ours", "theirs"))
    same = {"modules_to_save", "inference_mode"}  # the peer lists heads twice
    assert {k: v for k, v in ours.items() if k not in same} == {k: v for k, v in theirs.items() if k not in same}
    again = veneer.PeftModel.from_pretrained(build(), folder / "ours", is_trainable=True).eval()
    assert near(output(again, base, **inputs), expected, 2e-5)
    return own, again
