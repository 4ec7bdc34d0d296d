"""The tiny model and data of the training tests."""

from train.conftest import base, facts, tokenizer  # noqa: F401
