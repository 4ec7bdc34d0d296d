"""The base models that the golden folders belong to; their weights lie in ``weights/``, so no random draw matters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

WEIGHTS = Path(__file__).parent / "weights"


class MLP(nn.Module):
    """Two linear layers of different shapes with a norm between them; `task_ids` is for methods that ask for them."""

    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 8)

    def forward(self, x, task_ids=None):
        return self.fc2(torch.tanh(self.norm(self.fc1(x))))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    """Two blocks of equal shapes, for methods that share tensors between layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Around(nn.Module):
    """A layer with a linear head that suits it."""

    def __init__(self, layer: nn.Module, features: int, channels_first: bool = False):
        super().__init__()
        self.channels_first = channels_first
        self.layer, self.head = layer, nn.Linear(features, 4)

    def forward(self, x):
        y = self.layer(x)
        return self.head(torch.tanh(y.flatten(2).transpose(1, 2) if self.channels_first else y))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.attn(x, x, x, need_weights=False)[0])


class Experts(nn.Module):
    """Fused expert weights of shape (experts, out, in), or (experts, in, out) when turned."""

    def __init__(self, turned: bool = False):
        super().__init__()
        up, down = (3, 12, 8), (3, 8, 6)
        if turned:
            self.is_transposed = True
            up, down = (3, 8, 12), (3, 6, 8)
        self.turned = turned
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.zeros(up)), nn.Parameter(torch.zeros(down))

    def forward(self, x):
        up, down = (
            (w.transpose(1, 2) if not self.turned else w) for w in (self.gate_up_proj, self.down_proj)
        )  # (e, in, out)
        gate, h = torch.einsum("bi,eio->beo", x, up).chunk(2, dim=-1)
        return torch.einsum("beh,eho->bo", torch.sigmoid(gate) * h, down) / 3


class Mixture(nn.Module):
    def __init__(self, turned: bool = False):
        super().__init__()
        self.experts, self.head = Experts(turned), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.experts(x))


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, 8))  # (out, in)

    def forward(self, x):
        return x @ self.table.T


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.head = Router(), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.router(x))


def llama(tied: bool = False, vocabulary: int = 24, labels: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        pad_token_id=0,
        **({"num_labels": labels} if labels else {}),
    )
    return (LlamaForSequenceClassification if labels else LlamaForCausalLM)(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(vocab_size=24, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=24, decoder_start_token_id=0, pad_token_id=0, **sizes))


def turned() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Around(Conv1D(12, 8), 12)


BASES: dict[str, Callable[[], nn.Module]] = {
    "mlp": MLP,
    "stack": Stack,
    "conv1d_hf": turned,
    "conv1d": lambda: Around(nn.Conv1d(4, 6, 3, padding=1), 6, channels_first=True),
    "conv2d": lambda: Around(nn.Conv2d(3, 6, 3, stride=2, padding=1), 6, channels_first=True),
    "conv3d": lambda: Around(nn.Conv3d(2, 4, (2, 3, 3), padding=(0, 1, 1)), 4, channels_first=True),
    "embedding": lambda: Around(nn.Embedding(20, 8), 8),
    "mha": Attention,
    "experts": Mixture,
    "experts_turned": lambda: Mixture(turned=True),
    "parameter": Routed,
    "llama": llama,
    "llama_tied": lambda: llama(tied=True),
    "llama_resized": lambda: llama(vocabulary=32),
    "llama_classifier": lambda: llama(labels=3),
    "gpt2": gpt2,
    "t5": t5,
}


def build(name: str) -> nn.Module:
    """The base model ``name`` with its stored weights, in eval mode."""
    model = BASES[name]()
    weights = load_file(WEIGHTS / f"{name}.safetensors")
    named = dict(model.named_parameters())
    assert named.keys() == weights.keys(), f"the weights of {name} do not fit the model as it is built today"
    model.load_state_dict(weights, strict=False)  # tied tensors are stored once
    return model.eval()


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's tensors, each of several tied ones under its first name."""
    return {k: v.detach().contiguous() for k, v in model.named_parameters()}
