"""What a method writes: one module per site that stands around a layer, adds to it, or rewrites its weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from veneer.core import lean
from veneer.core.sites import Parameters, Site
from veneer.ops.lowrank import LowRank

if TYPE_CHECKING:
    from typing import Self

Base = Callable[[Tensor], Tensor]
"""The layer with everything inside an adapter already applied: ``base(x) -> y``."""
Weight = tuple[Tensor, Tensor | None]
"""A layer's ``(weight, bias)``, weight as ``(out, in, *kernel)``."""


def without_graphs(state: dict[str, Any]) -> dict[str, Any]:
    """A module's attributes for a copy or a pickle: what its last forward left belongs to a graph, and stays behind."""

    def of_a_graph(value: Any) -> bool:
        tensors = value if isinstance(value, tuple | list) else (value,)
        return any(isinstance(t, Tensor) and t.grad_fn is not None for t in tensors)

    return {name: None if of_a_graph(value) else value for name, value in state.items()}


def made_again(run: Callable[[Tensor], Tensor], x: Tensor, *reads: Tensor | nn.Module) -> Tensor:
    """``run(x)``; of what that makes nothing but x is kept for the backward pass, which makes it anew.

    Args:
        run: computes; it may be called twice.
        x: its input.
        reads: the other tensors that it reads, or the modules whose parameters it reads.

    Raises:
        RuntimeError: in the backward pass, when x or one of these has been written into since.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return run(x)
    tensors = [t for each in (x, *reads) for t in (each.parameters() if isinstance(each, nn.Module) else [each])]
    seen = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]

    def checked(x: Tensor) -> Tensor:
        changed = [tensor for tensor, version in seen if tensor._version != version]
        if changed:
            raise RuntimeError(
                f"A tensor of shape {tuple(changed[0].shape)} that a layer's backward pass reads has been changed in "
                "place since the forward pass; write into a copy of it, or after the backward pass."
            )
        return run(x)

    return checkpoint(checked, x, use_reentrant=False)


class Adapter(nn.Module):
    """One method's parameters at one site. Its ``state_dict()`` is what the checkpoint holds.

    A method overrides ``forward`` (stand around the layer) and, where its effect is a weight, ``merged``. It never
    learns its adapter's name, which others are active, or how the layer stores its weight.
    """

    zero_start: ClassVar[bool] = True
    """The adapted output equals the base's before any training."""
    reads_weight: ClassVar[bool] = False
    """The forward needs ``site.weight`` (so a quantised base is unpacked in each forward)."""
    stacks: ClassVar[bool] = False
    """The class handles a stack of matrices itself; else each matrix of the stack gets an adapter of its own."""
    keeps_dtype: ClassVar[bool] = False
    """Its tensors stay in the layer's own dtype (copies of the layer's parameters)."""
    whole_modules: ClassVar[bool] = False
    """The method takes its targets as whole modules, whatever their kind."""
    reads_call: ClassVar[bool] = False
    """``forward`` takes ``call=(args, kwargs)`` too: what the layer was called with besides its input."""
    looks_around: ClassVar[bool] = False
    """``beside`` is to hold the adapters of the same layer, this one among them, by name."""
    dense: ClassVar[bool] = False
    """Its change is a matrix of the weight's size, so the layer runs once, with the sum of both (``summed``) for its
    weight, where it is a plain one. Where nothing needs gradients, that sum is kept."""
    again: ClassVar[bool] = True
    """Of a ``dense`` change: the backward pass makes it (or the sum) a second time, for keeping it takes as much memory
    as the layer's weight does. False where it takes long to make."""
    switches: ClassVar[bool] = True
    """A compiled graph may run it at strength zero where it is off, so that switching it compiles nothing anew."""
    beside: Any = None
    wants: ClassVar[frozenset[str]] = frozenset()
    """Names of the model's inputs (``attention_mask``, ``task_ids``, ...) that ``site.inputs`` is to hold."""
    fixed: frozenset[str] = frozenset()
    """Names of own parameters that are saved but never trained."""
    residual: Parameters | None = None
    """The base weight that takes the layer's place while this adapter is active, where ``rebase`` set one."""
    shared: nn.Module | None = None
    """What ``plan`` made for all sites of this adapter (not a sub-module here: the tuner owns it)."""

    def __init__(self, site: Site, config: Any):
        lean.begin(self)
        self.__dict__["site"] = site

    if TYPE_CHECKING:  # a torch module's attributes are whatever was set

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def among(cls, config: Any, sites: list[Site]) -> list[Site]:
        """Which of the sites that the config's words match are adapted; default: all."""
        return sites

    @classmethod
    def plan(cls, config: Any, sites: Sequence[Site]) -> nn.Module | None:
        """What all sites of one adapter share, made once; its ``state_dict`` is saved under ``base_model.``."""
        return None

    @classmethod
    def on(cls, site: Site, config: Any, shared: nn.Module | None = None) -> Adapter:
        """The adapter for this kind of site; default: this class, one per matrix where the site is a stack.

        Raises:
            ValueError: the method cannot sit here; the sentence names the site and why.
        """
        if site.kind == "opaque" and not cls.whole_modules:
            raise ValueError(
                f"Target module '{site.path}' is not supported: {cls.__name__} needs a layer with a weight matrix, and "
                f"it is a {type(site.module).__name__}; take it out of target_modules or put it into exclude_modules."
            )
        if site.cut:
            raise ValueError(
                f"{cls.__name__} cannot sit at '{site.path}', whose weight is divided between processes (tensor "
                "parallelism); plain LoRA can, or load the model without a tensor-parallel plan."
            )
        if site.stack and not cls.stacks:
            return Stacked(site, [cls.build(site.one(i), config, shared) for i in range(site.stack)])
        return cls.build(site, config, shared)

    @classmethod
    def build(cls, site: Site, config: Any, shared: nn.Module | None = None) -> Self:
        """Construct and attach what is shared."""
        if shared is None:
            return cls(site, config)
        make: Any = cls
        adapter = make(site, config, shared) if cls.takes_shared else make(site, config)
        object.__setattr__(adapter, "shared", shared)
        return adapter

    takes_shared: ClassVar[bool] = False
    """``__init__`` takes what ``plan`` made as a third argument."""

    def __getstate__(self) -> dict[str, Any]:
        return without_graphs(self.__dict__)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """The adapted layer's output for ``x`` (..., in) given the inner layer ``base``."""
        raise NotImplementedError

    def merged(self, weight: Tensor, bias: Tensor | None) -> Weight:
        """(W, b) -> (W', b'), out of place, in the dtype given (float32 from the engine).

        Raises:
            ValueError: the method's effect depends on its input.
        """
        raise ValueError(f"{type(self).__name__} at '{self.site.path}' depends on its input and cannot be merged.")

    def summed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's function of ``x`` with what ``merged`` makes of (W, b): what a ``dense`` adapter's layer runs."""

        def run(x: Tensor) -> Tensor:
            return self.site(x, *self.merged(weight, bias))

        return made_again(run, x, weight, self) if self.again else run(x)

    def rebase(self, weight: Tensor) -> None:
        """Have ``weight`` (out, in, *kernel) stand in for the base weight whenever this adapter is active.

        For starts that move a part of W into the adapter (PiSSA and its kin). The base's own parameter is kept and
        is back whenever the adapter is inactive, disabled, deleted or unloaded.
        """
        self.residual = self.site.packed(weight.detach())

    def ready(self) -> None:
        """Called when the tensors are in their place: before planting, and after a load, the base's own weights in."""

    def replacement(self) -> nn.Module | None:
        """A whole module that runs in the layer's place (a trained copy), or None."""
        return None

    def overrides(self) -> dict[str, Tensor] | None:
        """Tensors that stand in for the layer's own parameters of these names in each call, or None."""
        return None

    def training_state(self) -> dict[str, Tensor]:
        """What ``after_step`` has gathered so far and a resumed run needs; not part of the adapter's own file."""
        return {}

    def resume(self, state: dict[str, Tensor]) -> None:
        """Take ``training_state()`` of an earlier run back."""

    # ---- the checkpoint ---------------------------------------------------------------------------------------------
    @property
    def holder(self) -> nn.Module:
        """The module whose ``state_dict()`` is saved; its keys are the keys on disk."""
        return self

    def outgoing(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Own tensors as the file is to hold them; override where the file's layout differs from the live one."""
        return tensors

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors as this adapter holds them: other layouts and older names are translated here."""
        return tensors

    def original_form(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Own tensors as an adapter for the original base, where a start replaced it (``rebase``)."""
        return tensors

    @classmethod
    def original_config(cls, config: Any, adapters: Sequence[Adapter]) -> Any:
        """The settings that fit ``original_form`` of these adapters: the same object where nothing differs."""
        return config

    @property
    def mergeable(self) -> bool:
        """Whether ``merged`` is defined here."""
        return type(self).merged is not Adapter.merged or self.overrides() is not None

    def penalty(self) -> Tensor | None:
        """A scalar that belongs into the loss (a regulariser, router balance), for the last forward."""
        return None

    @classmethod
    def after_step(cls, config: Any, adapters: dict[str, Adapter], step: int) -> None:
        """Called after each optimiser step, before gradients are cleared, with all sites of one adapter."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype this adapter computes in: its leading tensor's."""
        owner, name = self._lead()
        return getattr(owner, name).dtype

    def _lead(self) -> tuple[nn.Module, str]:
        found = self.__dict__.get("_leading")
        if found is None:
            found = next(
                (
                    (m, n)
                    for m in self.modules()
                    for n, p in m._parameters.items()
                    if p is not None and p.is_floating_point()
                ),
                None,
            )
            if found is None and self.shared is not None:
                found = next(
                    (m, n) for m in self.shared.modules() for n, p in [*m._parameters.items(), *m._buffers.items()]
                )
            if found is None:
                found = next((m, n) for m in self.modules() for n, b in m._buffers.items() if b.is_floating_point())
            self.__dict__["_leading"] = found
        return found


class Additive(Adapter):
    """W' = W + dW. A method writes ``delta_weight``, and ``delta`` where there is a cheaper way than building dW."""

    def delta_weight(self) -> Tensor:
        """dW, shaped like ``site.weight``."""
        raise NotImplementedError

    def delta_bias(self) -> Tensor | None:
        """What is added to the bias (out,), or None."""
        return None

    def delta_factors(self) -> tuple[Tensor, Tensor] | None:
        """(up, down), whose product is dW of the original base as matrices, where the method holds it so.

        Returns:
            up (..., out, r) and down (..., r, in * kernel), scales included, a leading dimension counting groups or
            experts; or None.
        """
        return None

    def low_rank(self) -> LowRank | None:
        """The branch as factors, where ``delta(x)`` is exactly ``s (drop(x) A^T) B^T``; the engine may then fuse it."""
        return None

    def delta(self, x: Tensor) -> Tensor:
        """The layer's function with dW (and the bias' delta) in place of W: (..., in) -> (..., out)."""
        return self.site(x, self.delta_weight(), self.delta_bias())

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return self.onto(base(x), x)

    def onto(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output and the change of it; override where one product can do both."""
        return y + self.change(x).to(y.dtype)

    def change(self, x: Tensor) -> Tensor:
        """``delta`` of an input of any dtype, in this adapter's own."""

        def run(x: Tensor) -> Tensor:
            return self.delta(x.to(self.dtype) if x.is_floating_point() else x)

        return made_again(run, x, self) if self.dense and self.again else run(x)

    def merged(self, weight: Tensor, bias: Tensor | None) -> Weight:
        change = self.delta_bias()
        if change is not None:
            bias = change.to(weight) if bias is None else bias + change.to(bias)
        return weight + self.delta_weight().to(weight), bias


class Reweight(Adapter):
    """W' = f(W). A method writes ``merged`` alone; the engine runs the layer with it."""

    reads_weight = True

    def forward(self, x: Tensor, base: Base) -> Tensor:
        raise AssertionError("the engine folds weight-level adapters before it calls the layer")


class Stacked(Adapter):
    """A stack of matrices (fused experts), each with an adapter of its own."""

    def __init__(self, site: Site, each: list[Adapter]):
        super().__init__(site, None)
        self.each = nn.ModuleList(each)

    @property
    def mergeable(self) -> bool:
        return self.each[0].mergeable

    @property
    def fixed(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(f"each.{i}.{n}" for i, a in enumerate(self.each) for n in a.fixed)

    def merged(self, weight: Tensor, bias: Tensor | None) -> Weight:
        return torch.stack([a.merged(w, None)[0] for a, w in zip(self.each, weight.unbind(0), strict=True)]), bias

    def outgoing(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._translated("outgoing", tensors)

    def incoming(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._translated("incoming", tensors)

    def _translated(self, way: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for i, adapter in enumerate(self.each):
            prefix = f"each.{i}."
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            out |= {prefix + k: v for k, v in getattr(adapter, way)(own).items()}
        return out | {k: v for k, v in tensors.items() if not k.startswith("each.")}

    def penalty(self) -> Tensor | None:
        terms = [t for t in (a.penalty() for a in self.each) if t is not None]
        return torch.stack(terms).sum() if terms else None

    def training_state(self) -> dict[str, Tensor]:
        return {f"each.{i}.{k}": v for i, a in enumerate(self.each) for k, v in a.training_state().items()}

    def resume(self, state: dict[str, Tensor]) -> None:
        for i, adapter in enumerate(self.each):
            prefix = f"each.{i}."
            adapter.resume({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
