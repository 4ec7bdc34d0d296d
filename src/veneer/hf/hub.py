"""From a folder or a hub id to a local folder that holds an adapter, and from a folder back to the hub."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.core.config import CONFIG_NAME
from veneer.core.errors import NotFound
from veneer.hf import card

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""In the order in which they are looked for."""

ARGUMENTS = frozenset(
    {
        "revision", "token", "cache_dir", "local_files_only", "force_download", "repo_type", "endpoint", "etag_timeout",
        "headers", "user_agent", "library_name", "library_version", "local_dir",
    }
)  # fmt: skip
"""The keyword arguments that are the hub's; everything else that ``from_pretrained`` takes is not sent to it."""


def arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The part of ``kwargs`` that is the hub's, ``use_auth_token`` under its present name ``token``."""
    own = {k: v for k, v in kwargs.items() if k in ARGUMENTS and v is not None}
    if kwargs.get("use_auth_token") is not None:
        own.setdefault("token", kwargs["use_auth_token"])
    return own


def resolve(model_id: str | Path, subfolder: str | None = None, *, weights: bool = True, **kwargs: Any) -> Path:
    """The local folder with an adapter's ``adapter_config.json`` (and its tensors).

    A local folder comes first; what is none is asked of the hub. Nothing that a config names is imported or run.

    Args:
        model_id: a folder, or a hub id such as ``"someone/their-adapter"``.
        subfolder: a folder inside it.
        weights: also fetch the tensors; False: the config alone.
        kwargs: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ...; others are ignored.

    Raises:
        FileNotFoundError: a local folder without an adapter, or an id that the hub does not have.
        ValueError: what is neither a folder nor an id, or an adapter without tensors.
    """
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return _local(folder, subfolder, weights)
    found = download(str(model_id), CONFIG_NAME, subfolder, **kwargs).parent
    if weights and not any((found / name).is_file() for name in WEIGHTS):
        _download_weights(str(model_id), subfolder, kwargs)
    return found


def _local(root: Path, subfolder: str | None, weights: bool) -> Path:
    folder = root / (subfolder or "")
    if not (folder / CONFIG_NAME).is_file():
        inside = sorted(p.parent.relative_to(root) for p in root.glob(f"*/{CONFIG_NAME}"))
        hint = f"; its sub-folders {', '.join(map(str, inside))} do: pass subfolder=" if inside else ""
        raise NotFound(
            f"Can't find '{CONFIG_NAME}' at '{folder}': it is a folder, but it holds no {CONFIG_NAME}, so no "
            f"adapter{hint}."
        )
    if weights and not any((folder / name).is_file() for name in WEIGHTS):
        raise ValueError(
            f"'{folder}' holds a {CONFIG_NAME} but no tensors ({' or '.join(WEIGHTS)}); save the adapter again."
        )
    return folder


def _download_weights(repo: str, subfolder: str | None, kwargs: dict[str, Any]) -> None:
    for name in WEIGHTS:
        try:
            download(repo, name, subfolder, **kwargs)
            return
        except FileNotFoundError as error:
            missing = error
    raise ValueError(
        f"'{repo}' has a {CONFIG_NAME} but no tensors ({' or '.join(WEIGHTS)}); ask its owner, or try another revision."
    ) from missing


def download(repo: str, filename: str, subfolder: str | None = None, **kwargs: Any) -> Path:
    """One file of a hub repository, in the local cache.

    Raises:
        FileNotFoundError: the repository, the revision or the file does not exist, or the hub cannot be reached.
        ValueError: ``repo`` cannot be a hub id.
    """
    from huggingface_hub import errors, hf_hub_download

    if not card.REPO_ID.fullmatch(repo):
        raise NotFound(
            f"Can't find '{CONFIG_NAME}' at '{repo}': it is neither an existing folder nor a hub id of the form "
            "'owner/name'; check the path."
        )
    own = arguments(kwargs)
    what = f"'{repo}'" + (f" at revision '{own['revision']}'" if "revision" in own else "")
    wanted = f"{subfolder}/{filename}" if subfolder else filename
    try:
        return Path(hf_hub_download(repo, filename, subfolder=subfolder, **own))
    except errors.GatedRepoError as error:
        raise NotFound(f"{what} is gated: accept its terms on the hub and pass token=.") from error
    except errors.RevisionNotFoundError as error:
        raise NotFound(f"{what} does not exist on the hub; name a branch, a tag or a commit.") from error
    except errors.LocalEntryNotFoundError as error:
        raise NotFound(
            f"{what} is no local folder, and {wanted} is not in the local cache while the hub is switched off or out "
            "of reach; check the path, or download it once while online."
        ) from error
    except errors.EntryNotFoundError as error:
        raise NotFound(f"{what} has no file {wanted} on the hub; check subfolder and revision.") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise NotFound(
            f"{what} is neither an existing folder nor a repository that the hub shows you; check the name, or pass "
            "token= if it is private."
        ) from error
    except errors.HfHubHTTPError as error:
        raise NotFound(f"{what}: the hub did not give {wanted} ({error}); try again later.") from error


def cached_config(name: str) -> Path | None:
    """The ``config.json`` of a base model where it lies on this machine: a folder, or the hub's cache; else None.

    Asks nothing of the network.
    """
    path = Path(name) / "config.json"
    if path.is_file():
        return path
    if not card.REPO_ID.fullmatch(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found) if isinstance(found, str) else None


def renamed(tensors: dict[str, Any], key_mapping: Mapping[str, str] | None) -> dict[str, Any]:
    """The tensors under new keys: each pattern replaces its matches in what follows ``base_model.model.``.

    Raises:
        ValueError: a malformed pattern, or two keys that become one.
    """
    if not key_mapping:
        return tensors
    out: dict[str, Any] = {}
    for key, value in tensors.items():
        head = "base_model.model." if key.startswith("base_model.model.") else ""
        new = key.removeprefix(head)
        for pattern, replacement in key_mapping.items():
            try:
                new = re.sub(pattern, replacement, new)
            except re.error as error:
                raise ValueError(f"key_mapping has the malformed pattern '{pattern}': {error}.") from error
        if head + new in out:
            raise ValueError(
                f"key_mapping turns two keys of the file into '{head + new}'; make its patterns more exact."
            )
        out[head + new] = value
    return out


def push(model: Any, repo_id: str, *, commit_message: str = "Upload adapter", **kwargs: Any) -> Any:
    """Save a model's adapters into a temporary folder and upload that; what the hub does not take goes to the saving.

    Returns:
        The hub's commit.
    """
    upload = {k: kwargs.pop(k) for k in ("private", "token", "revision", "create_pr", "endpoint") if k in kwargs}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **kwargs)
        return push_to_hub(folder, repo_id, commit_message=commit_message, **upload)


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str = "Upload adapter",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    endpoint: str | None = None,
) -> Any:
    """Upload an adapter folder to the hub; the repository is made if it does not exist. Returns the hub's commit.

    Raises:
        FileNotFoundError: ``folder`` holds no adapter.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    if not any(folder.glob(CONFIG_NAME)) and not any(folder.glob(f"*/{CONFIG_NAME}")):
        raise NotFound(f"'{folder}' holds no {CONFIG_NAME}; save the adapter there before pushing it.")
    card.make_uploadable(folder)
    hub = HfApi(endpoint=endpoint, token=token)
    repo = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return hub.upload_folder(
        repo_id=repo, folder_path=folder, commit_message=commit_message, revision=revision, create_pr=create_pr
    )
