"""A language model of a few thousand weights with a chat template, made here, so that nothing is fetched."""

import json
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["red", "green", "blue", "sky", "grass", "rose", "What", "colour", "is", "the", "The", "yes", "no"]


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


def make_base(folder, tokenizer, **shape):
    """A folder with a random two-layer Llama and its tokenizer; ``shape``: LlamaConfig's fields."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer):
    """The folder of a random two-layer Llama with its tokenizer."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 256, **heads}
    return make_base(tmp_path_factory.mktemp("base") / "tiny-llama", tokenizer, **shape)


@pytest.fixture(scope="session")
def facts(tmp_path_factory):
    """Sixty conversations that a tiny model can learn by heart."""
    pairs = [("sky", "blue"), ("grass", "green"), ("rose", "red")]
    file = tmp_path_factory.mktemp("data") / "facts.jsonl"
    with file.open("w") as out:
        for i in range(60):
            thing, colour = pairs[i % 3]
            turns = [
                {"role": "user", "content": f"What colour is the {thing} {i // 3}"},
                {"role": "assistant", "content": f"The {thing} is {colour}"},
            ]
            out.write(json.dumps({"messages": turns}) + "\n")
    return file


PLACES, PEOPLE = ["paris", "rome", "oslo", "lima"], ["anna", "otto", "maria", "hugo"]
OTHER = ["went", "to", "saw", "in", "the", "and", "met", "good", "bad", "fine", "awful", "film", "was", "a", "very"]


@pytest.fixture(scope="session")
def word_tokenizer():
    """A word a token, but ``maria`` and ``lima`` of two, as WordPiece cuts them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "mar", "##ia", "li", "##ma"]
    words += [word for word in PLACES + PEOPLE + OTHER if word not in ("maria", "lima")]
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        eos_token="[SEP]", model_max_length=32, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


@pytest.fixture(scope="session")
def encoder(tmp_path_factory, word_tokenizer):
    """The folder of a random two-layer BERT with its tokenizer; it has 32 positions."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder") / "tiny-bert"
    config = BertConfig(
        vocab_size=len(word_tokenizer), max_position_embeddings=32, initializer_range=0.1, hidden_size=32,
        intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def translator(tmp_path_factory, word_tokenizer):
    """The folder of a random T5 of one layer each way."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("translator") / "tiny-t5"
    config = T5Config(
        vocab_size=len(word_tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """Eighty films, good or bad, three of four good."""
    words = {"good": ["good", "fine"], "bad": ["bad", "awful"]}
    rows = []
    for i in range(80):
        label = "bad" if i % 4 == 0 else "good"
        rows.append({"text": f"{OTHER[i % 5]} {OTHER[i % 7]} was {words[label][i // 4 % 2]}", "label": label})
    return write_rows(tmp_path_factory.mktemp("data") / "reviews.jsonl", rows)


@pytest.fixture(scope="session")
def sentences(tmp_path_factory):
    """Who went where, with tags."""
    rows = []
    for i in range(80):
        person, place = PEOPLE[i % 4], PLACES[i // 4 % 4]
        middle = ["went", "to"] if i % 3 else ["was", "in", "the", "very"]
        tokens = [person, *middle, place, "and", PEOPLE[(i + 1) % 4]]
        rows.append({"tokens": tokens, "tags": ["B-PER", *["O"] * len(middle), "B-LOC", "O", "B-PER"]})
    return write_rows(tmp_path_factory.mktemp("data") / "sentences.jsonl", rows)


@pytest.fixture(scope="session")
def couples(tmp_path_factory):
    """A person belongs to a place; every anchor is one of sixteen sentences about them."""
    rows = []
    for i in range(64):
        n = i % 4
        anchor = f"{'the ' * (i // 4 % 4)}{PEOPLE[n]} {OTHER[i // 16]}"
        rows.append({"anchor": anchor, "positive": f"{PLACES[n]} {OTHER[5 + i // 4 % 4]}"})
    return write_rows(tmp_path_factory.mktemp("data") / "couples.jsonl", rows)


@pytest.fixture(scope="session")
def translations(tmp_path_factory):
    """People in the source, places in the target."""
    rows = [
        {"prompt": f"{PEOPLE[i % 4]} {PEOPLE[i // 4 % 4]}", "completion": f"{PLACES[i % 4]} {PLACES[i // 4 % 4]}"}
        for i in range(48)
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "translations.jsonl", rows)
