"""P-tuning v1 (Liu, Zheng, Du, Ding, Qian, Yang, Tang, 2021, arXiv:2103.10385).

    P = MLP(E)    or    P = MLP(biLSTM(E))        E (length, dim) a trained table, P (length, dim) read before the text

The MLP has three linear layers with ReLU between (hidden ``encoder_hidden_size``); behind the LSTM it has two. Only P
is needed to run: the file holds it as ``prompt_embeddings``, and beside it the encoder's own tensors, so that training
resumes where it stood. A file without them is read as a plain table, which trains on as prompt tuning would.
Cost: the encoder over ``length`` rows once a forward (in eval once for all), and ``length`` more tokens to read.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.cache import cached
from veneer.core.prompt import Prompt, PromptLearningConfig
from veneer.core.registry import method


class PromptEncoderReparameterizationType(str, enum.Enum):
    """What computes the prompt from the table."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """Settings of P-tuning.

    ``encoder_num_layers`` and ``encoder_dropout`` are the LSTM's; the MLP has three layers always.

    Attributes:
        encoder_reparameterization_type: MLP or LSTM.
        encoder_hidden_size: width of the encoder; None: the model's.
        encoder_num_layers: layers of the LSTM.
        encoder_dropout: dropout of the LSTM.

    Raises:
        ValueError: an encoder that is neither MLP nor LSTM.
    """

    encoder_reparameterization_type: str | PromptEncoderReparameterizationType = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    type: ClassVar[str | None] = "P_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        said = self.encoder_reparameterization_type
        said = said.value if isinstance(said, enum.Enum) else said
        if said not in ("MLP", "LSTM"):
            raise ValueError(f"encoder_reparameterization_type must be MLP or LSTM, not {said!r}.")
        self.encoder_reparameterization_type = PromptEncoderReparameterizationType(said)


class PromptEncoder(nn.Module):
    """The table and what computes the prompt from it."""

    def __init__(self, config: PromptEncoderConfig, rows: int):
        super().__init__()
        d, h = config.token_dim, config.encoder_hidden_size
        self.embedding = nn.Embedding(rows, d)
        self.lstm_head: nn.LSTM | None = None
        if config.encoder_reparameterization_type == PromptEncoderReparameterizationType.LSTM:
            layers, dropout = config.encoder_num_layers, config.encoder_dropout
            self.lstm_head = nn.LSTM(d, h, layers, batch_first=True, dropout=dropout, bidirectional=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, d))
        else:
            relu = nn.ReLU
            self.mlp_head = nn.Sequential(nn.Linear(d, h), relu(), nn.Linear(h, h), relu(), nn.Linear(h, d))

    def forward(self) -> Tensor:
        rows = self.embedding.weight[None]
        if self.lstm_head is not None:
            rows = self.lstm_head(rows)[0]
        return self.mlp_head(rows)[0]


class Encoded(Prompt):
    """A prompt whose table may be computed by an encoder while it trains.

    It holds either ``encoder`` or, read from a file that has only the result, ``prompt_embeddings``.
    """

    def __init__(self, model: nn.Module, config: Any):
        super().__init__(model, config)
        self.encoder: nn.Module | None = None
        self.make: Callable[[], nn.Module] | None = None

    def encode_with(self, make: Callable[[], nn.Module]) -> None:
        """Compute the table with what ``make`` makes."""
        self.make, self.encoder = make, make()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"make": None}  # a twin has its encoder already

    def table(self) -> Tensor:
        """The prompt as the file holds it."""
        return self.prompt_embeddings if self.encoder is None else cached(self, "table", self.encoder)

    def outgoing(self) -> dict[str, Tensor]:
        """The computed table under the key that everybody reads, and the encoder beside it."""
        if self.encoder is None:
            return dict(self.state_dict())
        training = self.encoder.training
        with torch.no_grad():
            table = self.encoder.eval()()
        self.encoder.train(training)
        return {"prompt_embeddings": table.detach(), **self.state_dict()}

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """With the encoder's tensors where the file has them, else with the table alone."""
        tensors = dict(tensors)
        inside = any(key.startswith("encoder.") for key in tensors)
        if inside and self.encoder is not None:
            tensors.pop("prompt_embeddings", None)
        elif inside and self.make is not None:
            tensors.pop("prompt_embeddings", None)
            own = self.prompt_embeddings
            self.encoder = self.make().to(own).requires_grad_(own.requires_grad)
            del self.prompt_embeddings
        elif self.encoder is not None and "prompt_embeddings" in tensors:
            lead = next(self.encoder.parameters())
            found = tensors["prompt_embeddings"]
            self.encoder = None
            self.prompt_embeddings = nn.Parameter(
                torch.empty(found.shape, dtype=lead.dtype, device=lead.device), lead.requires_grad
            )
        return tensors


@method("P_TUNING", PromptEncoderConfig)
class PTuning(Encoded):
    """Rows read before the text, computed by a small network."""

    def __init__(self, model: nn.Module, config: PromptEncoderConfig):
        super().__init__(model, config)
        if config.encoder_hidden_size is None:
            config.encoder_hidden_size = config.token_dim
        self.encode_with(lambda: PromptEncoder(config, self.length * self.halves))

    def embeddings(self, batch: int, inputs: dict[str, Any]) -> Tensor:
        return self.table()[: self.length].expand(batch, -1, -1)
