"""AdamW over one flat buffer: as many kernels for four hundred small factors as for one tensor.

Parameters become views into a buffer for each dtype and device of a group, and gradients and moments lie beside it in
buffers of the same layout, so that a step and a clipping are a few passes over contiguous memory. Values, and the state
that is saved (by parameter, interchangeable with ``torch.optim.AdamW``'s), are those of AdamW.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


class _Buffer:
    """Parameters of one dtype on one device, laid end to end."""

    def __init__(self, parameters: list[Tensor]):
        self.parameters = parameters
        sizes = [p.numel() for p in parameters]
        self.values, self.grads = (parameters[0].new_empty(sum(sizes)) for _ in range(2))
        self.views, self.grad_views = self.cut(self.values), self.cut(self.grads)
        self.places = [v.data_ptr() for v in self.views]

    def cut(self, flat: Tensor) -> list[Tensor]:
        """Views of a buffer of this layout, one for each parameter."""
        each = flat.split([p.numel() for p in self.parameters])
        return [v.view(p.shape) for v, p in zip(each, self.parameters, strict=True)]

    def hold(self) -> None:
        """Have the parameters be views of the buffer again where something gave them other memory."""
        for p, view, place in zip(self.parameters, self.views, self.places, strict=True):
            if p.data_ptr() != place:
                view.copy_(p.detach())
                p.data = view

    def gather(self) -> bool:
        """Bring the gradients into their buffer; False where a parameter has none."""
        grads = [p.grad for p in self.parameters]
        if any(g is None for g in grads):
            return False
        if any(g is not v for g, v in zip(grads, self.grad_views, strict=True)):
            torch.cat([g.reshape(-1) for g in grads if g is not None], out=self.grads)
            for p, view in zip(self.parameters, self.grad_views, strict=True):
                p.grad = view
        return True


def evaluated(closure: Callable[[], float] | None) -> float | None:
    """What a step's closure gives, gradients on; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class FlatAdamW(Optimizer):
    """``torch.optim.AdamW`` over flat buffers.

    Args:
        params: tensors, or groups of them, as every optimiser takes them. Their ``.data`` becomes a view.
        lr, betas, eps, weight_decay: AdamW's.

    Raises:
        ValueError: a parameter that is no dense floating-point tensor.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        self._buffers: dict[int, list[_Buffer]] = {}
        self._flat_moments: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _of(self, group: dict[str, Any]) -> list[_Buffer]:
        found = self._buffers.get(id(group))
        if found is None or sum(len(b.parameters) for b in found) != len(group["params"]):
            kinds: dict[Any, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if type(p.data) is not Tensor or not p.is_floating_point() or p.layout != torch.strided:
                    raise ValueError(
                        f"adamw_flat lays parameters end to end, but one is a {type(p.data).__name__} of {p.dtype}; "
                        "use torch.optim.AdamW where parameters are spread over processes or packed."
                    )
                kinds[p.dtype, p.device].append(p)
            found = self._buffers[id(group)] = [_Buffer(own) for own in kinds.values()]
        for buffer in found:
            buffer.hold()
        return found

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm is at most ``max_norm``; returns what it was."""
        flat: list[Tensor] = []
        for group in self.param_groups:
            for buffer in self._of(group):
                whole = buffer.gather()
                flat += [buffer.grads] if whole else [p.grad for p in buffer.parameters if p.grad is not None]
        if not flat:
            return torch.zeros(())
        norms = torch.stack([_norm(g).to(flat[0].device) for g in flat])
        norm = torch.linalg.vector_norm(norms)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for g in flat:
            g.mul_(factor.to(g.device))
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; parameters without a gradient stay as they are."""
        loss = evaluated(closure)
        for group in self.param_groups:
            for buffer in self._of(group):
                self._step(group, buffer)
        return loss

    def _step(self, group: dict[str, Any], buffer: _Buffer) -> None:
        whole = buffer.gather()
        moments = self._moments(buffer)
        own = [p for p in buffer.parameters if p.grad is not None]
        if not own:
            return
        steps = {id(self.state[p]["step"]): self.state[p]["step"] for p in own}
        if whole and len(steps) == 1:
            lists = [buffer.values], [buffer.grads], *[[m] for m in moments]
        else:  # some have taken fewer steps than others, so that each needs its own bias correction
            self._part(buffer.parameters)
            steps = {id(self.state[p]["step"]): self.state[p]["step"] for p in own}
            lists = own, [p.grad for p in own], *[[self.state[p][name] for p in own] for name in MOMENTS]
        first, second = group["betas"]
        counts = list(steps.values())
        torch._foreach_add_(counts, 1)
        values, grads, firsts, seconds = lists
        torch._fused_adamw_(
            values, grads, firsts, seconds, [], counts, amsgrad=False, lr=float(group["lr"]), beta1=first, beta2=second,
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
        torch.autograd.graph.increment_version(own)  # the buffer's count went up, but a parameter has one of its own

    def _moments(self, buffer: _Buffer) -> list[Tensor]:
        """The moments' buffers, made at the first step, or out of a state that was loaded."""
        known = self._flat_moments
        found = known.get(id(buffer))
        if found is None or any(self.state[p].get("exp_avg") is not v for p, v in zip(buffer.parameters, found[1])):
            flats = [torch.zeros_like(buffer.values) for _ in MOMENTS]
            views = [buffer.cut(flat) for flat in flats]
            same = {float(self.state[p].get("step", 0)) for p in buffer.parameters}
            step = torch.tensor(same.pop(), device=buffer.values.device) if len(same) == 1 else None
            for i, p in enumerate(buffer.parameters):
                state = self.state[p]
                count = step if step is not None else torch.tensor(float(state.get("step", 0)), device=p.device)
                for name, view in zip(MOMENTS, views, strict=True):
                    if name in state:
                        view[i].copy_(state[name])
                    state[name] = view[i]
                state["step"] = count
            found = known[id(buffer)] = (flats, views[0])
        return found[0]

    def _part(self, parameters: list[Tensor]) -> None:
        """Give each parameter a count of its own."""
        if len({id(self.state[p]["step"]) for p in parameters}) < len(parameters):
            for p in parameters:
                self.state[p]["step"] = self.state[p]["step"].clone()

    def state_dict(self) -> dict[str, Any]:
        """By parameter, as ``torch.optim.AdamW`` has it."""
        found = super().state_dict()
        found["state"] = {i: {**own, "step": own["step"].clone()} for i, own in found["state"].items()}
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k not in ("_buffers", "_flat_moments")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buffers, self._flat_moments = {}, {}


def _norm(g: Tensor) -> Tensor:
    return torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)).float()
