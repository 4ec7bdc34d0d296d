"""What a load did, and in words what did not fit."""

from __future__ import annotations

from dataclasses import dataclass, field

from veneer.core.errors import ShapeError
from veneer.core.patterns import nearest


@dataclass
class LoadReport:
    """What a load did. ``missing``, ``unexpected``: keys; ``mismatched``: (key, shape in the file, shape wanted)."""

    loaded: int = 0
    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    mismatched_keys: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.missing_keys or self.unexpected_keys or self.mismatched_keys)

    def sentence(self) -> str:
        """What is wrong and its likely cause, in a few lines."""
        parts = []
        for what, keys in (
            ("missing from the file", self.missing_keys),
            ("without a place in the model", self.unexpected_keys),
            ("of another shape", [f"{k}: {a} in the file, {b} in the model" for k, a, b in self.mismatched_keys]),
        ):
            if keys:
                more = f", and {len(keys) - 4} more" if len(keys) > 4 else ""
                parts.append(f"{len(keys)} tensors are {what} ({'; '.join(keys[:4])}{more})")
        return ". ".join(parts) + f". {self._cause()}"

    def judge(self, name: str, strict: bool, ignore_mismatched: bool) -> None:
        """Refuse what does not fit.

        Raises:
            ValueError: a mis-shaped tensor, unless those are ignored; with ``strict`` also a missing or unexpected one.
        """
        if not self.missing_keys and not self.unexpected_keys and ignore_mismatched:
            return
        if self.mismatched_keys and not ignore_mismatched:
            raise ShapeError(
                f"size mismatch: the tensors do not fit adapter '{name}'; nothing was loaded. {self.sentence()}"
            )
        if strict and not self.clean:
            raise ValueError(f"The tensors do not fit adapter '{name}'; nothing was loaded. {self.sentence()}")

    def _cause(self) -> str:
        if self.mismatched_keys and not self.missing_keys:
            return "The adapter was likely trained on a base model of another size, or its config names another rank."
        if self.missing_keys and self.unexpected_keys:
            near = nearest(self.unexpected_keys[0], self.missing_keys, 1)
            hint = f" ('{self.unexpected_keys[0]}' looks like '{near[0]}')" if near else ""
            return f"The adapter was likely saved under other module names{hint}; pass key_mapping to rename its keys."
        if self.unexpected_keys:
            return "The config names fewer layers than the file holds; check target_modules and the base model."
        return "The file is incomplete, or the config names more layers than were saved."
