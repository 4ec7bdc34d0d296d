"""A folder of many tenants' adapters, addressed by what is in them: equal adapters lie on the disk once.

    store/objects/3f/3f9a.../adapter_config.json, adapter_model.safetensors
    store/tenants/NAME        the digest of that tenant's adapter, one line

The digest is the SHA-256 of the settings (their keys sorted) and of the tensors' file. An object never changes, so a
cache, a server or a CDN may keep it for ever under its digest; a tenant's new version is a new line in a small file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from veneer.core.config import CONFIG_NAME
from veneer.core.files import write_bytes
from veneer.engine.checkpoint import BIN_NAME, SAFE_NAME

KEPT = (CONFIG_NAME, SAFE_NAME)


class AdapterStore:
    """Adapters of many tenants in one folder.

        store = AdapterStore("store")
        store.put("tenant-17", "out")
        pool = AdapterPool(base, store.folders())

    Args:
        root: the folder; made when something is put there.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def put(self, tenant: str, folder: str | Path) -> str:
        """Keep a copy of an adapter folder, and have the tenant's name stand for it.

        Returns:
            The digest.

        Raises:
            ValueError: no adapter in the folder, tensors that are no safetensors, or a name that is no file name.
        """
        if not tenant or tenant.startswith(".") or set(tenant) & set("/\\\0"):
            raise ValueError(f"A tenant's name must be usable as a file name, which '{tenant}' is not.")
        digest = digest_of(folder)
        place = self.place(digest)
        if not place.is_dir():
            place.parent.mkdir(parents=True, exist_ok=True)
            half = Path(tempfile.mkdtemp(dir=place.parent, prefix=".half-"))
            for name in KEPT:
                shutil.copyfile(Path(folder) / name, half / name)
            try:
                os.rename(half, place)  # whole or not at all; who comes second finds it there
            except OSError:
                shutil.rmtree(half)
                if not place.is_dir():
                    raise
        (self.root / "tenants").mkdir(parents=True, exist_ok=True)

        def write(file: str) -> None:
            Path(file).write_text(digest + "\n")

        write_bytes(self.root / "tenants" / tenant, write)
        return digest

    def place(self, digest: str) -> Path:
        """Where the object with a digest lies, or would lie."""
        return self.root / "objects" / digest[:2] / digest

    def digest(self, tenant: str) -> str:
        """The digest of a tenant's adapter.

        Raises:
            KeyError: no such tenant.
        """
        try:
            return (self.root / "tenants" / tenant).read_text().strip()
        except (OSError, ValueError):
            raise KeyError(f"The store {self.root} has no adapter of '{tenant}'.") from None

    def folder(self, tenant: str) -> Path:
        """The folder of a tenant's adapter, which PeftModel, vLLM and SGLang load as it is.

        Raises:
            KeyError: no such tenant.
        """
        return self.place(self.digest(tenant))

    def __iter__(self) -> Iterator[str]:
        tenants = self.root / "tenants"
        return (
            (file.name for file in sorted(tenants.iterdir()) if file.suffix != ".tmp") if tenants.is_dir() else iter(())
        )

    def folders(self) -> dict[str, Path]:
        """tenant -> folder, for ``AdapterPool`` or for a server's list."""
        return {tenant: self.folder(tenant) for tenant in self}

    def damaged(self) -> list[str]:
        """The digests of objects that do not hold what they are named after."""
        found = sorted((self.root / "objects").glob("??/*"))
        return [place.name for place in found if not place.name.startswith(".") and not _is_whole(place)]

    def prune(self) -> list[str]:
        """Take away the objects that no tenant stands for; returns their digests."""
        kept = {self.digest(tenant) for tenant in self}
        gone = [p for p in sorted((self.root / "objects").glob("??/*")) if p.name not in kept]
        for place in gone:
            shutil.rmtree(place)
        return [place.name for place in gone]


def digest_of(folder: str | Path) -> str:
    """The digest of an adapter folder.

    Raises:
        ValueError: no adapter there, or one whose tensors are no safetensors.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file() or not (folder / SAFE_NAME).is_file():
        pickled = f"; {BIN_NAME} is not taken, save it with safe_serialization=True" * (folder / BIN_NAME).is_file()
        raise ValueError(f"{folder} does not hold {' and '.join(KEPT)}, so it is no adapter to be stored{pickled}.")
    settings = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode())
    with open(folder / SAFE_NAME, "rb") as file:
        found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def _is_whole(place: Path) -> bool:
    try:
        return digest_of(place) == place.name
    except ValueError:
        return False
