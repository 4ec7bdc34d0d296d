"""Names and patterns: how paths are matched, by expressions that cannot hang, and the nearest names for errors."""

from __future__ import annotations

import difflib
import functools
import time
from collections.abc import Iterable
from typing import Protocol

import regex

LIMIT_S = 1.0
"""CPU time one pattern may spend in slow matches, all names together."""
SLOW_S = 0.001
"""A match below this costs nothing of the limit: honest patterns take microseconds however many names there are."""

_META = frozenset(r"\^$*+?{}[]|()")


def fullmatch(pattern: str, text: str) -> bool:
    """Whether the regular expression ``pattern`` matches the whole of ``text``.

    Raises:
        ValueError: the pattern is malformed, or it takes so long that it would hang the program.
    """
    if pattern == text and is_literal(pattern):
        return True
    return _compiled(pattern).fullmatch(text)


def search_suffix(key: str, path: str) -> bool:
    """Whether ``key`` names the module at ``path``: all of it or its end, cut at a dot.

    This is how keys of ``rank_pattern`` and its kin are read: a name (``q_proj``, ``layers.0.q_proj``) or a regular
    expression, where ``^`` ties it to the beginning of the path. Dots of a plain name are dots.

    Raises:
        ValueError: see `fullmatch`.
    """
    if is_literal(key):
        return ends_with(path, key)
    return _compiled(rf"(?:.*\.)?(?:{key})", shown=key).fullmatch(path)


def is_literal(pattern: str) -> bool:
    """Whether ``pattern`` is a plain (dotted) name rather than a regular expression."""
    return _META.isdisjoint(pattern)


def ends_with(path: str, name: str) -> bool:
    """Whether ``path`` is ``name`` or ends with it at a dot: 'a.head' ends with 'head', 'a.subhead' does not."""
    return path.endswith(name) and (len(path) == len(name) or path[-len(name) - 1] == ".")


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """Up to ``n`` candidates that look like ``name``, the nearest first; upper and lower case count as equal."""
    by_lower: dict[str, str] = {}
    for candidate in candidates:
        by_lower.setdefault(candidate.lower(), candidate)
    return [by_lower[c] for c in difflib.get_close_matches(name.lower(), by_lower, n=n, cutoff=0.4)]


class Matcher(Protocol):
    """Says which paths are meant, and remembers which of its words have never matched."""

    def match(self, path: str) -> bool:
        """Whether ``path`` is meant."""
        ...

    def unmatched(self) -> list[str]:
        """The words that no path has met so far."""
        ...


class Names:
    """Names to be met as whole paths or as ends at a dot: one look-up a length of name, however many names."""

    def __init__(self, names: Iterable[str]):
        self.names = set(names) - {""}
        self.depths = sorted({name.count(".") + 1 for name in self.names})
        self.met: set[str] = set()

    def match(self, path: str) -> bool:
        parts = path.split(".")
        ends = {".".join(parts[-depth:]) for depth in self.depths} & self.names
        self.met |= ends
        return bool(ends)

    def unmatched(self) -> list[str]:
        return sorted(self.names - self.met)


class Expression:
    """A regular expression for whole paths."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        self.met = False

    def match(self, path: str) -> bool:
        found = fullmatch(self.pattern, path)
        self.met |= found
        return found

    def unmatched(self) -> list[str]:
        return [] if self.met else [self.pattern]


class _Pattern:
    """A compiled pattern and the time it may still waste."""

    def __init__(self, pattern: str, shown: str):
        self.shown = shown
        self.left = LIMIT_S
        try:
            regex.compile(shown)  # first alone: what is not a pattern by itself must not become one by being wrapped
            self.regex = regex.compile(pattern)
        except regex.error as error:
            raise ValueError(
                f"The pattern '{shown}' is not a valid regular expression: {error}. Correct it, or give module names."
            ) from error

    def fullmatch(self, text: str) -> bool:
        start = time.thread_time()
        try:
            found = self.regex.fullmatch(text, timeout=max(self.left, SLOW_S)) is not None
        except TimeoutError:
            found, self.left = False, 0.0
        spent = time.thread_time() - start
        if spent > SLOW_S:
            self.left -= spent
        if self.left <= 0:
            self.left = 0.0
            raise ValueError(
                f"The pattern '{self.shown}' takes too long to match (it was stopped at '{text}'): nested repetitions "
                "such as '(a+)+' backtrack without end. Write it without them, or give module names."
            )
        return found


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str, shown: str | None = None) -> _Pattern:
    return _Pattern(pattern, pattern if shown is None else shown)
