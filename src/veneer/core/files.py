"""Files that are whole or not there: atomic writes, and the hook through which ids become local files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_bytes(path: Path, write: Callable[[str], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, sync it, and rename it into place.

    A full disk, a crash or Ctrl-C leaves what stood at ``path`` before as it was, and no temporary file.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` for text in UTF-8."""

    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)

    write_bytes(path, write)


def fetch(repo: str, filename: str, **kwargs: Any) -> Path:
    """A file of a repository that is not a local folder. The floor that knows the hub replaces ``resolver``.

    Raises:
        FileNotFoundError: nothing here knows how to fetch.
    """
    if resolver is None:
        raise FileNotFoundError(f"'{repo}' is not a local folder, and no hub is set up to fetch {filename} from.")
    return resolver(repo, filename, **kwargs)


resolver: Callable[..., Path] | None = None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # a file system without folder handles has nothing to sync
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
