"""Optimisers that know A from B: LoRA+, LoRA-FA, Riemannian, LoRA-Pro. Each function returns a torch optimiser.

    LoRA+ (Hayou et al., 2024, arXiv:2402.12354)              lr_B = ratio lr_A
    LoRA-FA (Zhang et al., 2023, arXiv:2308.03303)            A stays;  g_B <- g_B (A A^T)^-1 / s^2
    Riemannian (Zhang, Pilanci, 2024, arXiv:2402.02347)       g_A <- (B^T B + d I)^-1 g_A,  g_B <- g_B (A A^T + d I)^-1
    LoRA-Pro (Wang et al., 2024, arXiv:2407.18242)            s (g_B A + B g_A) = the nearest to the full gradient g

with W' = W + s B A, A (r, in), B (out, r). The two in the middle change the gradients just before a step of any
optimiser; LoRA-Pro keeps Adam's moments of the equivalent gradient, which are as large as the weight itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from veneer.hf.state_dict import tuner_of
from veneer.methods.lora import Lora
from veneer.train.flat import FlatAdamW, evaluated

DAMPING = 1e-8


@dataclass(frozen=True)
class Pair:
    """The factors of one layer, seen as matrices: A (..., r, in) and B (..., out, r)."""

    lora: Lora

    @property
    def scaling(self) -> float:
        """s."""
        return self.lora.scaling

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        """A and B as the optimiser holds them."""
        return self.lora.factors()

    def values(self) -> tuple[Tensor, Tensor]:
        """A and B, views that can be written to."""
        a, b = self.parameters
        return self.lora.matrices((a.detach(), b.detach()))

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Views of the gradients; None where a factor has none."""
        a, b = self.parameters
        if a.grad is None and b.grad is None:
            return None, None
        here = self.lora.matrices(
            (
                a.grad if a.grad is not None else torch.zeros_like(a),
                b.grad if b.grad is not None else torch.zeros_like(b),
            )
        )
        return here[0] if a.grad is not None else None, here[1] if b.grad is not None else None


def pairs(model: nn.Module) -> list[Pair]:
    """The factors of the active LoRA adapters.

    Raises:
        ValueError: there are none.
    """
    tuner = tuner_of(model)
    found = [Pair(a) for name in tuner.state.active for _, a in tuner.adapters(name) if isinstance(a, Lora)]
    if not found:
        raise ValueError(f"No active adapter of this {type(model).__name__} is LoRA, which this optimiser is for.")
    return found


def _others(model: nn.Module, own: list[Pair]) -> list[Tensor]:
    """The trainable tensors that are no factor."""
    factors = {id(p) for pair in own for p in pair.parameters}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in factors]


def _trainable(own: list[Pair], which: int) -> list[Tensor]:
    return [pair.parameters[which] for pair in own if pair.parameters[which].requires_grad]


# ---- LoRA+ ----------------------------------------------------------------------------------------------------------
def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float | None = None,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """Any optimiser with a learning rate for A and a larger one for B.

    Args:
        model: with LoRA adapters.
        optimizer_cls: for example ``torch.optim.AdamW``.
        lr: of A, and of all that is no factor.
        loraplus_lr_ratio: lr of B over lr of A, at least 1; 16 is the authors' advice, less where a task is easy.
        loraplus_weight_decay: of matrices; biases and norms decay by 0. Default: ``weight_decay``, or 0.
        loraplus_lr_embedding: of the factors of adapted embeddings.
        kwargs: for the optimiser.

    Raises:
        ValueError: a ratio below 1, or no LoRA.
    """
    if loraplus_lr_ratio < 1:
        raise ValueError(f"loraplus_lr_ratio must be at least 1, not {loraplus_lr_ratio}: B learns faster than A.")
    decay = kwargs.pop("weight_decay", 0.0) if loraplus_weight_decay is None else loraplus_weight_decay
    own = pairs(model)
    embedding = [p for pair in own if pair.lora.site.kind == "embedding" for p in pair.parameters if p.requires_grad]
    inner = [pair for pair in own if pair.lora.site.kind != "embedding"]
    biases = [b for pair in inner if (b := getattr(pair.lora.lora_B, "bias", None)) is not None and b.requires_grad]
    known = {id(p) for p in biases}
    others = [p for p in _others(model, own) if id(p) not in known]
    groups = [
        {"params": _trainable(inner, 0) + [p for p in others if p.dim() > 1], "lr": lr, "weight_decay": decay},
        {"params": [p for p in others if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
        {"params": embedding, "lr": loraplus_lr_embedding, "weight_decay": decay},
        {"params": _trainable(inner, 1), "lr": lr * loraplus_lr_ratio, "weight_decay": decay},
        {"params": biases, "lr": lr * loraplus_lr_ratio, "weight_decay": 0.0},
    ]
    return optimizer_cls([group for group in groups if group["params"]], lr=lr, **kwargs)  # type: ignore[call-arg]


# ---- gradients changed just before a step ---------------------------------------------------------------------------
def create_lorafa_optimizer(
    model: nn.Module,
    r: int | None = None,
    lora_alpha: float | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
    *,
    eps: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """AdamW on B alone, by the gradient that brings B A nearest to a step of full training; A is frozen.

    Args:
        model: with LoRA adapters; their A stops training (and its inputs need not be kept).
        r, lora_alpha, use_rslora: as the peer has them; not needed, each layer's own scale is used.
        lr, weight_decay, eps, kwargs: AdamW's.

    Raises:
        ValueError: no LoRA.
    """
    own = pairs(model)
    for pair in own:
        pair.lora.fixed = pair.lora.fixed | {pair.lora.factor_names[0]}
        pair.parameters[0].requires_grad_(False)

    def project() -> None:
        for pair in own:
            a, _ = pair.values()
            _, g_b = pair.gradients()
            if g_b is not None:
                g_b.copy_(_solved(a @ a.mT, g_b.mT, DAMPING).mT / pair.scaling**2)

    parameters = _trainable(own, 1) + _others(model, own)
    return _preconditioned(AdamW(parameters, lr=lr, weight_decay=weight_decay, eps=eps, **kwargs), project)


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """Any optimiser, with the factors' gradients scaled by each other's Gram matrix.

    Args:
        model: with LoRA adapters.
        optimizer_cls: for example ``torch.optim.AdamW``.
        lr, kwargs: the optimiser's.
        reg: what is added to the diagonals of the Gram matrices.

    Raises:
        ValueError: no LoRA.
    """
    own = pairs(model)

    def precondition() -> None:
        for pair in own:
            (a, b), (g_a, g_b) = pair.values(), pair.gradients()
            new_a = None if g_a is None else _solved(b.mT @ b, g_a, reg)
            new_b = None if g_b is None else _solved(a @ a.mT, g_b.mT, reg).mT
            for g, new in ((g_a, new_a), (g_b, new_b)):
                if g is not None and new is not None:
                    g.copy_(new)

    parameters = [p for p in model.parameters() if p.requires_grad]
    return _preconditioned(optimizer_cls(parameters, lr=lr, **kwargs), precondition)  # type: ignore[call-arg]


def _preconditioned(optimizer: Optimizer, change: Callable[[], None]) -> Optimizer:
    """``optimizer``, with ``change`` of the gradients before each step (after a scaler has unscaled them)."""

    @torch.no_grad()
    def before(opt: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        change()

    optimizer.register_step_pre_hook(before)
    return optimizer


def _solved(gram: Tensor, right: Tensor, damping: float) -> Tensor:
    """(gram + damping I)^-1 right, in float64: r x r."""
    eye = torch.eye(gram.shape[-1], device=gram.device, dtype=torch.float64)
    return torch.linalg.solve(gram.double() + damping * eye, right.double()).to(right)


# ---- LoRA-Pro --------------------------------------------------------------------------------------------------------
def adjusted(
    a: Tensor, b: Tensor, g_a: Tensor, g_b: Tensor, s: float, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """The (gA, gB) with s (gB A + B gA) nearest to the full gradient g, from autograd's g_A = s B^T g, g_B = s g A^T.

        gA = (B^T B)^-1 g_A / s^2 + X A        gB = (I - B (B^T B)^-1 B^T) g_B (A A^T)^-1 / s^2 - B X

    X, which the equivalent gradient does not depend on, keeps gA and gB near to g_A and g_B (theorem 2.3 of the paper).

    Args:
        a, b: (..., r, in), (..., out, r).
        g_a, g_b: of the same shapes.
        s: the adapter's scale.
        damping: added to the Gram matrices' diagonals.
    """
    aa = a @ a.mT
    if not b.any():
        return g_a, _solved(aa, g_b.mT, damping).mT / s**2
    bb = b.mT @ b
    of_a = _solved(bb, g_a, damping) / s**2
    of_b = _solved(aa, (g_b - b @ _solved(bb, b.mT @ g_b, damping)).mT, damping).mT / s**2
    x = sylvester(bb, aa, -of_a @ a.mT)
    return of_a + x @ a, of_b - b @ x


def sylvester(p: Tensor, q: Tensor, c: Tensor) -> Tensor:
    """X with P X + X Q = C, for symmetric positive P and Q, by their eigenvectors in float64."""
    l_p, u_p = torch.linalg.eigh(p.double())
    l_q, u_q = torch.linalg.eigh(q.double())
    sums = (l_p[..., :, None] + l_q[..., None, :]).clamp_min(1e-30)
    return (u_p @ ((u_p.mT @ c.double() @ u_q) / sums) @ u_q.mT).to(c)


class LoraPro(Optimizer):
    """AdamW on the equivalent gradients of LoRA's layers, and plainly on everything else that trains.

    Args:
        model: with LoRA adapters.
        lr, betas, eps, weight_decay: Adam's, with decoupled decay.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        own = pairs(model)
        self._pairs = {id(pair.parameters[0]): pair for pair in own}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # A and B of a layer lie side by side, so their moments stand with A in the state
        groups: list[dict[str, Any]] = [{"params": [p for pair in own for p in pair.parameters]}]
        others = _others(model, own)
        super().__init__(groups + ([{"params": others}] if others else []), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; the gradients of the factors are read together."""
        loss = evaluated(closure)
        for group in self.param_groups:
            seen = {id(p) for pair in self._of(group) for p in pair.parameters}
            for pair in self._of(group):
                self._step_pair(pair, group)
            for p in group["params"]:
                if id(p) not in seen and p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(group["lr"] * self._direction(self.state[p], p.grad.float(), group).to(p))
        return loss

    def _of(self, group: dict[str, Any]) -> Iterator[Pair]:
        return (self._pairs[id(p)] for p in group["params"] if id(p) in self._pairs)

    def _step_pair(self, pair: Pair, group: dict[str, Any]) -> None:
        g_a, g_b = pair.gradients()
        if g_a is None or g_b is None:
            return
        a, b = pair.values()
        wide_a, wide_b, s = a.float(), b.float(), pair.scaling
        g_a, g_b = adjusted(wide_a, wide_b, g_a.float(), g_b.float(), s)
        equivalent = s * (g_b @ wide_a + wide_b @ g_a)  # (..., out, in)
        g = self._direction(self.state[pair.parameters[0]], equivalent, group)
        g_a, g_b = adjusted(wide_a, wide_b, s * wide_b.mT @ g, s * g @ wide_a.mT, s)
        for value, change in ((a, g_a), (b, g_b)):
            value.mul_(1 - group["lr"] * group["weight_decay"]).sub_((group["lr"] * change).to(value))

    def _direction(self, state: dict[str, Any], g: Tensor, group: dict[str, Any]) -> Tensor:
        """Adam's direction for the gradient ``g``; its moments are kept in ``state``."""
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(g), "exp_avg_sq": torch.zeros_like(g)}
        state["step"] += 1
        first, second = group["betas"]
        m = state["exp_avg"].lerp_(g, 1 - first)
        v = state["exp_avg_sq"].lerp_(g.square(), 1 - second)
        m, v = m / (1 - first ** state["step"]), v / (1 - second ** state["step"])
        return m / (v.sqrt() + group["eps"])


def create_lorapro_optimizer(
    model: nn.Module,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """``LoraPro``; memory as for full training of the adapted layers.

    Raises:
        ValueError: no LoRA.
    """
    return LoraPro(model, lr, betas, eps, weight_decay)


OPTIMISERS: dict[str, Callable[..., Optimizer]] = {
    "adamw_flat": lambda model, lr, **kw: FlatAdamW([p for p in model.parameters() if p.requires_grad], lr=lr, **kw),
    "loraplus": lambda model, lr, **kw: create_loraplus_optimizer(
        model, AdamW, lr=lr, loraplus_lr_ratio=kw.pop("ratio", 16.0), **kw
    ),
    "lorafa": lambda model, lr, **kw: create_lorafa_optimizer(model, lr=lr, **kw),
    "riemannian": lambda model, lr, **kw: create_riemannian_optimizer(model, AdamW, lr=lr, **kw),
    "lorapro": lambda model, lr, **kw: create_lorapro_optimizer(model, lr=lr, **kw),
}
"""Name in a training file -> ``(model, lr, **settings) -> optimiser``."""
