"""Answers: a loaded model with its tokenizer, asked things."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import yaml
from torch import nn

from veneer.train import adapters, models, tasks
from veneer.train.config import Model, RunConfig
from veneer.train.formats import alpaca_prompt
from veneer.train.rows import Row


def end_tokens(model: nn.Module, tokenizer: Any, learnt: int | None = None) -> list[int]:
    """Every token that ends an answer: the generation config's, the tokenizer's, and the one the rows taught."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    found = ends if isinstance(ends, list) else [ends]
    return [int(t) for t in dict.fromkeys([*found, tokenizer.eos_token_id, learnt]) if t is not None]


def pad_token(tokenizer: Any) -> int:
    """The token that fills up batches; the mask says where it stands, so any will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


@torch.inference_mode()
def answer(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    ends: list[int] | None = None,
    bos: int | None = None,
    streamer: Any = None,
) -> str:
    """What the model writes after ``prompt``, a text that is rendered already.

    Args:
        model: with or without adapters.
        tokenizer: the model's.
        prompt: the whole text before the answer.
        max_new_tokens: at most so many.
        temperature: 0 for the likeliest token each time.
        top_p: sample from the smallest set of this probability.
        ends: tokens that end the answer; default: ``end_tokens``.
        bos: a first token that the text lacks.
        streamer: a transformers streamer.
    """
    device = next(model.parameters()).device
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    inputs = torch.tensor([ids], device=device)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    if not temperature:  # what the generation config says of sampling has no meaning now, and would be warned about
        sampling |= {"temperature": None, "top_p": None, "top_k": None}
    training = model.training
    model.eval()
    output = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or end_tokens(model, tokenizer) or None,
        pad_token_id=pad_token(tokenizer),
        streamer=streamer,
        use_cache=True,
        **sampling,
    )
    model.train(training)
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


class Session:
    """A model, its tokenizer and perhaps an adapter, ready to be asked.

    An adapter's folder says what it needs: its base, and in ``run.yaml`` how prompts were rendered.

    Args:
        model: the base's folder or id; None takes the one the adapter was trained on.
        adapter: an adapter's folder.
        options: further ``model`` settings (device, dtype, ...).

    Raises:
        ValueError: neither a model nor an adapter that names one.
        OSError: something is not where it should be.
    """

    def __init__(self, model: str | None = None, adapter: str | None = None, options: dict[str, Any] | None = None):
        self.recipe = _recipe(adapter)
        stored = self.recipe.get("model", {})
        base = model or base_of(adapter)
        keep = {k: v for k, v in stored.items() if k in Model.model_fields and k not in ("path", "device")}
        settings = Model(**{**(keep if base == stored.get("path") else {}), **(options or {}), "path": base})
        has_tokenizer = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
        if has_tokenizer:
            settings.tokenizer = settings.tokenizer or str(adapter)
        self.settings = settings
        self.tokenizer = models.load_tokenizer(settings)
        self.task = tasks.find(self.recipe.get("task", "sft"))
        self.model: Any = self._base()
        self.adapted = adapter is not None
        if adapter is not None:
            self.model = adapters.load(self.model, adapter).eval()
        opening = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        self.bos = self.tokenizer.bos_token_id if opening[:1] == [self.tokenizer.bos_token_id] else None

    def _base(self) -> Any:
        if self.writes:
            return models.load_model(self.settings)
        config = self._config()
        return self.task.open(config, self.task.settle(config, models.load_config(self.settings), self.tokenizer))

    def _config(self) -> RunConfig:
        return RunConfig.model_validate({**self.recipe, "model": self.settings.model_dump()})

    @property
    def writes(self) -> bool:
        """Whether this is a language model, which is asked for text; other tasks ``respond`` to rows."""
        return self.task.adapter_type == "CAUSAL_LM"

    def respond(self, rows: list[Row]) -> list[Row]:
        """What the task makes of rows with a ``text``: an ``answer`` for each, and what else there is to say."""
        return self.task.respond(self._config(), self.tokenizer, self.model, rows)

    @property
    def template(self) -> str:
        """``chat``, ``alpaca`` or ``none``: as the adapter was trained, else the tokenizer's template if it has one."""
        trained = self.recipe.get("data", {}).get("template", "auto")
        if trained != "auto":
            return trained
        return "chat" if self.tokenizer.chat_template else "none"

    def render(self, messages: list[Row], template: str | None = None) -> str:
        """The text the model is to continue.

        Raises:
            ValueError: the chat template is missing, or refuses the messages.
        """
        template = template or self.template
        system = self.recipe.get("data", {}).get("system")
        if template == "chat":
            if system and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": system}, *messages]
            if not self.tokenizer.chat_template:
                raise ValueError("The tokenizer has no chat template; use --raw to continue the text as it stands.")
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        last = str(messages[-1]["content"])
        return alpaca_prompt(last) if template == "alpaca" else last

    def answer(self, messages: list[Row], template: str | None = None, **options: Any) -> str:
        """The whole answer to ``messages``."""
        return answer(self.model, self.tokenizer, self.render(messages, template), bos=self.bos, **options)

    def stream(self, messages: list[Row], template: str | None = None, **options: Any) -> Iterator[str]:
        """The answer, piece by piece as it is written."""
        from transformers import TextIteratorStreamer  # pulls in the generation code, which nothing else here needs

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []

        def work() -> None:
            try:
                self.answer(messages, template, streamer=streamer, **options)
            except BaseException as error:
                failure.append(error)
                streamer.end()

        thread = Thread(target=work, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if failure:
            raise failure[0]


def base_of(adapter: str | Path | None) -> str:
    """The base model that an adapter's config names.

    Raises:
        ValueError: there is no adapter, or it names none.
        FileNotFoundError: the folder holds no adapter.
    """
    if adapter is None:
        raise ValueError(
            "Say which model: --model FOLDER_OR_ID, or --adapter FOLDER of an adapter that names its base."
        )
    if Path(adapter).exists() and not (Path(adapter) / adapters.CONFIG_FILE).is_file():
        raise FileNotFoundError(f"'{adapter}' holds no adapter: there is no {adapters.CONFIG_FILE} in it.")
    base = adapters.read_config(adapter).base_model_name_or_path
    if not base:
        raise ValueError(f"The adapter '{adapter}' does not name its base model; say it with --model.")
    return str(base)


def _recipe(adapter: str | None) -> dict[str, Any]:
    file = Path(adapter or ".") / "run.yaml"
    if adapter is None or not file.is_file():
        return {}
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}
