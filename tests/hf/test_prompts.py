"""Prompts before a text: exactly hand-made inputs, in training and in generation, over models, caches and paddings."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

import veneer
from hf.tiny import gpt2, llama, t5, tokenizer
from veneer import (
    LoraConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

P = 3
IDS = torch.tensor([[1, 4, 5, 6, 7], [1, 9, 10, 11, 12]])
LEFT = torch.tensor([[1, 4, 5, 6, 7], [0, 0, 1, 9, 10]])
LEFT_MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
RIGHT = torch.tensor([[1, 4, 5, 6, 7], [1, 9, 10, 0, 0]])
RIGHT_MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
LM = {"num_virtual_tokens": P, "task_type": "CAUSAL_LM"}


def mistral(window=4):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=16, num_hidden_layers=2, sliding_window=window, pad_token_id=0, **sizes)
    return MistralForCausalLM(config).eval()


def bloom():
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=16, hidden_size=16, n_layer=2, n_head=2, pad_token_id=0)).eval()


def gqa():
    return llama(num_attention_heads=4, num_key_value_heads=2, head_dim=8)


MODELS = {"llama": llama, "gqa": gqa, "gpt2": gpt2, "mistral": mistral}
METHODS = {
    "prompt": lambda **k: PromptTuningConfig(**(LM | k)),
    "prefix": lambda **k: PrefixTuningConfig(**(LM | k)),
}


def made(base, config, seed=1, **kwargs):
    torch.manual_seed(seed)
    return get_peft_model(base, config, **kwargs).eval()


def bert(cls, **kwargs):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return cls(BertConfig(vocab_size=16, max_position_embeddings=32, pad_token_id=0, **sizes, **kwargs)).eval()


def table(model, name="default"):
    return model.base_model.prompts[name].prompt_embeddings


def hand_made(model, batch, heads, name="default"):
    """A cache built from the table as the paper says, without any of our code."""
    layers = model.get_base_model().config.num_hidden_layers
    cache = DynamicCache()
    flat = table(model, name).view(P, layers, 2, heads, -1)
    for i in range(layers):
        keys, values = (flat[:, i, j].permute(1, 0, 2).expand(batch, -1, -1, -1) for j in (0, 1))
        cache.update(keys, values, i)
    return cache


def longer(mask, n=P):
    return torch.cat([torch.ones(len(mask), n, dtype=torch.long), mask], 1)


@pytest.mark.parametrize("base", MODELS)
@pytest.mark.parametrize(
    "ids,mask", [(IDS, None), (LEFT, LEFT_MASK), (RIGHT, RIGHT_MASK)], ids=["full", "left", "right"]
)
def test_prompt_tuning_is_inputs_embeds_with_rows_before(base, ids, mask):
    model = made(MODELS[base](), METHODS["prompt"]())
    whole = mask if mask is not None else torch.ones_like(ids)
    inner = model.get_base_model()
    embeds = torch.cat([table(model).expand(2, -1, -1), inner.get_input_embeddings()(ids)], 1)
    labels = torch.where(whole == 1, ids, -100)
    expected = inner(
        inputs_embeds=embeds,
        attention_mask=longer(whole),
        labels=torch.cat([torch.full((2, P), -100), labels], 1),
    )
    found = model(input_ids=ids, attention_mask=mask, labels=labels)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert torch.equal(model(inputs_embeds=embeds[:, P:], attention_mask=mask).logits, expected.logits)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == P * 16


@pytest.mark.parametrize("base,heads", [("llama", 2), ("gqa", 2), ("gpt2", 2), ("mistral", 2)])
@pytest.mark.parametrize(
    "ids,mask", [(IDS, None), (LEFT, LEFT_MASK), (RIGHT, RIGHT_MASK)], ids=["full", "left", "right"]
)
def test_prefix_tuning_is_past_key_values(base, heads, ids, mask):
    model = made(MODELS[base](), METHODS["prefix"]())
    whole = mask if mask is not None else torch.ones_like(ids)
    cache = hand_made(model, 2, heads)
    expected = model.get_base_model()(input_ids=ids, attention_mask=longer(whole), past_key_values=cache, labels=ids)
    found = model(input_ids=ids, attention_mask=mask, labels=ids)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert found.logits.shape[1] == ids.shape[1]


def test_off_is_the_base_and_the_base_comes_back_untouched():
    base = llama()
    expected = base(IDS).logits
    names = [n for n, _ in base.named_modules()]
    model = made(base, METHODS["prefix"]())
    assert not torch.allclose(model(IDS).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)
        assert torch.equal(
            model.generate(IDS, max_new_tokens=3, do_sample=False),
            base.generate(IDS, max_new_tokens=3, do_sample=False),
        )
    assert model.unload() is base and [n for n, _ in base.named_modules()] == names


# ---- generation -----------------------------------------------------------------------------------------------------
def step_by_step(model, ids, mask, steps, **kwargs):
    """Greedy decoding by whole forwards, each row alone and unpadded."""
    answers = []
    for row, keep in zip(ids, mask.bool()):
        text = row[keep][None]
        for _ in range(steps):
            text = torch.cat([text, model(input_ids=text, **kwargs).logits[:, -1].argmax(-1, keepdim=True)], 1)
        answers.append(text[0, -steps:])
    return torch.stack(answers)


GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("cache", ["none", "given", "static", "static object", "offloaded"])
@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize("base", [*MODELS, "bloom"])
def test_generate_is_forward_step_by_step(base, how, cache):
    if cache == "offloaded" and not torch.cuda.is_available():
        pytest.skip("offloading needs an accelerator")
    if base == "bloom" and cache.startswith("static"):
        pytest.skip("Bloom has no static cache")
    model = made((MODELS | {"bloom": bloom})[base](), METHODS[how]())
    inner = model.get_base_model()
    kinds = {
        "none": {},
        "given": {"past_key_values": DynamicCache(config=inner.config)},
        "static": {"cache_implementation": "static"},
        "static object": {"past_key_values": StaticCache(config=inner.config, max_cache_len=24)},
        "offloaded": {"cache_implementation": "offloaded"},
    }
    ids, mask = (LEFT, LEFT_MASK) if base != "mistral" else (IDS, torch.ones_like(IDS))  # padding fills its window
    found = model.generate(input_ids=ids, attention_mask=mask, **GREEDY, **kinds[cache])
    assert torch.equal(found[:, :5], ids)
    assert torch.equal(found[:, 5:], step_by_step(model, ids, mask, 5))
    assert inner.generation_config.max_length is None


@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize("base", MODELS)
def test_beams_of_padded_rows_equal_each_row_alone(base, how):
    model = made((MODELS | {"mistral": lambda: mistral(window=16)})[base](), METHODS[how]())
    settings = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    both = model.generate(input_ids=LEFT, attention_mask=LEFT_MASK, **settings)
    alone = torch.cat(
        [model.generate(input_ids=row[keep][None], **settings)[:, -5:] for row, keep in zip(LEFT, LEFT_MASK.bool())]
    )
    assert torch.equal(both[:, -5:], alone)
    if how == "prompt":  # the base itself, given the same embeddings, finds the same beams
        inner = model.get_base_model()
        embeds = torch.cat([table(model).expand(2, -1, -1), inner.get_input_embeddings()(LEFT)], 1)
        expected = inner.generate(inputs_embeds=embeds, attention_mask=longer(LEFT_MASK), **settings)
        assert torch.equal(both[:, -5:], expected)


@pytest.mark.parametrize("how", METHODS)
def test_sampling_draws_what_the_base_would(how):
    model = made(llama(), METHODS[how]())
    settings = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 3, "eos_token_id": None}
    torch.manual_seed(5)
    found = model.generate(
        input_ids=LEFT, attention_mask=LEFT_MASK, output_scores=True, return_dict_in_generate=True, **settings
    )
    assert found.sequences.shape == (6, 11)
    scores = found.scores[0][::3].log_softmax(-1)
    first = [model(input_ids=r[k][None]).logits[0, -1] for r, k in zip(LEFT, LEFT_MASK.bool())]
    expected = torch.stack(first).log_softmax(-1)
    keep = torch.isfinite(scores)
    assert torch.allclose(scores[keep], expected[keep], atol=1e-4)


def test_lengths_penalties_embeds_and_streamers_do_not_see_the_prompt():
    model = made(llama(), METHODS["prompt"]())
    plain = GREEDY | {"max_new_tokens": None}
    assert model.generate(input_ids=IDS, **plain, max_length=9).shape == (2, 9)
    with model.disable_adapter():
        usual = model.generate(input_ids=IDS, **plain).shape
    assert model.generate(input_ids=IDS, **plain).shape == usual
    model.get_base_model().generation_config.max_length = 8
    assert model.generate(input_ids=IDS, **plain).shape == (2, 8)
    assert model.get_base_model().generation_config.max_length == 8
    inner, settings = model.get_base_model(), GREEDY | {"repetition_penalty": 1.7}
    embeds = inner.get_input_embeddings()(IDS)
    assert model.generate(inputs_embeds=embeds, **GREEDY).shape == (2, 5)
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), model.generate(input_ids=IDS, **GREEDY)[:, 5:])
    text = IDS[:1]
    found = model.generate(input_ids=text, **settings)
    for step in range(5):
        logits = model(input_ids=found[:, : 5 + step]).logits[0, -1]
        seen = found[0, : 5 + step].unique()
        logits[seen] = torch.where(logits[seen] < 0, logits[seen] * 1.7, logits[seen] / 1.7)
        assert logits.argmax() == found[0, 5 + step]

    class Ear:
        heard: list = []

        def put(self, value):
            self.heard += value.flatten().tolist()

        def end(self):
            pass

    found = model.generate(input_ids=text, streamer=Ear(), **GREEDY)
    assert Ear.heard == found[0].tolist()


def test_a_conversation_goes_on_from_its_cache():
    for how in METHODS.values():
        model = made(llama(), how())
        whole = model(input_ids=IDS).logits[:, -2:]
        first = model(input_ids=IDS[:, :3], use_cache=True)
        rest = model(
            input_ids=IDS[:, 3:], attention_mask=torch.ones(2, 5).long(), past_key_values=first.past_key_values
        )
        assert torch.allclose(rest.logits, whole, atol=1e-5)


# ---- several adapters -----------------------------------------------------------------------------------------------
def several():
    model = made(llama(), METHODS["prompt"](), adapter_name="short")
    for seed, (name, config) in enumerate(
        {
            "long": PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
            "prefix": METHODS["prefix"](),
            "lora": LoraConfig(
                r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
            ),
        }.items()
    ):
        torch.manual_seed(10 + seed)
        model.add_adapter(name, config)
    return model.eval()


def test_switching_between_prompts_and_weights():
    model = several()
    answers = {}
    for name in ("short", "long", "prefix", "lora"):
        model.set_adapter(name)
        answers[name] = model(IDS).logits[:, -5:]
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained and all(f".{name}." in n for n in trained)
    assert len({float(a.sum().detach()) for a in answers.values()}) == 4
    model.delete_adapter("prefix")
    model.set_adapter("short")
    assert torch.equal(model(IDS).logits[:, -5:], answers["short"])


def test_a_prompt_on_a_weight_adapter_is_the_prompt_before_the_merged_model():
    model = several()
    for name in ("long", "prefix"):
        model.set_adapter(["lora", name])
        found, generated = model(IDS).logits, model.generate(IDS, **GREEDY)
        model.set_adapter("lora")
        model.base_model.merge("lora")
        model.base_model.state.active = (name,)
        assert torch.allclose(model(IDS).logits, found, atol=1e-5)
        assert torch.equal(model.generate(IDS, **GREEDY), generated)
        model.base_model.unmerge()


def test_two_prompts_together_are_read_one_after_the_other():
    model = several()
    model.set_adapter(["long", "short"])
    both = torch.cat([table(model, "long"), table(model, "short")])
    inner = model.get_base_model()
    embeds = torch.cat([both.expand(2, -1, -1), inner.get_input_embeddings()(IDS)], 1)
    assert torch.equal(model(IDS).logits, inner(inputs_embeds=embeds).logits)


def test_rows_of_a_mixed_batch_equal_each_alone():
    model = several()
    names = ["short", "long", "prefix", "lora", "__base__", "prefix"]
    ids = torch.randint(3, 16, (6, 5), generator=torch.Generator().manual_seed(0))
    alone, generated = [], []
    for row, name in zip(ids, names):
        if name == "__base__":
            with model.disable_adapter():
                alone.append(model(row[None]).logits[:, -5:])
                generated.append(model.generate(row[None], **GREEDY))
            continue
        model.set_adapter(name)
        alone.append(model(row[None]).logits[:, -5:])
        generated.append(model.generate(row[None], **GREEDY))
    for active in ("lora", "short"):
        model.set_adapter(active)
        mixed = model(ids, adapter_names=names).logits[:, -5:]
        assert torch.allclose(mixed, torch.cat(alone), atol=1e-5)
        assert torch.equal(model.generate(ids, adapter_names=names, **GREEDY), torch.cat(generated))
    beams = model.generate(ids, adapter_names=names, num_beams=2, **GREEDY)
    model.set_adapter("prefix")
    assert torch.equal(beams[2:3], model.generate(ids[2:3], num_beams=2, **GREEDY))


# ---- training -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize("base", [*MODELS, "t5", "bert"])
def test_recomputed_layers_give_the_same_gradients(base, how):
    def gradients(recompute):
        build = MODELS | {"t5": t5, "bert": lambda: bert(BertForTokenClassification)}
        task = {"t5": "SEQ_2_SEQ_LM", "bert": "TOKEN_CLS"}.get(base, "CAUSAL_LM")
        inner = build[base]()
        for name, value in vars(inner.config).items():
            if "drop" in name and isinstance(value, float):
                setattr(inner.config, name, 0.0)
        for module in inner.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model = made(inner, METHODS[how](task_type=task))
        model.train()
        if recompute:
            model.gradient_checkpointing_enable()
        labels = IDS % 2 if base == "bert" else IDS
        one = model(input_ids=LEFT, attention_mask=LEFT_MASK, labels=labels).loss
        with model.disable_adapter():
            model(input_ids=IDS, labels=labels)  # between a forward and its backward, as a reference pass is
        (one + model(input_ids=IDS, labels=labels).loss).backward()
        assert not any("forward" in m.__dict__ for m in model.modules())
        return table(model).grad

    plain, again = gradients(False), gradients(True)
    assert plain.abs().sum() > 0 and torch.allclose(plain, again, atol=1e-6)


CONFIGS = {
    "prompt": METHODS["prompt"],
    "prefix": METHODS["prefix"],
    "prefix projected": lambda: PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=8, **LM),
    "p": lambda: PromptEncoderConfig(encoder_hidden_size=8, **LM),
    "p lstm": lambda: PromptEncoderConfig(encoder_hidden_size=8, encoder_reparameterization_type="LSTM", **LM),
    "multitask": lambda: MultitaskPromptTuningConfig(num_tasks=2, **LM),
}


@pytest.mark.parametrize("how", CONFIGS)
def test_the_loss_goes_down(how):
    model = made(llama(initializer_range=0.5), CONFIGS[how]())
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    tasks = {"task_ids": torch.tensor([0, 1])} if how == "multitask" else {}
    losses = []
    for _ in range(60):
        loss = model(input_ids=IDS, labels=IDS, **tasks).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("how", METHODS)
def test_half_precision_bases_and_autocast(how):
    exact = made(llama(), METHODS[how]())(IDS).logits
    model = made(llama().bfloat16(), METHODS[how]())
    assert table(model).dtype == torch.float32
    y = model(IDS).logits
    assert y.dtype == torch.bfloat16 and (y.float() - exact).abs().max() < 0.2
    assert model.generate(IDS, **GREEDY).shape == (2, 10)
    model = made(llama(), METHODS[how]())
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(IDS).logits.float() - exact).abs().max() < 0.2


# ---- encoders and encoder-decoders ----------------------------------------------------------------------------------
@pytest.mark.parametrize("how", METHODS)
def test_encoders_with_heads(how):
    n = P if how == "prompt" else 0
    for cls, task in (
        (BertForSequenceClassification, "SEQ_CLS"),
        (BertForTokenClassification, "TOKEN_CLS"),
        (BertForQuestionAnswering, "QUESTION_ANS"),
        (BertModel, "FEATURE_EXTRACTION"),
    ):
        model = made(bert(cls), METHODS[how](task_type=task))
        labels = {
            "SEQ_CLS": {"labels": torch.tensor([0, 1])},
            "TOKEN_CLS": {"labels": IDS % 2},
            "QUESTION_ANS": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([2, 3])},
        }.get(task, {})
        kinds = torch.tensor([[0, 0, 1, 1, 1]]).expand(2, -1)
        y = model(input_ids=RIGHT, attention_mask=RIGHT_MASK, token_type_ids=kinds, **labels)
        first = next(v for v in y.values() if v.dim())
        assert first.shape[1] == (2 if task == "SEQ_CLS" else 5 + n)
        heads = {"SEQ_CLS": "classifier", "TOKEN_CLS": "classifier", "QUESTION_ANS": "qa_outputs"}
        if task in heads:
            y.loss.backward()
            trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
            assert any(heads[task] in name for name in trained) and any("prompt_embeddings" in name for name in trained)
        if task == "QUESTION_ANS":
            entropy = torch.nn.functional.cross_entropy
            at = {k: v + n for k, v in labels.items()}
            expected = entropy(y.start_logits, at["start_positions"]) + entropy(y.end_logits, at["end_positions"])
            assert torch.allclose(y.loss, expected / 2)


@pytest.mark.parametrize("how", METHODS)
def test_a_decoder_that_classifies_reads_the_last_token_whatever_the_padding(how):
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(llama(num_labels=3).config).eval()
    model = made(base, METHODS[how](task_type="SEQ_CLS"))
    alone = torch.cat([model(row[keep][None]).logits for row, keep in zip(RIGHT, RIGHT_MASK.bool())])
    assert torch.allclose(model(input_ids=RIGHT, attention_mask=RIGHT_MASK).logits, alone, atol=1e-5)
    left, positions = torch.stack([RIGHT[0], RIGHT[1].roll(2)]), (LEFT_MASK.cumsum(1) - 1).clamp(min=0)
    y = model(input_ids=left, attention_mask=LEFT_MASK, position_ids=positions).logits
    assert torch.allclose(y, alone, atol=1e-5)


def test_encoder_decoder_prefix_is_its_decoders_past():
    for layers in (1, 3):
        model = made(t5(num_layers=layers), METHODS["prefix"](task_type="SEQ_2_SEQ_LM"))
        inner = model.get_base_model()
        entries = table(model).view(1, P, 2 * layers, 2, 8).permute(2, 0, 3, 1, 4).expand(-1, 2, -1, -1, -1)
        own = DynamicCache()
        for i in range(layers):
            own.update(entries[4 * i % (2 * layers)], entries[(4 * i + 1) % (2 * layers)], i)
        labels = IDS[:, 1:].clone()
        expected = inner(
            input_ids=LEFT, attention_mask=LEFT_MASK, labels=labels,
            past_key_values=EncoderDecoderCache(own, DynamicCache()), decoder_attention_mask=torch.ones(2, P + 4),
        )  # fmt: skip
        found = model(input_ids=LEFT, attention_mask=LEFT_MASK, labels=labels)
        assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("how", [*METHODS, "multitask"])
def test_encoder_decoders_generate_what_forward_says(how):
    methods = METHODS | {"multitask": lambda **k: MultitaskPromptTuningConfig(num_tasks=2, **(LM | k))}
    model = made(t5(), methods[how](task_type="SEQ_2_SEQ_LM"))
    if how == "multitask":
        with torch.no_grad():
            model.base_model.prompts["default"].prefix_task_cols.add_(1)
    tasks = {"task_ids": torch.tensor([0, 1])} if how == "multitask" else {}
    found = model.generate(input_ids=LEFT, attention_mask=LEFT_MASK, **GREEDY, **tasks)
    assert found.shape == (2, 6) and found[:, 0].tolist() == [0, 0]
    text = torch.zeros(2, 1, dtype=torch.long)
    for _ in range(5):
        y = model(input_ids=LEFT, attention_mask=LEFT_MASK, decoder_input_ids=text, **tasks)
        text = torch.cat([text, y.logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, text)
    beams = GREEDY | {"num_beams": 2}
    both = model.generate(input_ids=LEFT, attention_mask=LEFT_MASK, **beams, **tasks)
    one = {"task_ids": tasks["task_ids"][1:]} if tasks else {}
    alone = model.generate(input_ids=LEFT[1:, 2:], **beams, **one)
    assert torch.equal(both[1:], alone)


# ---- bad input ------------------------------------------------------------------------------------------------------
def test_refusals():
    with pytest.raises(ValueError, match=r"leaves no room in the context.*64"):
        get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=64, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="num_virtual_tokens must be a positive integer"):
        get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM"))
    model = made(llama(), METHODS["prompt"]())
    with pytest.raises(ValueError, match="packed"):
        model(input_ids=IDS, position_ids=torch.tensor([[0, 1, 0, 1, 2]]).expand(2, -1))
    with pytest.raises(ValueError, match="packed"):
        model(input_ids=IDS, cu_seq_lens_q=torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match=r"\(batch, length\)"):
        model(input_ids=IDS, attention_mask=torch.ones(2, 1, 5, 5))
    with pytest.raises(ValueError, match="weight to merge"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="quantized"):
        model.generate(IDS, cache_implementation="quantized", **GREEDY)
    small = made(gpt2(n_positions=7), METHODS["prompt"]())
    with pytest.raises(ValueError, match=r"exceeds the 7 positions.*cut the text to 4"):
        small(input_ids=IDS)
    with pytest.raises(ValueError, match=r"input embedding|config says none"):
        get_peft_model(torch.nn.Linear(2, 2), PromptTuningConfig(num_virtual_tokens=2))
    left = made(llama(), METHODS["prompt"]())  # positions that a left-padding collator makes are no packing
    assert left(
        input_ids=LEFT, attention_mask=LEFT_MASK, position_ids=torch.tensor([[0, 1, 2, 3, 4], [1, 1, 0, 1, 2]])
    ).logits.shape == (2, 8, 16)


def test_unknown_prompt_names_are_in_the_package():
    for name in (
        "PromptTuningInit",
        "PromptEncoderReparameterizationType",
        "MultitaskPromptTuningInit",
        "PromptLearningConfig",
    ):
        assert getattr(veneer, name)
    assert tokenizer() is not None
