"""One line of the table that the laws run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from veneer.testing.kinds import ALL


@dataclass(frozen=True)
class Row:
    """One method with one choice of options.

    Attributes:
        name: shown in test ids.
        make: ``(**targets) -> config``; targets are ``target_modules`` or ``target_parameters``.
        kinds: the layer kinds the method sits at; at every other kind ``add`` must refuse in a sentence.
        tested: a sample of ``kinds``, for rows that differ from another in one option only; default: all.
        merges: ``merged`` is defined at these kinds (all of ``kinds`` where True, none where False).
        zero_start: the start equals the base.
        start_tolerance: largest difference at the start (starts that split the weight round).
        tolerance: largest relative difference between forward and merged, float32.
        combines: several adapters of this method may be active together.
        gradient_free: trainable tensors that no gradient reaches at a random point, by name ending.
    """

    name: str
    make: Callable[..., Any]
    kinds: frozenset[str] = ALL
    tested: frozenset[str] | None = None
    merges: bool | frozenset[str] = True
    zero_start: bool = True
    start_tolerance: float = 0.0
    tolerance: float = 2e-5
    combines: bool = True
    gradient_free: tuple[str, ...] = ()

    def merges_at(self, kind: str) -> bool:
        return self.merges if isinstance(self.merges, bool) else kind in self.merges
