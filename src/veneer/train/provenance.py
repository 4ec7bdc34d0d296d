"""With what a run was made: versions of the packages and digests of the data, as a comment above its settings."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata
from pathlib import Path


def versions() -> dict[str, str]:
    """Version of everything that decides a run's numbers."""
    found = {"python": platform.python_version()}
    for name in ("veneer", "torch", "transformers", "accelerate"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "from source"
    return found


def digest(path: str | Path) -> str:
    """The sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def header(files: list[str]) -> str:
    """The comment that opens ``run.yaml``."""
    lines = ["All settings of this run; `veneer train` repeats it from this file."]
    lines.append("made with " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    lines += [f"data {path} sha256 {digest(path)}" for path in dict.fromkeys(files)]
    return "".join(f"# {line}\n" for line in lines)
