"""A tiny model that has SmolLM2's shape of widths, so that what the pages show for it runs here in no time."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.conftest import make_base, make_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a random Llama: widths are multiples of 64, as SmolLM2's are."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    shape = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 1024, **heads}
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    return make_base(folder, make_tokenizer(), tie_word_embeddings=True, **shape)
