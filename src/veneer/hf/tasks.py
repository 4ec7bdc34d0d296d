"""PeftModel by task: explicit forward signatures, which data collators and the Trainer read."""

from __future__ import annotations

from typing import Any

from torch import nn

from veneer.core.config import PeftConfig
from veneer.hf.mixed import PeftMixedModel
from veneer.hf.model import TASK_CLASSES, PeftModel


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """The arguments that were passed; a base model with fewer parameters is not told about the rest."""
    kwargs = values.pop("kwargs")
    values.pop("self"), values.pop("__class__", None)
    return {k: v for k, v in values.items() if v is not None} | kwargs


class PeftModelForCausalLM(PeftModel):
    """A causal language model with adapters."""

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, output_attentions=None,
        output_hidden_states=None, return_dict=None, task_ids=None, **kwargs,
    ):  # fmt: skip
        """Inputs as the base model's; ``labels`` (batch, length) with -100 where nothing is learnt."""
        return super().forward(**_given(locals()))

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model.prepare_inputs_for_generation(*args, **kwargs)


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder language model with adapters."""

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, decoder_input_ids=None,
        decoder_attention_mask=None, decoder_inputs_embeds=None, labels=None, output_attentions=None,
        output_hidden_states=None, return_dict=None, task_ids=None, **kwargs,
    ):  # fmt: skip
        """Inputs as the base model's; ``labels`` (batch, target length)."""
        return super().forward(**_given(locals()))

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model.prepare_inputs_for_generation(*args, **kwargs)


class PeftModelForSequenceClassification(PeftModel):
    """A sequence classifier with adapters; its head (``classifier`` or ``score``) trains and is saved."""

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, output_attentions=None,
        output_hidden_states=None, return_dict=None, task_ids=None, **kwargs,
    ):  # fmt: skip
        """Inputs as the base model's; ``labels`` (batch,)."""
        return super().forward(**_given(locals()))


class PeftModelForTokenClassification(PeftModelForSequenceClassification):
    """A token classifier with adapters; its head trains and is saved. ``labels`` (batch, length)."""


class PeftModelForQuestionAnswering(PeftModel):
    """An extractive question answerer with adapters; its head (``qa_outputs``) trains and is saved."""

    def forward(
        self, input_ids=None, attention_mask=None, token_type_ids=None, position_ids=None, inputs_embeds=None,
        start_positions=None, end_positions=None, output_attentions=None, output_hidden_states=None,
        return_dict=None, **kwargs,
    ):  # fmt: skip
        """Inputs as the base model's; ``start_positions`` and ``end_positions`` (batch,)."""
        return super().forward(**_given(locals()))


class PeftModelForFeatureExtraction(PeftModel):
    """An encoder with adapters, for embeddings."""

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, output_attentions=None,
        output_hidden_states=None, return_dict=None, task_ids=None, **kwargs,
    ):  # fmt: skip
        """Inputs as the base model's."""
        return super().forward(**_given(locals()))


TASK_CLASSES.update(
    SEQ_CLS=PeftModelForSequenceClassification,
    SEQ_2_SEQ_LM=PeftModelForSeq2SeqLM,
    CAUSAL_LM=PeftModelForCausalLM,
    TOKEN_CLS=PeftModelForTokenClassification,
    QUESTION_ANS=PeftModelForQuestionAnswering,
    FEATURE_EXTRACTION=PeftModelForFeatureExtraction,
)


def task_class(config: PeftConfig) -> type[PeftModel]:
    """The PeftModel class for a config's ``task_type``."""
    return TASK_CLASSES.get(str(config.task_type), PeftModel)


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put a fresh adapter on a model; the class of the result follows ``peft_config.task_type``.

    Args:
        model: any ``nn.Module``; its layers are wrapped in place and its parameters frozen.
        peft_config: the method and its settings.
        adapter_name: the adapter's name.
        mixed: make a ``PeftMixedModel``, as programs for the peer ask for; every model here may hold adapters of
            different methods.
        autocast_adapter_dtype: float32 adapters over a half-precision base (default), else the base's dtype.
        revision: the base model's revision, recorded in the config.
        low_cpu_mem_usage: leave the adapter's tensors on the meta device.

    Raises:
        ValueError: a config that does not fit the model; the model is as it was then.
    """
    if revision is not None:
        peft_config.revision = revision
    build = PeftMixedModel if mixed else task_class(peft_config)
    return build(
        model,
        peft_config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The config object for a dict with ``peft_type``."""
    return PeftConfig.from_dict(config_dict)
