"""What is raised and warned with where a program may want to tell one refusal from another.

All are ValueErrors (or warnings) besides; the names are the peer's, whose users catch them by.
"""

from __future__ import annotations

lenient = False
"""Whether words of a config that match nothing are passed over with a warning, as long as others match.

Off, for a typo costs a training run; on where veneer answers to the name ``peft``, for programs written for it pass one
list of names to many models."""


class PeftError(ValueError):
    """A refusal that has a name of its own."""


class NoMatchingPeftModuleError(PeftError):
    """The config's words match nothing that an adapter could sit at."""


class ShapeError(ValueError, RuntimeError):
    """A tensor has another shape than its place; a RuntimeError too, as ``load_state_dict`` raises."""


class NotFound(FileNotFoundError, ValueError):
    """A folder, repository or file of an adapter is not there."""


class PeftWarning(UserWarning):
    """Something that works, but likely not as meant."""
