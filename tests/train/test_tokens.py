"""The loss mask: exactly what the model must write is learnt, end token included, and nothing else."""

import pytest

from veneer.train.data import Example
from veneer.train.tokens import IGNORED, Renderer


def rows(tokenizer, example, format="messages", length=512, **options):
    renderer = Renderer(tokenizer, format, **options)
    return renderer, renderer.tokenise([example], length)


def learnt(tokenizer, tokenised):
    return tokenizer.decode([t for t in tokenised.rows[0]["labels"] if t != IGNORED])


def chat(*turns):
    return Example("row", messages=[{"role": r, "content": c} for r, c in turns])


TALK = chat(
    ("system", "Be brief"), ("user", "What is red"), ("assistant", "rose"), ("user", "and blue"), ("assistant", "sky")
)


def test_every_assistant_turn_is_learnt_with_its_end_token(tokenizer):
    _, got = rows(tokenizer, TALK)
    assert learnt(tokenizer, got) == "rose<|im_end|>sky<|im_end|>"
    assert tokenizer.decode(got.rows[0]["input_ids"]).startswith("<|im_start|>system\nBe brief<|im_end|>")


def test_completion_learns_the_last_turn_and_all_learns_everything(tokenizer):
    assert learnt(tokenizer, rows(tokenizer, TALK, loss_on="completion")[1]) == "sky<|im_end|>"
    everything = rows(tokenizer, TALK, loss_on="all")[1].rows[0]
    assert everything["labels"][1:] == everything["input_ids"][1:]
    assert everything["labels"][0] == IGNORED


def test_what_precedes_the_answer_is_what_generation_starts_from(tokenizer):
    renderer, got = rows(tokenizer, TALK, loss_on="completion")
    start = next(i for i, label in enumerate(got.rows[0]["labels"]) if label != IGNORED)
    prompt = tokenizer(renderer.prompt(TALK), add_special_tokens=False)["input_ids"]
    assert got.rows[0]["input_ids"][:start] == prompt


def test_prompt_and_completion_split_where_a_token_would_straddle_them(tokenizer):
    """A prompt that ends inside what would be one token must be read as it will be at inference."""
    assert len(tokenizer(" colour")["input_ids"]) == 1
    example = Example("row", prompt="What col", completion="our is")
    renderer, got = rows(tokenizer, example, format="prompt", template="none")
    prompt = tokenizer("What col")["input_ids"]
    assert got.rows[0]["input_ids"][: len(prompt)] == prompt
    assert learnt(tokenizer, got) == "our is<|im_end|>"
    assert got.counts["split_at_boundary"] == 1


def test_prompts_use_the_chat_template_unless_their_completions_continue_them(tokenizer):
    from veneer.train.data import continues

    question, text = Example("a", prompt="Q", completion="A"), Example("b", prompt="Q: x\nA:", completion=" y")
    assert not continues([question, question, text])
    assert continues([text, text, question])
    assert Renderer(tokenizer, "prompt").template == "chat"
    assert Renderer(tokenizer, "prompt", continues=True).template == "none"


def test_alpaca_uses_the_chat_template_or_else_its_own_prompt(tokenizer):
    from veneer.train.formats import FORMATS

    example = Example("row", **FORMATS["alpaca"].convert({"instruction": "Name it", "input": "sky", "output": "blue"}))
    _, got = rows(tokenizer, example, format="alpaca")
    assert "user\nName it\n\nsky<|im_end|>" in tokenizer.decode(got.rows[0]["input_ids"])
    _, plain = rows(tokenizer, example, format="alpaca", template="alpaca")
    text = tokenizer.decode(plain.rows[0]["input_ids"])
    assert "### Instruction:\nName it\n\n### Input:\nsky\n\n### Response:\nblue" in text
    assert learnt(tokenizer, plain) == "blue<|im_end|>"


def test_a_system_message_is_added_where_there_is_none(tokenizer):
    _, got = rows(tokenizer, chat(("user", "Hi"), ("assistant", "yes")), system="Be kind")
    assert tokenizer.decode(got.rows[0]["input_ids"]).startswith(
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user"
    )


def test_a_template_that_rewrites_earlier_turns_learns_the_last_one_only(tokenizer):
    import copy

    rewriting = copy.deepcopy(tokenizer)
    rewriting.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and not loop.last %}(cut){% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    _, got = rows(rewriting, TALK)
    assert learnt(rewriting, got) == "sky<|im_end|>"
    assert got.counts["last_turn_only"] == 1


def test_rows_cut_before_their_answer_are_dropped_and_counted(tokenizer):
    renderer = Renderer(tokenizer, "prompt", template="none")
    short, long = (
        Example("a", prompt="Q", completion="yes"),
        Example("b", prompt="What is the sky " * 9, completion="yes"),
    )
    got = renderer.tokenise([short, long], 16)
    assert len(got) == 1
    assert got.counts["dropped_unlearnt"] == 1
    assert got.counts["truncated"] == 1
    with pytest.raises(ValueError, match="None of the 1 rows has a token to learn"):
        renderer.tokenise([long], 16)


def test_bos_is_put_once_and_not_learnt(tokenizer):
    import copy

    from tokenizers import processors

    opening = copy.deepcopy(tokenizer)
    opening.bos_token = "<|im_start|>"
    bos = opening.bos_token_id
    opening.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    _, plain = rows(opening, Example("row", prompt="Q", completion="A"), format="prompt", template="none")
    assert plain.rows[0]["input_ids"].count(bos) == 1
    assert plain.rows[0]["labels"][0] == IGNORED
    _, templated = rows(opening, chat(("user", "Q"), ("assistant", "A")))
    assert templated.rows[0]["input_ids"][:2].count(bos) == 1


def test_conversations_without_a_template_are_refused(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        Renderer(bare, "messages")


def test_a_conversation_the_template_refuses_is_named(tokenizer):
    import copy

    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="row: the chat template refuses this conversation: roles must alternate"):
        Renderer(strict, "messages").tokenise([TALK], 64)
